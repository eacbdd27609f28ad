"""SIGINT and SIGTERM as a wish that a job looks at when it suits it, instead of an exception at any line."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(Exception):
    """A job stopped because it was asked to, after it had saved where it was."""

    def __init__(self, signum: int, text: str):
        super().__init__(text)
        self.signum = signum


class Wish:
    """`signum` is the signal that asked to stop, or None."""

    signum: int | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Wish]:
    """Notes the first SIGINT or SIGTERM while the block runs. After it, SIGINT raises KeyboardInterrupt, for the impatient;
    SIGTERM, which schedulers send more than once, says nothing new.

    Off the main thread, where Python takes no signals, nothing is noted.
    """
    wish = Wish()

    def note(signum: int, frame: object) -> None:
        if wish.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        wish.signum = wish.signum or signum

    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    held = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
