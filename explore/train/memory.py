"""Keeps the memory that one step frees for the next step."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""

LARGE = 1 << 30


def keep_freed_memory() -> bool:
    """Lets this process keep freed blocks of up to one gibibyte for its next allocations.

    By default the C library returns freed activations to the operating system, which must find and clear the same
    number of pages in the next step. With this, the process holds its peak memory until it ends.

    Returns:
        Whether the C library supports this (glibc does).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    return all(bool(mallopt(parameter, LARGE)) for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
