"""The cache folder: what can be made again, never pickled, never half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_folder(kind: str) -> Path:
    """The folder for one kind of cached file, under `$EXPLORE_CACHE` or `~/.cache/explore`.

    Raises:
        ValueError: the folder cannot be made.
    """
    root = os.environ.get("EXPLORE_CACHE") or "~/.cache/explore"
    folder = Path(root).expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"EXPLORE_CACHE: {root!r} must be a folder that can be written ({error.strerror})") from error
    return folder


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name only when the block ends without an error.

    A killed writer leaves a dot file under another name; of two writers, the later one wins whole.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
