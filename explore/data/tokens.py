"""The token cache: each split is one memory-mapped stream of ids, keyed by the content of text and tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from explore.data.cache import HEADER_BYTES, cache_folder, open_array, read_header, sealed, update_digest, write_header
from explore.data.corpora import Corpus
from explore.data.progress import progress
from explore.data.splits import SPLITS, Split
from explore.data.tokenizer import PIECE_CHARS, Tokenizer
from explore.files import held, remove_abandoned, try_lock

BATCH_CHARS = 1 << 21
"""Amount of text tokenized at once in memory."""

SHARD_BATCHES = 8
"""Batches between saves of progress: the most work that a kill can cost."""

PARTIAL = ".partial"
PARTIAL_KEPT_S = 7 * 86400


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split; an end-of-text token precedes each document.

    Attributes:
        ids: memory-mapped, read-only.
        n_bytes: UTF-8 bytes of the text; an end-of-text token has none.
    """

    ids: np.ndarray
    n_bytes: int
    n_documents: int

    @property
    def n_tokens(self) -> int:
        return len(self.ids)


def token_streams(corpus: Corpus, tokenizer: Tokenizer, splits: Collection[Split] = SPLITS) -> dict[Split, TokenStream]:
    """Opens the cached tokens of some splits; tokenizes missing or damaged ones, reading the text once.

    After a kill, the next process continues from the last save. If two processes need the same tokens, one tokenizes
    and the other waits.

    Raises:
        ValueError: the tokenizer loses bytes that its table counts, or the text changes while it is read.
    """
    files = {split: _File.of(corpus, split, tokenizer) for split in splits}
    streams = {split: file.open() for split, file in files.items()}
    if not all(streams.values()):
        _make({split: file for split, file in files.items() if streams[split] is None}, corpus, tokenizer)
        streams = {split: streams[split] or file.open() for split, file in files.items()}
    found = {split: stream for split, stream in streams.items() if stream is not None}
    assert len(found) == len(files)
    return found


