"""Interpolated Kneser-Ney n-gram models: the floor that a language model must beat on the tokens it was trained on.

Source: Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 4.1, with one
discount for each order. To fit 30 million tokens of Zipf's law takes 12 to 35 s of one core and 30 to 70 bytes per
training token, from a trigram to a 5-gram.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer

from explore.data import TextSource
from explore.data.cache import cache_folder, sealed
from explore.evals.bits_per_byte import Score
from explore.files import read_json, replacing

ORDERS = range(2, 6)
"""Allowed orders: bigrams to 5-grams."""

EVALUATED: tuple[Literal["val", "test"], ...] = ("val", "test")

CHUNK = 1 << 20
"""Tokens scored at once."""

FALLBACK_DISCOUNT = 0.5
"""Discount of an order if no n-gram occurs exactly once, so that it cannot be estimated."""


@dataclass(frozen=True, eq=False)
class _Order:
    """All n-grams of one length, by the index of their context (the first n - 1 tokens) and their last token.

    Attributes:
        keys: context * vocab_size + token, sorted; the position of a key is the index of its n-gram.
        counts: occurrences; below the highest order, the number of different tokens that precede the n-gram.
        totals: sum of the counts of each context.
        kinds: number of different tokens that follow each context.
    """

    keys: Int64[np.ndarray, " ngrams"]
    counts: Integer[np.ndarray, " ngrams"]
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
        order: length of the longest n-gram, including the predicted token.
        begins: start positions in `ids` of stretches of text that do not continue the previous one; no n-gram crosses
            them. None means one stretch.

    Raises:
        ValueError: the order is not in `ORDERS`, or there are fewer tokens than the order.
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
        places, index = _places_in_stretch(len(ids), begins, order), _index_type(len(ids))
        orders: list[_Order] = []
        numbers = np.zeros(len(ids) + 1, index)  # numbers[i + 1]: index of the n-gram that ends with token i
        keys, counts, n_contexts = np.empty(0, np.int64), np.empty(0, index), 1
        for n in range(1, order + 1):
            ends = np.flatnonzero(places >= n - 1).astype(index)  # last tokens of all n-grams
            found, some, which, seen = _unique(_keys(numbers[ends], ids[ends], vocab_size))
            if n > 1:  # each distinct n-gram adds one preceding token to the shorter n-gram that ends it
                counts = np.bincount(numbers[1:][ends[some]], minlength=len(keys)).astype(index)
                orders.append(_Order.of(keys, counts, n_contexts, vocab_size))
                n_contexts = len(keys)
            keys, counts = found, seen
            if n < order:
                numbers[ends + 1] = which
            del ends, some, which  # as large as the text
        orders.append(_Order.of(keys, counts, n_contexts, vocab_size))
        self._orders = tuple(orders)

    def log_probs(self, ids: Integer[np.ndarray, " tokens"]) -> Float64[np.ndarray, " predicted"]:
        """Log-probability in nats of every token but the first, given the tokens before it."""
        pieces = []
        for start in range(1, len(ids), CHUNK):
            before = max(0, start - self.order + 1)
            pieces.append(self._log_probs(ids[before : start + CHUNK])[start - before :])
        return np.concatenate(pieces) if pieces else np.empty(0)

    def _log_probs(self, ids: np.ndarray) -> np.ndarray:
        contexts = np.zeros(len(ids), np.int64)  # -1: unseen, or begins before the first token
        probs = np.full(len(ids), 1 / self.vocab_size)
        for order in self._orders:
            keys = contexts * self.vocab_size + ids
            at = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            known = (contexts >= 0) & (order.keys[at] == keys)
            totals = np.where(contexts >= 0, order.totals[contexts], 0)
            counts = np.where(known, order.counts[at], 0)
            left = order.discount * order.kinds[contexts] * probs  # mass that discounting leaves to the shorter context
            smoothed = (np.maximum(counts - order.discount, 0) + left) / np.maximum(totals, 1)
            probs = np.where(totals > 0, smoothed, probs)
            contexts = np.concatenate(([-1], np.where(known, at, -1)[:-1]))
        logs: np.ndarray = np.log(probs)
        return logs


def _places_in_stretch(n: int, begins: np.ndarray | None, order: int) -> np.ndarray:
    """Number of tokens of the same stretch before each token, at most `order`."""
    if begins is None:
        return np.minimum(np.arange(n), order).astype(np.int8)
    first = np.asarray(begins, dtype=bool).copy()
    first[:1] = True
    places = np.full(n, order, np.int8)
    for place in reversed(range(order)):
        places[place:][first[: n - place]] = place
    return places


def _index_type(n: int) -> type[np.signedinteger[Any]]:
    """The smallest type for indices of a text of this many tokens."""
    return np.int32 if n < np.iinfo(np.int32).max else np.int64


def _keys(contexts: np.ndarray, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    keys = contexts.astype(np.int64)
    keys *= vocab_size
    keys += ids
    return keys


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the sorted distinct keys, an index of each, the inverse indices, and the counts.

    Like `np.unique`, but faster, since that sorts stably, and in less memory. The keys are freed if nothing else refers
    to them.
    """
    index = _index_type(len(keys))
    order = np.argsort(keys)
    keys = keys[order]
    order = order.astype(index)
    new = np.concatenate(([True], keys[1:] != keys[:-1]))
    keys = keys[new]
    which = np.empty(len(order), index)
    which[order] = np.cumsum(new, dtype=index) - 1
    starts = np.flatnonzero(new)
    return keys, order[starts], which, np.diff(starts, append=len(order)).astype(index)


def ngram_scores(
    source: TextSource, order: int = 3, n_windows: int | None = None, max_tokens: int | None = None
) -> dict[Literal["val", "test"], Score]:
    """Scores validation and test text with an n-gram model of the training tokens.

    The scores are cached by the content of all three texts.

    Args:
        n_windows: number of windows that a run reads; None, or an epoch or more, takes all training tokens.
        max_tokens: tokens of each split to score, as in `TextSource.eval_batches`.

    Raises:
        ValueError: the order is not in `ORDERS`, there are fewer tokens than the order, or `max_tokens` cannot be
            applied.
    """
    ids, begins = source.tokens_read(n_windows)
    targets = {split: source.n_targets(split, max_tokens) for split in EVALUATED}
    texts = {split: source.streams[split].ids[: n + 1] for split, n in targets.items()}
    digest = hashlib.sha256(json.dumps(["interpolated Kneser-Ney", order, source.vocab_size]).encode())
    for array in (ids, begins, *texts.values()):
        digest.update(hashlib.sha256(np.ascontiguousarray(array).data).digest())
    path = cache_folder("ngrams") / f"{digest.hexdigest()[:32]}.json"
    if (kept := _kept_scores(path)) is not None:
        return kept
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
        content: dict[str, Any] = {split: asdict(score) for split, score in scores.items()}
        temporary.write_text(json.dumps(sealed(content, hashlib.sha256())), encoding="utf-8")
    return scores


def _kept_scores(path: Path) -> dict[Literal["val", "test"], Score] | None:
    """The cached scores; None if the file is missing, damaged, or of a version without digests."""
    try:
        content = read_json(path)
        if sealed(content, hashlib.sha256()) != content:
            return None
        return {split: Score(**content[split]) for split in EVALUATED}
    except (ValueError, LookupError, TypeError):
        return None
