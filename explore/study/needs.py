"""Checks that a machine can train a sweep's experiments, before the first trial starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from explore.experiment import Experiment
from explore.formatting import size
from explore.machine import memory_bytes
from explore.study.faults import FaultError
from explore.study.identity import read_data
from explore.train import check_capacity
from explore.train.capacity import needs

CHECKPOINTS = 2
"""Checkpoints of a run on disk at once: the last one stays until the next is complete."""
NUMBERS_PER_PARAM = 3
"""4-byte numbers per parameter in a checkpoint: the weight and two optimizer moments."""


def check_needs(experiments: Sequence[Experiment], runs: Path, workers: int = 1, *, elsewhere: bool = False) -> None:
    """Checks that the experiments' corpora and tokenizers exist, and that memory, open files and disk suffice.

    Args:
        workers: number of processes that train at the same time.
        elsewhere: training runs on other machines, whose memory is unknown here.

    Raises:
        FaultError: something is missing; the message names it.
    """
    for experiment in experiments:
        read_data(experiment)
        if not elsewhere:
            _check_memory(experiment, workers)
    needed = max(map(_checkpoint_bytes, experiments), default=0) * CHECKPOINTS * workers
    if needed > (free := _free_bytes(runs)):
        raise FaultError(
            f"{runs}: the disk must have room for {CHECKPOINTS} checkpoints of each of {workers} workers "
            f"({size(needed)}), and {size(free)} are free"
        )


def _check_memory(experiment: Experiment, workers: int) -> None:
    is_cuda = torch.cuda.is_available()
    try:
        check_capacity(experiment, device="cuda" if is_cuda else "cpu")
    except ValueError as error:
        raise FaultError(str(error)) from error
    each = needs(experiment).total
    free = torch.cuda.mem_get_info()[0] if is_cuda else memory_bytes()[1]
    if workers > 1 and workers * each > free:
        raise FaultError(
            f"memory: training with {workers} workers needs at least {size(workers * each)} ({size(each)} for each) "
            f"and {size(free)} are free; workers={max(1, int(free / each))} would fit"
        )


def _checkpoint_bytes(experiment: Experiment) -> float:
    cost = experiment.model.cost(experiment.data.seq_len)
    return 4 * NUMBERS_PER_PARAM * (cost.params_total + cost.params_mtp)


def _free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    place = os.statvfs(folder)
    return place.f_bavail * place.f_frsize
