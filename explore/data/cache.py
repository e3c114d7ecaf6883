"""The cache folder: arrays that can be recomputed, each with a checked digest, never pickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from explore.files import replacing
from explore.foreign import echo, parse_json

HEADER_BYTES = 1024
_READ_BYTES = 1 << 20


def cache_folder(kind: str) -> Path:
    """Returns the folder for one kind of cached file, under `$EXPLORE_CACHE` or `~/.cache/explore`.

    Raises:
        ValueError: the folder cannot be created.
    """
    root = os.environ.get("EXPLORE_CACHE") or "~/.cache/explore"
    folder = Path(root).expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"EXPLORE_CACHE: must be a folder that can be written, got {echo(root)} ({error.strerror})"
        ) from error
    return folder


def open_array(
    path: Path, dtype: np.dtype[Any], expected: Mapping[str, object]
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Opens a cached array, memory-mapped and read-only.

    The file is a header of 1024 bytes (JSON padded with blanks), followed by the array.

    Args:
        expected: fields that the header must have.

    Returns:
        The array and its header; None if the file is missing, damaged, or has other fields.
    """
    try:
        with path.open("rb") as file:
            header = read_header(file)
            if any(header[name] != value for name, value in expected.items()):
                return None
            digest = hashlib.sha256()
            n_bytes = update_digest(digest, file)
        if n_bytes != header["n"] * dtype.itemsize or sealed(header, digest) != header:
            return None
        if n_bytes == 0:  # an empty array cannot be mapped
            return np.frombuffer(b"", dtype), header
        return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(header["n"],)), header
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_array(path: Path, array: np.ndarray, fields: Mapping[str, Any]) -> None:
    """Writes an array for `open_array`, completely or not at all.

    Args:
        fields: further fields of the header.
    """
    raw = np.ascontiguousarray(array).view(np.uint8).data
    with replacing(path) as temporary, temporary.open("r+b") as file:
        write_header(file, sealed({**fields, "n": len(array)}, hashlib.sha256(raw)))
        file.write(raw)


def sealed(header: Mapping[str, Any], digest: Any) -> dict[str, Any]:
    """Adds the digest of the array and of the header itself to a header.

    Args:
        digest: SHA-256 of the array; not modified.
    """
    fields = {name: value for name, value in header.items() if name != "sha256"}
    both = digest.copy()
    both.update(json.dumps(fields, sort_keys=True).encode())
    return {**fields, "sha256": both.hexdigest()}


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Reads the header of a cached array from the start of its file.

    Raises:
        ValueError: the file has no valid header.
    """
    file.seek(0)
    header = parse_json(file.read(HEADER_BYTES))
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header


def write_header(file: BinaryIO, header: Mapping[str, Any]) -> None:
    """Writes the header over the first 1024 bytes."""
    raw = json.dumps(header).encode().ljust(HEADER_BYTES)
    assert len(raw) == HEADER_BYTES
    file.seek(0)
    file.write(raw)


def update_digest(digest: Any, file: BinaryIO, n_bytes: int | None = None) -> int:
    """Adds the rest of an open file, or its next `n_bytes`, to a digest; returns the number of bytes read."""
    done = 0
    while block := file.read(_READ_BYTES if n_bytes is None else min(_READ_BYTES, n_bytes - done)):
        digest.update(block)
        done += len(block)
    return done
