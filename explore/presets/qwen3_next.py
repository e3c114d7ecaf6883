"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, each followed by experts."""

from __future__ import annotations

from typing import Any

from explore.model import ModelConfig
from explore.presets.base import Preset, Published


def qwen3_next() -> ModelConfig:
    """Qwen3-Next 80B-A3B; its one depth of multi-token prediction has attention."""
    blocks: dict[str, Any] = {
        "G": {"n_heads": 32, "n_key_heads": 16, "d_k": 128, "d_v": 128, "chunk_size": 64},
        "*": {
            "n_heads": 16,
            "n_kv_heads": 2,
            "d_head": 256,
            "rope_theta": 1e7,
            "d_rope": 64,
            "qk_norm": True,
            "output_gate": True,
            "norm_eps": 1e-6,
        },
        "E": {
            "n_experts": 512,
            "top_k": 10,
            "d_expert": 512,
            "d_shared": 512,
            "shared_gate": True,
            "activation": "swiglu",
            "router_score": "softmax",
            "routed_scaling_factor": 1.0,
            "expert_bias": False,
            "aux_loss_coef": 1e-3,
        },
    }
    pattern = "GEGEGE*E" * 12 + "/*E"
    return ModelConfig(d_model=2048, vocab_size=151_936, pattern=pattern, blocks=blocks, norm_eps=1e-6)


SOURCE = "Qwen3-Next-80B-A3B: its model card and released configuration"

QWEN3_NEXT: dict[str, Preset] = {
    "qwen3-next-80b-a3b": Preset(
        qwen3_next,
        SOURCE,
        (
            Published("params_total", "80"),
            Published("params_total_no_embeddings", "79", "printed as 'non-embedding'"),
            Published("params_active_no_embeddings", "3", "printed as 'activated'"),
        ),
    ),
}
