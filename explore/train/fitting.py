"""Training one experiment, from nothing or from where it stopped, into a run folder."""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from explore import tracking
from explore.data import Source
from explore.experiment import Experiment
from explore.ops import paths_in_use
from explore.runs import PRUNED, RunFolder, run_folder, write_json
from explore.train.callbacks import KeptCheckpoints, LastCheckpoint, ProgressBar, Throughput, WholeCheckpointIO, quiet
from explore.train.judging import Judge, LearningCurve, check_judged, has_ended, seen, tell
from explore.train.memory import keep_freed_memory
from explore.train.metrics import MetricsFile
from explore.train.models import evaluate, step_of
from explore.train.module import DataModule, DivergedError, LitLanguageModel
from explore.train.parallel import StrategyName, check_parallel, is_writer, lightning_strategy, wait_for_all
from explore.train.record import cost_record, describe, result_of
from explore.train.regions import compiled_ops, keep_compiled
from explore.train.rungs import branch, curve_steps, rung_path, rung_steps

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
CHECKPOINTS_PER_RUN = 20


class BusyError(ValueError):
    """Another process trains this very experiment."""


@dataclass(frozen=True)
class _Way:
    """How a run is made, as far as it changes its result by no more than rounding."""

    checkpoint_every: int | None
    keep_every: int | None
    recompute: bool
    wandb: tracking.WandbMode | None
    group: str | None
    accelerator: str
    devices: int
    strategy: StrategyName
    console: Console
    points: Mapping[int, float]
    rungs: Mapping[int, Path]
    judge: Judge | None
    device: str
    compiled: Mapping[str, Mapping[str, float]]

    @property
    def paths(self) -> dict[str, str]:
        return dict.fromkeys(self.compiled, "compiled")


def fit(
    experiment: Experiment,
    runs: str | Path = "runs",
    *,
    checkpoint_every: int | None = None,
    keep_every: int | None = None,
    recompute: bool = False,
    wandb: tracking.WandbMode | None = None,
    group: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: StrategyName = "auto",
    rungs: Sequence[float] = (),
    judge: Judge | None = None,
    console: Console | None = None,
) -> RunFolder:
    """Trains an experiment and writes its record.

    A finished experiment is found by its key and not trained again; one that was interrupted goes on from
    its last checkpoint, with the same data in the same order; one that has nothing yet goes on from the furthest rung
    in `runs` that is a state of its own stable phase. A diverged one ends with a result that says so.

    Several devices share every batch and give what one would. Lightning starts the script that calls this once
    more for each of them; the first writes the record, and all return when it is whole.

    Args:
        runs: folder of run folders.
        checkpoint_every: steps between checkpoints; a twentieth of the run when absent.
        keep_every: steps between weights that are kept for merging, `checkpoints/step-000120.ckpt`; none when absent.
        recompute: make a layer's activations again in the backward pass, for less memory and more time.
        wandb: mirror the run to Weights & Biases.
        group: the study that the run is a trial of, under whose name Weights & Biases shows it.
        accelerator: Lightning's name of the device to train on.
        devices: processes that share a batch, each on a device of its own.
        strategy: `ddp` has the whole model on every device, `fsdp` a part of each layer; `auto` is `ddp`.
        rungs: shares of the schedule, in its stable phase, at which the run is validated and its whole state kept in
            `runs/rungs` for other runs to branch from.
        judge: asked at every validation, also of earlier points of a run that goes on; where it gives a reason, the
            run ends as `pruned`. Without a judge, a pruned run goes on to its end.
        console: where the progress bar is drawn if it is a terminal; standard error when absent.

    Raises:
        ValueError: corpus, tokenizer or vocabulary do not fit the model, the devices do not fit batch or optimizer,
            a rung is not in the stable phase, the judge would never be asked, or (`BusyError`) another process trains
            this very experiment; nothing is written then.
    """
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every: {keep_every} is not allowed; at least 1 is")
    check_parallel(experiment.train, devices, strategy)
    points = curve_steps(experiment, rungs)
    if judge is not None:
        check_judged(experiment, points)
    key = experiment.key()
    folder = run_folder(runs, experiment.name, key)
    if has_ended(folder, judge):
        if judge is not None and is_writer(devices):
            tell(judge, seen(folder, points))
        return folder
    source = experiment.data.open(experiment.seed)
    if source.vocab_size > experiment.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: {experiment.model.vocab_size} is too small; "
            f"the data has {source.vocab_size} different tokens"
        )
    device = _device(accelerator)
    way = _Way(
        checkpoint_every,
        keep_every,
        recompute,
        wandb,
        group,
        accelerator,
        devices,
        strategy,
        console or Console(stderr=True),
        points,
        {step: rung_path(runs, experiment, step) for step in rung_steps(experiment, rungs)},
        judge,
        device,
        _compiled(experiment, folder, devices, device),
    )
    if not is_writer(devices):
        _train(experiment, key, source, folder, way)
    else:
        with _locked(folder.path):
            if not has_ended(folder, judge):  # by a process that held the lock until now
                compiled = {"ops": paths_in_use(way.device) | way.paths, "compiled": way.compiled}
                describe(folder.path, experiment, key, {"devices": devices, "strategy": strategy, **compiled})
                if devices == 1:  # several do not agree on files that others write
                    branch(runs, experiment, folder.path)
                result = _train(experiment, key, source, folder, way)
                write_json(folder.path / "result.json", result)
    wait_for_all()
    return folder


