"""The model with which a run begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from explore.experiment import Experiment
from explore.model import LanguageModel


def _fresh(experiment: Experiment) -> LanguageModel:
    return experiment.model.build()


STARTS: Mapping[str, Callable[[Experiment], LanguageModel]] = {"fresh": _fresh}
"""How the model of an experiment is made, by the kind of its `start`."""


def starting_model(experiment: Experiment) -> LanguageModel:
    """The model of an experiment before its first step; torch's generator is seeded for all that is drawn after it."""
    torch.manual_seed(experiment.seed)
    return STARTS[experiment.start.kind](experiment)
