"""Faults of the machine and of what a sweep needs there: they stop a sweep, and are no trial's result."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import optuna

from explore.machine import is_passing

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a disk that is full or may not be written."""

LEAST_FREE = 1 << 20
"""Bytes: with less than these a disk is full."""


class FaultError(ValueError):
    """Something around the trials is wrong: data that are missing or changed, a storage that is away, little memory."""


def fault_of(error: BaseException, runs: Path) -> str | None:
    """One line on what is wrong with the machine, where that is why a trial could not be trained; None where it is not.

    Args:
        runs: the folder of runs, whose disk may be full: torch tells of that as a RuntimeError.
    """
    for each in _causes(error):
        if isinstance(each, FaultError):
            return str(each)
        if isinstance(each, OSError) and (each.errno in UNWRITABLE or is_passing(each)):
            return f"{each.filename or runs}: {each.strerror or type(each).__name__}"
    if is_passing(error) or isinstance(error, optuna.exceptions.StorageInternalError):
        return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(": ")
    if not isinstance(error, Exception):
        return None
    return f"{runs}: no space left on the device" if _is_full(runs) else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__


def _is_full(runs: Path) -> bool:
    try:
        place = os.statvfs(runs)
    except OSError:  # the folder is gone
        return False
    return place.f_bavail * place.f_frsize < LEAST_FREE
