"""Files as documents: a .txt file is one document, a .jsonl file holds one per line; both may be .gz or .xz."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import numpy as np

from explore.data.cache import cache_folder
from explore.files import COMPRESSIONS, UNREADABLE, open_plain, replacing

SUFFIXES = (".txt", ".jsonl")
ALLOWED = ".txt or .jsonl, plain, .gz or .xz"

INDEX_DTYPE = np.dtype([("digest", "V32"), ("n_bytes", "<u8")])
"""One row a document: SHA-256 of its UTF-8 bytes, and their number."""


def is_text_file(path: Path) -> bool:
    """Whether `read_documents` knows the name's ending; hidden files do not count."""
    return _format(path) in SUFFIXES and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The file's name without its endings: `austen-train` of `austen-train.txt.xz`."""
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name
    return name.removesuffix(_format(path))


def digest(text: str) -> bytes:
    """SHA-256 of the text as UTF-8: equal documents have equal digests."""
    return hashlib.sha256(text.encode()).digest()


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, in order; blank ones are left out.

    Raises:
        ValueError: not UTF-8, not JSON, no string in the field `text`, or a broken archive; with file and line.
    """
    lines = _format(path) == ".jsonl"
    try:
        with open_plain(path) as file:
            texts = _json_lines(path, file) if lines else iter([_decoded(file.read(), str(path))])
            yield from (text for text in texts if text.strip())
    except UNREADABLE as error:
        raise ValueError(f"corpus: {path} cannot be read ({error})") from error


def index_documents(texts: Iterable[str]) -> np.ndarray:
    """Digest and length of every document: an array of `INDEX_DTYPE`."""
    return np.array([(digest(text), len(text.encode())) for text in texts], dtype=INDEX_DTYPE)


def index_file(path: Path) -> np.ndarray:
    """The index of one file, kept in the cache until the file's size or time changes."""
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()
    cached = cache_folder("documents") / f"{key[:32]}.npy"
    try:
        index = np.load(cached, allow_pickle=False)
        if index.dtype == INDEX_DTYPE and index.ndim == 1:
            return cast(np.ndarray, index)
    except (EOFError, OSError, ValueError):  # absent or damaged: it is made anew
        pass
    index = index_documents(read_documents(path))
    with replacing(cached) as temporary, temporary.open("wb") as file:
        np.save(file, index, allow_pickle=False)
    return index


def _format(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _json_lines(path: Path, file: io.BufferedIOBase) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(_decoded(line, where))
        except json.JSONDecodeError as error:
            raise ValueError(f"corpus: {where}: not JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            found = f"the fields {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
            raise ValueError(f'corpus: {where}: needs a string in the field "text", found {found}')
        try:
            record["text"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f'corpus: {where}: "text" holds half a surrogate pair, which UTF-8 cannot hold') from error
        yield record["text"]


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus: {where}: must be UTF-8, byte {error.start} is not ({error.reason})") from error
