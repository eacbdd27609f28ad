"""Writes checkpoints in the background, one at a time and in order."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

logger = logging.getLogger(__name__)
RETRY_SECONDS = (1.0, 10.0, 60.0)
"""Waited before a write is tried again that the disk or store refused."""


class Writer:
    """A context manager. An error of a write is raised by the next call, or at the block's end."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: Future | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Have `write` called by a thread, once the one before is done: no more than two copies of a state are held."""
        self.wait()
        self._pending = self._pool.submit(_tried, write)

    def check(self) -> None:
        """Raise the error of a write that has failed. Does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until everything submitted is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()


def _tried(write: Callable[[], None]) -> None:
    for pause in (*RETRY_SECONDS, None):
        try:
            return write()
        except OSError as error:
            if pause is None:
                raise
            logger.warning("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
