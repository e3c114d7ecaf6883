"""Files that are whole or absent, and files that may be compressed."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def copy_whole(source: Path, path: Path) -> None:
    """Copies a file so that `path` is the whole of it or absent."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def open_plain(path: Path) -> io.BufferedIOBase:
    """Opens a file for reading, decompressed as its name ends: .gz, .xz or anything else."""
    match path.suffix:
        case ".gz":
            return gzip.GzipFile(path)
        case ".xz":
            return lzma.LZMAFile(path)
        case _:
            return path.open("rb")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: no such file, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is needed, found {type(content).__name__}")
    return content
