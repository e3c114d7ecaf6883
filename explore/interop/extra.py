"""Imports of the `hf` extra's libraries, which only import and export need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra() -> Iterator[None]:
    """Wraps an import; if a library is missing, the error says how to install it.

    Raises:
        ValueError: a library is missing.
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
