"""Pictures of the report."""

import numpy as np
import pytest

from mdt_ray.evaluation.frontier import Point
from mdt_ray.report import figures

NAME = r"a$\foo$b"
"""No formula that TeX knows."""
IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize("draw", [
    lambda: figures.grid([IMAGES], [NAME], [NAME, "b"], captions=[[NAME, "b"]]),
    lambda: figures.heat_map([NAME], [NAME], np.ones((1, 1)), NAME, NAME, NAME),
    lambda: figures.curves({NAME: ([1, 2], [3, 4])}, NAME, NAME, log=True, level=(NAME, 1.0)),
    lambda: figures.frontier([Point(x=x, y=3 - x, label=NAME, group=NAME) for x in (1, 2)], NAME, NAME)])
def test_names_from_outside_are_no_formulas(draw):
    assert draw().startswith(b"\x89PNG")
