"""Objectives of training: an objective turns a batch into terms, and the training loop minimises their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from explore.blocks import RouterStats
from explore.experiment import TrainConfig
from explore.model import LanguageModel, Loss
from explore.objective import Distillation
from explore.train.distillation import Teacher, cosine_distance, outputs_of


class Term(NamedTuple):
    """One number that training minimises.

    Attributes:
        value: the number, in nats if it is an entropy; logged without its weight under the term's name.
        weight: factor in the sum of the terms; with 0 the term is only logged.
        over_targets: whether the value is a mean over targets; then each process is weighted by its number of targets.
    """

    value: Float[Tensor, ""]
    weight: float = 1.0
    over_targets: bool = False


class BatchLoss(NamedTuple):
    """The result of an objective on one batch.

    Attributes:
        terms: the terms by name. `loss` is always present: the next-token cross-entropy, which also detects divergence.
        n_targets: number of predicted tokens.
        stats: the statistics of every router, by layer, which balance the experts.
    """

    terms: Mapping[str, Term]
    n_targets: Int[Tensor, ""]
    stats: Mapping[int, RouterStats]


Objective = Callable[[LanguageModel, Tensor, Tensor], BatchLoss]
"""A function from model, tokens (batch, seq) and targets (batch, seq) to the terms of the loss."""


def _next_token(train: TrainConfig) -> Objective:
    def objective(model: LanguageModel, tokens: Tensor, targets: Tensor) -> BatchLoss:
        loss = model.loss(tokens, targets, mtp=True)
        terms = {"loss": Term(loss.cross_entropy, over_targets=True), **_own_terms(loss, train)}
        return BatchLoss(terms, loss.n_targets, loss.stats)

    return objective


def _distillation(train: TrainConfig) -> Objective:
    config = train.objective
    assert isinstance(config, Distillation)
    teacher = Teacher(config)

    def objective(model: LanguageModel, tokens: Tensor, targets: Tensor) -> BatchLoss:
        output, theirs = teacher(tokens)
        with outputs_of(model, [student for student, _ in config.hidden_layers]) as ours:
            loss = model.loss(tokens, targets, mtp=True, teacher=output)
        assert loss.kl is not None
        terms = {
            "loss": Term(loss.cross_entropy, config.ce_weight, over_targets=True),
            "kl_loss": Term(loss.kl, config.kl_weight, over_targets=True),
            **_own_terms(loss, train),
        }
        if config.hidden_layers:
            distances = [cosine_distance(ours[i], theirs[j]) for i, j in config.hidden_layers]
            terms["hidden_loss"] = Term(torch.stack(distances).mean(), config.hidden_weight)
        return BatchLoss(terms, loss.n_targets, loss.stats)

    return objective


def _own_terms(loss: Loss, train: TrainConfig) -> dict[str, Term]:
    """The model's own terms besides the next-token loss: router balance and multi-token prediction."""
    terms = {}
    if loss.stats:
        terms["aux_loss"] = Term(loss.aux_loss)
    if loss.mtp is not None:
        terms["mtp_loss"] = Term(loss.mtp.mean(), train.mtp_weight)
    return terms


OBJECTIVES: Mapping[str, Callable[[TrainConfig], Objective]] = {
    "next_token": _next_token,
    "distillation": _distillation,
}
"""Builders of objectives, by kind. A term with a new name also needs a column in `explore.train.metrics`."""


def build_objective(train: TrainConfig) -> Objective:
    """The objective that a training config names."""
    return OBJECTIVES[train.objective.kind](train)
