"""Gradients of replacements: those of the normalised error, each part clipped alone, whatever else is trained."""

from __future__ import annotations

import pytest
import torch
from block_variants import D_MODEL, VARIANTS

from explore.compress.variants import Offer, variants
from explore.model import LanguageModel, ModelConfig
from explore.train.block_training import Part, by_layer, compute_gradients

PATTERN = "M*E-G"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    blocks = {letter: VARIANTS[letter].model_dump() for letter in PATTERN}
    shape = {"d_model": D_MODEL, "vocab_size": 64, "pattern": PATTERN, "blocks": blocks}
    config = ModelConfig.model_validate(shape)
    return config.build().requires_grad_(False)


def parts_of(model: LanguageModel) -> list[Part]:
    torch.manual_seed(1)
    parts = []
    for i, (letter, block) in enumerate(zip(model.config.pattern, model.config.layers, strict=True)):
        for variant in variants(letter, block, Offer(shares=(0.5,))):
            if variant.is_trained and variant.block is not None:
                mixer = variant.block.build(D_MODEL)
                mixer.init_weights(0.1, 0.1)
                parts.append(Part(i, variant, mixer))
    return parts


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_gradients_are_those_of_the_normalised_error_of_each_part(model: LanguageModel, clip: float) -> None:
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(2))
    parts, others = parts_of(model), parts_of(model)
    compute_gradients(model, by_layer(parts), tokens, clip)
    x = model.embedding(tokens)
    for i, layer in enumerate(model.layers):
        normed = layer.norm(x)  # type: ignore[operator]
        wanted = layer.mixer(normed)[0]  # type: ignore[operator]
        for part in (each for each in others if each.layer == i):
            (((part.mixer(normed)[0] - wanted) ** 2).sum() / (wanted**2).sum()).backward()
        x = x + wanted
    assert {part.layer for part in parts} == set(range(len(PATTERN)))
    for part, other in zip(parts, others, strict=True):
        gradients = [weight.grad for weight in other.parameters() if weight.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([each.flatten() for each in gradients]))
        factor = min(1.0, clip / (float(norm) + 1e-6))
        for ours, theirs in zip(part.parameters(), other.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None
                continue
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad * factor, rtol=1e-4, atol=1e-6)


def test_the_parent_gets_no_gradient(model: LanguageModel) -> None:
    model = model.config.build()  # whose weights would take gradients
    compute_gradients(model, by_layer(parts_of(model)[:2]), torch.zeros(1, 8, dtype=torch.long), 1.0)
    assert all(weight.grad is None for weight in model.parameters())
