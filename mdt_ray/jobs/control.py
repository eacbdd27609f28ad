"""What the driver and the workers of a training run tell each other while it runs, and how the driver watches over them.

Workers leave rows of metrics and say on which node they are. Asked by the driver to stop, they write a checkpoint and end.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mdt_ray.config import TrainConfig
from mdt_ray.interrupts import Wish
from mdt_ray.jobs import nodes

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5
GROW_AFTER_SECONDS = 30.0
"""How long there must be room for another worker before the run is restarted with it, which costs about as much. Twice as
long after each restart that found the room taken, up to GROW_AFTER_MOST: so long it may be held for nothing."""
GROW_AFTER_MOST = 480.0
ANSWER_SECONDS = 30.0
STOPPED, PREEMPTED, GROWS = "asked to stop", "a node is about to go", "there is room for more workers"


@ray.remote(num_cpus=0, max_restarts=-1)
class Control:
    """Rows that the driver has not taken yet, the workers' nodes, and whether they are asked to stop."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []
        self.nodes: dict[int, str] = {}
        self.stop = False

    def put(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        rows, self.rows = self.rows, []
        return rows

    def arrive(self, rank: int, node: str) -> None:
        self.nodes[rank] = node

    def where(self) -> dict[int, str]:
        return self.nodes

    def ask_to_stop(self) -> None:
        self.stop = True

    def asked(self) -> bool:
        return self.stop


def open_control() -> Any:
    """A Control on the driver's node, which is lost only with the driver."""
    here = ray.get_runtime_context().get_node_id()
    return Control.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True)).remote()


class Asked(Wish):
    """In a worker: whether the driver asked to stop, looked up by a thread, so that calling it costs nothing."""

    def __init__(self, control: Any):
        self.control = control
        self._closed = threading.Event()
        threading.Thread(target=self._poll, daemon=True, name="stop-poll").start()

    def __call__(self) -> bool:
        return self.signum is not None

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _poll(self) -> None:
        while not (self() or self._closed.wait(POLL_SECONDS)):
            try:
                if ray.get(self.control.asked.remote(), timeout=ANSWER_SECONDS):
                    self.signum = signal.SIGTERM
            except RayError:
                continue  # a lost actor is made anew; a lost driver ends this process


def watch(fit: Callable[[], None], control: Any, config: TrainConfig, num_workers: int, wish: Wish,
          on_row: Callable[[dict[str, Any]], None], meanwhile: Callable[[], str | None],
          grow_after: float = GROW_AFTER_SECONDS) -> str | None:
    """Run `fit`, which launches the workers and waits for them, in a thread; meanwhile hand their rows to `on_row`, call
    `meanwhile`, and ask them to stop where there is a reason, which `meanwhile` too may return. Returns the reason, or None
    where they ended by themselves.

    grow_after: seconds for which there must be room for more workers before that is a reason.
    Raises what `fit` raises. Whatever goes wrong here costs a warning: the workers are never left alone. An exit in
    `on_row`, by which Tune ends a trial early, asks them to stop and waits until they have.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:  # raised below, in the thread that waits
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="fit")
    reason = None
    with contextlib.closing(_Growth(config, num_workers, grow_after, control)) as growth:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            try:
                _hand_over(control, on_row)
                if reason is None:
                    reason = _reason(control, wish, growth)
                    if reason == STOPPED:
                        logger.warning("stopping once the step is done and its checkpoint written; Ctrl-C now does not wait")
                wanted = meanwhile()  # whose troubles keep no stop from the workers
                reason = reason or wanted
            except Exception as error:
                logger.warning("while watching the workers: %s: %s", type(error).__name__, error)
            except SystemExit:
                while thread.is_alive():
                    control.ask_to_stop.remote()
                    thread.join(POLL_SECONDS)
                raise
            if reason is not None:
                control.ask_to_stop.remote()  # again and again, for an actor that was lost and made anew
    _hand_over(control, on_row)
    if failure:
        raise failure[0]
    return reason


def _hand_over(control: Any, on_row: Callable[[dict[str, Any]], None]) -> None:
    try:
        rows = ray.get(control.take.remote(), timeout=ANSWER_SECONDS)
    except RayError:
        return  # a lost actor costs rows on the screen, never the run
    for row in rows:
        on_row(row)


def _reason(control: Any, wish: Wish, growth: "_Growth") -> str | None:
    if wish.signum is not None:
        return STOPPED
    going = nodes.draining()
    if going:
        try:
            if going & set(ray.get(control.where.remote(), timeout=ANSWER_SECONDS).values()):
                return PREEMPTED
        except RayError:
            return None
    return GROWS if growth.is_due() else None


class Arrival:
    """Whether all workers of a launch have arrived. What takes room before may take theirs."""

    def __init__(self, control: Any, num_workers: int):
        self.control, self.num_workers, self.is_over = control, num_workers, False

    def __call__(self) -> bool:
        if not self.is_over:
            with contextlib.suppress(RayError):
                self.is_over = len(ray.get(self.control.where.remote(), timeout=ANSWER_SECONDS)) == self.num_workers
        return self.is_over


class _Growth:
    """Whether more workers fit than run, for long enough. Until then they are asked for, from when those that run have
    arrived."""

    def __init__(self, config: TrainConfig, num_workers: int, grow_after: float, control: Any):
        self.workers, self.grow_after, self.have_arrived = config.workers, grow_after, Arrival(control, num_workers)
        self.wanted = config.workers.num_workers - num_workers
        self.demand = nodes.Demand(config.workers, self.wanted, config.output)
        self.since: float | None = None

    def is_due(self) -> bool:
        if self.wanted <= 0 or not self.have_arrived():
            return False
        self.demand.ask()
        if nodes.room_for(self.workers) < 1 and not self.demand.is_met():
            self.since = None
            return False
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since > self.grow_after

    def close(self) -> None:
        try:
            self.demand.close()
        except Exception as error:
            logger.warning("while asking for more workers: %s: %s", type(error).__name__, error)
