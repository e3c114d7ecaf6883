"""Checks whether a run fits into the machine, before anything is written."""

from __future__ import annotations

from typing import NamedTuple

import torch

from explore.experiment import Experiment
from explore.formatting import count, size
from explore.machine import ensure_descriptors, memory_bytes
from explore.model import ModelConfig, saved_bytes_of
from explore.train.parallel import StrategyName

OPEN_FILES = 48
"""Most files that a run opens at once, in addition to those already open."""

WEIGHT, GRADIENT, MOMENT = 4, 4, 4
"""Bytes of a parameter, of its gradient, and of each number in its optimizer state."""


class Needs(NamedTuple):
    """Lower bound on the bytes that training takes, over all processes on one machine.

    Attributes:
        states: weights and optimizer state.
        gradients: gradients of the weights, at the end of a backward pass.
        sequence: activations that one sequence keeps for the backward pass.
        batch_size: sequences in a batch.
    """

    states: float
    gradients: float
    sequence: float
    batch_size: int

    @property
    def total(self) -> float:
        """The peak: at the start of a backward pass, before there are gradients, or at its end."""
        return self.states + max(self.gradients, self.batch_size * self.sequence)


def needs(experiment: Experiment, *, recompute: bool = False, copies: int = 1) -> Needs:
    """Computes a lower bound on the memory of a run from closed forms.

    Args:
        recompute: whether the backward pass recomputes a layer's activations, so that only its input is kept.
        copies: number of copies of weights, gradients and optimizer state: one per process that holds the whole model.
    """
    model, seq_len, train = experiment.model, experiment.data.seq_len, experiment.train
    n_params = copies * _n_params(model)
    moments = 1 if train.optimizer == "muon" else 2  # for matrices only; other parameters have two
    narrow = 1 if train.recipe.high == "fp32" else 0.5
    sequence = _inputs(model, seq_len) if recompute else narrow * saved_bytes_of(model, seq_len)["exact"]
    return Needs(n_params * (WEIGHT + moments * MOMENT), n_params * GRADIENT, sequence, train.batch_size)


def check_capacity(
    experiment: Experiment,
    *,
    recompute: bool = False,
    device: str = "cpu",
    devices: int = 1,
    strategy: StrategyName = "auto",
) -> None:
    """Raises an error if the machine has too little memory, or allows too few open files, for a run.

    Args:
        device: device type, as torch names it.

    Raises:
        ValueError: memory or open files do not suffice; the message says what would fit. Its cause is a MemoryError if
            the memory would suffice without other processes: `is_passing` then counts it as temporary.
    """
    ensure_descriptors(OPEN_FILES)
    copies = 1 if strategy == "fsdp" else devices
    needed = needs(experiment, recompute=recompute, copies=copies)
    total, free = memory_bytes()
    if device == "cuda":
        free, total = (float(n) * devices for n in torch.cuda.mem_get_info())
    if needed.total <= free:
        return
    states = needed.states + needed.gradients
    line = (
        f"memory: training needs at least {size(needed.total)} ({size(states)} for weights, gradients and optimizer, "
        f"{size(needed.sequence)} for each of {needed.batch_size} sequences) and {size(free)} are free; "
        f"{_what_fits(experiment, needed, free, recompute)} would fit"
    )
    raise ValueError(line) from (MemoryError() if needed.total <= total else None)


def _what_fits(experiment: Experiment, needed: Needs, free: float, recompute: bool) -> str:
    """Describes what would fit into the free memory."""
    states = needed.states + needed.gradients
    if states > free:
        n_params = _n_params(experiment.model)
        return f"at most {count(n_params * free / states)} of {count(n_params)} parameters"
    if batch_size := int((free - needed.states) / needed.sequence):
        return f"train.batch_size={batch_size}"
    return "a shorter data.seq_len" + ("" if recompute else ", or perhaps --recompute,")


def _n_params(model: ModelConfig) -> int:
    cost = model.cost(1)
    return cost.params_total + cost.params_mtp


def _inputs(model: ModelConfig, seq_len: int) -> float:
    """Bytes of the inputs of all layers."""
    return 4.0 * model.d_model * seq_len * model.n_layers
