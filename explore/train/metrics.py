"""Writes the measurements of a run during training, to disk and into its checkpoints."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from explore.checkpoints import Standing
from explore.files import named, replacing
from explore.quantities import METRICS

VALIDATION = ("val_loss", "val_bpb", "val_recall")


class RowsFile:
    """A CSV file that grows with a run.

    Every checkpoint contains its text. A resumed run rewrites the file from there, which drops the rows of later steps
    (they are trained again) and repairs a damaged file.

    Args:
        columns: names of the columns; other names raise an error.
        standing: the state of the run. Checkpoints of earlier versions have no text; then the rows on disk are kept.
    """

    def __init__(self, path: Path, columns: Sequence[str], standing: Standing) -> None:
        self.path, self.columns = path, columns
        self.text = ",".join(columns) + "\r\n"
        if standing.files is not None:
            self.text += self._lines(_rows(standing.files.get(path.name, "")))  # earlier versions had fewer columns
        else:
            self.text += self._lines(row for row in _read(path) if float(row["step"]) <= standing.step)
        with replacing(path) as temporary:
            temporary.write_text(self.text, encoding="utf-8", newline="")

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to the file."""
        lines = self._lines(rows)
        self.text += lines
        with named(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(lines)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Adds the text to a checkpoint."""
        checkpoint.setdefault("files", {})[self.path.name] = self.text

    def _lines(self, rows: Iterable[Mapping[str, Any]]) -> str:
        lines = io.StringIO(newline="")
        csv.DictWriter(lines, self.columns).writerows(rows)
        return lines.getvalue()


class MetricsFile(Callback):
    """Appends metrics to a CSV file. The column `step` counts completed optimizer steps, from 1.

    An unknown column raises an error.

    This is a callback and not a logger because Lightning calls loggers after writing a step's checkpoint: a run resumed
    from that checkpoint would lack the row.

    Args:
        batch_tokens: tokens per step, for the column `tokens`.
        every_n_steps: steps between rows of training metrics.
        standing: the state of the run.
    """

    def __init__(self, path: Path, batch_tokens: int, every_n_steps: int, standing: Standing) -> None:
        self.rows, self.batch_tokens, self.every_n_steps = (
            RowsFile(path, METRICS, standing),
            batch_tokens,
            every_n_steps,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._append(trainer, validation=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._append(trainer, validation=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.rows.save(checkpoint)

    def _append(self, trainer: Trainer, *, validation: bool) -> None:
        step, metrics = trainer.global_step, trainer.callback_metrics  # the latest training and validation metrics
        row = {name: float(value) for name, value in metrics.items() if (name in VALIDATION) == validation}
        self.rows.append([{"step": step, "tokens": step * self.batch_tokens} | row])


def _read(path: Path) -> list[dict[str, str]]:
    """The complete rows of a CSV file; none if the file is missing."""
    if not path.is_file():
        return []
    return _rows(path.read_text(encoding="utf-8", errors="replace").replace("\0", ""))


def _rows(text: str) -> list[dict[str, str]]:
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row.values() and _is_step(row.get("step"))]


def _is_step(text: str | None) -> bool:
    return text is not None and text.isdecimal()
