"""The Lightning module and data module for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from explore.data import Batch, Source, TextSource
from explore.evals import RecallScore, Score, score_batch, score_recall
from explore.experiment import Experiment
from explore.model import LanguageModel, quantize_products
from explore.ops import forced_paths
from explore.termination import Requests
from explore.train.low_precision import set_step
from explore.train.objectives import Objective
from explore.train.optimizer import build_optimizer
from explore.train.parallel import Sharded, shard, whole
from explore.train.schedule import wsd

Tensors = dict[str, Any]
"""A batch as a dictionary, since Lightning does not move frozen dataclasses to a device."""


WORST = 20
"""A run has diverged if its loss exceeds this many times that of a uniform guess, even if it is finite."""

KEPT_LOAD = 0.99
"""Factor by which the loads of earlier steps count less after each step. Loads are thus averages over about 100 steps:
one batch is too few tokens, since even random routing of 2,048 tokens to 6 of 256 experts has a violation near 0.5."""


class DivergedError(RuntimeError):
    """The loss is not finite, or far above that of a uniform guess."""

    def __init__(self, step: int, loss: float) -> None:
        how = f", over {WORST} times that of a uniform guess" if math.isfinite(loss) else ""
        super().__init__(f"the loss is {loss:g} at step {step}{how}: the run diverged; a lower learning rate may help")
        self.step = step


class LitLanguageModel(LightningModule):
    """A language model with its objective, optimizer, schedule and metrics.

    After every optimizer step each router's bias is adjusted towards equal expert loads, counted over all batches and
    processes of that step.

    Args:
        model: the model with its initial weights.
        paths: implementations of ops in training; validation uses the default ones.
        requests: signals that ask this process to end.
        key: key of the run, saved in its checkpoints.

    Attributes:
        max_violation: over all routers, the largest load of an expert divided by the mean load, minus 1. Loads are
            averages over about the last 100 steps (`KEPT_LOAD`). The metrics and the result of a run hold this number;
            in those of earlier versions, loads are of one step.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: LanguageModel,
        objective: Objective,
        paths: Mapping[str, str] | None = None,
        requests: Requests | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__()
        self.experiment, self.model, self.objective = experiment, model, objective
        self.paths = dict(paths or {})
        self.emulation = quantize_products(model, experiment.train.recipe, experiment.seed)
        self.requests, self.key = requests or Requests(), key
        self._asked = False
        self.max_violation: Tensor | None = None
        self._load: dict[int, Tensor] = {}
        self._recent_load: dict[int, Tensor] = {}
        self._score, self._recall = Score(), RecallScore()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            shard(self.model, self.trainer.strategy.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Sets the learning rate of the next step: a rung may come from a run with another budget and decay."""
        schedule: Any = self.lr_schedulers()
        for group, lr in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = lr * wsd(self.global_step, self.experiment.n_steps, self.experiment.train)

    def training_step(self, batch: Tensors, batch_idx: int) -> Tensor:
        set_step(self.emulation, self.experiment, self.global_step, self.global_rank, self.trainer.world_size)
        with forced_paths(**self.paths):
            loss = self.objective(self.model, batch["inputs"], batch["targets"])
        share = self._share(loss.n_targets)
        values = {name: term.value * share if term.over_targets else term.value for name, term in loss.terms.items()}
        total = torch.zeros_like(values["loss"])
        for name, term in loss.terms.items():
            total = total + term.weight * values[name]
        asked = total.new_tensor(float(self.requests.signum is not None))
        *means, mean_total, mean_asked = self._mean(torch.stack([*values.values(), total, asked]))
        self._asked = bool(mean_asked > 0)
        logged = dict(zip(values, means, strict=True))
        self._check_converging(mean_total, logged["loss"])
        for i, stats in loss.stats.items():
            load = stats.load.detach()
            self._load[i] = self._load[i] + load if i in self._load else load
        self.log_dict(logged)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return total / self._n_shares

    @property
    def _n_shares(self) -> int:
        """The divisor of gradients in the backward pass, after which processes average their gradients.

        It matters because formats with power-of-two scales round differently after a gradient is multiplied by 3.
        """
        return self.trainer.world_size if self.experiment.train.quantizes else 1

    @property
    def is_ending(self) -> bool:
        """Whether the run ends after this step because of a signal; the same answer in every process."""
        return self._asked if self.trainer.world_size > 1 else self.requests.signum is not None

    def _check_converging(self, total: Tensor, cross_entropy: Tensor) -> None:
        if not torch.isfinite(total):
            raise DivergedError(self.global_step, total.item())
        if cross_entropy > WORST * math.log(self.experiment.model.vocab_size):
            raise DivergedError(self.global_step, cross_entropy.item())

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, equal in all of them, so that they stop together if a loss is not finite."""
        return self.trainer.strategy.reduce(values.detach(), reduce_op="mean")

    def _share(self, n_targets: Tensor) -> Tensor | float:
        """Weight of this process's mean loss that makes the mean over processes a mean over all targets."""
        if self.trainer.world_size == 1:
            return 1.0
        return n_targets / self._mean(n_targets.float())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self._n_shares > 1:
            for weight in self.parameters():
                if weight.grad is not None:
                    weight.grad *= self._n_shares
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.experiment.train.clip)
        self.log("grad_norm", whole(norm))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._balance()

    def _balance(self) -> None:
        violations = []
        for i, moe in self.model.moe_layers().items():
            load = self.trainer.strategy.reduce(self._load.pop(i), reduce_op="sum")
            moe.update_bias(load)
            before = self._recent_load.get(i)
            recent = load.float() if before is None else KEPT_LOAD * before.to(load.device) + load
            self._recent_load[i] = recent
            violations.append(recent.max() / recent.mean() - 1)
        if violations:
            self.max_violation = torch.stack(violations).max()
            self.log("max_violation", self.max_violation)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.key is not None:
            checkpoint["key"] = self.key
        if self.max_violation is not None:
            checkpoint["max_violation"] = self.max_violation.cpu()
            checkpoint["recent_load"] = {i: load.cpu() for i, load in self._recent_load.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.max_violation = checkpoint.get("max_violation")
        self._recent_load = dict(checkpoint.get("recent_load", {}))  # absent in checkpoints of earlier versions

    def on_validation_epoch_start(self) -> None:
        self._score, self._recall = Score(), RecallScore()
        set_step(self.emulation, self.experiment, self.global_step)

    def validation_step(self, batch: Tensors, batch_idx: int) -> None:
        self._score += score_batch(self.model, Batch(**batch))
        if self.experiment.data.kind == "recall":
            self._recall += score_recall(self.model, Batch(**batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self._score.loss)
        if (bits := self._score.bits_per_byte) is not None:
            self.log("val_bpb", bits)
        if self.experiment.data.kind == "recall":
            self.log("val_recall", self._recall.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.experiment.train)
        n_steps, train = self.experiment.n_steps, self.experiment.train
        schedule = LambdaLR(optimizer, lambda step: wsd(step, n_steps, train))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DataModule(LightningDataModule):
    """Batches of an experiment, from the trainer's step on, so a resumed run continues with the next batch."""

    def __init__(self, experiment: Experiment, source: Source) -> None:
        super().__init__()
        self.experiment, self.source = experiment, source

    def train_dataloader(self) -> DataLoader[Tensors]:
        trainer = self.trainer
        assert trainer is not None
        steps = range(trainer.global_step, self.experiment.n_steps)
        share = slice(trainer.global_rank, None, trainer.world_size)
        return DataLoader(_Steps(self.source, steps, self.experiment.train.batch_size, share), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensors]:
        train = self.experiment.train
        read = self.source.eval_batches
        if train.evaluation != "opening" and isinstance(self.source, TextSource):
            read = self.source.sampled_batches
        batches = read("val", train.batch_size, train.eval_tokens)
        return DataLoader([_tensors(batch) for batch in batches], batch_size=None)  # type: ignore[arg-type]


class _Steps(IterableDataset[Tensors]):
    def __init__(self, source: Source, steps: range, batch_size: int, share: slice) -> None:
        self.source, self.steps, self.batch_size, self.share = source, steps, batch_size, share

    def __iter__(self) -> Iterator[Tensors]:
        for step in self.steps:
            batch = self.source.batch(step, self.batch_size)
            yield {"inputs": batch.inputs[self.share], "targets": batch.targets[self.share], "n_bytes": None}


def _tensors(batch: Batch) -> Tensors:
    return {"inputs": batch.inputs, "targets": batch.targets, "n_bytes": batch.n_bytes}
