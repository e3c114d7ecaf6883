"""Training one experiment, from nothing or from where it stopped, into a run folder."""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from rich.console import Console
from torch import Tensor

from explore import tracking
from explore.cost import Cost
from explore.data import Batch, Source
from explore.evals import bits_per_byte, recall_accuracy
from explore.experiment import Experiment
from explore.model import LanguageModel
from explore.runs import RunFolder, run_folder, write_json
from explore.train.callbacks import KeptCheckpoints, LastCheckpoint, ProgressBar, Throughput, WholeCheckpointIO, quiet
from explore.train.environment import environment
from explore.train.logger import MetricsFile
from explore.train.module import DataModule, LitLanguageModel, NonFiniteLossError
from explore.train.parallel import StrategyName, check_parallel, is_writer, lightning_strategy, wait_for_all

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
CHECKPOINTS_PER_RUN = 20


@dataclass(frozen=True)
class _Way:
    """How a run is made, as far as it does not change its result."""

    checkpoint_every: int | None
    keep_every: int | None
    recompute: bool
    wandb: tracking.WandbMode | None
    accelerator: str
    devices: int
    strategy: StrategyName
    console: Console


def fit(
    experiment: Experiment,
    runs: str | Path = "runs",
    *,
    checkpoint_every: int | None = None,
    keep_every: int | None = None,
    recompute: bool = False,
    wandb: tracking.WandbMode | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: StrategyName = "auto",
    console: Console | None = None,
) -> RunFolder:
    """Trains an experiment and writes its record.

    A finished experiment is found by its key and not trained again; one that was interrupted goes on from
    its last checkpoint, with the same data in the same order. A diverged one ends with a result that says so.

    Several devices share every batch and give what one would. Lightning starts the script that calls this once
    more for each of them; the first writes the record, and all return when it is whole.

    Args:
        runs: folder of run folders.
        checkpoint_every: steps between checkpoints; a twentieth of the run when absent.
        keep_every: steps between weights that are kept for merging, `checkpoints/step-000120.ckpt`; none when absent.
        recompute: make a layer's activations again in the backward pass, for less memory and more time.
        wandb: mirror the run to Weights & Biases.
        accelerator: Lightning's name of the device to train on.
        devices: processes that share a batch, each on a device of its own.
        strategy: `ddp` has the whole model on every device, `fsdp` a part of each layer; `auto` is `ddp`.
        console: where the progress bar is drawn if it is a terminal; standard error when absent.

    Raises:
        ValueError: corpus, tokenizer or vocabulary do not fit the model, the devices do not fit batch or optimizer,
            or another process trains this very experiment; nothing is written then.
    """
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every: {keep_every} is not allowed; at least 1 is")
    check_parallel(experiment.train, devices, strategy)
    key = experiment.key()
    folder = run_folder(runs, experiment.name, key)
    if folder.is_finished:
        return folder
    source = experiment.data.open(experiment.seed)
    if source.vocab_size > experiment.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: {experiment.model.vocab_size} is too small; "
            f"the data has {source.vocab_size} different tokens"
        )
    console = console or Console(stderr=True)
    way = _Way(checkpoint_every, keep_every, recompute, wandb, accelerator, devices, strategy, console)
    if not is_writer(devices):
        _train(experiment, key, source, folder, way)
        wait_for_all()
        return folder
    with _locked(folder.path):
        if not RunFolder(folder.path).is_finished:  # by a process that held the lock until now
            _describe(folder.path, experiment, key, way)
            result = _train(experiment, key, source, folder, way)
            write_json(folder.path / "result.json", result)
    wait_for_all()
    return folder


def cost_record(experiment: Experiment) -> dict[str, Any]:
    """Totals, family and ledger of an experiment's model, as in `cost.json`."""
    ledger = experiment.model.ledger(experiment.data.seq_len)
    return {"family": experiment.model.family, **Cost.of(ledger).to_dict(), "ledger": ledger.to_records()}


