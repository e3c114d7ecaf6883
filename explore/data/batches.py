"""Batches: what a model reads and must predict, as a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from explore.data.splits import Split
from explore.data.tokenizer import Tokenizer
from explore.data.tokens import TokenStream

IGNORED = -100
"""Target of a position where nothing is predicted; `torch.nn.functional.cross_entropy` skips it."""

SAMPLED = 0
"""Seed of the sample of windows on which a run is validated during training."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Input sequences and the target of each position.

    Attributes:
        targets: -100 where nothing is predicted.
        n_bytes: UTF-8 bytes of the text of the targets; None if unknown or if the data is not text.
        n_pairs: key-value pairs in each sequence; None if the task is not recall.
    """

    inputs: Int64[Tensor, "batch seq"]
    targets: Int64[Tensor, "batch seq"]
    n_bytes: int | None = None
    n_pairs: tuple[int, ...] | None = None


@runtime_checkable
class Source(Protocol):
    """Data opened with a seed."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the data, one line each."""

    @property
    def n_train_tokens(self) -> int | None:
        """Tokens of the training text; None if the data is unlimited."""

    def batch(self, step: int, batch_size: int) -> Batch:
        """Returns training batch number `step`, independent of earlier calls."""

    def eval_batches(
        self, split: Literal["val", "test"], batch_size: int, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields the split in order, the same for every seed, or its first sequences up to `max_tokens`."""


def windows_per_epoch(n_tokens: int, seq_len: int) -> int:
    """Number of windows of `seq_len` tokens plus one target that fit at any offset below `seq_len`; at least 1."""
    return max(1, (n_tokens - seq_len) // seq_len)


@lru_cache(maxsize=4)
def window_starts(n_tokens: int, seq_len: int, seed: int, epoch: int) -> Int64[np.ndarray, " windows"]:
    """Start positions of the windows of one epoch, in reading order."""
    rng = np.random.default_rng([seed, epoch])
    n = windows_per_epoch(n_tokens, seq_len)
    offset = rng.integers(min(seq_len, n_tokens - n * seq_len))
    starts: Int64[np.ndarray, " windows"] = offset + seq_len * rng.permutation(n)
    starts.flags.writeable = False
    return starts


class TextSource:
    """Windows of token streams.

    An epoch cuts the training stream at a random offset into windows of `seq_len` that share no target, and
    reads them in a random order; offset and order are derived from the seed and the number of the epoch.
    """

    def __init__(
        self,
        streams: Mapping[Split, TokenStream],
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.streams, self.tokenizer, self.seq_len, self.seed, self.notes = streams, tokenizer, seq_len, seed, notes
        self.windows_per_epoch = windows_per_epoch(streams["train"].n_tokens, seq_len)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def n_train_tokens(self) -> int:
        return self.streams["train"].n_tokens

    def batch(self, step: int, batch_size: int) -> Batch:
        places = [divmod(step * batch_size + row, self.windows_per_epoch) for row in range(batch_size)]
        n_tokens, seq_len = self.n_train_tokens, self.seq_len
        starts = np.array([window_starts(n_tokens, seq_len, self.seed, epoch)[i] for epoch, i in places])
        windows = self.streams["train"].ids[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        return _batch(inputs, targets, self._bytes(targets))

    def tokens_read(self, n_windows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the training tokens in the first `n_windows` that a run reads, each once, in text order.

        Args:
            n_windows: number of windows; None, or an epoch or more, gives all tokens of the text.

        Returns:
            The tokens, and the start of every stretch that does not continue the previous one.
        """
        ids = self.streams["train"].ids
        if n_windows is None or n_windows >= self.windows_per_epoch:
            begins = np.zeros(len(ids), bool)
            begins[:1] = True
            return ids, begins
        starts = np.sort(window_starts(len(ids), self.seq_len, self.seed, 0)[:n_windows])
        last = np.append(np.diff(starts) > self.seq_len, True)  # ends of stretches: their last target is read as well
        places = starts[:, None] + np.arange(self.seq_len + 1)
        read = np.ones(places.shape, bool)
        read[:, -1] = last
        begins = np.zeros(places.shape, bool)
        begins[:, 0] = np.append(True, last[:-1])
        return ids[places[read]], begins[read]

    def eval_batches(
        self, split: Literal["val", "test"], batch_size: int, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields batches that predict every token of the split except the first once, in order.

        The last window is padded with targets of -100. If the tokenizer has no table of bytes per token, the bytes of
        the split are distributed over its batches by number of targets, so that their sum is exact.

        Args:
            max_tokens: yield only the first tokens, rounded down to whole windows, at least one.

        Raises:
            ValueError: `max_tokens` cuts the split and the tokenizer has no table of bytes per token.
        """
        return self._eval_batches(self.streams[split], self.n_targets(split, max_tokens), batch_size)

    def sampled_batches(
        self, split: Literal["val", "test"], batch_size: int, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields windows spread evenly over the whole split, and so over its documents; the same for every seed.

        Args:
            max_tokens: number of tokens, rounded down to whole windows, at least one; the whole split in order if None
                or too large.

        Raises:
            ValueError: as for `eval_batches`.
        """
        stream, n_targets = self.streams[split], self.n_targets(split, max_tokens)
        if n_targets == stream.n_tokens - 1:
            yield from self._eval_batches(stream, n_targets, batch_size)
            return
        n, n_places = n_targets // self.seq_len, (stream.n_tokens - 1) // self.seq_len
        edges = np.arange(n + 1) * n_places // n  # one window of each of n pieces
        places = edges[:-1] + (np.random.default_rng(SAMPLED).random(n) * np.diff(edges)).astype(np.int64)
        starts = places * self.seq_len
        for some in np.split(starts, range(batch_size, n, batch_size)):
            windows = stream.ids[some[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
            yield _batch(windows[:, :-1], windows[:, 1:], self._bytes(windows[:, 1:]))

    def n_targets(self, split: Literal["val", "test"], max_tokens: int | None = None) -> int:
        """Number of tokens of a split that `eval_batches` predicts; raises the same errors."""
        n_targets = self.streams[split].n_tokens - 1
        if max_tokens is None or max_tokens >= n_targets:
            return n_targets
        if self.tokenizer.token_bytes is None:
            raise ValueError(
                f"max_tokens must be null with the tokenizer {self.tokenizer.name!r}, got {max_tokens}: "
                "it does not give the bytes per token, so only the bytes of the whole split are known"
            )
        return min(n_targets, max(1, max_tokens // self.seq_len) * self.seq_len)

    def _eval_batches(self, stream: TokenStream, n_targets: int, batch_size: int) -> Iterator[Batch]:
        per_batch = batch_size * self.seq_len
        for start in range(0, n_targets, per_batch):
            end = min(start + per_batch, n_targets)
            rows = -(-(end - start) // self.seq_len)
            inputs = np.full(rows * self.seq_len, self.tokenizer.eot_id, dtype=np.int64)
            targets = np.full(rows * self.seq_len, IGNORED, dtype=np.int64)
            inputs[: end - start] = stream.ids[start:end]
            targets[: end - start] = stream.ids[start + 1 : end + 1]
            n_bytes = self._bytes(targets[: end - start])
            if n_bytes is None:
                n_bytes = stream.n_bytes * end // n_targets - stream.n_bytes * start // n_targets
            shape = (rows, self.seq_len)
            yield _batch(inputs.reshape(shape), targets.reshape(shape), n_bytes)

    def _bytes(self, targets: np.ndarray) -> int | None:
        table = self.tokenizer.token_bytes
        return None if table is None else int(table[targets].sum())


def _batch(inputs: np.ndarray, targets: np.ndarray, n_bytes: int | None) -> Batch:
    # Copies: both are views of one window, and writing to tensors that share memory is a trap.
    return Batch(torch.tensor(inputs), torch.tensor(targets), n_bytes)
