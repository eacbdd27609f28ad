"""Progress bars on the driver. Workers that cannot be polled leave their newest row in a mailbox actor."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from tqdm import tqdm


def bar(total: int, unit: str, title: str, initial: int = 0) -> tqdm:
    """A bar with rate and time left; where stderr is no terminal, a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=initial, unit=unit, desc=f"{title:<10}", mininterval=interval, miniters=0,
                dynamic_ncols=True, file=sys.stderr, smoothing=0.1)


logger = logging.getLogger(__name__)
STALL_SECONDS = 600.0


class Parts:
    """Moves a bar by what is done of parts that are worked on at the same time, whichever is begun anew."""

    def __init__(self, bar: tqdm, sizes: list[int], finished: Iterable[int]):
        self.bar = bar
        self.done = dict.fromkeys(range(len(sizes)), 0) | {part: sizes[part] for part in finished}

    def show(self, row: dict[str, Any]) -> None:
        self.done[row["chunk"]] = row["num_read"]
        self.bar.update(max(sum(self.done.values()) - self.bar.n, 0))


@ray.remote(num_cpus=0, max_restarts=-1)
class Mailbox:
    """Holds the newest row that each sender put."""

    def __init__(self):
        self.rows: dict[Any, dict[str, Any]] = {}

    def put(self, row: dict[str, Any], sender: Any = None) -> None:
        self.rows[sender] = row

    def get(self) -> dict[Any, dict[str, Any]]:
        return self.rows


@contextlib.contextmanager
def watched(on_row: Callable[[dict[str, Any]], None], interval_s: float = 0.5) -> Iterator[Any]:
    """A Mailbox whose new rows are handed to `on_row` by a thread while the block runs, and at its end.

    A lost mailbox costs rows, never the job. Where none comes for STALL_SECONDS, a warning says what may be missing.
    """
    mailbox = Mailbox.remote()
    done = threading.Event()
    seen: dict[Any, dict[str, Any]] = {}
    moved = time.monotonic()

    def poll() -> None:
        nonlocal moved
        with contextlib.suppress(RayError):
            for sender, row in ray.get(mailbox.get.remote(), timeout=30).items():
                if seen.get(sender) != row:
                    seen[sender] = row
                    moved = time.monotonic()
                    on_row(row)
        if time.monotonic() - moved > STALL_SECONDS:
            moved = time.monotonic()
            logger.warning("nothing has come from the workers for %.0f minutes; free in the cluster: %s; `ray status` shows "
                           "what waits", STALL_SECONDS / 60, ray.available_resources())

    def keep_polling() -> None:
        while not done.wait(interval_s):
            poll()

    thread = threading.Thread(target=keep_polling, daemon=True, name="progress")
    thread.start()
    try:
        yield mailbox
    finally:
        done.set()
        thread.join()
        poll()
        ray.kill(mailbox)
