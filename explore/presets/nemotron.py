"""The Nemotron hybrids. All have head widths of 128, no positional encoding, squared ReLU and untied embeddings."""

from __future__ import annotations

from functools import partial
from typing import Any

from explore.model import ModelConfig
from explore.presets.base import Preset, Published

VOCAB_SIZE = 131_072

H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
H_56B = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
H_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
NANO_2_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
NANO_2_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_3 = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER_3 = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME/*E/*E"
ULTRA_3 = (
    "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME/*E/*E"
)


def hybrid(
    pattern: str,
    d_model: int,
    mamba: tuple[int, int, int],
    heads: tuple[int, int],
    *,
    d_ff: int | None = None,
    moe: dict[str, Any] | None = None,
) -> ModelConfig:
    """A Nemotron hybrid.

    Args:
        mamba: number of heads, head width, state width; always 8 groups.
        heads: number of query heads and of key-value heads.
        d_ff: width of the MLP layers.
        moe: fields of the MoE layers.
    """
    n_heads, d_head, d_state = mamba
    blocks: dict[str, Any] = {
        "M": {"n_heads": n_heads, "d_head": d_head, "d_state": d_state, "n_groups": 8, "chunk_size": 128},
        "*": {"n_heads": heads[0], "n_kv_heads": heads[1], "d_head": 128},
        "-": {"d_ff": d_ff},
        "E": moe,
    }
    return ModelConfig(d_model=d_model, vocab_size=VOCAB_SIZE, pattern=pattern, blocks=blocks)


def experts(n: int, top_k: int, d_expert: int, d_shared: int, scaling: float, d_latent: int | None) -> dict[str, Any]:
    """Fields of the MoE layers of Nemotron 3: one shared expert, sigmoid router."""
    return {
        "n_experts": n,
        "top_k": top_k,
        "d_expert": d_expert,
        "d_shared": d_shared,
        "d_latent": d_latent,
        "routed_scaling_factor": scaling,
    }


H = "Nemotron-H, arXiv 2504.03624, table 1"
NANO_2 = "Nemotron Nano 2, arXiv 2508.14444"
NO_ROUTER = "the print leaves out the routers' weights"
LATENT = experts(512, 22, 2688, 5376, 5.0, 1024)
LATENT_ULTRA = experts(512, 22, 5120, 10_240, 5.0, 2048)

NEMOTRON: dict[str, Preset] = {
    "nemotron-h-8b": Preset(
        partial(hybrid, H_8B, 4096, (128, 64, 128), (32, 8), d_ff=21_504), H, (Published("params_total", "8.1"),)
    ),
    "nemotron-h-56b": Preset(
        partial(hybrid, H_56B, 8192, (256, 64, 256), (64, 8), d_ff=32_768), H, (Published("params_total", "56"),)
    ),
    "nemotron-h-47b": Preset(
        partial(hybrid, H_47B, 8192, (256, 64, 256), (64, 8), d_ff=30_720),
        f"{H[:-9]}, section 4: MiniPuzzle of the 56B",
        (Published("params_total", "47"),),
    ),
    "nemotron-nano-2-12b": Preset(
        partial(hybrid, NANO_2_12B, 5120, (128, 80, 128), (40, 8), d_ff=20_480),
        NANO_2,
        (Published("params_total", "12"),),
    ),
    "nemotron-nano-2-9b": Preset(
        partial(hybrid, NANO_2_9B, 4480, (128, 80, 128), (40, 8), d_ff=15_680),
        f"{NANO_2}: Minitron of the 12B",
        (Published("params_total", "8.89"),),
    ),
    "nemotron-3-nano": Preset(
        partial(hybrid, NANO_3, 2688, (64, 64, 128), (32, 2), moe=experts(128, 6, 1856, 3712, 2.5, None)),
        "Nemotron 3 Nano, arXiv 2512.20848",
        (
            Published("params_total", "31.6"),
            Published("params_active", "3.6"),
            Published("params_active_no_input_embedding", "3.2"),
        ),
    ),
    "nemotron-3-super": Preset(
        partial(hybrid, SUPER_3, 4096, (128, 64, 128), (32, 2), moe=LATENT),
        "Nemotron 3 Super, arXiv 2604.12374",
        (
            Published("params_total_no_router", "120.6", NO_ROUTER),
            Published("params_active_no_router", "12.7", NO_ROUTER),
            Published("params_active_no_input_embedding_no_router", "12.1", "printed as 'excluding embeddings'"),
        ),
    ),
    "nemotron-3-ultra": Preset(
        partial(hybrid, ULTRA_3, 8192, (256, 64, 128), (64, 2), moe=LATENT_ULTRA),
        "Nemotron 3, arXiv 2512.20856",
        (Published("params_total", "5.5e2"), Published("params_active_no_input_embedding", "55")),
    ),
}
