"""Minimal pairs: does the model find the grammatical sentence more probable than its twin?"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from explore.data import Tokenizer
from explore.files import UNREADABLE, open_plain
from explore.model import LanguageModel


class MinimalPair(NamedTuple):
    """Two sentences that differ in one point of grammar; `uid` names the paradigm."""

    uid: str
    good: str
    bad: str


def read_minimal_pairs(path: Path, limit: int | None = None) -> list[MinimalPair]:
    """Reads a BLiMP or Zorro file: JSON lines with `uid`, `good` and `bad`, plain, .gz or .xz.

    Args:
        limit: keep only the first pairs of each paradigm.

    Raises:
        ValueError: no such file, or a line that is not such a record.
    """
    try:
        with open_plain(path) as lines:
            pairs = [_pair(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    except (*UNREADABLE, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: minimal pairs cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    seen: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        seen[pair.uid] += 1
        if limit is None or seen[pair.uid] <= limit:
            kept.append(pair)
    return kept


def _pair(line: bytes, path: Path, number: int) -> MinimalPair:
    try:
        record = json.loads(line)
        pair = MinimalPair(record["uid"], record["good"], record["bad"])
        if all(isinstance(text, str) for text in pair):
            return pair
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: line {number} is not a record with uid, good and bad")


@torch.inference_mode()
def minimal_pair_accuracy(
    model: LanguageModel, tokenizer: Tokenizer, pairs: Sequence[MinimalPair], *, batch_size: int = 128
) -> dict[str, float]:
    """Share of pairs whose good sentence has the higher log-probability, by paradigm.

    A sentence is scored whole, after the end-of-text token. Equal sentences count one half.

    Args:
        batch_size: sentences in a batch; they are sorted by length, so that little is padded.

    Returns:
        Accuracy of every `uid`; the mean over paradigms is the usual summary.

    Source: BLiMP, arXiv 1912.00582.
    """
    if not pairs:
        raise ValueError("pairs: there are none")
    sentences = sorted({sentence for pair in pairs for sentence in (pair.good, pair.bad)})
    encoded = tokenizer.encode_batch(sentences)
    log_probability = dict(
        zip(sentences, _log_probabilities(model, tokenizer.eot_id, encoded, batch_size), strict=True)
    )
    wins: dict[str, list[float]] = defaultdict(list)
    for uid, good, bad in pairs:
        a, b = log_probability[good], log_probability[bad]
        wins[uid].append(0.5 if a == b else float(a > b))
    return {uid: sum(results) / len(results) for uid, results in wins.items()}


def _log_probabilities(
    model: LanguageModel, eot_id: int, encoded: Sequence[Sequence[int]], batch_size: int
) -> Iterable[float]:
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    scores = [0.0] * len(encoded)
    for rows in _slices(order, batch_size):
        width = max(len(encoded[i]) for i in rows)
        tokens = torch.full((len(rows), width + 1), eot_id)
        targets = torch.full((len(rows), width), -100)
        for row, i in enumerate(rows):
            tokens[row, 1 : len(encoded[i]) + 1] = torch.tensor(encoded[i])
            targets[row, : len(encoded[i])] = torch.tensor(encoded[i])
        device = model.embedding.weight.device
        logits = model(tokens[:, :-1].to(device)).float()
        nats = F.cross_entropy(logits.transpose(1, 2), targets.to(device), ignore_index=-100, reduction="none").sum(1)
        for i, score in zip(rows, nats.tolist(), strict=True):
            scores[i] = -score
    return scores


def _slices(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
