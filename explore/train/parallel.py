"""Training by several processes: which one writes, which settings work, how a model is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from explore.archive import load_checkpoint
from explore.experiment import TrainConfig
from explore.model import LanguageModel

StrategyName = Literal["auto", "ddp", "fsdp"]


class Sharded(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2) on any accelerator; a checkpoint is one whole file, as elsewhere.

    Lightning's `FSDPStrategy` is the older FSDP, which it refuses on a CPU.
    """

    def __init__(self, devices: int) -> None:
        super().__init__(data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint of any strategy; Lightning's own method reads optimizer states of sharded models only."""
        assert self.model is not None
        checkpoint = load_checkpoint(Path(checkpoint_path))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        names = {weight: name for name, weight in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            ordered = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, _by_name(state, ordered), options=options)
        return checkpoint


def _by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Replaces the numbers in an optimizer's state, which index the weights in group order, by the weights' names."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    name_of = dict(zip(numbers, names, strict=True))
    return {
        "state": {name_of[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def check_parallel(train: TrainConfig, devices: int, strategy: StrategyName) -> None:
    """Raises an error if a run cannot be trained by this many processes.

    Raises:
        ValueError: devices, strategy, batch size or optimizer do not fit one another.
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    if strategy not in ("auto", "ddp", "fsdp"):
        raise ValueError(f"strategy must be auto, ddp or fsdp, got {strategy!r}")
    if train.batch_size % devices:
        raise ValueError(
            f"train.batch_size must be a multiple of {devices}, the number of devices, got {train.batch_size}"
        )
    if strategy == "fsdp" and train.optimizer == "muon":
        raise ValueError("train.optimizer must be 'adamw' with fsdp, got 'muon', which needs whole matrices")


def lightning_strategy(devices: int, strategy: StrategyName) -> str | Strategy:
    """Converts our name of a strategy into the argument of Lightning's trainer."""
    if strategy == "fsdp":
        return Sharded(devices)
    return "ddp" if devices > 1 else strategy


def is_writer(devices: int) -> bool:
    """Whether this process writes the record of the run; exactly one process does."""
    return devices == 1 or getattr(rank_zero_only, "rank", 0) == 0


def wait_for_all() -> None:
    """Waits until every process of the run gets here; returns at once if there is only one."""
    if distributed.is_initialized():
        distributed.barrier()


def end_followers(trainer: Trainer) -> None:
    """Ends the processes that this one started for the other devices: they would wait for it forever."""
    started = getattr(trainer.strategy.launcher, "procs", [])
    followers = [*started]
    started.clear()  # first, since Lightning ends this process when it sees that one of them has ended
    for process in followers:
        process.kill()
    for process in followers:
        process.wait()


@contextmanager
def ended_together(trainer: Trainer) -> Iterator[None]:
    """Ends the processes that this one started if the block raises."""
    try:
        yield
    except BaseException:
        end_followers(trainer)
        raise


def shard(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Shards each layer separately, and the rest together, including a prediction depth that runs several times."""
    if isinstance(model, FSDPModule):
        return
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")


def whole(value: Tensor) -> Tensor:
    """Gathers a tensor that may be sharded over several devices."""
    return value.full_tensor() if isinstance(value, DTensor) else value
