"""The metrics of a run on disk."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from explore.files import replacing
from explore.quantities import METRICS

VALIDATION = ("val_loss", "val_bpb")


class MetricsFile(Callback):
    """Appends metrics to a CSV file. The column `step` counts optimizer steps that are done, from 1.

    A column that is not known is refused.

    A callback, as Lightning tells its loggers of a step after the checkpoint of that step is written: whoever went on
    from there would have lost the row.

    Args:
        batch_tokens: tokens of a step, for the column `tokens`.
        every_n_steps: steps from one row of training to the next.
        resumed_at: step of the checkpoint that the run goes on from; later rows are dropped, since those
            steps are made again.
    """

    def __init__(self, path: Path, batch_tokens: int, every_n_steps: int, resumed_at: int) -> None:
        self.path, self.batch_tokens, self.every_n_steps = path, batch_tokens, every_n_steps
        rows = read_rows(path)
        kept = [row for row in rows if float(row["step"]) <= resumed_at] if resumed_at else []
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, METRICS)
            writer.writeheader()
            writer.writerows(kept)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._append(trainer, validation=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._append(trainer, validation=True)

    def _append(self, trainer: Trainer, *, validation: bool) -> None:
        step, metrics = trainer.global_step, trainer.callback_metrics  # the last of both kinds
        row = {name: float(value) for name, value in metrics.items() if (name in VALIDATION) == validation}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, METRICS).writerow({"step": step, "tokens": step * self.batch_tokens} | row)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that are whole; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row.values()]
