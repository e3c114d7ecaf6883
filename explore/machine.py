"""The machine that a process runs on: which of its faults pass."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator

PASSING = tuple(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EBUSY", "EDQUOT", "EIO", "EMFILE", "ENFILE", "ENOLCK", "ENOMEM", "ENOSPC", "ESTALE"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET"),
        *("ENETUNREACH", "ENOTCONN", "EPIPE", "EREMOTEIO", "ESHUTDOWN", "ETIMEDOUT"),
    )
    if hasattr(errno, name)
)
"""Errors of the operating system that have nothing to do with what a process was asked to do."""

WORDS = (*map(os.strerror, PASSING), "out of memory", "ALLOC_FAILED", "can't allocate memory", "unable to allocate")
"""What libraries in C++ write into a RuntimeError, whose type says nothing."""


def is_passing(error: BaseException) -> bool:
    """Whether an error is a fault of the machine, so that the same work may succeed later or elsewhere.

    A disk that is full or fails, a network file system that is away, too few file descriptors, no memory on the CPU or
    the GPU, a time limit. Errors that such a fault has been turned into count too.
    """
    return any(map(_is_passing, _chain(error)))


def _is_passing(error: BaseException) -> bool:
    match error:
        case MemoryError() | TimeoutError() | ConnectionError() | subprocess.TimeoutExpired():
            return True
        case OSError():
            return error.errno in PASSING
        case RuntimeError():  # torch's OutOfMemoryError is one
            text = str(error).lower()
            return any(word.lower() in text for word in WORDS)
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, also where `raise ... from None` hides that."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        yield following
        seen.add(id(following))
        following = following.__cause__ or following.__context__
