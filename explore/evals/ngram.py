"""Interpolated Kneser-Ney n-gram models: the floor that a language model must beat on the tokens it was trained on.

Source: Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 4.1, with one
discount for each order. Memory is about 50 bytes a training token and order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer

from explore.data import TextSource
from explore.data.cache import cache_folder
from explore.evals.bits_per_byte import Score
from explore.files import read_json, replacing

ORDERS = range(2, 6)
"""Orders that a floor may have: bigrams to 5-grams."""

EVALUATED: tuple[Literal["val", "test"], ...] = ("val", "test")

CHUNK = 1 << 20
"""Tokens that are scored at once."""

FALLBACK_DISCOUNT = 0.5
"""Where an order has no n-gram that occurs once, from which its discount would be estimated."""


@dataclass(frozen=True, eq=False)
class _Order:
    """All n-grams of one length, by the number of their context (their first n - 1 tokens) and their last token.

    Attributes:
        keys: context times vocabulary plus token, sorted; the place of a key is the number of its n-gram.
        counts: occurrences; below the highest order, of how many different tokens stand before the n-gram.
        totals: sum of the counts of a context.
        kinds: tokens with a count that follow a context.
    """

    keys: Int64[np.ndarray, " ngrams"]
    counts: Int64[np.ndarray, " ngrams"]
    totals: Float64[np.ndarray, " contexts"]
    kinds: Float64[np.ndarray, " contexts"]
    discount: float

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, n_contexts: int, vocab_size: int) -> _Order:
        contexts = keys // vocab_size
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        return cls(
            keys,
            counts,
            np.bincount(contexts, weights=counts, minlength=n_contexts),
            np.bincount(contexts, weights=counts > 0, minlength=n_contexts),
            float(once / (once + 2 * twice)) if once else FALLBACK_DISCOUNT,
        )


class NgramModel:
    """An interpolated Kneser-Ney model of token ids.

    Args:
        ids: training tokens.
        order: tokens of the longest n-gram, the predicted one included.
        begins: where a stretch of text begins that does not follow what stands before it in `ids`: no n-gram crosses
            such a place. One stretch when absent.

    Raises:
        ValueError: the order is not in `ORDERS`, or there are fewer tokens than it.
    """

    def __init__(
        self,
        ids: Integer[np.ndarray, " tokens"],
        vocab_size: int,
        order: int = 3,
        begins: Bool[np.ndarray, " tokens"] | None = None,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order must be from {ORDERS[0]} to {ORDERS[-1]}, got {order}")
        if len(ids) < order:
            raise ValueError(f"ids must have at least {order} tokens for an order of {order}, got {len(ids)}")
        self.vocab_size, self.order = vocab_size, order
        places = _places_in_stretch(len(ids), begins)
        orders: list[_Order] = []
        numbers = np.zeros(len(ids) + 1, np.int64)  # numbers[i + 1]: of the n-gram that ends with token i
        keys, counts, n_contexts = np.empty(0, np.int64), np.empty(0, np.int64), 1
        for n in range(1, order + 1):
            ends = np.flatnonzero(places >= n - 1)  # of all n-grams
            found, some, which, seen = _unique(numbers[ends] * vocab_size + ids[ends])
            if n > 1:  # every different n-gram is one more token before the shorter one that ends with it
                counts = np.bincount(numbers[1:][ends[some]], minlength=len(keys))
                orders.append(_Order.of(keys, counts, n_contexts, vocab_size))
                n_contexts = len(keys)
            keys, counts = found, seen
            numbers[ends + 1] = which
        orders.append(_Order.of(keys, counts, n_contexts, vocab_size))
        self._orders = tuple(orders)

    def log_probs(self, ids: Integer[np.ndarray, " tokens"]) -> Float64[np.ndarray, " predicted"]:
        """Log-probability of every token but the first, each after all that stand before it, in nats."""
        pieces = []
        for start in range(1, len(ids), CHUNK):
            before = max(0, start - self.order + 1)
            pieces.append(self._log_probs(ids[before : start + CHUNK])[start - before :])
        return np.concatenate(pieces) if pieces else np.empty(0)

    def _log_probs(self, ids: np.ndarray) -> np.ndarray:
        contexts = np.zeros(len(ids), np.int64)  # -1: did not occur, or begins before the first token
        probs = np.full(len(ids), 1 / self.vocab_size)
        for order in self._orders:
            keys = contexts * self.vocab_size + ids
            at = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            known = (contexts >= 0) & (order.keys[at] == keys)
            totals = np.where(contexts >= 0, order.totals[contexts], 0)
            counts = np.where(known, order.counts[at], 0)
            left = order.discount * order.kinds[contexts] * probs  # what discounting leaves to the shorter context
            smoothed = (np.maximum(counts - order.discount, 0) + left) / np.maximum(totals, 1)
            probs = np.where(totals > 0, smoothed, probs)
            contexts = np.concatenate(([-1], np.where(known, at, -1)[:-1]))
        logs: np.ndarray = np.log(probs)
        return logs


def _places_in_stretch(n: int, begins: np.ndarray | None) -> np.ndarray:
    """How many tokens of its own stretch stand before each token."""
    places = np.arange(n)
    if begins is None:
        return places
    firsts: np.ndarray = np.maximum.accumulate(np.where(begins, places, 0))
    after: np.ndarray = places - firsts
    return after


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The different keys in order, where one of each stands, which of them each key is, and how often each occurs.

    As `np.unique`, which sorts stably and takes several times as long.
    """
    order = np.argsort(keys)
    ordered = keys[order]
    new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    which = np.empty(len(keys), np.int64)
    which[order] = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    return ordered[starts], order[starts], which, np.diff(starts, append=len(keys))


def ngram_scores(
    source: TextSource, order: int = 3, n_windows: int | None = None, max_tokens: int | None = None
) -> dict[Literal["val", "test"], Score]:
    """Scores of the validation and the test text by an n-gram model of the training tokens.

    The scores are cached by the content of all three texts.

    Args:
        n_windows: windows that a run reads; all training tokens when absent, or when that is an epoch or more.
        max_tokens: of each split, as in `TextSource.eval_batches`.

    Raises:
        ValueError: the order is not in `ORDERS`, there are fewer tokens than it, or `max_tokens` cannot be applied.
    """
    ids, begins = source.tokens_read(n_windows)
    targets = {split: source.n_targets(split, max_tokens) for split in EVALUATED}
    texts = {split: source.streams[split].ids[: n + 1] for split, n in targets.items()}
    digest = hashlib.sha256(json.dumps(["interpolated Kneser-Ney", order, source.vocab_size]).encode())
    for array in (ids, begins, *texts.values()):
        digest.update(hashlib.sha256(np.ascontiguousarray(array).data).digest())
    path = cache_folder("ngrams") / f"{digest.hexdigest()[:32]}.json"
    if path.exists():
        kept = read_json(path)
        return {split: Score(**kept[split]) for split in EVALUATED}
    model = NgramModel(ids, source.vocab_size, order, begins)
    table = source.tokenizer.token_bytes
    scores = {
        split: Score(
            nats=-float(model.log_probs(text).sum()),
            n_targets=targets[split],
            n_bytes=source.streams[split].n_bytes if table is None else int(table[text[1:]].sum()),
        )
        for split, text in texts.items()
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({split: asdict(score) for split, score in scores.items()}))
    return scores
