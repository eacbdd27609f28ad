"""The Pareto front against its definition, and the picture of it: labels that can be read."""

import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from mdt_ray.evaluation.frontier import Point, pareto
from mdt_ray.report import figures


def points(places, group: str = "ddpm") -> list[Point]:
    return [Point(x=float(x), y=float(y), group=group, label=f"cfg {k}") for k, (x, y) in enumerate(places)]


def sweep(seed: int, count: int = 40) -> list[Point]:
    """As a sweep of guidance scales scores: the FID falls and rises again while the Inception Score rises."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(1, 4, count)
    return [Point(x=120 + 70 * (s - 1) + rng.normal() * 5, y=2 + k % 4 / 5 + (s - 2) ** 2 + rng.normal() / 10,
                  group=f"sampler {k % 4}", label=f"cfg {s:.1f}, power {k % 3}") for k, s in enumerate(scales)]


small = st.tuples(st.integers(0, 5), st.integers(0, 5))  # few values, so that points coincide


@given(st.lists(small, max_size=12))
def test_the_front_is_what_nothing_equals_or_beats(places):
    front = pareto(points(places))
    expected = {place for place in places
                if not any(x >= place[0] and y <= place[1] and (x, y) != place for x, y in places)}
    assert [places[i] for i in front] == sorted(expected)
    assert all(places.index(places[i]) == i for i in front)  # the first of equal ones
    ys = [places[i][1] for i in front]
    assert ys == sorted(ys)


def test_a_point_that_is_not_finite_is_refused():
    for place in ((1, float("nan")), (float("inf"), 1)):
        with pytest.raises(ValueError, match=r"points: ddpm cfg 1 has x = .* but both must be finite"):
            pareto(points([(1, 1), place]))
    with pytest.raises(ValueError, match="points: none"):
        figures.frontier([], "is", "fid")
    assert pareto([]) == []


@pytest.mark.parametrize("of", [sweep(0), sweep(1)[:1], points([(2, 3)] * 3), points([(x, x * x) for x in range(30)]),
                                [p for k in range(25) for p in points([(k, -k)], f"group {k}")]])
def test_the_picture_is_the_same_each_time(of):
    first, second = (figures.frontier(of, "is", "fid") for _ in range(2))
    assert first == second
    assert Image.open(io.BytesIO(first)).size == (792, 528)


@pytest.mark.parametrize("seed", range(3))
def test_labels_cover_neither_each_other_nor_points(seed):
    of = sweep(seed)
    front = pareto(of)
    axes = Figure(figsize=(7.2, 4.8), dpi=110, layout="constrained").subplots()
    axes.scatter([p.x for p in of], [p.y for p in of], label="all")
    axes.legend()
    figures._label(axes, [(of[i].x, of[i].y) for i in front], [of[i].label for i in front], [(p.x, p.y) for p in of])
    texts = [text for text in axes.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(texts) > len(front) / 2
    assert texts[0].get_text() == of[front[0]].label
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*pixel) for box in boxes for pixel in axes.transData.transform([(p.x, p.y) for p in of]))
    frame = axes.get_window_extent()
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)
