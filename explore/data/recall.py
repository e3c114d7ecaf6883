"""Multi-query associative recall: can a model retrieve the value of a key that it read before?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from explore.data.batches import IGNORED, Batch

FILLER = 0
STREAMS = {"train": 0, "val": 1, "test": 2}


class RecallSource:
    """Sequences of key-value pairs, followed by some of the keys again; there the model must predict the value.

    Keys come from the lower half of the vocabulary, values from the upper half, all different within a sequence; the
    other positions are 0. With two pairs, two queries, 12 tokens and a vocabulary of 12:

        role      key  val  key  val                 query          query
        inputs      2    8    4    7    0    0    0    0    4    0    2    0
        targets  -100 -100 -100 -100 -100 -100 -100 -100    7 -100    8 -100

    Queries are at even offsets after the pairs; the i-th such position is drawn with weight i ** (power_a - 1), without
    repetition. Validation and test are the same for every seed.

    With `fewer_pairs`, sequences alternate between these numbers of pairs and `n_pairs`, so that a batch has all of
    them; a sequence with fewer pairs than `n_queries` has one query per pair.

    Source: Arora et al. 2023, arXiv 2312.04927, as in zoology's `multiquery_ar` without random fillers. Here there may
    be fewer queries than pairs; the queried pairs are then drawn at random. Zoology has a data set for each number of
    pairs and takes a batch from one of them; here every batch has all numbers.
    """

    n_train_tokens: int | None = None
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        seq_len: int,
        n_pairs: int,
        n_queries: int,
        vocab_size: int,
        power_a: float,
        n_eval: int,
        seed: int,
        fewer_pairs: Sequence[int] = (),
    ) -> None:
        self.seq_len, self.n_queries, self.vocab_size = seq_len, n_queries, vocab_size
        self.power_a, self.n_eval, self.seed = power_a, n_eval, seed
        self.numbers = (*fewer_pairs, n_pairs)

    def batch(self, step: int, batch_size: int) -> Batch:
        return self._draw(batch_size, [STREAMS["train"], self.seed, step])

    def eval_batches(
        self, split: Literal["val", "test"], batch_size: int, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """The `n_eval` sequences of the split, or the first of them (at least one) up to `max_tokens` tokens."""
        drawn = self._draw(self.n_eval, [STREAMS[split], 0, 0])
        n = self.n_eval if max_tokens is None else min(self.n_eval, max(1, max_tokens // self.seq_len))
        for start in range(0, n, batch_size):
            rows = slice(start, min(start + batch_size, n))
            assert drawn.n_pairs is not None
            yield Batch(drawn.inputs[rows], drawn.targets[rows], n_pairs=drawn.n_pairs[rows])

    def _draw(self, batch_size: int, entropy: list[int]) -> Batch:
        rng = np.random.default_rng(entropy)
        inputs = np.full((batch_size, self.seq_len), FILLER)
        targets = np.full((batch_size, self.seq_len), IGNORED)
        for i, n_pairs in enumerate(self.numbers):
            rows = slice(i, None, len(self.numbers))
            self._fill(rng, inputs[rows], targets[rows], n_pairs)
        n_pairs_of = tuple(self.numbers[row % len(self.numbers)] for row in range(batch_size))
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), n_pairs=n_pairs_of)

    def _fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, n_pairs: int) -> None:
        """Writes sequences of `n_pairs` pairs into rows of fillers and ignored targets."""
        n_rows, n_queries = len(inputs), min(self.n_queries, n_pairs)
        half, context = self.vocab_size // 2, 2 * n_pairs
        keys = 1 + _distinct(rng, n_rows, np.zeros(half - 1), n_pairs)
        values = half + _distinct(rng, n_rows, np.zeros(self.vocab_size - half), n_pairs)
        places = np.arange(1, (self.seq_len - context) // 2 + 1)
        gaps = _distinct(rng, n_rows, (self.power_a - 1) * np.log(places), n_queries)
        asked = _distinct(rng, n_rows, np.zeros(n_pairs), n_queries)
        inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
        np.put_along_axis(inputs, context + 2 * gaps, np.take_along_axis(keys, asked, 1), 1)
        np.put_along_axis(targets, context + 2 * gaps, np.take_along_axis(values, asked, 1), 1)


def _distinct(rng: np.random.Generator, rows: int, log_weights: np.ndarray, n: int) -> np.ndarray:
    """Draws n distinct indices per row, one after another by weight (the Gumbel top-k trick)."""
    scores = -(log_weights + rng.gumbel(size=(rows, len(log_weights))))
    if n == len(log_weights):
        return np.argsort(scores, axis=1)
    first = np.argpartition(scores, n, axis=1)[:, :n]  # unordered; takes a third of the time of a full sort
    order = np.argsort(np.take_along_axis(scores, first, 1), axis=1)
    return np.take_along_axis(first, order, 1)
