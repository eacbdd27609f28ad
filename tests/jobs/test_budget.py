"""What a sweep may use, by a clock that the test moves."""

import dataclasses

import pytest

from mdt_ray.config import TrainConfig, TuneConfig, WorkersConfig
from mdt_ray.jobs import budget


@pytest.fixture
def clock(monkeypatch):
    """Seconds, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    return now


def config(folder, **changes) -> TuneConfig:
    workers = WorkersConfig(num_workers=4, gpus_per_worker=0.5)
    return dataclasses.replace(TuneConfig(output=str(folder), train=TrainConfig(workers=workers)), **changes)


def test_hours_of_gpus_are_those_of_all_runs(tmp_path, clock):
    """Two trials of 4 x 0.5 GPUs for half an hour, then after a kill one for another half."""
    first = budget.Budget(config(tmp_path, max_gpu_hours=3.0))
    clock[0] += 600  # before the first trial
    first.count(0)
    clock[0] += 1800
    first.count(2)
    assert first.hours == pytest.approx(2.0)
    assert first.used_up() is None
    second = budget.Budget(config(tmp_path, max_gpu_hours=3.0))
    assert second.hours == pytest.approx(2.0), "kept though nobody said good-bye"
    clock[0] += 1800
    second.count(1)
    assert second.used_up() == "max_gpu_hours = 3 are used"
    assert budget.Budget(config(tmp_path / "other", max_gpu_hours=3.0)).used_up() is None


def test_without_gpus_workers_are_counted(tmp_path, clock):
    workers = WorkersConfig(num_workers=3)
    counted = budget.Budget(dataclasses.replace(config(tmp_path), train=TrainConfig(workers=workers)))
    clock[0] += 3600
    counted.count(2)
    assert counted.hours == pytest.approx(6.0)
    assert counted.used_up() is None, "without a limit"


def test_the_time_limit_is_of_one_run(tmp_path, clock):
    limited = config(tmp_path, time_limit=0.5)
    first = budget.Budget(limited)
    clock[0] += 1799
    assert first.used_up() is None
    clock[0] += 1
    assert first.used_up() == "time_limit = 0.5 hours is reached"
    assert budget.Budget(limited).used_up() is None


@pytest.mark.parametrize("name", ["max_gpu_hours", "time_limit"])
def test_no_budget_of_nothing(name):
    with pytest.raises(ValueError, match=rf"{name} = 0: must be positive"):
        TuneConfig(**{name: 0})
