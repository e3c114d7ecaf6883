"""A shortlist of children: the same short distillation of each, and the ranking before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from explore.compress import Plan
from explore.runs import RunFolder
from explore.train.child import child_experiment
from explore.train.fitting import fit

FOLDER = "candidates"
"""Folder within the parent's where the runs of a shortlist lie, apart from those that a table shows."""


class Distilled(NamedTuple):
    """A child after a short distillation.

    Attributes:
        run: its folder.
        val_loss: in nats per token; None where it diverged.
        val_bpb: bits per byte; None where it diverged, or the data is no text.
        flops: of training it and of its teacher.
    """

    run: Path
    val_loss: float | None
    val_bpb: float | None
    flops: float


def distil_shortlist(
    plans: Sequence[Path], tokens: int, parent: Path, data: Path | None = None, **options: Any
) -> list[Distilled]:
    """Distils the children of some plans of one parent, each on the same tokens in the same order.

    A child that was distilled before is found, and one that was interrupted goes on.

    Args:
        plans: paths of the plans.
        tokens: to train each child on.
        parent: folder of the run, or of the imported checkpoint, that was cut.
        data: a run or an experiment with the data and training of the child, where the parent is imported.
        options: further ones of `fit`.
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
    """Indices of the children, the lowest loss first; those that diverged are last."""
    return sorted(range(len(found)), key=lambda i: (found[i].val_loss is None, found[i].val_loss or 0.0, i))


def counted(plan: Plan, found: Sequence[Distilled]) -> Plan:
    """A plan that also counts what the distillation of the whole shortlist cost."""
    spent = sum(each.flops for each in found)
    return plan.model_copy(update={"origin": {**plan.origin, "flops": plan.flops + spent}})


def rankings_agree(before: Sequence[float], after: Sequence[float | None]) -> float | None:
    """Kendall's tau between two rankings of the same children: 1 where they agree, -1 where they are reversed.

    Returns:
        None where fewer than two children have both losses, or all have the same one.
    """
    from scipy.stats import kendalltau

    pairs = [(a, b) for a, b in zip(before, after, strict=True) if b is not None]
    if len(pairs) < 2:
        return None
    tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    return None if tau != tau else tau
