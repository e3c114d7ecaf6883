"""Qwen3-Next: the preset has every parameter of transformers' class, and a small model computes the same."""

from __future__ import annotations

import pytest
import torch
from qwen3_next import weights
from torch import Tensor, nn
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM

from explore.model import LanguageModel, ModelConfig
from explore.presets import preset

SMALL = Qwen3NextConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=16,
    rope_parameters={"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25},
)


def small() -> ModelConfig:
    """The preset with the sizes of `SMALL`."""
    sizes = {
        "G": {"n_heads": 6, "n_key_heads": 2, "d_k": 8, "d_v": 12},
        "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 16, "d_rope": 4},
        "E": {"n_experts": 8, "top_k": 3, "d_expert": 12, "d_shared": 16},
    }
    blocks = {letter: block.model_copy(update=sizes[letter]) for letter, block in large().blocks.items()}
    changes = {"d_model": 32, "vocab_size": 50, "pattern": "GEGEGE*E", "blocks": blocks}
    return ModelConfig.model_validate(large().model_dump() | {"mtp": None} | changes)


def large() -> ModelConfig:
    return preset("qwen3-next-80b-a3b")


@pytest.fixture(scope="module")
def pair() -> tuple[Qwen3NextForCausalLM, LanguageModel]:
    """Transformers' model with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = Qwen3NextForCausalLM(SMALL).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith("A_log"):
                weight.uniform_(-2, 1)
            else:
                weight.normal_(0.1 if weight.ndim == 1 else 0.0, 0.1)
    ours = small().build()
    missing = ours.load_state_dict(weights(theirs.state_dict(), small()), strict=False)
    assert [name for name in missing.missing_keys if not name.endswith("expert_bias")] == missing.unexpected_keys == []
    return theirs, ours


def test_the_preset_has_every_parameter_of_transformers_class() -> None:
    with torch.device("meta"):
        theirs, ours = Qwen3NextForCausalLM(Qwen3NextConfig()), large().build()
    mapped = {name: weight.shape for name, weight in weights(dict(theirs.named_parameters()), large()).items()}
    built = {name: weight.shape for name, weight in ours.named_parameters() if not name.startswith("mtp.")}
    assert mapped == built
    cost = large().cost(4096)
    assert cost.params_total == sum(weight.numel() for weight in theirs.parameters()) == 79_674_391_296
    assert cost.params_active_no_embeddings == 3_252_599_552
    assert cost.params_mtp == 1_650_471_424


def test_logits_and_gradients_are_those_of_transformers(pair: tuple[Qwen3NextForCausalLM, LanguageModel]) -> None:
    theirs, ours = pair
    tokens = torch.randint(50, (2, 150))

    def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected, found = theirs(tokens, use_cache=False).logits, ours(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    mapped = weights(gradients(theirs, expected), small(), gradients=True)
    for name, gradient in gradients(ours, found).items():
        assert (gradient - mapped.pop(name)).norm() <= 1e-4 * gradient.norm(), name
    assert mapped == {}


def test_decoding_gives_the_logits_of_transformers(pair: tuple[Qwen3NextForCausalLM, LanguageModel]) -> None:
    theirs, ours = pair
    tokens = torch.randint(50, (2, 90))
    state = ours.new_state(capacity=90)
    with torch.no_grad():
        found = torch.cat([ours(part, state) for part in tokens.split((70, *[1] * 20), dim=1)], dim=1)
        torch.testing.assert_close(found, theirs(tokens, use_cache=False).logits, rtol=0, atol=1e-4)