def load_model(folder: RunFolder) -> LanguageModel:
    """The trained model of a run, in evaluation mode.

    Raises:
        ValueError: the run has no checkpoint.
    """
    path = folder.path / "checkpoints" / "last.ckpt"
    if not path.exists():
        raise ValueError(f"{folder.path}: no checkpoint; train the run first")
    model = Experiment.load(folder.path / "experiment.json").model.build()
    model.load_state_dict(read_weights(path))
    return model.eval()


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights and buffers in a checkpoint, by their names in the model."""
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def evaluate(experiment: Experiment, source: Source, model: LanguageModel) -> dict[str, float | None]:
    """What `result.json` says of a model: loss and bits per byte of both splits, and recall where that is the task."""
    train, model = experiment.train, model.eval()
    device = model.embedding.weight.device

    def batches(split: Any) -> Iterator[Batch]:
        for batch in source.eval_batches(split, train.batch_size, train.eval_tokens):
            yield Batch(batch.inputs.to(device), batch.targets.to(device), batch.n_bytes)

    with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
        val, test = bits_per_byte(model, batches("val")), bits_per_byte(model, batches("test"))
        recall = recall_accuracy(model, batches("test")) if experiment.data.kind == "recall" else None
    return {
        "val_loss": val.loss,
        "val_bpb": val.bits_per_byte,
        "test_loss": test.loss,
        "test_bpb": test.bits_per_byte,
        "recall": recall,
    }


def _train(experiment: Experiment, key: str, source: Source, folder: RunFolder, way: _Way) -> dict[str, Any]:
    train, n_steps, writes = experiment.train, experiment.n_steps, is_writer(way.devices)
    checkpoint = folder.path / "checkpoints" / "last.ckpt"
    resumed_at = _step_of(checkpoint)
    throughput = Throughput(experiment.batch_tokens)
    callbacks = [
        throughput,
        LastCheckpoint(checkpoint.parent, way.checkpoint_every or math.ceil(n_steps / CHECKPOINTS_PER_RUN)),
    ]
    if way.keep_every is not None:
        callbacks.append(KeptCheckpoints(checkpoint.parent, way.keep_every))
    if writes and way.console.is_terminal:
        callbacks.append(ProgressBar(n_steps, experiment.name, throughput, way.console))
    loggers: list[Logger] = []
    if writes:
        loggers.append(MetricsFile(folder.path / "metrics.csv", experiment.batch_tokens, resumed_at))
    torch.manual_seed(experiment.seed)
    module = LitLanguageModel(experiment, recompute=way.recompute)
    with quiet(), _mirrored(experiment, key, folder, way.wandb if writes else None) as mirror:
        if mirror is not None:
            loggers.append(mirror)
        trainer = Trainer(
            accelerator=way.accelerator,
            devices=way.devices,
            strategy=lightning_strategy(way.devices, way.strategy),
            use_distributed_sampler=False,
            max_steps=n_steps,
            precision=PRECISIONS[train.precision],  # type: ignore[arg-type]
            val_check_interval=train.val_every,
            check_val_every_n_epoch=None,
            limit_val_batches=None if train.val_every else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, n_steps // 500),
            callbacks=callbacks,
            logger=loggers,
            plugins=[WholeCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(
                module,
                datamodule=DataModule(experiment, source),
                ckpt_path=checkpoint if resumed_at else None,
                weights_only=True,
            )
        except NonFiniteLossError as error:
            result = _result(experiment, error.step, throughput) | {"status": "diverged", "reason": str(error)}
        else:
            result = _result(experiment, n_steps, throughput)
            scores = evaluate(experiment, source, module.model.to(trainer.strategy.root_device))
            if broken := [name for name, score in scores.items() if score is not None and not math.isfinite(score)]:
                reason = f"{broken[0]} is {scores[broken[0]]} after the last step: the run diverged"
                result |= {"status": "diverged", "reason": reason}
            else:
                result |= scores
            if (violation := trainer.callback_metrics.get("max_violation")) is not None:
                result["max_violation"] = float(violation)
        if mirror is not None:
            cost = experiment.model.cost(experiment.data.seq_len)
            tracking.summarize(mirror.experiment, {**result, **cost.to_dict()})
    return result


@contextmanager
def _mirrored(
    experiment: Experiment, key: str, folder: RunFolder, mode: tracking.WandbMode | None
) -> Iterator[WandbLogger | None]:
    """Lightning's logger of Weights & Biases, whose run is closed however the block ends; None when off."""
    if mode is None:
        yield None
        return
    mirror = WandbLogger(
        project=tracking.PROJECT,
        name=experiment.name,
        id=key[:32],
        resume="allow",
        save_dir=folder.path,
        offline=mode == "offline",
    )
    try:
        tracking.describe(mirror.experiment, experiment, key, cost_record(experiment))
        yield mirror
    finally:
        mirror.experiment.finish()


def _result(experiment: Experiment, step: int, throughput: Throughput) -> dict[str, Any]:
    tokens = step * experiment.batch_tokens
    return {
        "status": "finished",
        "reason": None,
        "step": step,
        "tokens": tokens,
        "flops_run": tokens * experiment.model.cost(experiment.data.seq_len).flops_train,
        "train_s": throughput.train_s,
        "tokens_per_s": tokens / throughput.train_s if throughput.train_s else None,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _describe(path: Path, experiment: Experiment, key: str, way: _Way) -> None:
    processes = {"devices": way.devices, "strategy": way.strategy}
    write_json(path / "cost.json", cost_record(experiment))
    write_json(path / "environment.json", environment(experiment) | processes)
    write_json(path / "experiment.json", {"key": key, "experiment": experiment.model_dump(mode="json")})


def _step_of(checkpoint: Path) -> int:
    """Step of a checkpoint, 0 when there is none."""
    if not checkpoint.exists():
        return 0
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a run folder against other processes; the lock goes with the process, however it ends."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is training this experiment") from None
        yield
