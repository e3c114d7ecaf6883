"""Atomic writing of files, reading of compressed files, and JSON files."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import json
import lzma
import math
import os
import re
import shutil
import stat
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from explore.foreign import parse_json

COMPRESSIONS = (".gz", ".xz")
UNREADABLE = (EOFError, OSError, lzma.LZMAError, zlib.error)
"""Errors from reading a missing or broken file, compressed or not."""

EXPANSION = {".gz": 200, ".xz": 2000}
"""Largest allowed expansion of a compressed file; text compresses 3 to 50 times, bombs over 1000 times."""

EXPANSION_FREE_BYTES = 1 << 26
"""Decompressed bytes that are always allowed, however small the file."""

JSON_BYTES = 1 << 26
"""Bytes of the largest JSON file that is read."""

POLL_S = 0.1

_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp(\.\w+)?")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that atomically replaces it if the block ends without an error.

    If anything stops the block, even a kill, `path` keeps its old content; with two writers the later one wins
    completely. A missing parent folder is created.
    """
    path = Path(path)
    with named(path), temporary_beside(path) as temporary:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds the path to operating-system errors that name no file, such as a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def temporary_beside(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yields a hidden temporary file or folder beside `path`, removed when the block ends.

    Its owner holds a lock on it. If the owner is killed, the lock is released, and the next writer in the same folder
    removes the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp{'' if folder else path.suffix}")
    if folder:
        temporary.mkdir()
    else:
        temporary.touch()
    lock = os.open(temporary, os.O_RDONLY if folder else os.O_RDWR)
    try:
        with contextlib.suppress(OSError):
            try_lock(lock)
        yield temporary
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        os.close(lock)


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary files and folders of `temporary_beside` whose owners are gone."""
    for path in folder.iterdir():
        if not _TEMPORARY.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # another process is removing it, or we may not
            lock = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if try_lock(lock):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(lock)


def try_lock(file: int) -> bool:
    """Locks an open file against other processes until it is closed; returns False if another holds the lock.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def held(path: Path, waiting: Callable[[], None]) -> Iterator[BinaryIO]:
    """Opens a file for reading and writing (creating it if missing) with an exclusive lock.

    Args:
        waiting: called repeatedly while another process holds the lock.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        with contextlib.suppress(OSError):
            while not try_lock(file.fileno()):
                waiting()
                time.sleep(POLL_S)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # it was renamed or removed
    with file:
        yield file


def copy_whole(source: Path, path: Path) -> None:
    """Copies a file so that `path` is either complete or absent."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def safe_name(name: str) -> str:
    """Converts the name of an experiment to characters that are safe in a path; different patterns stay different.

    The letter `*` of attention becomes `a`, which is not a pattern letter (those are capitals), and `/` becomes `_`.
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name.translate({ord("*"): "a", ord("/"): "_", ord("|"): ""}))
    slug = slug[:128].lstrip(".")
    return re.sub(r"^-", "_", slug) if slug.strip("-._") else "run"


def exists(path: Path) -> bool:
    """Whether a path typed by a user exists; False if it is too long or not accessible."""
    try:
        return path.exists()
    except OSError:
        return False


def check_regular(path: Path) -> None:
    """Raises an error if a path is not a regular file: a folder, a FIFO, a socket or a device.

    Raises:
        ValueError: `path` is one of them.
        OSError: `path` does not exist.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        raise ValueError(f"{path}: must be a file, got a {kinds.get(stat.S_IFMT(mode), 'device')}")


def open_plain(path: Path) -> io.BufferedReader:
    """Opens a file for reading; decompresses it if its name ends in .gz or .xz.

    Raises:
        ValueError: not a regular file; or, while reading, a file expands to more than `EXPANSION` times its size.
        OSError: the file does not exist.
    """
    check_regular(path)
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    opener = gzip.GzipFile if path.suffix == ".gz" else lzma.LZMAFile
    return io.BufferedReader(_Expanded(path, opener(path)), buffer_size=1 << 17)


class _Expanded(io.RawIOBase):
    """A decompressed file with a limit on its size, against bombs; readers need memory only for a buffer."""

    def __init__(self, path: Path, packed: gzip.GzipFile | lzma.LZMAFile) -> None:
        self.path, self.packed, self.n_read = path, packed, 0
        self.ratio = EXPANSION[path.suffix]
        self.limit = max(EXPANSION_FREE_BYTES, self.ratio * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self.packed.readinto(buffer)
        self.n_read += n
        if self.n_read > self.limit:
            raise ValueError(
                f"{self.path}: must hold at most {self.ratio} times its size on disk ({self.limit:,} bytes), "
                "got more; decompress it first if that is intended"
            )
        return n

    def close(self) -> None:
        self.packed.close()
        super().close()


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: the file is missing or not a JSON object.
    """
    path = Path(path)
    try:
        check_regular(path)
        with path.open("rb") as file:
            raw = file.read(JSON_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > JSON_BYTES:
        raise ValueError(f"{path}: must have at most {JSON_BYTES:,} bytes of JSON, got more")
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(path: str | Path, obj: Any) -> None:
    """Writes JSON atomically: a reader sees either the old content or the new.

    Raises:
        ValueError: a float is NaN or infinite, which JSON cannot represent; write None.
    """
    text = json_text(obj, Path(path).name)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(obj: Any, name: str) -> str:
    """Formats a JSON file of a run as text.

    Raises:
        ValueError: a float is NaN or infinite, in the file called `name`.
    """
    if (where := _non_finite(obj)) is not None:
        raise ValueError(f"{name}: {where} must be finite; write a missing number as null")
    return json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _non_finite(obj: Any, path: str = "value") -> str | None:
    """Path and value of the first float that JSON cannot represent."""
    if isinstance(obj, float):
        return None if math.isfinite(obj) else f"{path} = {obj}"
    if isinstance(obj, Mapping):
        parts: Iterator[tuple[str, Any]] = ((f"{path}.{key}", value) for key, value in obj.items())
    elif isinstance(obj, list | tuple):
        parts = ((f"{path}[{i}]", value) for i, value in enumerate(obj))
    else:
        return None
    return next((where for part, value in parts if (where := _non_finite(value, part)) is not None), None)
