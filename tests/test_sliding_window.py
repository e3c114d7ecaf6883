"""Sliding-window attention: equal to attention with a window, with a cache of bounded size."""

from __future__ import annotations

import pytest
import torch

from explore.blocks import AttentionConfig, SlidingWindowConfig
from explore.figures import receipts_table
from explore.model import ModelConfig

SIZES = {"n_heads": 4, "n_kv_heads": 2, "d_head": 8, "rope_theta": 1e4, "qk_norm": True, "sinks": True, "window": 6}


def model(pattern: str, window: int = 6) -> ModelConfig:
    return ModelConfig(d_model=64, vocab_size=100, pattern=pattern, blocks={"W": {"window": window}})


def test_it_equals_attention_with_that_window() -> None:
    own, attention = SlidingWindowConfig(**SIZES), AttentionConfig(**SIZES)
    assert own.entries(32, 50) == attention.entries(32, 50)
    torch.manual_seed(0)
    mixer, other = own.build(32), attention.build(32)
    mixer.init_weights(0.2, 0.2)
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 50, 32)
    assert torch.equal(mixer(x)[0], other(x)[0])
    last = x.clone()
    last[:, :44] = 0
    assert torch.equal(mixer(last)[0][:, -1], mixer(x)[0][:, -1])


@pytest.mark.parametrize("window", [1, 6, 100])
def test_keys_and_values_stop_growing_at_the_window(window: int) -> None:
    built = model("W-W-", window).build()
    state, positions = built.new_state(), window + 3
    held, counted = [], []
    with torch.no_grad():
        for i in range(positions):
            built(torch.randint(100, (1, 1)), state)
            held.append(sum(layer.n_bytes for layer in state))
            counted.append(int(built.config.cost(i + 1, kv_dtype="float32").kv_bytes))
    assert held == counted
    assert held == [min(i + 1, window) * held[0] for i in range(positions)]
    assert built.config.cost(2**20).decode_bytes == built.config.cost(2**30).decode_bytes


def test_it_has_its_own_letter_and_groups_in_figures() -> None:
    mixed = model("W-*-")
    assert mixed.family == "attention + MLP"
    assert mixed.blocks["W"] == SlidingWindowConfig.default(64).model_copy(update={"window": 6})
    table = receipts_table({"mixed": mixed}, 4096, ["kv_bytes"]).set_index("group")["value"]
    per_token = 2 * 2 * mixed.blocks["*"].n_kv_heads * mixed.blocks["*"].d_head
    assert table["window scores, KV"] == 6 * per_token
    assert table["attention scores, KV"] == 4096 * per_token


def test_a_window_is_required() -> None:
    with pytest.raises(ValueError, match=r"window\n.*Input should be greater than 0"):
        SlidingWindowConfig(**{**SIZES, "window": 0})
    with pytest.raises(ValueError, match=r"window\n.*Field required"):
        SlidingWindowConfig(**{name: size for name, size in SIZES.items() if name != "window"})
