"""What Weights & Biases is told beside the metrics that Lightning's logger sends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from explore.experiment import Experiment

if TYPE_CHECKING:
    from wandb import Run

WandbMode = Literal["offline", "online"]
PROJECT = "explore"


def describe(run: Run, experiment: Experiment, key: str, cost: dict[str, Any]) -> None:
    """Sends the experiment, its key and its cost as the run's config."""
    totals = {name: value for name, value in cost.items() if name != "ledger"}
    config = {"key": key, **experiment.model_dump(mode="json"), "cost": totals}
    run.config.update(config, allow_val_change=True)  # type: ignore[no-untyped-call]


def summarize(run: Run, row: dict[str, Any]) -> None:
    """Sends the run's row of the final table as the run's summary."""
    run.summary.update({name: value for name, value in row.items() if value is not None})
