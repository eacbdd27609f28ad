"""Progress bars on the driver. Workers that cannot be polled leave their newest row in a mailbox actor."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from tqdm import tqdm


def bar(total: int, unit: str, title: str, initial: int = 0) -> tqdm:
    """A bar with rate and time left; where stderr is no terminal, a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=initial, unit=unit, desc=f"{title:<10}", mininterval=interval, dynamic_ncols=True,
                file=sys.stderr, smoothing=0.1)


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds the newest row that a worker put."""

    def __init__(self):
        self.row: dict[str, Any] | None = None

    def put(self, row: dict[str, Any]) -> None:
        self.row = row

    def get(self) -> dict[str, Any] | None:
        return self.row


@contextlib.contextmanager
def watched(on_row: Callable[[dict[str, Any]], None], interval_s: float = 0.5) -> Iterator[Any]:
    """A Mailbox whose new rows are handed to `on_row` by a thread while the block runs."""
    mailbox = Mailbox.remote()
    done = threading.Event()

    def poll() -> None:
        last = None
        while not done.wait(interval_s):
            row = ray.get(mailbox.get.remote())
            if row is not None and row != last:
                on_row(row)
                last = row

    thread = threading.Thread(target=poll, daemon=True, name="progress")
    thread.start()
    try:
        yield mailbox
    finally:
        done.set()
        thread.join()
        row = ray.get(mailbox.get.remote())
        if row is not None:
            on_row(row)
        ray.kill(mailbox)
