"""The metrics of a run on disk."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from explore.files import replacing

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "aux_loss",
    "mtp_loss",
    "lr",
    "grad_norm",
    "max_violation",
    "tokens_per_s",
    "val_loss",
    "val_bpb",
)


class MetricsFile(Logger):
    """Appends metrics to a CSV file. The column `step` counts optimizer steps that are done, from 1.

    Lightning's own CSV logger starts anew when a run is resumed; this one goes on.

    Args:
        batch_tokens: tokens of a step, for the column `tokens`.
        resumed_at: step of the checkpoint that the run goes on from; later rows are dropped, since those
            steps are made again.
    """

    def __init__(self, path: Path, batch_tokens: int, resumed_at: int = 0) -> None:
        super().__init__()
        self.path, self.batch_tokens = path, batch_tokens
        rows = _rows(path)
        kept = [row for row in rows if float(row["step"]) <= resumed_at] if resumed_at else []
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the experiment stands in a file of its own."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one row; a column that is not known is refused.

        Args:
            step: Lightning's count, which is 0 for the first step.
        """
        row = {name: value for name, value in metrics.items() if name != "epoch"}
        if not row or step is None:
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({"step": step + 1, "tokens": (step + 1) * self.batch_tokens} | row)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row.values()]
