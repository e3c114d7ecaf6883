"""What happens beside the training steps: progress, throughput, checkpoints that are whole or absent, silence."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from explore.files import copy_whole, replacing
from explore.termination import SIGNALS, TerminatedError
from explore.threads import CoreWatch
from explore.train.module import DivergedError, LitLanguageModel
from explore.train.parallel import end_followers


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and swaps them: a kill leaves one or the other."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with replacing(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`, anew every so many steps, at the rungs, at the end, and where a signal ends the run.

    Where a step is validated, after that: whoever goes on from a checkpoint has its validation on disk.

    Args:
        validated: steps that are validated.
        rungs: steps, all of them validated, whose checkpoint is also kept at a path of its own.
    """

    def __init__(
        self, folder: Path, every_n_steps: int, validated: Container[int] = (), rungs: Mapping[int, Path] | None = None
    ) -> None:
        super().__init__(
            dirpath=folder,
            filename="last",
            every_n_train_steps=every_n_steps,
            save_top_k=1,
            enable_version_counter=False,
        )
        self.path = folder / "last.ckpt"
        self.validated, self.rungs = validated, rungs or {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._keep_rung(trainer)  # of a run that was killed between the two

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step not in self.validated:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._end_if_asked(trainer, pl_module, saved=trainer.global_step % self._every_n_train_steps == 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step % self._every_n_train_steps == 0 or step in self.rungs:
            trainer.save_checkpoint(self.path)
            self._keep_rung(trainer)
            self._end_if_asked(trainer, pl_module, saved=True)
        else:
            self._end_if_asked(trainer, pl_module, saved=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step % self._every_n_train_steps and step not in self.rungs:
            trainer.save_checkpoint(self.path)

    def _end_if_asked(self, trainer: Trainer, pl_module: LightningModule, *, saved: bool) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        # From the first step on, which may be compiled for a minute: until then a signal ends the process at once.
        pl_module.requests.deferred = threading.current_thread() is threading.main_thread()
        if pl_module.is_ending:
            if not saved:
                trainer.save_checkpoint(self.path)
            raise TerminatedError(pl_module.requests.signum or SIGNALS[0])

    def _keep_rung(self, trainer: Trainer) -> None:
        path = self.rungs.get(trainer.global_step)
        if path is not None and trainer.is_global_zero and not path.exists():
            copy_whole(self.path, path)


class FreeCores(Callback):
    """Trains with as many threads as there are free cores, also when a neighbour starts or ends during the run.

    Args:
        devices: processes that train together.
    """

    def __init__(self, devices: int) -> None:
        self._watch = CoreWatch(devices)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watch.look()


class KeptCheckpoints(Callback):
    """Keeps the weights of every so many steps, as `step-000120.ckpt`."""

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.folder / f"step-{step:06d}.ckpt", weights_only=True)


class EndsTogether(Callback):
    """Ends the other processes of a run when this one, which has started them, fails."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, DivergedError):  # which all of them raise
            end_followers(trainer)


class Throughput(Callback):
    """Time spent in training steps, across resumes. Validation and checkpoints do not count.

    Attributes:
        train_s: seconds in training steps since step 0.
        steps_here: steps of this process.
        here_s: seconds in them.
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
        """Mean over the steps of this process."""
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
        metrics = trainer.callback_metrics
        parts = [f"loss {float(metrics['loss']):.3f}"] if "loss" in metrics else []
        if "val_bpb" in metrics:
            parts.append(f"val {float(metrics['val_bpb']):.3f} bits/byte")
        parts.append(f"{self.throughput.tokens_per_s:,.0f} tokens/s")
        self.progress.update(self._task, completed=trainer.global_step, status="  ".join(parts))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.progress.stop()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Lightning's advice, which does not fit data that is made by step and steps that are counted."""
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
