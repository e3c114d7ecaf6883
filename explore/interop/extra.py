"""The libraries of the extra `hf`, which are needed only when a door is opened."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra() -> Iterator[None]:
    """Around an import: says how to install what is missing.

    Raises:
        ValueError: it is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"interop: {error}; pip install 'hybrid-frontier[hf]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' advice to install faster kernels."""
    with needs_extra():
        from transformers.utils import logging as theirs
    level = theirs.get_verbosity()
    theirs.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        theirs.set_verbosity(level)
