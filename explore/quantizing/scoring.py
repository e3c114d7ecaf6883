"""Compares a quantised model with the trained original."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from explore.data import IGNORED, Batch
from explore.model import LanguageModel
from explore.ops import logits_kl

SEGMENTS = 16
"""Number of position ranges for the loss by position."""


class Comparison(NamedTuple):
    """Comparison of two models on the same text.

    Attributes:
        kl: KL(trained || quantised), in nats per token.
        losses: the quantised model's loss by position range, in nats per token; None for ranges without targets.
    """

    kl: float
    losses: list[float | None]


class Reference:
    """A trained model's predictions on some text; the model may be changed afterwards."""

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, batches: Iterable[Batch]) -> None:
        device = model.embedding.weight.device
        self.batches = [Batch(each.inputs.to(device), each.targets.to(device), each.n_bytes) for each in batches]
        self.hidden = [model.hidden(batch.inputs)[0] for batch in self.batches]
        self.weight = model.head.weight.detach().clone()

    @torch.inference_mode()
    def compare(self, model: LanguageModel, *, by_token: bool = False) -> Comparison:
        """Compares a model with the reference.

        Args:
            by_token: read token by token with decoding state, as in generation.
        """
        kl, n_targets, losses = 0.0, 0, []
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            logits = (decoded(model, batch.inputs) if by_token else model(batch.inputs)).flatten(0, 1).float()
            targets = batch.targets.flatten()
            kl += float(logits_kl(logits, hidden.flatten(0, 1), self.weight, targets).kl)
            n_targets += int((targets != IGNORED).sum())
            losses.append(F.cross_entropy(logits, targets, reduction="none").view_as(batch.targets))
        return Comparison(kl / n_targets, self._by_position(losses))

    def _by_position(self, losses: list[Tensor]) -> list[float | None]:
        predicted = torch.cat([batch.targets != IGNORED for batch in self.batches]).sum(0)
        summed = torch.cat(losses).double().sum(0)
        n = min(SEGMENTS, len(summed))
        parts = zip(summed.tensor_split(n), predicted.tensor_split(n), strict=True)
        return [float(total.sum() / count.sum()) if count.any() else None for total, count in parts]


def decoded(model: LanguageModel, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
    """Returns logits at every position of a sequence read token by token."""
    state = model.new_state(tokens.shape[1])
    return torch.cat([model(tokens[:, i : i + 1], state) for i in range(tokens.shape[1])], dim=1)
