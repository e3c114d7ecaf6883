"""Checks what a sweep is asked for, before anything is trained or written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from explore.records import check_packed_name
from explore.runs import read_packed
from explore.search.samplers import make_sampler
from explore.study.identity import check_choices
from explore.study.journal import open_journal
from explore.study.processes import Cluster, cluster_executor
from explore.study.storage import JOURNAL, check_storage, study_names
from explore.study.sweep_file import Sweep


def check_request(
    sweep: Sweep,
    runs: Path,
    *,
    sampler: str | None = None,
    seed: int | None = None,
    storage: str | None = None,
    new_study: bool = False,
    cluster: Cluster | None = None,
    cluster_options: Mapping[str, Any] | None = None,
    records: Path | None = None,
) -> None:
    """Checks the arguments of `run_sweep`; connects to no server.

    Raises:
        ValueError: the sampler, the storage, the cluster, one of its options or the records are invalid; or sampler or
            seed are not those of the study in `runs`.
    """
    make_sampler(sampler or sweep.sampler, seed or 0, 0, grid=sweep.grid)
    if storage is not None:
        check_storage(storage)
    elif (runs / JOURNAL).is_file() and not new_study:
        opened = open_journal(runs / JOURNAL)
        if names := study_names(opened, sweep.name):
            check_choices(optuna.load_study(study_name=names[-1], storage=opened), sampler, seed)
    if records is not None:
        check_packed_name(records)
        if records.exists():
            read_packed(records)
    if cluster is not None:
        with tempfile.TemporaryDirectory() as folder:
            cluster_executor(Path(folder), cluster, cluster_options or {})
