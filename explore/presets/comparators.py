"""The models that the Nemotron papers compare with: every layer is attention followed by MLP or experts.

Features without weights and matrix products are left out: scaled rotary frequencies, and DeepSeek-V3's selection of
expert groups before experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from explore.model import ModelConfig, MTPConfig
from explore.presets.base import Preset, Published


def transformer(
    d_model: int, n_layers: int, heads: tuple[int, int], d_ff: int, vocab_size: int, *, theta: float, **attention: Any
) -> ModelConfig:
    """A dense SwiGLU Transformer with heads of 128.

    Args:
        heads: number of query heads and of key-value heads.
        attention: further fields of the attention layers.
    """
    blocks: dict[str, Any] = {
        "*": {"n_heads": heads[0], "n_kv_heads": heads[1], "d_head": 128, "rope_theta": theta, **attention},
        "-": {"d_ff": d_ff, "activation": "swiglu"},
    }
    return ModelConfig(d_model=d_model, vocab_size=vocab_size, pattern="*-" * n_layers, blocks=blocks)


def qwen3_moe(d_model: int, n_layers: int, n_heads: int, d_expert: int) -> ModelConfig:
    """Qwen3 with 128 SwiGLU experts, top 8, none shared."""
    blocks: dict[str, Any] = {
        "*": {"n_heads": n_heads, "n_kv_heads": 4, "d_head": 128, "rope_theta": 1e6, "qk_norm": True},
        "E": {
            "n_experts": 128,
            "top_k": 8,
            "d_expert": d_expert,
            "n_shared": 0,
            "d_shared": None,
            "activation": "swiglu",
            "router_score": "softmax",
            "routed_scaling_factor": 1.0,
            "expert_bias": False,
            "aux_loss_coef": 1e-3,
        },
    }
    return ModelConfig(d_model=d_model, vocab_size=151_936, pattern="*E" * n_layers, blocks=blocks, norm_eps=1e-6)


def gpt_oss(n_layers: int, n_experts: int) -> ModelConfig:
    """GPT-OSS: attention layers alternate between a window of 128 tokens (the first) and full context."""
    attention = {
        "kind": "attention",
        "n_heads": 64,
        "n_kv_heads": 8,
        "d_head": 64,
        "rope_theta": 150_000.0,
        "bias": "all",
        "sinks": True,
    }
    blocks: dict[str, Any] = {
        "*": attention,
        "W": {**attention, "window": 128},
        "E": {
            "n_experts": n_experts,
            "top_k": 4,
            "d_expert": 2880,
            "n_shared": 0,
            "d_shared": None,
            "activation": "swiglu_clamped",
            "bias": True,
            "router_score": "softmax",
            "routed_scaling_factor": 1.0,
            "expert_bias": False,
        },
    }
    return ModelConfig(d_model=2880, vocab_size=201_088, pattern="WE*E" * (n_layers // 2), blocks=blocks)


def deepseek(
    n_dense: int, n_heads: int, n_experts: int, vocab_size: int, scaling: float, theta: float, n_mtp: int = 0
) -> ModelConfig:
    """DeepSeek-V3 and models like it: 61 layers of latent attention, the first `n_dense` with an MLP.

    Args:
        n_dense: layers with an MLP instead of experts.
        scaling: factor on the routing weights.
        n_mtp: depths of multi-token prediction, each with its own layer of experts.
    """
    blocks: dict[str, Any] = {
        "L": {
            "n_heads": n_heads,
            "q_rank": 1536,
            "kv_rank": 512,
            "d_nope": 128,
            "d_rope": 64,
            "d_v": 128,
            "rope_theta": theta,
        },
        "-": {"d_ff": 18_432, "activation": "swiglu"},
        "E": {
            "n_experts": n_experts,
            "top_k": 8,
            "d_expert": 2048,
            "d_shared": 2048,
            "activation": "swiglu",
            "routed_scaling_factor": scaling,
        },
    }
    pattern = "L-" * n_dense + "LE" * (61 - n_dense)
    mtp = MTPConfig(pattern="LE", n_depths=n_mtp, shared=False) if n_mtp else None
    return ModelConfig(d_model=7168, vocab_size=vocab_size, pattern=pattern, blocks=blocks, mtp=mtp, norm_eps=1e-6)


LLAMA = "Llama 3.1, arXiv 2407.21783, table 3"
QWEN_2_5 = "Qwen2.5, arXiv 2412.15115, and its released configuration"
QWEN_3 = "Qwen3, arXiv 2505.09388, and its released configuration"
GPT_OSS = "gpt-oss, arXiv 2508.10925, table 1, and its released configuration"
UNEMBEDDED = "printed without the input embedding"

COMPARATORS: dict[str, Preset] = {
    "llama-3.1-8b": Preset(
        partial(transformer, 4096, 32, (32, 8), 14_336, 128_256, theta=5e5), LLAMA, (Published("params_total", "8.03"),)
    ),
    "llama-3.1-70b": Preset(
        partial(transformer, 8192, 80, (64, 8), 28_672, 128_256, theta=5e5), LLAMA, (Published("params_total", "70.6"),)
    ),
    "llama-3.1-405b": Preset(
        partial(transformer, 16_384, 126, (128, 8), 53_248, 128_256, theta=5e5),
        LLAMA,
        (Published("params_total", "406"),),
    ),
    "qwen2.5-72b": Preset(
        partial(transformer, 8192, 80, (64, 8), 29_568, 152_064, theta=1e6, bias="qkv"),
        QWEN_2_5,
        (Published("params_total", "72.7"),),
    ),
    "qwen3-8b": Preset(
        partial(transformer, 4096, 36, (32, 8), 12_288, 151_936, theta=1e6, qk_norm=True),
        QWEN_3,
        (Published("params_total", "8.2"), Published("params_active_no_embeddings", "6.95")),
    ),
    "qwen3-30b-a3b": Preset(
        partial(qwen3_moe, 2048, 48, 32, 768),
        QWEN_3,
        (Published("params_total", "30.5"), Published("params_active_no_router", "3.3")),
    ),
    "qwen3-235b-a22b": Preset(
        partial(qwen3_moe, 4096, 94, 64, 1536),
        QWEN_3,
        (Published("params_total", "235"), Published("params_active", "22")),
    ),
    "gpt-oss-20b": Preset(
        partial(gpt_oss, 24, 32),
        GPT_OSS,
        (Published("params_total", "20.91"), Published("params_active_no_input_embedding", "3.61", UNEMBEDDED)),
    ),
    "gpt-oss-120b": Preset(
        partial(gpt_oss, 36, 128),
        GPT_OSS,
        (Published("params_total", "116.83"), Published("params_active_no_input_embedding", "5.13", UNEMBEDDED)),
    ),
    "deepseek-v3": Preset(
        partial(deepseek, 3, 128, 256, 129_280, 2.5, 1e4, n_mtp=1),
        "DeepSeek-V3, arXiv 2412.19437, section 4.2",
        (Published("params_total", "671"), Published("params_active_no_input_embedding", "37")),
    ),
    "kimi-k2": Preset(
        partial(deepseek, 1, 64, 384, 163_840, 2.827, 5e4),
        "Kimi K2, arXiv 2507.20534, table 2",
        (Published("params_total", "1.0e3"), Published("params_active_no_input_embedding", "32")),
    ),
}
