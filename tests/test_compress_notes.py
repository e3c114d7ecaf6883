"""Notes on what a cut takes away and bits per byte does not show."""

from __future__ import annotations

from typing import Any

import pytest

from explore.compress import LayerCut, Plan
from explore.compress.notes import notes
from explore.model import ModelConfig

BLOCKS = {
    "M": {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 16},
    "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 8},
    "-": {"d_ff": 48},
    "E": {"n_experts": 4, "top_k": 2, "d_expert": 8, "d_shared": 16},
}
DROP = LayerCut(drop=True)
ORDER = "the child has no recurrent layer left before its first attention layer"
ATTENTION = "the child has no attention layer left"
ROUTERS = "routers keep the balancing biases"


def noted(pattern: str, cuts: dict[int, LayerCut], *, is_recall: bool = False, **attention: Any) -> list[str]:
    blocks = {**BLOCKS, "*": {**BLOCKS["*"], **attention}}
    used = {letter: block for letter, block in blocks.items() if letter in pattern}
    model = ModelConfig.model_validate({"d_model": 32, "vocab_size": 64, "pattern": pattern, "blocks": used})
    plan = Plan.keep_all(model.build())
    layers = tuple(cuts.get(i, LayerCut()) for i in range(len(pattern)))
    return notes(plan.model_copy(update={"layers": layers}), is_recall=is_recall)


@pytest.mark.parametrize(
    ("pattern", "cuts", "beginnings"),
    [
        ("M-*M", {}, []),
        ("M-*M", {0: DROP}, [ORDER]),
        ("MM*-", {0: DROP}, []),
        ("-*M-", {0: DROP}, []),
        ("M*-", {1: DROP}, [ATTENTION]),
        ("ME", {1: LayerCut(keep={"n_experts": (0, 1, 3)})}, [ROUTERS]),
        ("ME", {1: LayerCut(keep={"d_shared": (0, 1)})}, []),
    ],
)
def test_each_loss_has_its_own_sentence(pattern: str, cuts: dict[int, LayerCut], beginnings: list[str]) -> None:
    found = noted(pattern, cuts)
    assert len(found) == len(beginnings)
    assert all(text.startswith(beginning) for text, beginning in zip(found, beginnings, strict=True))


def test_attention_with_positions_needs_no_recurrent_layer_before_it() -> None:
    assert noted("M-*M", {0: DROP}, rope_theta=1e4) == []


def test_a_model_that_is_scored_on_recall_shows_the_loss_of_attention() -> None:
    assert noted("M*-", {1: DROP}, is_recall=True) == []
