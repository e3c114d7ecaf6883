"""What every trial needs of a machine, which is checked before the first one is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from explore.experiment import Experiment
from explore.formatting import size
from explore.study.faults import FaultError
from explore.study.identity import read_data
from explore.train import check_capacity

CHECKPOINTS = 2
"""Checkpoints of a run that are on disk at a time: the last one stays until the next is whole."""
NUMBERS_PER_PARAM = 3
"""Numbers of 4 bytes that a checkpoint holds for a parameter: the weight, and two moments of the optimizer."""


def check_needs(experiments: Sequence[Experiment], runs: Path, workers: int = 1, *, elsewhere: bool = False) -> None:
    """Checks that corpus and tokenizer of some experiments are here, and that memory, open files and disk suffice.

    Args:
        workers: processes that train at the same time.
        elsewhere: they train on other machines, whose memory is not known here.

    Raises:
        FaultError: with what is missing.
    """
    for experiment in experiments:
        read_data(experiment)
        if not elsewhere:
            _check_memory(experiment)
    needed = max(map(_checkpoint_bytes, experiments), default=0) * CHECKPOINTS * workers
    if needed > (free := _free_bytes(runs)):
        raise FaultError(
            f"{runs}: the disk must have room for {CHECKPOINTS} checkpoints of each of {workers} workers "
            f"({size(needed)}), and {size(free)} are free"
        )


def _check_memory(experiment: Experiment) -> None:
    try:
        check_capacity(experiment, device="cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise FaultError(str(error)) from error


def _checkpoint_bytes(experiment: Experiment) -> float:
    cost = experiment.model.cost(experiment.data.seq_len)
    return 4 * NUMBERS_PER_PARAM * (cost.params_total + cost.params_mtp)


def _free_bytes(folder: Path) -> int:
    """Bytes that may be written to the disk of a folder, which need not be there yet."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    place = os.statvfs(folder)
    return place.f_bavail * place.f_frsize
