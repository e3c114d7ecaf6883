"""Sends configs, summaries and sweeps to Weights & Biases; Lightning's logger sends the metrics."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from explore.experiment import Experiment

if TYPE_CHECKING:
    from wandb import Run

WandbMode = Literal["offline", "online"]
PROJECT = "explore"


def send_config(run: Run, experiment: Experiment, key: str, cost: dict[str, Any]) -> None:
    """Sends the experiment, its key, its family and its cost as the run's config."""
    totals = {name: value for name, value in cost.items() if name != "ledger"}
    about = {"key": key, "family": experiment.model.family, "pattern": experiment.model.pattern}
    config = {**about, **experiment.model_dump(mode="json"), "cost": totals}
    run.config.update(config, allow_val_change=True)  # type: ignore[no-untyped-call]


def send_summary(run: Run, row: dict[str, Any]) -> None:
    """Sends the run's row of the final table as the run's summary."""
    run.summary.update({name: value for name, value in row.items() if value is not None})


def log_sweep(
    study: str, table: pd.DataFrame, figure: Path, folder: Path, mode: WandbMode, *, question: str = ""
) -> None:
    """Sends the frontier of a sweep as one run in the group of its trials; sending it again replaces that run.

    Args:
        study: name of the study, used as the group.
        table: rows of the table of runs.
        figure: PNG of the frontier.
        folder: folder in which W&B creates its folder `wandb`.
        question: shown as the run's notes.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=PROJECT,
        name=f"{study}: frontier",
        id=sweep_id(study),
        group=study,
        job_type="sweep",
        notes=question or None,
        resume="allow",
        dir=folder,
        mode=mode,
        settings=wandb.Settings(console="off"),
    )
    try:
        known = table.astype(object).where(table.notna(), None)  # W&B has no NA
        rows = wandb.Table(dataframe=known, allow_mixed_types=True)
        run.log({"frontier": wandb.Image(str(figure), caption=study), "runs": rows})
        run.summary.update({"n_runs": len(table)})
    finally:
        run.finish()


def run_id(key: str) -> str:
    """The W&B id of the run with this experiment key."""
    return key[:32]


def sweep_id(study: str) -> str:
    """The W&B id of a sweep's run; it depends only on the study's name."""
    return f"sweep-{hashlib.sha256(study.encode()).hexdigest()[:24]}"
