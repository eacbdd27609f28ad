"""Spaces: every one that comes with the package fits the configs and the paper's tables; bad ones are refused by name."""

import importlib
import re
import shlex

import pytest

from mdt_ray import config_io, presets
from mdt_ray.cli import parse
from mdt_ray.tuning.space import known_spaces, load_space


def written(folder, text: str) -> str:
    (folder / "own.py").write_text(text)
    return str(folder / "own.py")


@pytest.mark.parametrize("preset", ["digits", "imagenet256-s-2"])
@pytest.mark.parametrize("name", known_spaces())
def test_every_point_of_every_space_is_a_setting(name, preset):
    """Keys of `evaluate.` change how a trial is judged, all others how it is trained."""
    space, config = load_space(name), presets.preset(preset).tune
    points = space.grid()
    changed = [config_io.override(config, {key if key.startswith("evaluate.") else f"train.{key}": value
                                           for key, value in point.items()}) for point in points]
    assert len({repr(config) for config in changed}) == len(points) >= 2
    assert space.mode in ("min", "max")


@pytest.mark.parametrize("name", known_spaces())
def test_the_command_of_a_space_says_all_that_it_needs(name):
    """A reference, and for a published table its number of steps."""
    text = importlib.import_module(f"tune_spaces.{name}").__doc__
    _, job, *words = shlex.split(re.search(r"^    (mdt-ray tune .*)$", text, re.MULTILINE)[1])
    config = parse(job, words).settings
    assert config.space == name
    assert config.evaluate.reference
    steps = re.search(r"after (\d+)k steps", load_space(name).paper.column) if load_space(name).paper else None
    assert steps is None or config.train.num_steps == 1000 * int(steps[1])


@pytest.mark.parametrize("name", [name for name in known_spaces() if load_space(name).paper])
def test_published_numbers_are_those_of_points(name):
    space = load_space(name)
    assert [space.paper.value(point) is not None for point in space.grid()] == [True] * len(space.paper.rows)
    assert space.paper.value({"loss.mask_ratio": 0.123}) is None
    if "(Table 2)" not in space.paper.column:
        assert 50.26 in [value for _, value in space.paper.rows], "MDT-S/2 as it is (paper Tables 3 to 5)"


def test_the_papers_tables_are_there():
    said = " ".join(load_space(name).paper.column for name in known_spaces() if load_space(name).paper)
    for table in ("Table 2", "Table 3", "Table 4", *(f"Table 5{letter}" for letter in "abcdefghi")):
        assert f"({table})" in said


def test_a_grid_is_all_combinations_in_order_and_a_list_is_its_points(tmp_path):
    grid = load_space(written(tmp_path, "metric = 'fid'\ndef space():\n    return {'a': [1, 2], 'b': ['x', 'y']}"))
    assert grid.grid() == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert (grid.name, grid.mode, grid.defaults, grid.paper) == ("own", "min", {}, None)
    some = load_space(written(tmp_path, "import math\n_side = 3\nmetric, mode = 'is', 'max'\ndef helper(): pass\n"
                                        "def space():\n    return [{'a': _side}, {'b': 2}]"))
    assert (some.grid(), some.mode) == ([{"a": 3}, {"b": 2}], "max")


def test_draws_are_from_lists_and_ranges_and_begin_alike(tmp_path):
    space = load_space(written(tmp_path, "import ray.tune\nmetric = 'fid'\ndef space():\n    return {'a': [1, 'x'], "
                                         "'b': ray.tune.loguniform(1e-4, 1e-2), 'c': ray.tune.randint(2, 5)}"))
    points = space.drawn(200, seed=0)
    assert space.drawn(7, seed=0) == points[:7]
    assert space.drawn(7, seed=1) != points[:7]
    assert {type(value) for point in points for value in point.values()} == {int, str, float}, "as JSON takes them"
    assert {p["a"] for p in points} == {1, "x"}
    assert {p["c"] for p in points} == {2, 3, 4}
    assert all(1e-4 <= p["b"] <= 1e-2 for p in points)
    assert 0.4 < sum(p["b"] < 1e-3 for p in points) / 200 < 0.6, "as many in each decade"
    assert space.described() == {"a": [1, "x"], "b": "LogUniform Float (0.0001, 0.01)", "c": "Uniform Integer (2, 5)"}
    with pytest.raises(ValueError, match=r"own': b, c: a range has no grid; use --search random or optuna"):
        space.grid()
    listed = load_space(written(tmp_path, "metric = 'fid'\ndef space():\n    return [{'a': 3}]"))
    with pytest.raises(ValueError, match="lists its trials, so there is nothing to draw; use --search grid"):
        listed.drawn(2, seed=0)


SPACE = "def space():\n    return {'loss.mask_ratio': [0.3]}\n"


@pytest.mark.parametrize(("text", "message"), [
    ("metric = 'fid'", "has no space; a space needs"),
    (SPACE, "has no metric; a space needs"),
    (SPACE + "metric = 3", "metric = 3 and mode = None, but must be a name"),
    (SPACE + "metric, mode = 'fid', 'least'", "mode = 'least', but must be a name, and 'min' or 'max'"),
    (SPACE + "metric, modus = 'fid', 'min'", "modus means nothing here; did you mean 'mode'"),
    (SPACE + "metric, defaults = 'fid', {'max_trails': 2}", "defaults: unknown setting .*did you mean 'max_trials'"),
    (SPACE + "metric, defaults = 'fid', {'grace_share': .5}",
     "defaults: grace_share: only the command line gives that; a space may give search, scheduler, cost, equal, num_seeds"),
    (SPACE + "metric, defaults = 'fid', {'train': {'num_steps': 5}}", "defaults: train: only the command line gives that"),
    (SPACE + "metric, paper = 'fid', {'column': 'x'}", r"paper = {'column': 'x'}: must have `column`, .*and `rows`"),
    ("metric = 'fid'\ndef space():\n    return {'loss.mask_ratio': []}",
     r"loss.mask_ratio = \[\]: must be a list of at least one value"),
    ("metric = 'fid'\ndef space():\n    return {}", r"space\(\) gives {}, but must give lists"),
    ("metric = 'fid'\ndef space():\n    return []", r"space\(\) gives \[\], but must give lists"),
    ("metric = 'fid'\nimport nothing_of_that_name", r"cannot be imported \(ModuleNotFoundError: No module named"),
    ("metric = 'fid\n", r"cannot be imported \(SyntaxError: "),
])
def test_a_bad_space_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"own.py'.*{message}"):
        load_space(written(tmp_path, text))


def test_a_space_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'mask_ration': neither a search space nor .*; did you mean 'mask_ratio'"):
        load_space("mask_ration")
    with pytest.raises(ValueError, match=r"'none/own.py': no such file"):
        load_space("none/own.py")