def _device(accelerator: str) -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator == "cpu" or found is None else found.type


def _compiled(
    experiment: Experiment, folder: RunFolder, devices: int, device: str
) -> Mapping[str, Mapping[str, float]]:
    """The ops that a run compiles: those that it compiled where it goes on, since rounding differs."""
    if step_of(folder.path / "checkpoints" / "last.ckpt"):
        recorded: Mapping[str, Mapping[str, float]] = folder.environment.get("compiled") or {}
        return recorded
    n_tokens = experiment.n_steps * experiment.batch_tokens // devices
    return compiled_ops(experiment.model, experiment.data.seq_len, n_tokens, experiment.train.precision, device)


def _train(experiment: Experiment, key: str, source: Source, folder: RunFolder, way: _Way) -> dict[str, Any]:
    train, n_steps, writes = experiment.train, experiment.n_steps, is_writer(way.devices)
    checkpoint = folder.path / "checkpoints" / "last.ckpt"
    resumed_at = step_of(checkpoint)
    throughput = Throughput(experiment.batch_tokens)
    curve = LearningCurve(way.points, n_steps, way.judge, seen(folder, way.points, resumed_at))
    every = way.checkpoint_every or math.ceil(n_steps / CHECKPOINTS_PER_RUN)
    row_every = max(1, n_steps // 500)
    callbacks: list[Callback] = [throughput]
    if writes:
        callbacks.append(MetricsFile(folder.path / "metrics.csv", experiment.batch_tokens, row_every, resumed_at))
    callbacks += [curve, LastCheckpoint(checkpoint.parent, every, way.points, way.rungs)]
    if way.keep_every is not None:
        callbacks.append(KeptCheckpoints(checkpoint.parent, way.keep_every))
    if writes and way.console.is_terminal:
        if way.compiled:
            saves, costs = (sum(each[what] for each in way.compiled.values()) for what in ("saves_s", "costs_s"))
            told = f"compiling {', '.join(way.compiled)}: some {costs:.0f} s, and then some {saves:.0f} s less"
            way.console.print(told, style="dim", highlight=False)
        callbacks.append(ProgressBar(n_steps, experiment.name, throughput, way.console))
    torch.manual_seed(experiment.seed)
    if way.compiled:
        keep_compiled()
    keep_freed_memory()
    module = LitLanguageModel(experiment, recompute=way.recompute, paths=way.paths)
    with quiet(), _mirrored(experiment, key, folder, way, writes) as mirror:
        trainer = Trainer(
            accelerator=way.accelerator,
            devices=way.devices,
            strategy=lightning_strategy(way.devices, way.strategy),
            use_distributed_sampler=False,
            max_steps=n_steps,
            precision=PRECISIONS[train.precision],  # type: ignore[arg-type]
            val_check_interval=n_steps + 1,  # the learning curve tells when
            check_val_every_n_epoch=None,
            limit_val_batches=None if way.points or resumed_at else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=row_every,
            callbacks=callbacks,
            logger=mirror or False,
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
        except DivergedError as error:
            result = result_of(experiment, folder.path, error.step, throughput)
            result |= {"status": "diverged", "reason": str(error)}
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # which Lightning has turned into an exit
                raise KeyboardInterrupt from None
            raise
        else:
            result = result_of(experiment, folder.path, trainer.global_step, throughput)
        if resumed_at == n_steps and way.judge is not None and writes:  # nothing was trained, so nothing asked
            tell(way.judge, curve.earlier)
        if curve.reason is not None:
            result |= {"status": PRUNED, "reason": curve.reason, "stopped_val_bpb": curve.value}
            result |= {"val_bpb": None, "test_bpb": None}  # of a model that has not decayed, they would mislead
        elif result["status"] == "finished":
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
    experiment: Experiment, key: str, folder: RunFolder, way: _Way, writes: bool
) -> Iterator[WandbLogger | None]:
    """Lightning's logger of Weights & Biases, whose run is closed however the block ends; None when off."""
    if way.wandb is None or not writes:
        yield None
        return
    mirror = WandbLogger(
        project=tracking.PROJECT,
        name=experiment.name,
        id=tracking.run_id(key),
        resume="allow",
        save_dir=folder.path,
        offline=way.wandb == "offline",
        group=way.group,
        job_type=None if way.group is None else "trial",
    )
    try:
        tracking.describe(mirror.experiment, experiment, key, cost_record(experiment))
        yield mirror
    finally:
        mirror.experiment.finish()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a run folder against other processes; the lock goes with the process, however it ends."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{path}: another process is training this experiment") from None
        yield
