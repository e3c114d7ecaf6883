"""Timed shapes: one model of each family, at two widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from explore.model import ModelConfig

VOCAB_SIZE = 1024
WIDE = 1024
"""Width from which models have heads as in large models."""


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

GPU_SHAPES: Mapping[str, Shape] = {"d1024": Shape(1024, 8, 2048), "d2048": Shape(2048, 4, 2048)}
"""Shapes large enough to keep a GPU busy."""

REHEARSAL_SHAPES: Mapping[str, Shape] = {"d64": Shape(64, 2, 64), "d128": Shape(128, 2, 64)}
"""Shapes for rehearsing the GPU benchmark on a CPU."""


def size_of(shape: str) -> Shape:
    """The shape with this name."""
    return {**SHAPES, **GPU_SHAPES, **REHEARSAL_SHAPES}[shape]


def families(d_model: int) -> dict[str, ModelConfig]:
    """Attention + MLP, Mamba + MLP, and hybrids with a standard and a latent mixture of experts.

    From `WIDE` on, heads, states and chunks have the sizes of published models, for which GPU kernels are made.
    """
    d_head, d_state, chunk_size = (64, 128, 256) if d_model >= WIDE else (32, 64, 64)
    n_heads = d_model // d_head
    blocks = {
        "*": {"n_heads": n_heads, "n_kv_heads": 2, "d_head": d_head},
        "M": {"n_heads": 2 * n_heads, "d_head": d_head, "d_state": d_state, "n_groups": 1, "chunk_size": chunk_size},
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
