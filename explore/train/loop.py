"""Trains one run with Lightning, from its last checkpoint to its result."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from explore import tracking
from explore.checkpoints import LAST, PREVIOUS, Standing, standing
from explore.data import Source
from explore.experiment import Experiment
from explore.files import write_json
from explore.ops import falling_back, path_of
from explore.runs import PRUNED, RunFolder
from explore.termination import Requests, TerminatedError, termination_handled
from explore.train.callbacks import (
    EndsTogether,
    FreeCores,
    NotebookProgress,
    PlainWhereNotCompiled,
    ProgressBar,
    Throughput,
    quiet,
    say,
)
from explore.train.halves import in_halves
from explore.train.judging import Judge, LearningCurve, first_reason, read_curve
from explore.train.low_precision import LostElements
from explore.train.memory import keep_freed_memory
from explore.train.metrics import MetricsFile
from explore.train.models import evaluate_splits
from explore.train.module import DataModule, DivergedError, LitLanguageModel
from explore.train.objectives import build_objective
from explore.train.parallel import StrategyName, ended_together, is_writer, lightning_strategy, wait_for_all
from explore.train.recall_curve import StopsAtRecall, curve_scores, recall_curve
from explore.train.record import cost_record, result_of
from explore.train.regions import keep_compiled
from explore.train.saving import KeptCheckpoints, LastCheckpoint, WholeCheckpointIO
from explore.train.start import starting_model

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
CHECKPOINTS_PER_RUN = 20


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run that is ready to train: its experiment and the options of `fit`.

    Attributes:
        points: steps after which the run is validated, each with its fraction of the schedule.
        rungs: steps whose full state is kept for other runs, each with its path.
        compiled: ops to compile, each with the seconds that compiling saves and costs.
        products: the implementation of quantised products, if the run has some.
    """

    experiment: Experiment
    key: str
    source: Source
    folder: RunFolder
    points: Mapping[int, float]
    rungs: Mapping[int, Path]
    compiled: Mapping[str, Mapping[str, float]]
    products: Mapping[str, str]
    checkpoint_every: int | None
    keep_every: int | None
    recompute: bool
    split_batch: bool
    wandb: tracking.WandbMode | None
    group: str | None
    accelerator: str
    devices: int
    strategy: StrategyName
    judge: Judge | None
    console: Console

    @property
    def checkpoint(self) -> Path:
        """The checkpoint from which the run resumes."""
        return self.folder.path / "checkpoints" / LAST

    @property
    def paths(self) -> dict[str, str]:
        """Implementations of the ops that do not run by their default one."""
        return {**dict.fromkeys(self.compiled, "compiled"), **self.products}

    @property
    def writes(self) -> bool:
        """Whether this process writes the record."""
        return is_writer(self.devices)

    def report_plain(self, reason: str) -> None:
        """Prints and records that nothing is compiled because the compiler failed."""
        if not self.writes:
            return
        say([f"the compiler failed, so the run continues uncompiled: {reason}"], self.console)
        record = self.folder.environment
        ops = {**record.get("ops", {}), **{op: path_of(op) for op in self.compiled}}
        write_json(self.folder.path / "environment.json", {**record, "ops": ops, "compiled": {}})

    @property
    def row_every(self) -> int:
        """Steps from one row of metrics to the next."""
        return max(1, self.experiment.n_steps // 500)


def train_run(run: TrainingRun) -> None:
    """Trains a run to its end and writes `result.json`; returns when every process of the run is done.

    Raises:
        TerminatedError: a signal asked this process to end; the run can resume from its last step.
    """
    begun = standing(run.checkpoint, run.key, run.folder.path, run.experiment.model)
    throughput = Throughput(run.experiment.batch_tokens)
    with termination_handled() as requests, quiet(), _mirrored(run) as mirror:
        tables = _tables(run, begun)  # before the learning curve is read from them
        earlier = read_curve(run.folder, run.points, begun.step)
        curve = LearningCurve(run.points, run.experiment.n_steps, run.judge, earlier)
        callbacks = [throughput, *tables, *_callbacks(run, curve, throughput)]
        module = _module(run, requests)
        trainer = _trainer(run, callbacks, mirror, validates=bool(run.points or begun.step))
        with ended_together(trainer):
            diverged = _fit(run, trainer, module, begun.step, requests)
            if begun.step == run.experiment.n_steps and run.judge is not None and run.writes:
                first_reason(run.judge, curve.earlier)  # nothing was trained, so the judge was not called yet
            step = trainer.global_step if diverged is None else diverged.step
            result = result_of(run.experiment, run.folder.path, step, throughput)
            if curve.reason is not None:  # scores of a model before its decay would mislead
                result |= {"status": PRUNED, "reason": curve.reason, "stopped_val_bpb": curve.value}
                result |= {"val_bpb": None, "test_bpb": None}
            elif diverged is not None:
                result |= {"status": "diverged", "reason": str(diverged)}
            else:
                result |= _scores(run, trainer, module)
                result |= curve_scores(run.experiment, recall_curve(run.folder.metrics))
            if run.writes:
                run.checkpoint.with_name(PREVIOUS).unlink(missing_ok=True)
                write_json(run.folder.path / "result.json", result)
            if mirror is not None:
                cost = run.experiment.model.cost(run.experiment.data.seq_len)
                tracking.send_summary(mirror.experiment, {**result, **cost.to_dict()})
            wait_for_all()


def _tables(run: TrainingRun, begun: Standing) -> list[Callback]:
    """The callbacks that write the tables of a run."""
    experiment, folder = run.experiment, run.folder.path
    tables: list[Callback] = []
    if run.writes:
        tables.append(MetricsFile(folder / "metrics.csv", experiment.batch_tokens, run.row_every, begun))
    if experiment.train.quantizes:
        tables.append(LostElements(folder, experiment.n_steps, begun, writes=run.writes))
    return tables


def _callbacks(run: TrainingRun, curve: LearningCurve, throughput: Throughput) -> list[Callback]:
    experiment, folder = run.experiment, run.checkpoint.parent
    every = run.checkpoint_every or math.ceil(experiment.n_steps / CHECKPOINTS_PER_RUN)
    callbacks: list[Callback] = [curve, LastCheckpoint(folder, every, run.points, run.rungs), EndsTogether()]
    if experiment.train.stop_recall is not None:
        callbacks.append(StopsAtRecall(experiment.train.stop_recall, recall_curve(run.folder.metrics)))
    if run.compiled:
        callbacks.append(PlainWhereNotCompiled(run.report_plain))
    if not run.compiled:  # a changed number of threads would compile the ops again
        callbacks.append(FreeCores(run.devices))
    if run.keep_every is not None:
        callbacks.append(KeptCheckpoints(folder, run.keep_every))
    if run.writes and run.console.is_terminal:
        callbacks.append(ProgressBar(experiment.n_steps, experiment.name, throughput, run.console))
    elif run.writes and run.console.is_jupyter and not run.console.quiet:
        keeps = run.group is None  # the trials of a study would fill the page
        callbacks.append(NotebookProgress(experiment.n_steps, experiment.name, throughput, keeps=keeps))
    return callbacks


def _module(run: TrainingRun, requests: Requests) -> LitLanguageModel:
    if run.compiled:
        keep_compiled()
        if run.writes and run.console.is_terminal:
            saves, costs = (sum(op[what] for op in run.compiled.values()) for what in ("saves_s", "costs_s"))
            line = f"compiling {', '.join(run.compiled)}: takes about {costs:.0f} s, saves about {saves:.0f} s"
            run.console.print(line, style="dim", highlight=False)
    keep_freed_memory()
    model = starting_model(run.experiment)
    model.recompute = run.recompute
    objective = build_objective(run.experiment.train)
    if run.split_batch:
        objective = in_halves(objective)
    return LitLanguageModel(run.experiment, model, objective, run.paths, requests, run.key)


def _trainer(run: TrainingRun, callbacks: list[Callback], mirror: WandbLogger | None, *, validates: bool) -> Trainer:
    n_steps = run.experiment.n_steps
    trainer = Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        strategy=lightning_strategy(run.devices, run.strategy),
        use_distributed_sampler=False,
        max_steps=n_steps,
        precision=PRECISIONS[run.experiment.train.recipe.high],  # type: ignore[arg-type]
        val_check_interval=n_steps + 1,  # the learning curve says when
        check_val_every_n_epoch=None,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=run.row_every,
        callbacks=callbacks,
        logger=mirror or False,
        plugins=[WholeCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning would answer SIGTERM with a broadcast, which deadlocks if two processes are at different points.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _fit(
    run: TrainingRun, trainer: Trainer, module: LitLanguageModel, resumed_at: int, requests: Requests
) -> DivergedError | None:
    """Trains the remaining steps; returns the error if the run diverged."""
    diverged, on_interrupt = None, signal.getsignal(signal.SIGINT)
    try:
        with falling_back() if run.compiled else nullcontext():
            trainer.fit(
                module,
                datamodule=DataModule(run.experiment, run.source),
                ckpt_path=run.checkpoint if resumed_at else None,
                weights_only=True,
            )
    except DivergedError as error:
        diverged = error
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turned it into an exit, and ignores the next
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        if requests.signum is None:
            raise
        raise TerminatedError(requests.signum) from error  # a compiler got the signal too, for example
    finally:
        requests.deferred = False
    if requests.signum is not None and run.writes:  # it came after the last step
        raise TerminatedError(requests.signum)
    return diverged


def _scores(run: TrainingRun, trainer: Trainer, module: LitLanguageModel) -> dict[str, Any]:
    """Returns the scores of the trained model, or the error if it diverged in its last step."""
    model = module.model.to(trainer.strategy.root_device)
    scores, documents = evaluate_splits(run.experiment, run.source, model)
    result: dict[str, Any] = {**scores}
    if documents is not None and run.writes:
        write_json(run.folder.path / "evals.json", {**run.folder.evals, "documents": documents})
    if broken := [name for name, score in scores.items() if isinstance(score, float) and not math.isfinite(score)]:
        reason = f"{broken[0]} is {scores[broken[0]]} after the last step: the run diverged"
        result = {"status": "diverged", "reason": reason}
    if module.max_violation is not None:
        result["max_violation"] = float(module.max_violation)
    return result


@contextmanager
def _mirrored(run: TrainingRun) -> Iterator[WandbLogger | None]:
    """Yields Lightning's logger for Weights & Biases (None when off), and closes it however the block ends."""
    experiment = run.experiment
    if run.wandb is None or not run.writes:
        yield None
        return
    mirror = WandbLogger(
        project=tracking.PROJECT,
        name=experiment.name,
        id=tracking.run_id(run.key),
        resume="allow",
        save_dir=run.folder.path,
        offline=run.wandb == "offline",
        group=run.group,
        job_type=None if run.group is None else "trial",
    )
    try:
        tracking.send_config(mirror.experiment, experiment, run.key, cost_record(experiment))
        yield mirror
    finally:
        mirror.experiment.finish()
