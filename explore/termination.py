"""Orderly exit on SIGTERM and SIGHUP, with the exit code that shells expect.

By default these signals end Python at once: no `finally` block runs and nothing is printed. Here they raise
`TerminatedError` in the main thread, as Ctrl-C raises KeyboardInterrupt. A training loop sets `Requests.deferred`
and ends itself between two steps, where it can write a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class TerminatedError(SystemExit):
    """A signal asked this process to end; the exit code is 128 plus the signal's number.

    In a process started by another to train on its share of a batch the code is 0: the first process ends the run, and
    an error here would look like the cause.
    """

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        super().__init__(0 if _follows() else 128 + signum)


class Requests:
    """Signals received by this process.

    Attributes:
        signum: the first signal received, or None.
        deferred: whether the first signal is only noted; a second one raises.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False

    def take(self, signum: int, frame: FrameType | None) -> None:
        """Handles a signal. A process started by another only records it, and ends when the other ends it."""
        is_first, self.signum = self.signum is None, self.signum or signum
        if not (_follows() or (self.deferred and is_first)):
            raise TerminatedError(signum)


_requests = Requests()
_handling: list[bool] = []  # not empty while the handlers are set


@contextmanager
def termination_handled() -> Iterator[Requests]:
    """Makes SIGTERM and SIGHUP raise `TerminatedError` while the block runs; a nested block changes nothing.

    Existing handlers are kept, and so are ignored signals, as by `nohup`. Outside the main thread, where Python does
    not allow handlers, the block changes nothing.
    """
    if _handling or threading.current_thread() is not threading.main_thread():
        yield _requests
        return
    _requests.signum, _requests.deferred = None, False
    ours = [signum for signum in SIGNALS if signal.getsignal(signum) is signal.SIG_DFL]
    for signum in ours:
        signal.signal(signum, _requests.take)
    if _follows() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the first process ends them
    _handling.append(True)
    try:
        yield _requests
    finally:
        _handling.clear()
        for signum in ours:
            signal.signal(signum, signal.SIG_DFL)


def _follows() -> bool:
    """Whether Lightning started this process to train on its share of a batch."""
    return os.environ.get("LOCAL_RANK", "0") != "0"
