"""What training minimises: an objective turns a batch into terms, and the training loop adds them up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from explore.blocks import RouterStats
from explore.experiment import TrainConfig
from explore.model import LanguageModel


class Term(NamedTuple):
    """One number that training minimises.

    Attributes:
        value: in nats where it is an entropy; logged, without its weight, under the name of the term.
        weight: factor in the sum of the terms; 0 logs a term only.
        over_targets: the value is a mean over the targets of this process, so that processes count by their targets.
    """

    value: Float[Tensor, ""]
    weight: float = 1.0
    over_targets: bool = False


class BatchLoss(NamedTuple):
    """What an objective says of one batch.

    Attributes:
        terms: by name. `loss` is always there: the cross-entropy of the next token, by which divergence is judged.
        n_targets: predicted tokens.
        stats: the statistics of every router, by layer, which balance the experts.
    """

    terms: Mapping[str, Term]
    n_targets: Int[Tensor, ""]
    stats: Mapping[int, RouterStats]


Objective = Callable[[LanguageModel, Tensor, Tensor], BatchLoss]
"""From the model, tokens (batch, seq) and targets (batch, seq) to the terms of their loss."""


def _next_token(train: TrainConfig) -> Objective:
    def objective(model: LanguageModel, tokens: Tensor, targets: Tensor) -> BatchLoss:
        loss = model.loss(tokens, targets, mtp=True)
        terms = {"loss": Term(loss.cross_entropy, over_targets=True)}
        if loss.stats:
            terms["aux_loss"] = Term(loss.aux_loss)
        if loss.mtp is not None:
            terms["mtp_loss"] = Term(loss.mtp.mean(), train.mtp_weight)
        return BatchLoss(terms, loss.n_targets, loss.stats)

    return objective


OBJECTIVES: Mapping[str, Callable[[TrainConfig], Objective]] = {"next_token": _next_token}
"""How an objective is made, by its kind. A term with a new name also needs a column in `explore.train.metrics`."""


def build_objective(train: TrainConfig) -> Objective:
    """The objective that a training config names."""
    return OBJECTIVES[train.objective.kind](train)
