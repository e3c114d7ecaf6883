"""Distils a shortlist of children briefly, and compares their ranking before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from explore.compress import Plan
from explore.runs import RunFolder
from explore.train.child import child_experiment
from explore.train.fitting import fit

FOLDER = "candidates"
"""Folder within the parent's for the runs of a shortlist, where tables of runs do not look."""


class Distilled(NamedTuple):
    """A child after a short distillation.

    Attributes:
        run: its folder.
        val_loss: validation loss in nats per token; None if it diverged.
        val_bpb: validation bits per byte; None if it diverged or the data is not text.
        flops: FLOPs of training the child and of its teacher.
    """

    run: Path
    val_loss: float | None
    val_bpb: float | None
    flops: float


def distil_shortlist(
    plans: Sequence[Path], tokens: int, parent: Path, data: Path | None = None, **options: Any
) -> list[Distilled]:
    """Distils the children of several plans of one parent on the same tokens in the same order.

    A child that was already distilled is reused; an interrupted one resumes.

    Args:
        plans: paths of the plans.
        tokens: training tokens for each child.
        parent: folder of the run or imported checkpoint that was cut.
        data: a run or experiment whose data and training the child takes; needed if the parent is imported.
        options: further options of `fit`.
    """
    found = []
    for path in plans:
        name = f"name=candidate-{path.stem}"
        experiment = child_experiment(path, tokens, parent=parent, data=data, overrides=[name])
        run = fit(experiment, parent / FOLDER, **options)
        found.append(_distilled(run))
    return found


def _distilled(run: RunFolder) -> Distilled:
    result: Mapping[str, Any] = run.result or {}
    finished = run.status == "finished"
    loss, bits = (result.get(name) if finished else None for name in ("val_loss", "val_bpb"))
    return Distilled(run.path, loss, bits, float(result.get("flops_run", 0) + result.get("flops_teacher", 0)))


def order_of(found: Sequence[Distilled]) -> list[int]:
    """Indices of the children by increasing loss; diverged ones come last."""
    return sorted(range(len(found)), key=lambda i: (found[i].val_loss is None, found[i].val_loss or 0.0, i))


def counted(plan: Plan, found: Sequence[Distilled]) -> Plan:
    """Adds the cost of distilling the whole shortlist to a plan."""
    spent = sum(each.flops for each in found)
    return plan.model_copy(update={"origin": {**plan.origin, "flops": plan.flops + spent}})


def rankings_agree(before: Sequence[float], after: Sequence[float | None]) -> float | None:
    """Kendall's tau between two rankings of the same children: 1 if they agree, -1 if they are reversed.

    Returns:
        The coefficient; None if fewer than two children have both losses, or all losses are equal.
    """
    from scipy.stats import kendalltau

    pairs = [(a, b) for a, b in zip(before, after, strict=True) if b is not None]
    if len(pairs) < 2:
        return None
    tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    return None if tau != tau else tau
