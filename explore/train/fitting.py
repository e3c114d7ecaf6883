"""Training one experiment, from nothing or from where it stopped, into a run folder."""

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
from explore.train.judging import Judge, check_judged, has_ended, seen, tell
from explore.train.loop import TrainingRun, train_run
from explore.train.parallel import StrategyName, check_parallel, is_writer
from explore.train.record import describe
from explore.train.regions import compiled_ops, missing_compiler
from explore.train.rungs import branch, curve_steps, rung_path, rung_steps
from explore.train.start import check_start


class BusyError(ValueError):
    """Another process trains this very experiment."""


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
        split_batch: train on both halves of a batch at once, each by one thread, where a model is so small that threads
            wait for one another at every op. Losses differ in their last bits. A run that goes on keeps its choice.
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
        ValueError: memory does not suffice; corpus, tokenizer or vocabulary do not fit the model; parent or teacher
            are gone or do not fit it; the devices do not fit batch or optimizer; the
            batch cannot be split; a rung is not in the stable phase; the
            judge would never be asked; no checkpoint is whole; or (`BusyError`) another process trains this very
            experiment. Nothing is written then.
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
            tell(judge, seen(folder, points))
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
            if not has_ended(folder, judge):  # a process that held the lock until now may have finished it
                if checkpoint is not None and checkpoint.name != LAST:
                    say([damage] if damage else [], run.console)
                    checkpoint.replace(checkpoint.with_name(LAST))
                _train_and_record(run, Path(runs), device)
    else:
        train_run(run)
    return folder


def _train_and_record(run: TrainingRun, runs: Path, device: str) -> None:
    """Writes what is known before training, and trains."""
    folder = run.folder.path
    for place in (folder, folder / "checkpoints", runs / "rungs"):
        if place.is_dir():
            remove_abandoned(place)
    say(run.experiment.notes(run.source), run.console)
    say(missing_compiler(*_length_and_precision(run.experiment, run.devices, device)), run.console)
    ops = {"ops": paths_in_use(device) | run.paths, "compiled": run.compiled}
    options = {"devices": run.devices, "strategy": run.strategy, "split_batch": run.split_batch}
    describe(folder, run.experiment, run.key, options | ops)
    if run.devices == 1:  # several processes would not agree on files that others write
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
    """The ops that a run compiles: those that it compiled where it goes on, since rounding differs."""
    if goes_on:
        recorded: Mapping[str, Mapping[str, float]] = folder.environment.get("compiled") or {}
        return recorded
    return compiled_ops(*_length_and_precision(experiment, devices, device))


def _length_and_precision(
    experiment: Experiment, devices: int, device: str
) -> tuple[ModelConfig, int, int, str, str, Recipe | None]:
    """Arguments of `compiled_ops`, and of what is said where there is no compiler."""
    n_tokens = experiment.n_steps * experiment.batch_tokens // devices
    train = experiment.train
    recipe = train.recipe if train.quantizes else None
    return experiment.model, experiment.data.seq_len, n_tokens, train.recipe.high, device, recipe


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a run folder against other processes; the lock goes with the process, however it ends."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{path}: another process is training this experiment") from None
        yield
