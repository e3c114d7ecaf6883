"""Faults of the machine or its resources: they stop a sweep and do not count as a trial's result."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import optuna

from explore.machine import is_passing

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a disk that is full or not writable."""

LEAST_FREE = 1 << 20
"""Free bytes below which a disk counts as full."""


class FaultError(ValueError):
    """A fault outside the trials: missing or changed data, an unreachable storage, or too little memory."""


def fault_of(error: BaseException, runs: Path) -> str | None:
    """One line on the machine's fault that caused an error; None if the machine is not the cause.

    Args:
        runs: the folder of runs. Its disk may be full, which torch reports as a RuntimeError.
    """
    causes = _causes(error)
    if (fault := next((each for each in causes if isinstance(each, FaultError)), None)) is not None:
        return str(fault)
    system = next((each for each in causes if _is_of_the_system(each)), None)
    text = " ".join(str(error).split())
    if isinstance(error, ValueError) and text and (system is not None or is_passing(error)):  # written for people
        return text
    if isinstance(system, OSError):
        return f"{system.filename or runs}: {system.strerror or str(system) or type(system).__name__}"
    if is_passing(error) or isinstance(error, optuna.exceptions.StorageInternalError):
        return f"{type(error).__name__}: {text}".removesuffix(": ")
    return f"{runs}: no space left on the device" if isinstance(error, Exception) and _is_full(runs) else None


def _is_of_the_system(error: BaseException) -> bool:
    return isinstance(error, OSError) and (error.errno in UNWRITABLE or is_passing(error))


def _causes(error: BaseException) -> list[BaseException]:
    """The error and its causes; torch, for example, raises another error while it handles a full disk."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


def _is_full(runs: Path) -> bool:
    try:
        place = os.statvfs(runs)
    except OSError:  # the folder is gone
        return False
    return place.f_bavail * place.f_frsize < LEAST_FREE
