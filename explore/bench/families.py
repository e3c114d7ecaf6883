"""The shapes that are timed: one model of each family, at two widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from explore.model import ModelConfig

VOCAB_SIZE = 1024


class Shape(NamedTuple):
    """Width of the models, and one step's batch."""

    d_model: int
    batch_size: int
    seq_len: int

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.seq_len


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(64, 4, 128),
    "small": Shape(192, 8, 512),
    "large": Shape(512, 8, 1024),
}


def families(d_model: int) -> dict[str, ModelConfig]:
    """Attention + MLP, Mamba + MLP, and hybrids with a standard and a latent mixture of experts."""
    n_heads = d_model // 32
    blocks = {
        "*": {"n_heads": n_heads, "n_kv_heads": 2, "d_head": 32},
        "M": {"n_heads": 2 * n_heads, "d_head": 32, "d_state": 64, "n_groups": 1, "chunk_size": 64},
        "-": {"d_ff": 4 * d_model},
    }
    moe = {"n_experts": 16, "top_k": 2, "d_expert": d_model, "d_shared": d_model, "routed_scaling_factor": 1.0}
    latent = {**moe, "n_experts": 64, "top_k": 8, "d_latent": d_model // 4}
    patterns = {
        "attention + MLP": ("*-*-*-*-", moe),
        "Mamba + MLP": ("M-M-M-M-", moe),
        "hybrid MoE": ("MEMEM*ME", moe),
        "hybrid LatentMoE": ("MEMEM*ME", latent),
    }
    return {
        family: ModelConfig.model_validate(
            {"d_model": d_model, "vocab_size": VOCAB_SIZE, "pattern": pattern, "blocks": {**blocks, "E": experts}}
        )
        for family, (pattern, experts) in patterns.items()
    }
