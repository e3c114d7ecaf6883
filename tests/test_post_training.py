"""Trained models in low precision: weights by every criterion, calibrated activations, and restored weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from explore.blocks import BLOCKS
from explore.cost import in_formats, storage
from explore.experiment import Experiment
from explore.model import (
    Component,
    LanguageModel,
    ModelConfig,
    QuantizedModel,
    calibrate,
    quantizable_parts,
    quantize_products,
)
from explore.ops import SCALES, quantize, quantize_weight
from explore.precision import RECIPES, Recipe, Rule

BLOCK_EXAMPLES = {
    "M": {"kind": "mamba2", "n_heads": 4, "d_state": 16, "d_head": 16, "n_groups": 1},
    "E": {"kind": "moe", "n_experts": 4, "top_k": 2, "d_expert": 32, "d_shared": 32, "d_latent": 32},
}
CLIPS = [1 - i / 16 for i in range(9)]


def built(pattern: str = "ME*-", **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    content = {"d_model": 64, "vocab_size": 48, "pattern": pattern, "init_std": 0.2, "blocks": BLOCK_EXAMPLES}
    return ModelConfig.model_validate(content | changes).build().eval()


def text(n: int = 1, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, 48, (n, 3, 33), generator=generator)
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def logits(model: LanguageModel, seed: int = 1) -> Tensor:
    with torch.inference_mode():
        return model(text(seed=seed)[0][0])


# Weights


@pytest.mark.parametrize("format", ["fp8", "nvfp4", "mxfp4", "mxfp8", "bf16", "int8"])
def test_scales_by_the_largest_magnitude_are_those_of_quantize(format: str) -> None:
    w = torch.randn(3, 64, 32)
    wanted = quantize(w, format, block_axis=1, per_expert=True)
    assert torch.equal(quantize_weight(w, format, block_axis=1, per_expert=True), wanted)
    six = quantize(w, format, block_axis=1, per_expert=True, four_over_six=format == "nvfp4")
    assert torch.equal(quantize_weight(w, format, "four_over_six", block_axis=1, per_expert=True), six)


@pytest.mark.parametrize(("format", "block"), [("mxfp4", 32), ("nvfp4", 16)])
def test_scales_by_squared_error_are_the_best_of_all_clips(format: str, block: int) -> None:
    w = torch.distributions.StudentT(3.0).sample((4, 64))
    anchor = torch.zeros(block).index_fill_(0, torch.tensor([0]), float(w.abs().max()))  # keeps the scale of the tensor
    found = quantize_weight(w, format, "mse")
    for i, row in enumerate(w):
        for start in range(0, 64, block):
            one, largest = row[start : start + block], float(row[start : start + block].abs().max())
            tried = [
                quantize(torch.cat([one.clamp(-share * largest, share * largest), anchor]), format)[:block]
                for share in CLIPS
            ]
            least = min((y - one).square().sum() for y in tried)
            error = (found[i, start : start + block] - one).square().sum()
            assert error == pytest.approx(float(least), rel=1e-5)


def test_squared_error_falls_with_the_criterion() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = {scales: float((quantize_weight(w, "nvfp4", scales) - w).square().mean()) for scales in SCALES}
    assert errors["mse"] < 0.9 * errors["max"]
    assert errors["four_over_six"] < 0.9 * errors["max"]


def test_an_outlier_is_clipped_if_that_has_the_smaller_error() -> None:
    w = torch.randn(2, 4096)
    w[:, 0] = 1e5  # beyond the resolution of E4M3
    error = {
        scales: (quantize_weight(w, "int8", scales, per_expert=True) - w).square().sum() for scales in ("max", "mse")
    }
    assert error["mse"] <= error["max"]


# Activations


def test_calibration_finds_the_largest_magnitude_that_a_product_reads() -> None:
    model, read = built(), dict[str, float]()
    hooks = [
        part.module.register_forward_pre_hook(
            lambda _, args, name=f"layers.{part.layer}.{part.name}": read.__setitem__(
                name, max(read.get(name, 0.0), float(args[0].abs().max()))
            )
        )
        for part in quantizable_parts(model)
        if part.layer is not None and isinstance(part.module, torch.nn.Linear)
    ]
    amax = calibrate(model, text(3))
    for hook in hooks:
        hook.remove()
    assert {name: found[""][0] for name, found in amax.items() if name in read} == pytest.approx(read)
    assert set(amax["layers.1.experts"]) == {"up", "down"}
    assert len(amax["layers.1.experts"]["up"]) == 4
    assert all(part.module.quantizer is None for part in quantizable_parts(model))
    assert calibrate(model, text(1))["layers.0.in_proj"][""] <= amax["layers.0.in_proj"][""]


def test_an_expert_without_a_token_has_the_largest_magnitude_of_all() -> None:
    model = built()
    bias = model.moe_layers()[1].expert_bias
    bias.copy_(torch.tensor([10.0, 10, 0, 0]))
    up = calibrate(model, text())["layers.1.experts"]["up"]
    assert up[2] == up[3] == max(up)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_a_component_reads_and_stores_values_of_its_format(format: Any) -> None:
    model = built("-")
    up = model.layers[0].mixer.up
    calibration, seen = text(4), []
    trained = QuantizedModel(model, amax=calibrate(model, calibration))
    weight = up.weight.detach().clone()
    up.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    trained.put(Component(0, "-", "up"), format)
    logits(model, seed=9)
    x, y = seen[-1]
    amax = trained.amax["layers.0.up"][""][0]
    clipped = x.flatten(0, 1).clamp(-amax, amax)
    anchored = torch.cat([clipped, torch.zeros_like(clipped[:1]).index_fill_(1, torch.tensor([0]), amax)])
    wanted = F.linear(quantize(anchored, format)[:-1], quantize(weight, format))
    torch.testing.assert_close(y.flatten(0, 1), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["ME*-", "GLW/E*"])
def test_a_recipe_after_training_equals_the_quantiser_of_training(pattern: str) -> None:
    recipe = Recipe(
        format="fp32", rules=(Rule(format="mxfp8", components=("in_proj", "experts", "q_proj", "head"), optional=True),)
    )
    model = built(
        pattern, blocks={**BLOCK_EXAMPLES, **{k.letter: k.example for k in BLOCKS if k.letter in "GLW"}}, d_model=64
    )
    other = copy.deepcopy(model)
    quantize_products(other, recipe)
    QuantizedModel(model, amax=calibrate(model, text())).apply(recipe)
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, each in RECIPES.items() if name not in ("fp32", "fp8-blocks")])
def test_every_named_recipe_fits_a_trained_model_and_changes_it(name: str) -> None:
    model = built()
    before = logits(model)
    amax = calibrate(model, text())
    QuantizedModel(model, amax=amax).apply(RECIPES[name].recipe)
    after = logits(model)
    assert not torch.equal(after, before)
    assert after.isfinite().all()


def test_the_rest_of_the_weights_is_rounded_to_the_high_format() -> None:
    model = built()
    QuantizedModel(model).apply(RECIPES["ultra-ptq"].recipe)
    router = model.layers[1].mixer.router.weight
    for name, weight in model.named_parameters():
        is_high = not any(word in name for word in ("in_proj", "out_proj", ".up", ".down", "router", "shared"))
        if is_high:
            assert torch.equal(weight, weight.bfloat16().float()), name
    assert not torch.equal(router, router.bfloat16().float())
    assert model.state_rounding.kv == "fp8"
    assert model.state_rounding.state == "fp16"


def test_components_can_be_restored_to_the_trained_weights() -> None:
    model = built("ME*-/*")
    before, state = logits(model), copy.deepcopy(model.state_dict())
    trained = QuantizedModel(model, "mse", amax=calibrate(model, text()))
    assert {str(component) for component in trained.components} >= {
        "embedding",
        "head",
        "layers.1.experts",
        "mtp.q_proj",
    }
    for component in trained.components:
        trained.put(component, "nvfp4")
    assert not torch.equal(logits(model), before)
    trained.restore()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


def test_weights_are_rounded_stochastically_if_the_recipe_says_so() -> None:
    recipe = Recipe(format="fp8", stochastic=("w",))
    one, again, other = (built("-") for _ in range(3))
    for model, seed in ((one, 0), (again, 0), (other, 1)):
        QuantizedModel(model).apply(recipe, seed)
    assert torch.equal(one.layers[0].mixer.up.weight, again.layers[0].mixer.up.weight)
    assert not torch.equal(one.layers[0].mixer.up.weight, other.layers[0].mixer.up.weight)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"format": "nvfp4", "forward": False}, "precision.forward must be true"),
        ({"format": "nvfp4", "hadamard": ["forward"]}, "precision.hadamard must not name forward"),
        ({"format": "nvfp4", "stochastic": ["x"]}, "precision.stochastic must be w for a trained model, got 'x'"),
    ],
)
def test_options_for_training_only_are_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedModel(built("-")).apply(Recipe.model_validate(recipe))


# An embedding


def test_an_embedding_is_stored_in_a_format_that_a_rule_gives_it() -> None:
    ledger = built().config.ledger(16)
    plain = storage(in_formats(ledger, Recipe()))
    recipe = Recipe(rules=(Rule(format="nvfp4", components=("embedding",)),))
    n = sum(row.entry.params for row in ledger)
    assert plain["weight_bytes"] - storage(in_formats(ledger, recipe))["weight_bytes"] == 48 * 64 * (16 - 4.5) / 8
    assert storage(in_formats(ledger, recipe))["bits_per_element"] == 16 - 11.5 * 48 * 64 / n
    model = built()
    table = model.embedding.weight.detach().clone()
    QuantizedModel(model).apply(recipe)
    assert torch.equal(model.embedding.weight, quantize(table, "nvfp4"))
    with pytest.raises(ValueError, match="multiples of 16, got 40 in embedding of the model; 32 or 48 would fit"):
        in_formats(built("-", d_model=40, blocks={}).config.ledger(16), recipe)


def test_an_embedding_is_not_quantised_in_training() -> None:
    content = {
        "name": "one", "model": {"d_model": 32, "vocab_size": 257, "pattern": "-"},
        "data": {"kind": "text", "tokenizer": "bytes", "seq_len": 16},
        "train": {"tokens": 64, "precision": {"rules": [{"format": "fp8", "components": ["embedding"]}]}},
    }  # fmt: skip
    with pytest.raises(ValidationError, match="embedding must be in bf16 or fp32 in training"):
        Experiment.model_validate(content)
