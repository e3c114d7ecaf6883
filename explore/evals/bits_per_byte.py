"""Bits per byte: bits that the model needs per byte of text, comparable across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from explore.data import Batch
from explore.model import LanguageModel


@dataclass(frozen=True)
class Score:
    """Cross-entropy summed over predicted tokens.

    Attributes:
        nats: summed cross-entropy.
        n_targets: predicted tokens.
        n_bytes: bytes of text of these tokens; None for data that is not text.
    """

    nats: float = 0.0
    n_targets: int = 0
    n_bytes: int | None = 0

    def __add__(self, other: Score) -> Score:
        n_bytes = None if self.n_bytes is None or other.n_bytes is None else self.n_bytes + other.n_bytes
        return Score(self.nats + other.nats, self.n_targets + other.n_targets, n_bytes)

    @property
    def loss(self) -> float:
        """Mean cross-entropy per token, in nats."""
        return self.nats / self.n_targets

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, or None if there are no bytes."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else None


def score_batch(model: LanguageModel, batch: Batch) -> Score:
    """Scores one batch; the caller sets precision and gradient mode."""
    loss = model.loss(batch.inputs, batch.targets)
    n_targets = int(loss.n_targets)
    return Score(loss.cross_entropy.double().item() * n_targets, n_targets, batch.n_bytes)


@torch.inference_mode()
def bits_per_byte(model: LanguageModel, batches: Iterable[Batch]) -> Score:
    """Scores all batches."""
    return sum((score_batch(model, batch) for batch in batches), start=Score())
