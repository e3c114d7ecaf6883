"""Converts weights of transformers' Qwen3-Next to our names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from explore.blocks import AttentionConfig, GatedDeltaNetConfig
from explore.model import ModelConfig


def weights(theirs: Mapping[str, Tensor], model: ModelConfig, *, gradients: bool = False) -> dict[str, Tensor]:
    """Weights of a model, or their gradients.

    One of their layers is two of ours, a mixer and experts. Their norms multiply by 1 plus the weight, but for the norm
    inside Gated DeltaNet.
    """
    shift = 0.0 if gradients else 1.0
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"] + shift,
        "head.weight": theirs["lm_head.weight"],
    }
    for i, block in enumerate(model.layers):
        layer = _within(theirs, f"model.layers.{i // 2}.")
        norm = layer[f"{'post_attention' if i % 2 else 'input'}_layernorm.weight"]
        match block:
            case GatedDeltaNetConfig():
                mixer = gated_deltanet_weights(_within(layer, "linear_attn."), block)
            case AttentionConfig():
                mixer = _attention_weights(_within(layer, "self_attn."), block, shift)
            case _:
                mixer = _moe_weights(_within(layer, "mlp."))
        ours[f"layers.{i}.norm.weight"] = norm + shift
        ours |= {f"layers.{i}.mixer.{name}": value for name, value in mixer.items()}
    return ours


def gated_deltanet_weights(theirs: Mapping[str, Tensor], config: GatedDeltaNetConfig) -> dict[str, Tensor]:
    """Weights of a Gated DeltaNet layer.

    Rows of their input projections come key head by key head, each with its queries, keys, values and gates; ours come
    all queries first, then all keys, values, gates z, b and a.
    """
    g, r = config.n_key_heads, config.n_heads // config.n_key_heads
    qkvz = _by_role(theirs["in_proj_qkvz.weight"], g, (config.d_k, config.d_k, r * config.d_v, r * config.d_v))
    kept = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    in_proj = torch.cat((qkvz, _by_role(theirs["in_proj_ba.weight"], g, (r, r))))
    return {"in_proj.weight": in_proj} | {name: theirs[name] for name in kept}


def _by_role(weight: Tensor, n_key_heads: int, rows: tuple[int, ...]) -> Tensor:
    """Rows grouped by key head, regrouped by their role.

    Args:
        rows: of a key head, for each role.
    """
    return torch.cat([part.flatten(0, 1) for part in weight.unflatten(0, (n_key_heads, -1)).split(rows, dim=1)])


def _attention_weights(theirs: Mapping[str, Tensor], config: AttentionConfig, shift: float) -> dict[str, Tensor]:
    """Their query projection holds the query and then the gate of each head."""
    query, gate = theirs["q_proj.weight"].unflatten(0, (config.n_heads, 2, config.d_head)).unbind(1)
    return {
        "q_proj.weight": query.flatten(0, 1),
        "gate_proj.weight": gate.flatten(0, 1),
        **{name: theirs[name] for name in ("k_proj.weight", "v_proj.weight", "o_proj.weight")},
        **{name: theirs[name] + shift for name in ("q_norm.weight", "k_norm.weight")},
    }


def _moe_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their gates and ups of the experts are one tensor, and all are transposed."""
    gate, up = theirs["experts.gate_up_proj"].transpose(1, 2).chunk(2, dim=2)
    return {
        "router.weight": theirs["gate.weight"],
        "gate": gate,
        "up": up,
        "down": theirs["experts.down_proj"].transpose(1, 2),
        "shared_gate.weight": theirs["shared_expert_gate.weight"],
        **{f"shared.{name}.weight": theirs[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")},
    }


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
