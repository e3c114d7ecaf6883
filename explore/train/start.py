"""The model with which a run begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from explore.experiment import Experiment, ParentWeights
from explore.model import LanguageModel
from explore.weights import check_shapes


def _fresh(experiment: Experiment) -> LanguageModel:
    return experiment.model.build()


def _from_parent(experiment: Experiment) -> LanguageModel:
    assert isinstance(experiment.start, ParentWeights)
    model = experiment.model.build()
    model.load_state_dict(experiment.start.parent.load().state_dict())
    return model


STARTS: Mapping[str, Callable[[Experiment], LanguageModel]] = {"fresh": _fresh, "parent": _from_parent}
"""How the model of an experiment is made, by the kind of its `start`."""


def starting_model(experiment: Experiment) -> LanguageModel:
    """The model of an experiment before its first step; torch's generator is seeded for all that is drawn after it."""
    torch.manual_seed(experiment.seed)
    return STARTS[experiment.start.kind](experiment)


def check_start(experiment: Experiment) -> None:
    """Refuses a parent whose weights are gone, or do not fit the model.

    Raises:
        ValueError: one of these.
    """
    if not isinstance(experiment.start, ParentWeights):
        return
    parent = experiment.start.parent
    parent.check()
    with torch.device("meta"):
        ours, theirs = (model.build().state_dict() for model in (experiment.model, parent.model))
    check_shapes(ours, theirs, f"start.parent: {parent.path}")
