"""The token cache: a split as one memory-mapped stream of ids, keyed by the content of text and tokenizer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import Progress

from explore.data.cache import cache_folder
from explore.data.corpora import Corpus
from explore.data.splits import Split
from explore.data.tokenizer import Tokenizer
from explore.files import replacing

HEADER_BYTES = 1024
BATCH_CHARS = 1 << 21
PATIENCE_S = 2.0


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split, each document behind an end of text.

    Attributes:
        ids: memory-mapped, read-only.
        n_bytes: UTF-8 bytes of the text; an end of text stands for none.
    """

    ids: np.ndarray
    n_bytes: int
    n_documents: int

    @property
    def n_tokens(self) -> int:
        return len(self.ids)


def token_stream(corpus: Corpus, split: Split, tokenizer: Tokenizer) -> TokenStream:
    """Opens the cached tokens of a split; makes them if they are absent or damaged.

    The file is a header of 1024 bytes, JSON and blanks, and then the ids, uint16 if they fit and else uint32.

    Raises:
        ValueError: the tokenizer loses bytes that its table counts.
    """
    key = {"content_hash": corpus.content_hash(split), "tokenizer_hash": tokenizer.content_hash}
    path = cache_folder("tokens") / f"{key['content_hash'][:24]}-{key['tokenizer_hash'][:24]}.tokens"
    stream = _opened(path, key)
    if stream is None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            _write(file, corpus, split, tokenizer, key)
        stream = _opened(path, key)
    assert stream is not None
    return stream


def _opened(path: Path, key: dict[str, str]) -> TokenStream | None:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
        n_tokens, dtype = int(header["n_tokens"]), np.dtype(header["dtype"])
        whole = path.stat().st_size == HEADER_BYTES + n_tokens * dtype.itemsize
        if not whole or any(header[name] != value for name, value in key.items()):
            return None
        ids = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
        return TokenStream(ids, int(header["n_bytes"]), int(header["n_documents"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: BinaryIO, corpus: Corpus, split: Split, tokenizer: Tokenizer, key: dict[str, str]) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    n_tokens = n_bytes = counted = 0
    file.write(b" " * HEADER_BYTES)
    with _progress(f"tokenizing {corpus.name} {split}", corpus.n_bytes(split)) as reach:
        for batch in _batches(corpus.documents(split), tokenizer):
            for (_, opens), piece in zip(batch, tokenizer.encode_batch([text for text, _ in batch]), strict=True):
                ids = np.array([tokenizer.eot_id, *piece] if opens else piece, dtype=dtype)
                file.write(ids.tobytes())
                n_tokens += len(ids)
                counted += 0 if tokenizer.token_bytes is None else int(tokenizer.token_bytes[ids].sum())
            n_bytes += sum(len(text.encode()) for text, _ in batch)
            reach(n_bytes)
    if tokenizer.token_bytes is not None and counted != n_bytes:
        raise ValueError(
            f"tokenizer: {tokenizer.name!r} must keep every byte: its tokens of {corpus.name} {split} stand for "
            f"{counted} bytes, the text has {n_bytes}"
        )
    header = {**key, "dtype": dtype.str, "n_tokens": n_tokens, "n_bytes": n_bytes}
    header |= {"n_documents": corpus.n_documents(split)}
    file.seek(0)
    file.write(json.dumps(header).encode().ljust(HEADER_BYTES))


def _batches(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents in groups of bounded size, each with whether it opens its document."""
    batch: list[tuple[str, bool]] = []
    n_chars = 0
    for text in texts:
        for i, piece in enumerate(tokenizer.pieces(text)):
            batch.append((piece, i == 0))
            n_chars += len(piece)
            if n_chars >= BATCH_CHARS:
                yield batch
                batch, n_chars = [], 0
    if batch:
        yield batch


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal for work that turns out to take long, and nothing for the rest."""
    start = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)

    def reach(done: int) -> None:
        bar.update(task, completed=done)
        if sys.stderr.isatty() and time.monotonic() - start > PATIENCE_S:
            bar.start()

    try:
        yield reach
    finally:
        if bar.live.is_started:  # stopping prints an empty line otherwise
            bar.stop()
