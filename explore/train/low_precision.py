"""Training in low precision: the products that each step quantises, and the elements that quantisation loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor, distributed
from torch.nn import Parameter

from explore.checkpoints import Standing
from explore.experiment import Experiment
from explore.model import quantizable_parts
from explore.ops import Emulation
from explore.precision import is_before, products_at
from explore.train.environment import multiplies_bf16
from explore.train.metrics import RowsFile
from explore.train.parallel import whole

FILE = "precision.csv"
COLUMNS = ("step", "letter", "component", "operand", "flushed", "saturated", "zero")
ROWS_PER_RUN = 50
"""Steps of a run at which lost elements are counted."""


def product_paths(device: str) -> dict[str, str]:
    """The path of quantised products in training, as for `forced_paths`: bf16 instructions on a CPU that has them.

    Sums may differ in the last bits of fp32 from those of the default path.
    """
    return {"quantized_product": "bf16"} if device == "cpu" and multiplies_bf16() else {}


def set_step(emulation: Emulation, experiment: Experiment, step: int, rank: int = 0, world_size: int = 1) -> None:
    """Prepares a model's quantisers for the next batch.

    Args:
        step: optimizer steps done.
        rank: rank of this process among those that share the batch; each has every `world_size`-th sequence.
    """
    emulation.step = step
    emulation.products = products_at(experiment.train.recipe, step, experiment.n_steps)
    emulation.is_off = is_before(experiment.train.recipe, step, experiment.n_steps)
    emulation.first, emulation.stride = rank, world_size
    emulation.reduce_max = None if world_size == 1 else _reduce_max


def _reduce_max(x: Tensor) -> None:
    distributed.all_reduce(x, op=distributed.ReduceOp.MAX)


class LostElements(Callback):
    """Writes `precision.csv`: elements that quantisation loses, by component, at some steps.

    The columns `step` (optimizer steps completed), `letter` and `component` (as in the ledger) say when and where;
    layers with the same letter share a row. `operand` is either an operand of a product, such as `dy weight_gradient`:
    `flushed` is the share of its nonzero elements rounded to zero, `saturated` the share clipped to the largest value.
    Or it is `dw`, the gradient of a weight: `zero` is the share of its elements that are zero.
    """

    def __init__(self, folder: Path, n_steps: int, standing: Standing, *, writes: bool = True) -> None:
        self.every_n_steps = max(1, n_steps // ROWS_PER_RUN)
        self.rows = RowsFile(folder / FILE, COLUMNS, standing) if writes else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        is_counted = (trainer.global_step + 1) % self.every_n_steps == 0
        pl_module.emulation.lost = {} if is_counted else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        lost, pl_module.emulation.lost = pl_module.emulation.lost, None
        if lost is None:
            return
        rows: list[dict[str, Any]] = []
        for (letter, component, operand), counts in sorted(lost.items(), key=lambda item: item[0]):
            n, flushed, saturated = trainer.strategy.reduce(counts.double(), reduce_op="sum").tolist()
            shares = {"flushed": flushed / n, "saturated": saturated / n} if n else {}
            rows.append({"letter": letter, "component": component, "operand": operand, **shares})
        zeros: dict[tuple[str, str], Tensor] = {}
        for part in quantizable_parts(pl_module.model):
            if part.module.quantizer is not None:
                key = (part.letter, part.component)
                counts = _zeros(list(part.module.parameters(recurse=False)))
                zeros[key] = zeros[key] + counts if key in zeros else counts
        for (letter, component), counts in zeros.items():
            n_zero, n = counts.tolist()
            rows.append({"letter": letter, "component": component, "operand": "dw", "zero": n_zero / n})
        if self.rows is not None:
            self.rows.append({"step": trainer.global_step, **row} for row in rows)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.rows is not None:
            self.rows.save(checkpoint)


def _zeros(parameters: list[Parameter]) -> Tensor:
    """Counts zero elements, and all elements, in the gradients of a module's weights; biases are left out."""
    ndim = max(weight.ndim for weight in parameters)
    gradients = [whole(weight.grad) for weight in parameters if weight.ndim == ndim and weight.grad is not None]
    return torch.tensor([[(each == 0).sum(), each.numel()] for each in gradients], dtype=torch.double).sum(0)
