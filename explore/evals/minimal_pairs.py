"""Minimal pairs: does the model give the grammatical sentence the higher probability?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from explore.data import Tokenizer
from explore.files import COMPRESSIONS, UNREADABLE, open_plain
from explore.foreign import echo, parse_json
from explore.model import LanguageModel


class MinimalPair(NamedTuple):
    """Two sentences that differ in one point of grammar; `uid` names the paradigm."""

    uid: str
    good: str
    bad: str


FIELDS: tuple[tuple[str, str, str], ...] = (("uid", "good", "bad"), ("UID", "sentence_good", "sentence_bad"))
"""JSON fields of paradigm, good and bad sentence; the second set is BLiMP's."""

SUFFIXES = (".jsonl", ".txt")


def read_minimal_pairs(path: Path, limit: int | None = None) -> list[MinimalPair]:
    """Reads minimal pairs in their published formats, plain, .gz or .xz.

    BLiMP is JSON lines with `UID`, `sentence_good` and `sentence_bad` (`uid`, `good` and `bad` are read as well).
    Zorro is one .txt file per paradigm, named after it, with bad and good sentences on alternate lines. A folder means
    all such files in it.

    Args:
        limit: keep only the first pairs of each paradigm.

    Raises:
        ValueError: the file is missing, a line is not such a record, or there are no pairs.
    """
    try:
        pairs = [pair for file in _files(path) for pair in _read(file)]
    except (*UNREADABLE, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: minimal pairs cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    if not pairs:
        raise ValueError(f"{path}: must hold at least one minimal pair, got none")
    n_pairs: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        n_pairs[pair.uid] += 1
        if limit is None or n_pairs[pair.uid] <= limit:
            kept.append(pair)
    return kept


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if _format(file) in SUFFIXES and not file.name.startswith(".")]
    if not files:
        raise ValueError(f"{path}: holds no .jsonl or .txt file, plain, .gz or .xz (subfolders are not searched)")
    return files


def _format(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _read(path: Path) -> list[MinimalPair]:
    with open_plain(path) as file:
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    if _format(path) == ".txt":
        return _alternate_lines(path, [line.decode("utf-8-sig" if number == 1 else "utf-8") for number, line in lines])
    return [_pair(line, path, number) for number, line in lines]


def _alternate_lines(path: Path, lines: Sequence[str]) -> list[MinimalPair]:
    if len(lines) % 2:
        raise ValueError(f"{path}: must have bad and good sentences on alternate lines, got {len(lines)} lines")
    uid = path.name.partition(".")[0]
    sentences = [line.strip() for line in lines]
    return [MinimalPair(uid, good, bad) for bad, good in zip(sentences[::2], sentences[1::2], strict=True)]


def _pair(line: bytes, path: Path, number: int) -> MinimalPair:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number} is not a record ({error})") from None
    for fields in FIELDS:
        if isinstance(record, dict) and all(field in record for field in fields):
            uid, good, bad = (record[field] for field in fields)
            if isinstance(uid, str) and all(isinstance(text, str) and text.strip() for text in (good, bad)):
                return MinimalPair(uid, good, bad)
    expected = " nor ".join(", ".join(fields) for fields in FIELDS)
    raise ValueError(f"{path}: line {number} is not a record with sentences in {expected}, got {echo(record)}")


@torch.inference_mode()
def minimal_pair_accuracy(
    model: LanguageModel, tokenizer: Tokenizer, pairs: Sequence[MinimalPair], *, batch_size: int = 128
) -> dict[str, float]:
    """Share of pairs whose good sentence has the higher log-probability, by paradigm.

    The whole sentence is scored, after the end-of-text token. Ties count one half.

    Args:
        batch_size: sentences per batch; they are sorted by length to reduce padding.

    Returns:
        Accuracy of every `uid`; the mean over paradigms is the usual summary.

    Source: BLiMP, arXiv 1912.00582.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one pair, got none")
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
