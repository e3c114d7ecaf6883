"""When and how the checkpoints of a run are written: each is complete or absent."""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from explore.archive import load_checkpoint
from explore.checkpoints import LAST, PREVIOUS
from explore.files import copy_whole, replacing
from explore.machine import causes
from explore.termination import SIGNALS, TerminatedError
from explore.train.module import LitLanguageModel


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, then swaps them: after a kill, one of the two is intact.

    The old one stays as `previous.ckpt` until the next is written, in case the disk damages the new one. Lightning's
    own method needs space in memory and TMPDIR, which may be too small for a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        replaces = path.name == LAST and path.exists()
        if replaces:
            path.with_name(PREVIOUS).unlink(missing_ok=True)  # first, so that there are never three on the disk
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                _save(checkpoint, file)
            if replaces:
                _keep_previous(path)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path), mmap=False)


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:  # torch raises this for a disk error
        raise next((each for each in causes(error) if isinstance(each, OSError)), error) from None


def _keep_previous(path: Path) -> None:
    """Gives a checkpoint a second name; renames it if the file system has no hard links."""
    with suppress(FileNotFoundError):
        try:
            os.link(path, path.with_name(PREVIOUS))
        except OSError:
            path.replace(path.with_name(PREVIOUS))


class LastCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` at a fixed interval, at the rungs, at the end, and when a signal ends the run.

    If the step is validated, it saves after the validation, so that a resumed run has that validation on disk.

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
        self.path = folder / LAST
        self.validated, self.rungs = validated, rungs or {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._keep_rung(trainer)  # in case the run was killed between the two

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
        # From the first step on; before it (compilation may take a minute) a signal ends the process at once.
        pl_module.requests.deferred = threading.current_thread() is threading.main_thread()
        if pl_module.is_ending:
            if not saved:
                trainer.save_checkpoint(self.path)
            raise TerminatedError(pl_module.requests.signum or SIGNALS[0])

    def _keep_rung(self, trainer: Trainer) -> None:
        path = self.rungs.get(trainer.global_step)
        if path is not None and trainer.is_global_zero and not path.exists():
            copy_whole(self.path, path)


class KeptCheckpoints(Callback):
    """Saves the weights at a fixed interval, as `step-000120.ckpt`."""

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.folder / f"step-{step:06d}.ckpt", weights_only=True)
