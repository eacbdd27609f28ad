"""Notices a process that makes no progress: writes down where each of its threads is, and ends it.

A rank that hangs makes the others hang in the next collective call, so each watches itself, and whoever started the
processes starts them again.
"""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 5.0
"""Between two looks at the clock, at most a twentieth of the time-out."""
EXIT_CODE = 70


class Watchdog:
    """Use as a context manager; call `beat` at every sign of progress.

    Args:
        timeout_s: seconds without a beat after which the process ends; 0 never ends it.
        keep: gets the stacks of all threads as text before that. Where it fails or takes as long again, or where a thread
            holds the interpreter's lock, the process ends all the same, with its stacks on stderr.
    """

    def __init__(self, timeout_s: float, keep: Callable[[str], None]):
        self.timeout_s, self.keep = timeout_s, keep
        self._done = threading.Event()
        self._last = time.monotonic()

    def beat(self) -> None:
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.timeout_s:
            self.beat()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        if self.timeout_s:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        interval = min(POLL_SECONDS, self.timeout_s / 20)
        while True:
            # Ends the process from outside Python, unless this thread gets to put it off.
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True)
            if self._done.wait(interval):
                faulthandler.cancel_dump_traceback_later()
                return
            if time.monotonic() - self._last > self.timeout_s:
                break
        try:
            self.keep(stacks())
            time.sleep(3 * interval)  # where the first process ends, the others are ended: let them write down theirs
        finally:
            os._exit(EXIT_CODE)


def stacks() -> str:
    """Where each thread of this process is, as text."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
