"""Whether a run fits into the machine, known before anything is written."""

from __future__ import annotations

from typing import NamedTuple

import torch

from explore.experiment import Experiment
from explore.formatting import count, size
from explore.machine import ensure_descriptors, memory_bytes
from explore.model import ModelConfig, saved_bytes_of
from explore.train.parallel import StrategyName

OPEN_FILES = 48
"""Files that a run has open at most, beside those that are open before it."""

WEIGHT, GRADIENT, MOMENT = 4, 4, 4
"""Bytes of a parameter, of its gradient, and of each number that an optimizer keeps of it."""


class Needs(NamedTuple):
    """Bytes that training takes at the least, of all processes on one machine together.

    Attributes:
        states: weights and optimizer state.
        gradients: of the weights, at the end of a backward pass.
        sequence: what one sequence keeps for the backward pass.
        batch_size: sequences in a batch.
    """

    states: float
    gradients: float
    sequence: float
    batch_size: int

    @property
    def total(self) -> float:
        """At the start of a backward pass, when there are no gradients yet, or at its end."""
        return self.states + max(self.gradients, self.batch_size * self.sequence)


def needs(experiment: Experiment, *, recompute: bool = False, copies: int = 1) -> Needs:
    """What a run needs, by closed forms: never more than it takes.

    Args:
        recompute: a layer's activations are made again in the backward pass, so that only its input is kept.
        copies: of weights, gradients and optimizer state, one for each process that has the whole model.
    """
    model, seq_len, train = experiment.model, experiment.data.seq_len, experiment.train
    n_params = copies * _n_params(model)
    moments = 1 if train.optimizer == "muon" else 2  # of the matrices alone; the rest has two
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
    """Refuses a run for which the machine has too little memory, or too few open files.

    Args:
        device: torch's name of the type of device.

    Raises:
        ValueError: what is needed, what there is, and what would fit. It comes from a MemoryError where the memory
            would suffice if nothing else used it: then it is a fault that may pass, as `is_passing` says.
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
    """What would fit into the memory that is free."""
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
