"""Distils a child model that a plan cuts out of a trained run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from explore.compress import Plan
from explore.compress.parent import open_parent
from explore.config import set_field
from explore.experiment import Experiment
from explore.files import exists
from explore.runs import RunFolder, walk_runs
from explore.weights import CHECKPOINT, MODEL, TrainedModel

LR_RATIO = 1 / 5
"""Peak learning rate of a distillation, divided by the parent's, as in NVIDIA Model-Optimizer's pruning guide."""


def child_experiment(
    path: str | Path,
    tokens: int,
    *,
    runs: str | Path = "runs",
    parent: str | Path | None = None,
    teacher: str | Path | None = None,
    data: str | Path | None = None,
    overrides: Iterable[str] = (),
) -> Experiment:
    """Returns the experiment that distils a plan's child on the parent's data, with a fifth of its learning rate.

    If hidden states of a narrower child are compared with its parent's, they are on the channels that the plan keeps.

    Args:
        path: path of the plan.
        tokens: number of training tokens.
        runs: folder of runs to search for the parent.
        parent: folder of the run or imported checkpoint that the plan cuts.
        teacher: a run or a folder of weights; None takes the parent.
        data: a run or experiment whose data and training the child takes; needed if the parent is imported.
        overrides: `path.to.field=value`, as for `Experiment.load`.

    Raises:
        ValueError: the plan cannot be read, its parent is missing, or an override is invalid.
    """
    path = Path(path)
    plan = Plan.load(path)
    folder = find_parent(plan, path, Path(runs)).path if parent is None else Path(parent)
    content: dict[str, Any] = _experiment(folder, data).model_dump(mode="json")
    content["name"] = f"{content['name']}-child"
    content["model"] = plan.model().model_dump(mode="json")
    content["start"] = {"kind": "parent", "parent": str(folder), "plan": plan.model_dump(mode="json")}
    content["train"] |= {
        "tokens": tokens,
        "flops": None,
        "lr": content["train"]["lr"] * LR_RATIO,
        "objective": {"kind": "distillation", "teacher": str(teacher or folder)},
    }
    for override in overrides:
        set_field(content, override)
    _name_channels(content, plan, folder)
    return Experiment.validated(content, path)


def _name_channels(content: dict[str, Any], plan: Plan, parent: Path) -> None:
    """Adds the channels that the child keeps to an objective that compares its hidden states with its parent's."""
    train = content["train"]
    objective = train.get("objective") if isinstance(train, dict) else None
    if plan.d_model is None or not isinstance(objective, dict) or not objective.get("hidden_layers"):
        return
    if Path(str(objective.get("teacher"))).resolve() == parent.resolve():
        objective.setdefault("hidden_channels", list(plan.d_model))


def _experiment(folder: Path, data: str | Path | None) -> Experiment:
    """The experiment of the parent; its weights are checked later, when they are read."""
    return (
        open_parent(folder, data).experiment if data or exists(folder / MODEL) else RunFolder(folder).load_experiment()
    )


def find_parent(plan: Plan, path: Path, runs: Path) -> RunFolder:
    """Finds the finished run in `runs` whose weights the plan cuts.

    Raises:
        ValueError: there is none.
    """
    model = plan.parent_model.model_dump(mode="json")
    for run in walk_runs(runs):
        if (run.experiment.get("experiment") or {}).get("model") != model or run.status != "finished":
            continue  # the digest covers a whole file
        if (run.path / CHECKPOINT).exists() and TrainedModel.model_validate(run.path).digest == plan.parent:
            return run
    raise ValueError(
        f"{path}: a run below {runs} must have the parent's weights (digest {plan.parent[:8]}), got none; "
        "name its folder with --parent"
    )