@dataclass(frozen=True)
class _File:
    """The cache file of a split's tokens, and the text and tokenizer that it belongs to."""

    path: Path
    content_hash: str
    tokenizer_hash: str
    dtype: str

    @classmethod
    def of(cls, corpus: Corpus, split: Split, tokenizer: Tokenizer) -> _File:
        text, vocabulary = corpus.content_hash(split), tokenizer.content_hash
        path = cache_folder("tokens") / f"{text[:24]}-{vocabulary[:24]}.tokens"
        return cls(path, text, vocabulary, "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    @property
    def key(self) -> dict[str, str]:
        return {"content_hash": self.content_hash, "tokenizer_hash": self.tokenizer_hash, "dtype": self.dtype}

    @property
    def partial(self) -> Path:
        return self.path.with_suffix(PARTIAL)

    def open(self) -> TokenStream | None:
        found = open_array(self.path, np.dtype(self.dtype), self.key)
        return None if found is None else TokenStream(found[0], found[1]["n_bytes"], found[1]["n_documents"])


def _make(files: Mapping[Split, _File], corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Tokenizes the splits that no other process has tokenized once this one gets the lock."""
    _remove_old(cache_folder("tokens"))
    with ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        with progress("waiting for another process to tokenize the same text", None) as report:
            # In the order of paths, so that no two processes wait for each other.
            for path in sorted({file.partial for file in files.values()}):
                opened[path] = stack.enter_context(held(path, lambda: report(0)))
        writers = {}
        for split, file in files.items():
            if file.open() is None:
                writers[split] = _Writer(file, opened[file.partial], tokenizer)
            else:
                file.partial.unlink(missing_ok=True)
        try:
            _fill(corpus, tokenizer, writers)
        except ValueError:  # text or tokenizer is at fault; the next attempt starts over
            for writer in writers.values():
                writer.file.partial.unlink(missing_ok=True)
            raise


def _fill(corpus: Corpus, tokenizer: Tokenizer, writers: Mapping[Split, _Writer]) -> None:
    with progress(f"tokenizing {corpus.name}", sum(map(corpus.n_bytes, writers))) as report:
        for split, chunks in corpus.read(writers):
            for i, piece in enumerate(tokenizer.pieces(chunks)):
                writers[split].add(piece, opens=i == 0)
                report(sum(writer.n_bytes for writer in writers.values()))
        for split, writer in writers.items():
            writer.finish(f"{corpus.name} {split}")


class _Writer:
    """Writes the tokens of one split, resuming from an earlier process."""

    def __init__(self, file: _File, output: BinaryIO, tokenizer: Tokenizer) -> None:
        self.file, self.output, self.tokenizer = file, output, tokenizer
        self.key = {**file.key, "batch_chars": BATCH_CHARS, "piece_chars": PIECE_CHARS}
        self.batch: list[tuple[str, bool]] = []
        self.n_chars = self.n_bytes = self.n_documents = self.n_batches = 0
        self.n_tokens = self.counted = 0
        self.text_digest, self.ids_digest = hashlib.sha256(), hashlib.sha256()
        self.resumed = self._resume()

    def add(self, text: str, opens: bool) -> None:
        """Adds a piece of text; `opens` is true if it starts a document."""
        self.batch.append((text, opens))
        self.n_chars += len(text)
        if self.n_chars >= BATCH_CHARS:
            self._flush()

    def finish(self, what: str) -> None:
        """Moves the complete stream to its final path.

        Raises:
            ValueError: the bytes of the tokens are not those of the text `what`.
        """
        self._flush()
        if self.tokenizer.token_bytes is not None and self.counted != self.n_bytes:
            raise ValueError(
                f"tokenizer: {self.tokenizer.name!r} must keep every byte: its tokens of {what} stand for "
                f"{self.counted} bytes, the text has {self.n_bytes}"
            )
        fields = {"n": self.n_tokens, "n_bytes": self.n_bytes, "n_documents": self.n_documents}
        self.output.truncate(HEADER_BYTES + self.n_tokens * np.dtype(self.file.dtype).itemsize)
        write_header(self.output, sealed({**self.file.key, **fields}, self.ids_digest))
        self.output.flush()
        os.fsync(self.output.fileno())
        self.file.partial.replace(self.file.path)

    def _flush(self) -> None:
        if not self.batch:
            return
        batch, self.batch, self.n_chars = self.batch, [], 0
        for text, opens in batch:
            raw = text.encode()
            self.text_digest.update(b"\1" if opens else b"\0")
            self.text_digest.update(raw)
            self.n_bytes += len(raw)
            self.n_documents += opens
        self.n_batches += 1
        resumed_batches = self.resumed.get("n_batches", 0)
        if self.n_batches == resumed_batches and self.text_digest.hexdigest() != self.resumed["text_sha256"]:
            raise ValueError("corpus: the text changed while it was read; try again")
        if self.n_batches > resumed_batches:
            self._write(batch)
            if self.n_batches % SHARD_BATCHES == 0:
                self._save_progress()

    def _write(self, batch: list[tuple[str, bool]]) -> None:
        flat: list[int] = []
        for (_, opens), piece in zip(batch, self.tokenizer.encode_batch([text for text, _ in batch]), strict=True):
            if opens:
                flat.append(self.tokenizer.eot_id)
            flat += piece
        ids = np.array(flat, dtype=self.file.dtype)
        self.output.write(ids.data)
        self.ids_digest.update(ids.data)
        self.n_tokens += len(ids)
        if self.tokenizer.token_bytes is not None:
            self.counted += int(self.tokenizer.token_bytes[ids].sum())

    def _save_progress(self) -> None:
        self.output.flush()  # the record must not count tokens that are not in the file
        done = {"n_batches": self.n_batches, "n_tokens": self.n_tokens, "counted": self.counted}
        digests = {"text_sha256": self.text_digest.hexdigest(), "ids_sha256": self.ids_digest.hexdigest()}
        write_header(self.output, {**self.key, **done, **digests})
        self.output.flush()
        self.output.seek(0, os.SEEK_END)

    def _resume(self) -> dict[str, Any]:
        """Returns the record of an earlier process if its tokens are intact, and truncates the file after them."""
        digest, n_bytes = hashlib.sha256(), 0
        resumed: dict[str, Any] = {}
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = read_header(self.output)
            if all(record[name] == value for name, value in self.key.items()):
                n_bytes = record["n_tokens"] * np.dtype(self.file.dtype).itemsize
                whole = update_digest(digest, self.output, n_bytes) == n_bytes
                if whole and digest.hexdigest() == record["ids_sha256"]:
                    self.n_tokens, self.counted, self.ids_digest = record["n_tokens"], record["counted"], digest
                    resumed = record
        self.output.truncate(HEADER_BYTES + n_bytes if resumed else 0)
        self.output.seek(HEADER_BYTES + n_bytes if resumed else HEADER_BYTES)
        return resumed


def _remove_old(folder: Path) -> None:
    """Removes files of killed processes that no other process will resume."""
    remove_abandoned(folder)
    for path in folder.glob(f"*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > PARTIAL_KEPT_S:
                lock = os.open(path, os.O_RDWR)
                try:
                    if try_lock(lock):
                        path.unlink()
                finally:
                    os.close(lock)
