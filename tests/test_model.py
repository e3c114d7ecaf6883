"""Models, patterns and configs; published counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from explore.blocks import BLOCKS
from explore.config import explain
from explore.model import ModelConfig
from explore.pattern import canonical, distance

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}
LETTERS = "".join(EXAMPLES)
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


@given(pattern=st.text(LETTERS, min_size=1, max_size=12), tied=st.booleans(), seq=st.integers(1, 9))
def test_the_ledger_counts_what_is_built_and_json_is_an_identity(pattern: str, tied: bool, seq: int) -> None:
    model = ModelConfig(d_model=16, vocab_size=50, pattern=pattern, blocks=EXAMPLES, tie_embeddings=tied)
    with torch.device("meta"):
        built = sum(weight.numel() for weight in model.build().parameters())
    cost = model.cost(seq)
    assert cost.params_total == built
    assert cost.params_active <= cost.params_total
    assert cost.flops_train == 3 * cost.flops_fwd
    again = ModelConfig.model_validate_json(model.model_dump_json())
    assert (again, hash(again)) == (model, hash(model))


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    torch.manual_seed(0)
    model = ModelConfig(d_model=16, vocab_size=50, pattern="M*-E", blocks=EXAMPLES).build()
    tokens, targets = torch.randint(0, 50, (2, 2, 21))
    targets[0, :5] = -100
    loss = model.loss(tokens, targets)
    torch.testing.assert_close(loss.cross_entropy, F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
    assert int(loss.stats[3].load.sum()) == 2 * 21 * EXAMPLES["E"].top_k  # type: ignore[attr-defined]


def test_nemotron_3_nano_counts_to_print() -> None:
    blocks = {
        "M": {"n_heads": 64, "d_head": 64, "d_state": 128, "n_groups": 8},
        "*": {"n_heads": 32, "n_kv_heads": 2, "d_head": 128},
        "E": {"n_experts": 128, "top_k": 6, "d_expert": 1856, "d_shared": 3712, "routed_scaling_factor": 2.5},
    }
    cost = ModelConfig(d_model=2688, vocab_size=131_072, pattern=NANO, blocks=blocks).cost(4096)
    assert round(cost.params_total / 1e9, 2) == 31.58
    assert round(cost.params_active / 1e9, 2) == 3.58
    assert round((cost.params_active - 2688 * 131_072) / 1e9, 2) == 3.23


def test_nemotron_h_8b_counts_to_print() -> None:
    blocks = {
        "M": {"n_heads": 128, "d_head": 64, "d_state": 128, "n_groups": 8},
        "*": {"n_heads": 32, "n_kv_heads": 8, "d_head": 128},
        "-": {"d_ff": 21_504},
    }
    cost = ModelConfig(d_model=4096, vocab_size=131_072, pattern=H_8B, blocks=blocks).cost(8192)
    assert round(cost.params_total / 1e9, 1) == 8.1
    assert cost.params_active == cost.params_total


def test_sizes_that_are_not_given_follow_d_model() -> None:
    partial = ModelConfig(d_model=256, vocab_size=50, pattern="E", blocks={"E": {"d_latent": 64}})  # type: ignore[dict-item]
    whole = ModelConfig(d_model=256, vocab_size=50, pattern="E", blocks={})
    assert partial.blocks["E"] == whole.blocks["E"].model_copy(update={"d_latent": 64})


def test_a_config_can_neither_be_changed_nor_depend_on_order() -> None:
    one = ModelConfig(d_model=16, vocab_size=50, pattern="M|E ", blocks=EXAMPLES)
    other = ModelConfig(d_model=16, vocab_size=50, pattern="ME", blocks=dict(reversed(EXAMPLES.items())))
    assert one == other
    with pytest.raises(ValidationError):
        one.d_model = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        one.blocks["M"] = EXAMPLES["E"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks": {"M": {"d_stat": 3}}}, "model.blocks.M.d_stat: unknown field"),
        ({"blocks": {"E": {"top_k": 999}}}, "model.blocks.E.top_k: 999 is above n_experts=128"),
        ({"pattern": "MX"}, "model.pattern: unknown letter 'X' at position 2 of 'MX'"),
        ({"pattern": " "}, "model.pattern: ' ' has no layer"),
        ({"d_model": 0}, "model.d_model: "),
        ({"d_modl": 1}, "model.d_modl: unknown field"),
        ({"blocks": {"*": {"n_heads": 6, "n_kv_heads": 4}}}, "model.blocks.*.n_kv_heads: 4 does not divide n_heads=6"),
    ],
)
def test_an_error_names_the_path_and_the_value(change: dict[str, object], says: str) -> None:
    content = {"d_model": 256, "vocab_size": 50, "pattern": "M*E", "blocks": {}} | change
    with pytest.raises(ValidationError) as refusal:
        ModelConfig.model_validate(content)
    assert says in explain(refusal.value, "model")


@pytest.mark.parametrize(
    ("pattern", "family"),
    [
        ("*-*-", "attention + MLP"),
        ("M-M-", "Mamba + MLP"),
        ("M-*-", "Mamba hybrid"),
        ("ME*E", "hybrid LatentMoE"),
        ("*E", "attention LatentMoE"),
    ],
)
def test_families_follow_the_kinds_of_layers(pattern: str, family: str) -> None:
    assert ModelConfig(d_model=16, vocab_size=50, pattern=pattern, blocks=EXAMPLES).family == family


@given(a=st.text("ME*", max_size=6), b=st.text("ME*", max_size=6))
def test_distance_is_the_recursive_edit_distance(a: str, b: str) -> None:
    def recursive(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        change = recursive(a[1:], b[1:]) + (a[0] != b[0])
        return min(change, recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1)

    assert distance(a, b) == recursive(a, b)
    assert canonical(f" {a}|{b}\n") == a + b
