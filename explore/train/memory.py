"""Memory that a step gives back and the next one asks for again."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""

LARGE = 1 << 30


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, up to blocks of a gibibyte, for what it allocates next.

    By default the C library hands freed activations to the operating system, which has to find and to clear as many
    pages in the next step. The process holds its peak until it ends.

    Returns:
        Whether the C library can, as glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    return all(bool(mallopt(parameter, LARGE)) for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
