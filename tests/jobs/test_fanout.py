"""Chunks over a pool of actors: results, and errors that arrive as themselves."""

import errno
import os
import signal

import pytest

from mdt_ray.config import WorkersConfig

pytestmark = pytest.mark.ray


class _Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Worker:
    """Does what an item says."""

    def __call__(self, item: dict) -> dict:
        if item["what"] == "full":
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise OSError("/out/chunk-00001.parquet: could not be written (No space left on device); make room"
                              ) from error
        if item["what"] == "value":
            raise ValueError("image 'x' has no label")
        if item["what"] == "odd":
            raise _Unpicklable("this", "that")
        if item["what"] == "errno":
            raise OSError(errno.EIO, "Input/output error", "/data/x")
        return {"number": item["number"], "text": item["what"] * 2}


class Dying:
    """Loses its process, as one does that takes more memory than there is."""

    def __init__(self, moment: str):
        self.moment = moment
        if moment == "loading":
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, item: dict) -> dict:
        if self.moment == "working" and item["number"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


class Adder:
    """A second stage, with bytes on the way."""

    def __init__(self, amount: int):
        self.amount = amount

    def __call__(self, item: dict) -> dict:
        return {"number": item["number"] + self.amount, "size": len(item["text"] * 1000)}


def test_actors_that_would_wait_for_ever_are_refused(ray_session):
    from mdt_ray.jobs import fanout

    items = [{"what": "a", "number": i} for i in range(300)]
    for workers, message in ((WorkersConfig(num_workers=400), r"num_workers = 300: .* Ray has room for \d+ .*; use fewer"),
                             (WorkersConfig(gpus_per_worker=0.5), r"0\.5 GPUs each, Ray has room for 0")):
        with pytest.raises(ValueError, match=message):
            next(fanout.run_stages(items, [fanout.Stage(Worker, (), workers)]))


def test_a_stage_that_reserves_nothing_runs_beside_others_that_take_all(ray_session):
    import ray

    from mdt_ray.jobs import fanout

    all_cpus = WorkersConfig(cpus_per_worker=ray.cluster_resources()["CPU"])
    stages = [fanout.Stage(Worker, (), all_cpus), fanout.Stage(Adder, (10,), WorkersConfig(), reserves=False)]
    assert len(list(fanout.run_stages([{"what": "ab", "number": i} for i in range(3)], stages))) == 3


def test_stages_hand_on_items_and_errors(ray_session):
    from mdt_ray.jobs import fanout

    small = WorkersConfig(cpus_per_worker=0.5)
    stages = [fanout.Stage(Worker, (), small), fanout.Stage(Adder, (10,), small)]
    rows = list(fanout.run_stages([{"what": "ab", "number": i} for i in range(5)], stages))
    assert sorted(row["number"] for row in rows) == list(range(10, 15))
    assert {row["size"] for row in rows} == {4000}
    with pytest.raises(ValueError, match=r"^image 'x' has no label$"):
        list(fanout.run_stages([{"what": "value", "number": 0}], stages))


def test_results_come_back_whatever_their_order(ray_session):
    from mdt_ray.jobs import fanout

    items = [{"what": "a", "number": i} for i in range(7)]
    for calls in (1, 2):
        rows = list(fanout.run_chunks(items, Worker, (), WorkersConfig(), calls_per_worker=calls))
        assert sorted(row["number"] for row in rows) == list(range(7))
        assert {row["text"] for row in rows} == {"aa"}
    assert list(fanout.run_chunks([], Worker, (), WorkersConfig())) == []


@pytest.mark.parametrize(("what", "kind", "text"), [
    ("full", OSError, r"^/out/chunk-00001.parquet: could not be written \(No space left on device\); make room$"),
    ("value", ValueError, r"^image 'x' has no label$"),
    ("errno", OSError, r"\[Errno 5\] Input/output error: '/data/x'"),
    ("odd", RuntimeError, r"^_Unpicklable: this and that$")])
def test_an_error_of_a_worker_arrives_as_itself(ray_session, what, kind, text):
    from mdt_ray.jobs import fanout

    items = [{"what": "a", "number": 0}, {"what": what, "number": 1}, {"what": "a", "number": 2}]
    with pytest.raises(kind, match=text):
        list(fanout.run_chunks(items, Worker, (), WorkersConfig()))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "working"])
def test_work_that_always_loses_its_process_ends(ray_session, moment):
    from ray.experimental import internal_kv

    from mdt_ray.jobs import fanout

    others = internal_kv._internal_kv_list("", namespace=fanout.KEEPER)  # of drivers that other tests killed
    items = [{"number": i} for i in range(3)]
    with pytest.raises(RuntimeError, match="part of the work cost 5 worker processes, most often for want of memory"):
        list(fanout.run_chunks(items, Dying, (moment,), WorkersConfig()))
    assert internal_kv._internal_kv_list("", namespace=fanout.KEEPER) == others, "no count is left"


def test_what_is_counted_are_processes_that_began_an_item_and_did_not_end_it(ray_session):
    from ray.experimental import internal_kv

    from mdt_ray.jobs import fanout

    others = internal_kv._internal_kv_list("", namespace=fanout.KEEPER)
    for _ in range(fanout.LOSSES + 2):
        with fanout._counted("a/1"):
            pass
    begun = [fanout._counted("a/1") for _ in range(fanout.LOSSES + 1)]
    for one in begun:
        one.__enter__()
    with fanout._counted("a/2"), pytest.raises(RuntimeError, match="cost 5 worker processes"), fanout._counted("a/1"):
        pass
    begun.pop().__exit__(None, None, None)
    with fanout._counted("a/1"):
        pass
    assert internal_kv._internal_kv_list("", namespace=fanout.KEEPER) == others


def test_workers_that_cannot_start_say_why(ray_session, tmp_path, monkeypatch):
    """As where a node lacks a package."""
    from mdt_ray.jobs import fanout

    (tmp_path / "only_here.py").write_text("class Absent:\n    def __call__(self, item):\n        return item\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from only_here import Absent

    with pytest.raises(RuntimeError, match=r"^a worker could not start: ModuleNotFoundError: No module named 'only_here'; "):
        list(fanout.run_chunks([{"number": 0}], Absent, (), WorkersConfig()))
