"""One step of block-wise distillation: inputs and outputs of a parent's layers, and gradients of their replacements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from explore.compress.variants import Variant
from explore.model import LanguageModel


class Part(nn.Module):
    """One replacement while it is trained."""

    def __init__(self, layer: int, variant: Variant, mixer: nn.Module) -> None:
        super().__init__()
        self.layer, self.variant, self.mixer = layer, variant, mixer


def by_layer(parts: Sequence[Part]) -> dict[int, list[Part]]:
    """Groups parts by the layer that they replace."""
    found: dict[int, list[Part]] = {}
    for part in parts:
        found.setdefault(part.layer, []).append(part)
    return found


def layer_inputs(model: LanguageModel, tokens: Tensor, *, bf16: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields layer index, input and output of each of the parent's mixers, both (batch, seq, d_model).

    Args:
        bf16: compute matrix products in bfloat16, as in the parent's training.
    """
    with torch.no_grad():
        x = model.embedding(tokens)
    for i, layer in enumerate(model.layers):
        with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            normed = layer.norm(x)  # type: ignore[operator]
            y = layer.mixer(normed)[0]  # type: ignore[operator]
            x = x + y
        yield i, normed, y


def compute_gradients(
    model: LanguageModel, parts: Mapping[int, Sequence[Part]], tokens: Tensor, clip: float, *, bf16: bool = False
) -> None:
    """Computes the gradients of |y - wanted|^2 / |wanted|^2 of every part and clips each part separately.

    Only gradients are needed, so each starts from its closed form, 2 (y - wanted) / |wanted|^2, and not from the loss.

    Args:
        parts: parts by layer, from `by_layer`.
        clip: largest norm of the gradient of a part.
        bf16: as in `layer_inputs`.
    """
    for i, normed, wanted in layer_inputs(model, tokens, bf16=bf16):
        wanted = wanted.float()
        scale = 2 / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        for part in parts.get(i, []):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
                y = part.mixer(normed)[0]
            y.backward((y.detach().float() - wanted).mul_(scale).to(y.dtype))
            nn.utils.clip_grad_norm_(part.parameters(), clip)
