"""Trains one experiment into a run folder, from the start or from its last checkpoint."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from explore import tracking
from explore.checkpoints import LAST, last_whole
from explore.data import Source
from explore.experiment import Experiment
from explore.files import remove_abandoned
from explore.foreign import check_type
from explore.model import ModelConfig
from explore.ops import paths_in_use
from explore.precision import Recipe
from explore.runs import LOCK, RunFolder, run_folder
from explore.terminal import plain_console
from explore.threads import n_cores, use_free_cores
from explore.train.callbacks import say
from explore.train.capacity import check_capacity
from explore.train.distillation import check_teacher
from explore.train.halves import check_halves
from explore.train.judging import Judge, check_judged, first_reason, has_ended, read_curve
from explore.train.loop import TrainingRun, train_run
from explore.train.low_precision import product_paths
from explore.train.parallel import StrategyName, check_parallel, is_writer
from explore.train.record import describe
from explore.train.regions import compiled_ops, missing_compiler
from explore.train.rungs import branch, curve_steps, rung_path, rung_steps
from explore.train.start import check_start


class BusyError(ValueError):
    """Another process is training this experiment."""


def fit(
    experiment: Experiment,
    runs: str | Path = "runs",
    *,
    checkpoint_every: int | None = None,
    keep_every: int | None = None,
    recompute: bool = False,
    split_batch: bool = False,
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

    A finished experiment is found by its key and not trained again. An interrupted one resumes from its last
    checkpoint, with the same data in the same order. A new one starts from the furthest rung in `runs` that lies on its
    own stable phase, if there is one. A run that diverges ends with a result that says so.

    Several devices split every batch and give the same result as one. Lightning starts the calling script again for
    each further device; the first process writes the record, and all return when it is complete.

    Args:
        runs: folder of run folders.
        checkpoint_every: steps between checkpoints; None takes a twentieth of the run.
        keep_every: steps between weights kept for merging, as `checkpoints/step-000120.ckpt`; None keeps none.
        recompute: recompute activations in the backward pass: less memory, more time.
        split_batch: train on both halves of a batch at once, one thread each. Faster for models so small that threads
            wait for each other at every op. Losses differ in their last bits. A resumed run keeps its choice.
        wandb: mirror the run to Weights & Biases.
        group: name of the run's study, used as its group in Weights & Biases.
        accelerator: device type to train on, as Lightning names it.
        devices: number of processes that share a batch, each on its own device.
        strategy: `ddp` has the whole model on every device, `fsdp` a part of each layer; `auto` is `ddp`.
        rungs: fractions of the schedule, within the stable phase, at which the run is validated and its full state
            saved in `runs/rungs` for other runs to branch from.
        judge: called at every validation, and for the earlier points of a resumed run; if it returns a reason, the run
            ends as `pruned`. Without a judge, a pruned run continues to its end.
        console: where to draw the progress bar if it is a terminal; None takes standard error.

    Raises:
        ValueError: memory does not suffice; corpus, tokenizer or vocabulary do not fit the model; parent or teacher are
            missing or do not fit; the devices do not fit batch or optimizer; the batch cannot be split; a rung is
            outside the stable phase; the judge would never be called; no checkpoint is intact; or (`BusyError`) another
            process is training this experiment. Nothing is written then.
    """
    check_type(experiment, Experiment, "experiment must be an explore.Experiment")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every: must be at least 1, got {keep_every}")
    check_parallel(experiment.train, devices, strategy)
    if split_batch:
        check_halves(experiment, devices, _device(accelerator))
    points = curve_steps(experiment, rungs)
    if judge is not None:
        check_judged(experiment, points)
    key = experiment.key()
    folder = run_folder(runs, experiment.name, key)
    if has_ended(folder, judge):
        if judge is not None and is_writer(devices):
            first_reason(judge, read_curve(folder, points))
        return folder
    check_start(experiment)
    check_teacher(experiment)
    device = _device(accelerator)
    if is_writer(devices):
        check_capacity(experiment, recompute=recompute, device=device, devices=devices, strategy=strategy)
    checkpoint, damage = last_whole(folder.path / "checkpoints")
    threads = use_free_cores(devices)
    run = TrainingRun(
        experiment=experiment,
        key=key,
        source=_open_data(experiment),
        folder=folder,
        points=points,
        rungs={step: rung_path(runs, experiment, step) for step in rung_steps(experiment, rungs)},
        compiled=_compiled(experiment, folder, devices, device, goes_on=checkpoint is not None),
        products=product_paths(device) if experiment.train.quantizes else {},
        checkpoint_every=checkpoint_every,
        keep_every=keep_every,
        recompute=recompute,
        split_batch=folder.environment.get("split_batch", False) if checkpoint is not None else split_batch,
        wandb=wandb,
        group=group,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        judge=judge,
        console=console or plain_console(),
    )
    if run.writes:
        if threads < n_cores() // devices and run.console.is_terminal:
            run.console.print(f"threads: {threads} of {n_cores()}, as other processes are busy", style="dim")
        with _locked(folder.path):
            if not has_ended(folder, judge):  # the process that held the lock may have finished the run
                if checkpoint is not None and checkpoint.name != LAST:
                    say([damage] if damage else [], run.console)
                    checkpoint.replace(checkpoint.with_name(LAST))
                _train_and_record(run, Path(runs), device)
    else:
        train_run(run)
    return folder


def _train_and_record(run: TrainingRun, runs: Path, device: str) -> None:
    """Writes the record that is known before training, then trains."""
    folder = run.folder.path
    for place in (folder, folder / "checkpoints", runs / "rungs"):
        if place.is_dir():
            remove_abandoned(place)
    say(run.experiment.notes(run.source), run.console)
    say(missing_compiler(*_length_and_precision(run.experiment, run.devices, device)), run.console)
    ops = {"ops": paths_in_use(device) | run.paths, "compiled": run.compiled}
    options = {"devices": run.devices, "strategy": run.strategy, "split_batch": run.split_batch}
    describe(folder, run.experiment, run.key, options | ops)
    if run.devices == 1:  # several processes might see different rungs while others write
        branch(runs, run.experiment, folder)
    train_run(run)


def _open_data(experiment: Experiment) -> Source:
    source = experiment.data.open(experiment.seed)
    if source.vocab_size > experiment.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: must be at least {source.vocab_size}, the number of tokens of the data, "
            f"got {experiment.model.vocab_size}"
        )
    return source


def _device(accelerator: str) -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator == "cpu" or found is None else found.type


def _compiled(
    experiment: Experiment, folder: RunFolder, devices: int, device: str, *, goes_on: bool
) -> Mapping[str, Mapping[str, float]]:
    """The ops that a run compiles; a resumed run compiles the same ones as before, since rounding differs."""
    if goes_on:
        recorded: Mapping[str, Mapping[str, float]] = folder.environment.get("compiled") or {}
        return recorded
    return compiled_ops(*_length_and_precision(experiment, devices, device))


def _length_and_precision(
    experiment: Experiment, devices: int, device: str
) -> tuple[ModelConfig, int, int, str, str, Recipe | None]:
    """Arguments shared by `compiled_ops` and `missing_compiler`."""
    n_tokens = experiment.n_steps * experiment.batch_tokens // devices
    train = experiment.train
    recipe = train.recipe if train.quantizes else None
    return experiment.model, experiment.data.seq_len, n_tokens, train.recipe.high, device, recipe


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks a run folder against other processes; the lock is released however this process ends."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{path}: another process is training this experiment") from None
        yield
