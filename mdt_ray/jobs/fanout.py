"""Chunks of work over a pool of actors, through Ray Data. Restart is the callers': they pass the chunks still missing.

A worker class is built once per actor and called with one item at a time; it writes its chunk to a file, whole, and returns
a small row. An actor that dies is replaced and its item given to another, so a chunk may be written twice, with equal bytes.
"""

import contextlib
import dataclasses
import functools
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError
from ray.experimental import internal_kv

from mdt_ray.config import WorkersConfig
from mdt_ray.jobs import nodes, session

FAILURE, NUMBER = "failure", "number of the item"
"""Columns of a row beside the worker's."""
LOSSES = 4
"""Times that an item is tried again whose process was lost, also while the worker loaded. (Ray Data tries without end: work
that takes more memory than there is would be started for ever. Ray's own count of retries will not do: it also counts those
made while a lost node is not yet known as lost, some a second.)"""
KEEPER = "mdt_ray"
"""Namespace in the cluster's key-value store, where counts outlive the processes."""


class _OneItem:
    """Adapter from Ray Data's batches of one row to the worker's dicts.

    An error travels as a row of its own: Ray Data would wrap it in advice about its settings, and lose the error itself.
    """

    def __init__(self, worker: type, arguments: tuple, pool: str):
        self.make, self.work, self.lock = functools.partial(worker, *arguments), None, threading.Lock()
        self.pool = pool

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        if FAILURE in batch:
            return batch  # of an earlier stage
        row = _row(batch)
        number = row.pop(NUMBER)
        try:
            with _counted(f"{self.pool}/{number}"):
                found = self._worker()(row)
            return {name: [value] for name, value in (found | {NUMBER: number}).items()}
        except Exception as error:
            return {FAILURE: [_packed(root_cause(error))]}

    def _worker(self) -> Any:
        """Made with the first item: processes that are lost before are counted nowhere, and would be started for ever."""
        with self.lock:
            if self.work is None:
                self.work = self.make()
            return self.work


@contextlib.contextmanager
def _counted(key: str) -> Iterator[None]:
    """Around the work on an item: while it lasts, a count is kept of the processes that began it. Raises RuntimeError where
    it cost too many."""
    lost = int(_kept(internal_kv._internal_kv_get, key) or 0)
    if lost > LOSSES:
        raise RuntimeError(f"the same part of the work cost {lost} worker processes, most often for want of memory; give "
                           "smaller batches, or a machine fewer workers, and run the same command again: it goes on with "
                           "what is missing")
    _kept(internal_kv._internal_kv_put, key, str(lost + 1))
    try:
        yield
    finally:
        _kept(internal_kv._internal_kv_del, key)


def _kept(call: Callable, *arguments: str, **options: Any) -> Any:
    with contextlib.suppress(RayError, RuntimeError):  # while the head does not answer, nothing is counted
        return call(*arguments, namespace=KEEPER, **options)


class Stage(NamedTuple):
    """A pool of actors that does one part of the work on an item."""

    worker: type
    """worker(*arguments) is called once an actor, and with each item. Returns a dict of plain values."""
    arguments: tuple
    workers: WorkersConfig
    """Size of the pool and what an actor takes."""
    reserves: bool = True
    """False: it has little to do, and takes CPUs (not GPUs) from those that reserve them. The pools before it would not wait
    for its actors, and what they make would pile up."""


def run_chunks(items: list[dict[str, Any]], worker: type, arguments: tuple, workers: WorkersConfig,
               calls_per_worker: int = 1) -> Iterator[dict[str, Any]]:
    """`run_stages` with one stage."""
    return run_stages(items, [Stage(worker, arguments, workers)], calls_per_worker)


def run_stages(items: list[dict[str, Any]], stages: Sequence[Stage], calls_per_worker: int = 1) -> Iterator[dict[str, Any]]:
    """Rows that the last stage returns, in the order in which they finish; an item may be in each stage at the same time.

    Args:
        items: small dicts, one a chunk.
        stages: each is given what the one before returned.
        calls_per_worker: items that an actor is given at a time, each in a thread of its own.
    Raises what a worker raised, ValueError where this machine has no room for the actors, and RuntimeError where actors
    cannot start, or an item cost LOSSES + 1 of their processes.
    """
    if not items:
        return
    off_the_head = nodes.off_the_head()
    data = ray.data.from_items([item | {NUMBER: k} for k, item in enumerate(items)], override_num_blocks=len(items))
    run = uuid.uuid4().hex
    for place, (worker, arguments, workers, reserves) in enumerate(stages):
        workers = dataclasses.replace(workers, num_workers=min(workers.num_workers, len(items)))
        if reserves or workers.gpus_per_worker:
            session.require_room(workers)
        pool = ActorPoolStrategy(size=workers.num_workers,
                                 max_tasks_in_flight_per_actor=calls_per_worker + 1,
                                 max_concurrent_calls_per_actor=calls_per_worker, enable_true_multi_threading=True)
        num_cpus = None if workers.gpus_per_worker else workers.cpus_per_worker * reserves
        data = data.map_batches(_OneItem, fn_constructor_args=(worker, arguments, f"{run}/{place}"), batch_size=1,
                                compute=pool, num_cpus=num_cpus, num_gpus=workers.gpus_per_worker or None,
                                label_selector=off_the_head if num_cpus == 0 else None)
    try:
        for row in data.iter_rows():
            if FAILURE in row:
                raise pickle.loads(row[FAILURE])  # bytes that our own actor made
            yield {name: value for name, value in row.items() if name != NUMBER}
    except RayError as error:
        if getattr(error, "actor_init_failed", False):
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"a worker could not start: {reason}; mend that on its node, and run the same command again"
                               ) from None
        raise root_cause(error) from None
    finally:
        _kept(internal_kv._internal_kv_del, f"{run}/", del_by_prefix=True)


def _packed(error: BaseException) -> bytes:
    """The error as bytes; one that does not come back whole as a RuntimeError with its text."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # some dump well and do not load: those whose arguments are not their text
        return data
    except Exception:  # whatever an exception's own pickling raises
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _row(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: values[0].item() if hasattr(values[0], "item") else values[0] for name, values in batch.items()}


def root_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, from under Ray's wrappers; Ray's own where there is none."""
    while type(error).__module__.startswith("ray."):
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner
    return error
