"""Files as documents: a .txt file is one document, a .jsonl file holds one per line; both may be .gz or .xz.

Text is read in chunks, so a document may be far larger than memory.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from explore.data.cache import cache_folder, open_array, save_array
from explore.data.progress import progress
from explore.files import COMPRESSIONS, UNREADABLE, open_plain
from explore.foreign import echo, parse_json

SUFFIXES = (".txt", ".jsonl")
ALLOWED = ".txt or .jsonl, plain, .gz or .xz"

Chunk = tuple[bool, str]
"""Whether this piece of text begins a document, and the piece."""

CHUNK_BYTES = 1 << 20
LINE_BYTES = 1 << 27
"""Bytes of the longest allowed line of a .jsonl file; lines are read whole."""

INDEX_DTYPE = np.dtype([("digest", "V32"), ("n_bytes", "<u8")])
"""One row per document: SHA-256 of its UTF-8 bytes, and their number."""

SETTLED_NS = 50_000_000
"""Two changes of a file within this time may get the same time stamp."""


def is_text_file(path: Path) -> bool:
    """Whether `read_chunks` can read a file with this extension; False for hidden files."""
    return _format(path) in SUFFIXES and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The file name without extensions: `austen-train` for `austen-train.txt.xz`."""
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name
    return name.removesuffix(_format(path))


def read_chunks(path: Path) -> Iterator[Chunk]:
    """Yields the documents of one file in order, without a byte-order mark; skips blank documents of .jsonl files.

    Raises:
        ValueError: the file is not UTF-8 or not JSON, a record has no string `text`, or the archive is broken.
    """
    try:
        with open_plain(path) as file:
            yield from _json_lines(path, file) if _format(path) == ".jsonl" else _text(path, file)
    except UNREADABLE as error:
        raise ValueError(f"corpus: {path} cannot be read ({error})") from error


def watched(chunks: Iterable[Chunk], ended: Callable[[bytes, int, bool], None]) -> Iterator[Chunk]:
    """Passes chunks on and calls `ended` after each document with its digest, its bytes, and whether it is blank."""
    digest, n_bytes, blank = None, 0, True
    for opens, text in chunks:
        if opens:
            if digest is not None:
                ended(digest.digest(), n_bytes, blank)
            digest, n_bytes, blank = hashlib.sha256(), 0, True
        assert digest is not None
        raw = text.encode()
        digest.update(raw)
        n_bytes += len(raw)
        blank = blank and (not text or text.isspace())
        yield opens, text
    if digest is not None:
        ended(digest.digest(), n_bytes, blank)


def index_chunks(chunks: Iterable[Chunk], report: Callable[[int], None] | None = None) -> np.ndarray:
    """Returns the digest and length of every nonblank document, as an array of `INDEX_DTYPE`.

    Args:
        report: called with the number of characters read so far.
    """
    rows, n_chars = bytearray(), 0

    def ended(digest: bytes, n_bytes: int, blank: bool) -> None:
        if not blank:
            rows.extend(digest + n_bytes.to_bytes(8, "little"))

    for _, text in watched(chunks, ended):
        n_chars += len(text)
        if report is not None:
            report(n_chars)
    index = np.frombuffer(rows, dtype=INDEX_DTYPE)
    index.flags.writeable = False
    return index


def index_file(path: Path) -> np.ndarray:
    """Returns the index of one file, from the cache unless the file changed.

    A change shows in size, inode, mtime or ctime; users cannot set ctime.
    """
    status = path.stat()
    version = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    key = hashlib.sha256("\0".join(map(str, (path.resolve(), *version))).encode()).hexdigest()
    cached = cache_folder("documents") / f"{key[:32]}.index"
    if (found := open_array(cached, INDEX_DTYPE, {"file": key})) is not None:
        return found[0]
    started = time.time_ns()
    with progress(f"reading {path.name}", None if path.suffix in COMPRESSIONS else status.st_size) as report:
        index = index_chunks(read_chunks(path), report)
    after = path.stat()
    if version != (after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino):
        raise ValueError(f"corpus: {path} changed while it was read; try again")
    if started - status.st_ctime_ns > SETTLED_NS:
        save_array(cached, index, {"file": key})
    return index


def _format(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _text(path: Path, file: io.BufferedReader) -> Iterator[Chunk]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    raw = file.read(CHUNK_BYTES)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"corpus: {path}: must be UTF-8, got UTF-16")
    n_read = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    raw, opens = raw[n_read:], True
    while True:
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            place = n_read - pending + error.start
            raise ValueError(f"corpus: {path}: must be UTF-8, byte {place} is not ({error.reason})") from error
        if text:
            yield opens, text
            opens = False
        if not raw:
            return
        n_read += len(raw)
        raw = file.read(CHUNK_BYTES)


def _json_lines(path: Path, file: io.BufferedReader) -> Iterator[Chunk]:
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise ValueError(
                f"corpus: {path}, line {number}: must have at most {LINE_BYTES:,} bytes, got more; "
                "a .txt file may hold a document of any length"
            )
        if not line.strip():
            continue
        try:
            text = _text_of(parse_json(line))
        except ValueError as error:
            raise ValueError(f"corpus: {path}, line {number}: {error}") from None
        if text and not text.isspace():
            yield True, text


def _text_of(record: object) -> str:
    if not isinstance(record, dict):
        raise ValueError(f'needs a string in the field "text", found {type(record).__name__}')
    if "text" not in record:
        raise ValueError(f'needs a string in the field "text", found the fields {echo(", ".join(map(str, record)))}')
    if not isinstance(text := record["text"], str):
        raise ValueError(f'needs a string in the field "text", found {"null" if text is None else echo(text)}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError('"text" holds half a surrogate pair, which UTF-8 cannot represent') from None
    return text
