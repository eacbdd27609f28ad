"""Search spaces: plain Python files that say which settings a sweep tries, and how their trials are ranked.

A file has `space()` and `metric`; it may have `mode` ("min", the default, or "max"), `defaults` (settings of `tune`, where
nobody gives others) and `paper` (published numbers to print beside ours). `space()` returns, by dotted config path, lists
of values, all combinations of which are tried, or ranges of ray.tune (`loguniform(1e-4, 1e-2)`), which are drawn from; or a
list of dicts of values by path, each one trial.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import math
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdt_ray import config_io
from mdt_ray.config import TuneConfig

FOLDER = "tune_spaces"
KNOWN = {"space", "metric", "mode", "defaults", "paper"}

Point = dict[str, Any]
"""What a trial changes: values by dotted config path."""


@dataclass(frozen=True)
class Paper:
    """Published numbers of a space's points."""

    column: str
    """What they are, such as `FID-50K of MDT-S/2, 600k steps (Table 3)`."""
    rows: list[tuple[Point, float]]

    def value(self, point: Point) -> float | None:
        """The number of a point, if it was published."""
        return next((value for published, value in self.rows if published == point), None)


@dataclass(frozen=True)
class Space:
    """A file of settings to try, checked."""

    name: str
    values: dict[str, Any] | list[Point]
    """Lists of values or ranges by path, or points."""
    metric: str
    """Without extractor and count, such as `fid`."""
    mode: str
    defaults: dict[str, Any]
    paper: Paper | None

    @property
    def num_points(self) -> float:
        """How many there are, which is without end where there are ranges."""
        if isinstance(self.values, list):
            return len(self.values)
        return math.prod(len(choices) if isinstance(choices, list) else math.inf for choices in self.values.values())

    def grid(self) -> list[Point]:
        """All combinations, in order. Raises ValueError where there are ranges."""
        if isinstance(self.values, list):
            return self.values
        ranges = [key for key, choices in self.values.items() if not isinstance(choices, list)]
        if ranges:
            raise ValueError(f"space {self.name!r}: {', '.join(ranges)}: a range has no grid; use --search random or optuna")
        return [dict(zip(self.values, point, strict=True)) for point in itertools.product(*self.values.values())]

    def drawn(self, count: int, seed: int) -> list[Point]:
        """Independent draws from lists and ranges; more of them begin with the same ones. Raises ValueError for a list of
        points."""
        if isinstance(self.values, list):
            raise ValueError(f"space {self.name!r}: space() lists its trials, so there is nothing to draw; use --search "
                             "grid")
        generator = np.random.default_rng(seed)
        return [{key: _draw(choices, generator) for key, choices in self.values.items()} for _ in range(count)]

    def described(self) -> dict[str, Any] | list[Point]:
        """The values as JSON takes them: ranges as their text."""
        if isinstance(self.values, list):
            return self.values
        return {key: value if isinstance(value, list) else _text(value) for key, value in self.values.items()}


def are_numbers(values: Iterable[Any]) -> bool:
    """Whether all of a setting's values have a size."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _draw(choices: Any, generator: np.random.Generator) -> Any:
    listed = isinstance(choices, list)
    value = choices[generator.integers(len(choices))] if listed else choices.sample(random_state=generator)
    return value.item() if isinstance(value, np.generic) else value


def _text(domain: Any) -> str:
    """A range of ray.tune: its bounds where it has some."""
    bounds = ", ".join(f"{getattr(domain, name):g}" for name in ("lower", "upper") if hasattr(domain, name))
    return f"{type(domain.get_sampler()).__name__.strip('_')} {type(domain).__name__} ({bounds})"


def known_spaces() -> list[str]:
    """Names of the spaces that come with this package."""
    folder = importlib.import_module(FOLDER).__path__[0]
    return sorted(p.stem for p in Path(folder).glob("*.py") if p.stem != "__init__")


def load_space(name: str) -> Space:
    """A space by name (a file of tune_spaces/), or by path.

    Raises ValueError, naming the file, where there is none, where it cannot be imported, and where something in it is
    missing, misspelt or empty. Keys and values of settings are for the configs to check.
    """
    module = _import(name)
    found = {key: value for key, value in vars(module).items() if _is_said(key, value)}
    where = f"space {name!r}"
    for key in found:
        if key not in KNOWN:
            raise ValueError(f"{where}: {key} means nothing here{config_io.suggestion(key, KNOWN)}; begin names of your own "
                             "with _")
    for key in ("space", "metric"):
        if key not in found:
            raise ValueError(f"{where}: has no {key}; a space needs `def space()` and `metric = \"fid\"`")
    if not isinstance(found["metric"], str) or found.get("mode", "min") not in ("min", "max"):
        raise ValueError(f"{where}: metric = {found['metric']!r} and mode = {found.get('mode')!r}, but must be a name, and "
                         "'min' or 'max'")
    defaults = found.get("defaults", {})
    try:
        config_io.override(TuneConfig(), defaults)
    except ValueError as error:
        raise ValueError(f"{where}: defaults: {error}") from error
    open_ = [f.name for f in dataclasses.fields(TuneConfig) if f.default is None]
    for key in defaults:
        if key not in open_:
            raise ValueError(f"{where}: defaults: {key}: only the command line gives that; a space may give "
                             f"{', '.join(open_)}")
    values = _checked(where, found["space"]())
    paper = found.get("paper")
    if paper is not None and not (isinstance(paper, dict) and paper.keys() == {"column", "rows"}):
        raise ValueError(f"{where}: paper = {paper!r}: must have `column`, what its numbers are, and `rows`, pairs of a "
                         "point and its number")
    return Space(name=Path(name).stem, values=values, metric=found["metric"], mode=found.get("mode", "min"),
                 defaults=defaults, paper=Paper(**paper) if paper else None)


def _is_said(key: str, value: Any) -> bool:
    """Whether a name in a space's file is one of its statements: not an import, a class or a helper."""
    if key.startswith("_") or isinstance(value, types.ModuleType | type):
        return False
    return key == "space" or not callable(value)


def _import(name: str) -> types.ModuleType:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"space = {name!r}: no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"space = {name!r}: cannot be imported ({type(error).__name__}: {error})") from error
        return module
    known = known_spaces()
    if name not in known:
        raise ValueError(f"space = {name!r}: neither a search space nor the path of a .py file"
                         f"{config_io.suggestion(name, known)}")
    return importlib.import_module(f"{FOLDER}.{name}")


def _checked(where: str, values: Any) -> dict[str, Any] | list[Point]:
    if isinstance(values, dict) and values:
        for key, choices in values.items():
            if not choices or not (isinstance(choices, list) or hasattr(choices, "get_sampler")):
                raise ValueError(f"{where}: {key} = {choices!r}: must be a list of at least one value (of one, for "
                                 "what is the same in all trials), or a range of ray.tune")
    elif not isinstance(values, list) or not values or not all(isinstance(point, dict) for point in values):
        raise ValueError(f"{where}: space() gives {values!r}, but must give lists of values by dotted config path, or a "
                         "list of trials")
    return values
