"""Floors: the score of an n-gram model of the same tokens, for run folders and tables of records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from explore.data import TextSource
from explore.evals import ngram_scores
from explore.files import write_json
from explore.records import update_records
from explore.runs import PACKED, RunFolder, find_runs

FLOOR_ORDER = 3
"""Order of the n-gram model that a baseline must beat: a trigram."""


def ngram_floor(run: RunFolder, order: int = FLOOR_ORDER) -> dict[str, Any]:
    """Bits per byte of an n-gram model of a run's training tokens, for its `evals.json`.

    It is scored on the same part of each split as the run, and on the whole if windows of the run are sampled.

    Raises:
        ValueError: the run was not trained on text, or the order is not allowed.
    """
    experiment = run.load_experiment()
    source = experiment.data.open(experiment.seed)
    if not isinstance(source, TextSource):
        raise ValueError(f"{run.path}: must be trained on text for an n-gram model, got {experiment.data.kind}")
    train = experiment.train
    whole = train.evaluation != "opening" or "documents" in run.evals  # windows of the run are of the whole split
    max_tokens = None if whole else train.eval_tokens
    scores = ngram_scores(source, order, experiment.n_steps * train.batch_size, max_tokens)
    return {"order": order, **{f"{split}_bpb": score.bits_per_byte for split, score in scores.items()}}


def add_floors(root: str | Path, order: int = FLOOR_ORDER, names: Iterable[str] | None = None) -> int:
    """Measures the floor of every text run below a folder or in a table of records, and saves it with the run.

    Args:
        names: folder names of the runs to measure; None measures all.

    Returns:
        Number of runs that got a floor; runs that already had one do not count.

    Raises:
        ValueError: the root holds no run.
    """
    chosen = None if names is None else set(names)
    added: dict[str, dict[str, Any]] = {}
    for run in find_runs(root):
        data = (run.experiment.get("experiment") or {}).get("data") or {}
        if data.get("kind") != "text" or run.evals.get("ngram", {}).get("order") == order:
            continue
        if chosen is not None and run.path.resolve().name not in chosen:
            continue
        evals = {**run.evals, "ngram": ngram_floor(run, order)}
        if run.packed is None:
            write_json(run.path / "evals.json", evals)
        added[str(run.path.relative_to(root))] = evals
    if added and Path(root).suffix == PACKED:
        update_records(root, "evals.json", added)
    return len(added)
