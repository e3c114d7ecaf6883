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
    causes = list(_causes(error))
    if (fault := next((each for each in causes if isinstance(each, FaultError)), None)) is not None:
        return str(fault)
    unwritable = any(isinstance(each, OSError) and each.errno in UNWRITABLE for each in causes)
    if unwritable or is_passing(error) or isinstance(error, optuna.exceptions.StorageInternalError):
        return _line(error, runs)
    return f"{runs}: no space left on the device" if isinstance(error, Exception) and _is_full(runs) else None


def _line(error: BaseException, runs: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or runs}: {error.strerror or str(error) or type(error).__name__}"
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


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
