"""Measures each replacement alone: the parent reads held-out text with one layer replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from explore.blocks import BlockConfig
from explore.data import IGNORED, Batch
from explore.evals import Score
from explore.model import LanguageModel, ModelConfig
from explore.ops import linear_kl


class Measured(NamedTuple):
    """Quality of a model on held-out text.

    Attributes:
        kl: KL(parent || model), in nats per token.
        val_loss: validation loss, in nats per token.
        val_bpb: bits per byte; None if the data is not text.
        recall: fraction of targets predicted correctly; None if the task is not recall.
    """

    kl: float
    val_loss: float
    val_bpb: float | None
    recall: float | None = None


class HeldOut:
    """Held-out text and the parent's predictions on it.

    Args:
        is_recall: the task is recall; also measure its accuracy.
        bf16: compute matrix products in bfloat16, as in the parent's training.
    """

    @torch.inference_mode()
    def __init__(
        self, parent: LanguageModel, batches: Iterable[Batch], *, is_recall: bool = False, bf16: bool = False
    ) -> None:
        device = parent.embedding.weight.device
        self.batches = [Batch(each.inputs.to(device), each.targets.to(device), each.n_bytes) for each in batches]
        self.is_recall, self.bf16 = is_recall, bf16
        with self._precision(device):
            self.hidden = [parent.hidden(batch.inputs)[0] for batch in self.batches]
        self.weight = parent.head.weight.detach().clone()

    @property
    def n_tokens(self) -> int:
        """Number of tokens read."""
        return sum(batch.inputs.numel() for batch in self.batches)

    @torch.inference_mode()
    def measure(self, model: LanguageModel) -> Measured:
        """Measures a model on the text."""
        kl, score, n_right = 0.0, Score(), 0
        with self._precision(model.embedding.weight.device):
            for batch, theirs in zip(self.batches, self.hidden, strict=True):
                targets, hidden = batch.targets.flatten(), model.hidden(batch.inputs)[0].flatten(0, 1)
                found = linear_kl(hidden, model.head.weight, theirs.flatten(0, 1), self.weight, targets)
                kl += float(found.kl)
                n_targets = int((targets != IGNORED).sum())
                score += Score(float(found.cross_entropy), n_targets, batch.n_bytes)
                if self.is_recall:
                    n_right += int(((hidden @ model.head.weight.T).argmax(-1) == targets).sum())
        n = score.n_targets
        return Measured(kl / n, score.loss, score.bits_per_byte, n_right / n if self.is_recall else None)

    def _precision(self, device: torch.device) -> Any:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


Mixers = Sequence[Sequence[torch.nn.Module | None]]
"""Replacements of each layer; None removes the layer."""


def replace_one(model: LanguageModel, mixers: Mixers, batch: Batch) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Evaluates one replacement at a time on one batch; a layer's own mixer is skipped.

    The caller turns gradients off: a decorator would not reach the body of a generator that another decorator wraps.

    Yields:
        Layer, replacement index, divergence from the parent summed over targets in nats, and squared error
        of the replacement's output relative to a zero output.
    """
    stream, x = [], model.embedding(batch.inputs)
    for layer in model.layers:
        stream.append(x)
        x = layer(x)[0]
    hidden, weight, targets = model.norm(x).flatten(0, 1), model.head.weight, batch.targets.flatten()
    for i, (layer, replacements) in enumerate(zip(model.layers, mixers, strict=True)):
        normed = layer.norm(stream[i])  # type: ignore[operator]
        wanted = layer.mixer(normed)[0].float()  # type: ignore[operator]
        for k, mixer in enumerate(replacements):
            if mixer is layer.mixer:
                continue
            y = torch.zeros_like(wanted) if mixer is None else mixer(normed)[0]
            error = (y.float() - wanted).square().sum() / wanted.square().sum()
            z = stream[i] + y
            for after in list(model.layers)[i + 1 :]:
                z = after(z)[0]
            changed = model.norm(z).flatten(0, 1)
            yield i, k, linear_kl(changed, weight, hidden, weight, targets).kl, error


def flops_of_replacing(
    model: ModelConfig, seq_len: int, n_tokens: int, variants: Sequence[Sequence[BlockConfig | None]]
) -> float:
    """FLOPs of `replace_one`: a forward pass, and for every replacement one from its layer on.

    Args:
        model: config of the parent.
        variants: replacement configs of each layer; None removes the layer.
    """
    head = 2 * model.d_model * model.vocab_size
    layers = [block_flops(block, model.d_model, seq_len) for block in model.layers]
    total = sum(layers) + head
    for i, replacements in enumerate(variants):
        after = sum(layers[i + 1 :]) + head
        total += sum(
            after + (0 if each is None else block_flops(each, model.d_model, seq_len)) for each in replacements
        )
    return float(n_tokens * total)


def block_flops(block: BlockConfig, d_model: int, seq_len: int) -> float:
    """FLOPs per token of a forward pass through a block."""
    return sum(entry.flops_seq for entry in block.entries(d_model, seq_len)) / seq_len
