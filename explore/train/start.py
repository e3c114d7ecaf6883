"""The initial model of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from explore.compress import Plan
from explore.config import explain, thaw
from explore.experiment import Experiment, ParentWeights
from explore.model import LanguageModel
from explore.weights import block_path, check_shapes


def _fresh(experiment: Experiment) -> LanguageModel:
    return experiment.model.build()


def _from_parent(experiment: Experiment) -> LanguageModel:
    assert isinstance(experiment.start, ParentWeights)
    model, weights = experiment.model.build(), experiment.start.parent.load().state_dict()
    plan = plan_of(experiment.start)
    model.load_state_dict(weights if plan is None else plan.apply(weights, Path(experiment.start.parent.path)))
    return model


def plan_of(start: ParentWeights) -> Plan | None:
    """Reads the plan that cuts a parent; None if the parent is used whole.

    Raises:
        ValueError: the file is not a plan.
    """
    if start.plan is None:
        return None
    try:
        return Plan.model_validate(thaw(start.plan))
    except ValidationError as error:
        raise ValueError(f"start.{explain(error, 'plan')}") from None


STARTS: Mapping[str, Callable[[Experiment], LanguageModel]] = {"fresh": _fresh, "parent": _from_parent}
"""Builders of an experiment's initial model, by the kind of its `start`."""


def starting_model(experiment: Experiment) -> LanguageModel:
    """Builds the model of an experiment before its first step, and seeds torch's generator for what follows."""
    torch.manual_seed(experiment.seed)
    return STARTS[experiment.start.kind](experiment)


def check_start(experiment: Experiment) -> None:
    """Raises an error if the parent's weights are missing, are not those of the plan, or do not fit the model.

    Raises:
        ValueError: one of these.
    """
    if not isinstance(experiment.start, ParentWeights):
        return
    parent, plan = experiment.start.parent, plan_of(experiment.start)
    parent.check()
    if plan is not None and plan.parent != parent.digest:
        raise ValueError(
            f"start.plan: the weights of the parent must have the digest {plan.parent[:8]}, got {parent.digest[:8]}, "
            f"those of {parent.path}"
        )
    for i, layer in enumerate(() if plan is None else plan.layers):
        if layer.block is not None and not (path := block_path(Path(parent.path), layer.block.digest)).exists():
            raise ValueError(f"start.plan: the block that replaces layer {i} must be at {path}, which is missing")
    whole = parent.model if plan is None else plan.model(parent.model)
    with torch.device("meta"):
        ours, theirs = (model.build().state_dict() for model in (experiment.model, whole))
    check_shapes(ours, theirs, f"start.parent: {parent.path}")
