"""Files that are whole or absent, and files that may be compressed."""

from __future__ import annotations

import gzip
import lzma
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSIONS = (".gz", ".xz")
UNREADABLE = (EOFError, OSError, lzma.LZMAError, zlib.error)
"""What reading a missing or broken file raises, compressed or not."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, atomically, when the block ends without an error.

    Whatever stops the block, even a kill, leaves the old content of `path`; of two writers, the later one wins
    whole. The parent folder is made when missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_plain(path: Path) -> BinaryIO:
    """Opens a file for reading, decompressed as its name ends: .gz, .xz or anything else."""
    match path.suffix:
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
        case _:
            return path.open("rb")
