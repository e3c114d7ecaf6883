"""Callbacks around the training steps: progress, throughput, number of threads, silenced warnings."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from explore.formatting import duration
from explore.formatting.html import block, line, progress
from explore.ops import compiler_failure
from explore.terminal import NotebookOutput
from explore.threads import CoreWatch
from explore.train.module import DivergedError, LitLanguageModel
from explore.train.parallel import end_followers


class FreeCores(Callback):
    """Trains with as many threads as there are free cores, and adapts when other processes start or end.

    Args:
        devices: number of processes that train together.
    """

    def __init__(self, devices: int) -> None:
        self._watch = CoreWatch(devices)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watch.look()


class EndsTogether(Callback):
    """Ends the other processes of a run when this one, which started them, fails."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, DivergedError):  # all processes raise this one
            end_followers(trainer)


class PlainWhereNotCompiled(Callback):
    """Stops asking for compiled ops once the compiler has failed.

    Args:
        report: called with the reason why the compiler failed.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        if pl_module.paths and (failure := compiler_failure()) is not None:
            pl_module.paths = {}
            self.report(failure)


class Throughput(Callback):
    """Time spent in training steps, across resumes. Validation and checkpoints do not count.

    Attributes:
        train_s: seconds in training steps since step 0.
        steps_here: training steps made by this process.
        here_s: seconds in those steps.
    """

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.train_s = self.here_s = 0.0
        self.steps_here = 0
        self._started = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"train_s": self.train_s}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.train_s = state_dict["train_s"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step_s = time.perf_counter() - self._started
        self.train_s += step_s
        self.here_s += step_s
        self.steps_here += 1
        pl_module.log("tokens_per_s", self.batch_tokens / step_s)

    @property
    def tokens_per_s(self) -> float:
        """Mean throughput over the steps of this process."""
        return self.steps_here * self.batch_tokens / self.here_s if self.here_s else 0.0


class ProgressBar(Callback):
    """One line: steps, loss, validation bits per byte, tokens per second, remaining time."""

    def __init__(self, n_steps: int, description: str, throughput: Throughput, console: Console) -> None:
        self.n_steps, self.description, self.throughput = n_steps, description, throughput
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._task = self.progress.add_task(
            self.description, total=self.n_steps, completed=trainer.global_step, status=""
        )
        self.progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._task is None or self.progress.finished:
            return
        status = "  ".join(progress_words(trainer, self.throughput))
        self.progress.update(self._task, completed=trainer.global_step, status=status)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.progress.stop()


class NotebookProgress(Callback):
    """Shows the same line as HTML in the output of a notebook cell.

    Args:
        keeps: whether the line stays when training ends.
    """

    def __init__(self, n_steps: int, description: str, throughput: Throughput, *, keeps: bool) -> None:
        self.n_steps, self.description, self.throughput, self.keeps = n_steps, description, throughput, keeps
        self._output = NotebookOutput()
        self._began_s, self._first_step = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began_s, self._first_step = time.monotonic(), trainer.global_step
        self._output.show(self.render(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._output.is_due():
            self._output.show(self.render(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._output.show(self.render(trainer) if self.keeps else "")

    def render(self, trainer: Trainer) -> str:
        """The line, with the remaining time."""
        step, took_s = trainer.global_step, time.monotonic() - self._began_s
        parts = [f"{step:,} of {self.n_steps:,} steps", *progress_words(trainer, self.throughput)]
        if step > self._first_step:
            left_s = took_s / (step - self._first_step) * (self.n_steps - step)
            parts.append(f"{duration(left_s)} left" if step < self.n_steps else duration(took_s))
        return block(line(self.description), progress(step / self.n_steps, " · ".join(parts)))


def progress_words(trainer: Trainer, throughput: Throughput) -> list[str]:
    """Loss, validation bits per byte if measured, and tokens per second, as words."""
    metrics = trainer.callback_metrics
    parts = [f"loss {float(metrics['loss']):.3f}"] if "loss" in metrics else []
    if "val_bpb" in metrics:
        parts.append(f"val {float(metrics['val_bpb']):.3f} bits/byte")
    return [*parts, f"{throughput.tokens_per_s:,.0f} tokens/s"]


_SAID: set[str] = set()


def say(notes: Iterable[str], console: Console) -> None:
    """Prints the notes that this process has not printed yet: trials of a sweep share most of theirs."""
    for note in notes:
        if note not in _SAID:
            _SAID.add(note)
            console.print(f"note: {note}", highlight=False, soft_wrap=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Lightning's advice about data loaders and epochs: here data is generated per step."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
