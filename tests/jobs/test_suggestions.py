"""What Optuna is let suggest, without Ray's processes: every point once, and no training in two processes at once."""

import pytest
import ray.tune

from mdt_ray.jobs import suggestions as module
from mdt_ray.jobs.suggestions import Suggestions
from mdt_ray.tuning.space import Space

GRID = {"loss.mask_ratio": [0.1, 0.3, 0.5], "model.decode_layer": [1, 2]}


def suggestions(values: dict, known=(), training_of=lambda point: str(point)) -> Suggestions:
    space = Space("own", values, metric="fid", mode="min", defaults={}, paper=None)
    return Suggestions(space, ["fid"], ["min"], list(known), 0, training_of)


def all_of(search: Suggestions, most: int = 20) -> list[dict]:
    """What is suggested, one after the other; each is done, and the better the lower its mask ratio, before the next."""
    found = []
    for n in range(most):
        point = search.suggest(str(n))
        if point == search.FINISHED:
            return found
        found.append(point)
        search.on_trial_complete(str(n), {"fid": point["loss.mask_ratio"]})
    return found


def test_every_point_of_lists_is_suggested_once_and_known_ones_first():
    """TPE alone would suggest the best ones again and again."""
    known = [{"loss.mask_ratio": 0.5, "model.decode_layer": 2}, {"loss.mask_ratio": 0.1, "model.decode_layer": 1}]
    search = suggestions(GRID, known)
    found = all_of(search)
    assert found[:2] == known
    assert len(found) == len({str(sorted(point.items())) for point in found}) == 6
    assert search.exhausted


def test_a_range_of_few_values_ends_too_and_one_of_many_does_not():
    few = suggestions({"loss.mask_ratio": [0.3], "model.decode_layer": ray.tune.randint(1, 4)})
    assert sorted(point["model.decode_layer"] for point in all_of(few)) == [1, 2, 3]
    assert few.exhausted
    many = suggestions({"loss.mask_ratio": ray.tune.uniform(0.1, 0.8)})
    assert len({point["loss.mask_ratio"] for point in all_of(many)}) == 20
    assert not many.exhausted


def test_a_point_waits_while_another_process_is_at_its_training():
    """Points that differ in how they are judged share one, and its folder has one writer."""
    search = suggestions({"loss.mask_ratio": [0.3], "evaluate.sampling.cfg_scale": [1.0, 2.0, 3.0]},
                         training_of=lambda point: str(point["loss.mask_ratio"]))
    first = search.suggest("0")
    assert [search.suggest(name) for name in "123"] == [None] * 3
    search.on_trial_complete("0", {"fid": 1.0})
    second = search.suggest("4")
    assert second != first
    assert search.suggest("5") is None
    search.on_trial_complete("4", error=True)
    third = search.suggest("6")
    search.on_trial_complete("6", {"fid": 2.0})
    assert sorted(p["evaluate.sampling.cfg_scale"] for p in (first, second, third)) == [1.0, 2.0, 3.0]
    assert search.suggest("7") == search.FINISHED


def test_a_store_that_is_away_keeps_a_point_waiting():
    answers = iter([OSError("no answer"), "a", AssertionError("asked once")])

    def training_of(point: dict) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    search = suggestions(GRID, training_of=training_of)
    search.trainings["another"] = "a"
    assert [search.suggest(name) for name in "012"] == [None] * 3
    search.trainings.clear()
    assert isinstance(search.suggest("3"), dict)


@pytest.mark.parametrize(("error", "patience", "gives_up"), [
    (PermissionError("denied"), 120, True), (OSError("AWS Error ACCESS_DENIED"), 120, True),
    (OSError("no answer"), 0, True), (OSError("no answer"), 120, False)])
def test_a_store_that_has_gone_ends_the_search(monkeypatch, error, patience, gives_up):
    def training_of(point: dict) -> str:
        raise error

    monkeypatch.setattr(module, "AWAY_SECONDS", patience)
    search = suggestions(GRID, training_of=training_of)
    assert [search.suggest("0") for _ in range(2)] == [search.FINISHED if gives_up else None] * 2
    assert search.failure is (error if gives_up else None)


def test_nothing_is_suggested_once_the_sweep_is_to_stop():
    search = suggestions(GRID)
    assert isinstance(search.suggest("0"), dict)
    search.set_finished()
    assert search.suggest("1") == search.FINISHED
    assert not search.exhausted


def test_points_that_are_no_valid_setting_wait_for_nobody():
    search = suggestions(GRID, training_of=lambda point: None)
    assert None not in [search.suggest(name) for name in "012"]
