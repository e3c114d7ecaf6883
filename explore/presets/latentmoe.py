"""The models of the LatentMoE paper: a standard MoE, and its efficient and its accurate latent form."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from explore.blocks import MoEConfig, latent_acc, latent_eff
from explore.model import ModelConfig
from explore.presets.base import Preset, Published

Variant = Literal["base", "acc", "eff"]
VOCAB_SIZE = 129_280
"""Not published; this value (that of DeepSeek's models) reproduces all six published counts of the hybrids."""

SOURCE = "LatentMoE, arXiv 2601.18089; the vocabulary is inferred"
NOTE = "the print leaves out the routers' weights"


def variant(
    which: Variant, pattern: str, d_model: int, d_latent: int, moe: MoEConfig, blocks: dict[str, Any]
) -> ModelConfig:
    """Builds the standard model or one of its latent forms."""
    if which == "acc":
        moe = latent_acc(moe, d_model, d_latent)
    elif which == "eff":
        moe = latent_eff(moe, d_model, d_latent)
    return ModelConfig(d_model=d_model, vocab_size=VOCAB_SIZE, pattern=pattern, blocks={**blocks, "E": moe})


def moe(n_experts: int, d_expert: int, activation: Literal["relu2", "swiglu"]) -> MoEConfig:
    """Top 6 with two shared experts, softmax router."""
    return MoEConfig(
        n_experts=n_experts,
        top_k=6,
        d_expert=d_expert,
        n_shared=2,
        d_shared=d_expert,
        activation=activation,
        router_score="softmax",
    )


HYBRID = "MEMEMEMEMEM*E" * 4
HYBRID_MAMBA = {"n_heads": 128, "d_head": 64, "d_state": 128, "n_groups": 8, "chunk_size": 128}
SMALL = partial(
    variant,
    pattern="*E" * 27,
    d_model=2048,
    d_latent=512,
    moe=moe(64, 1408, "swiglu"),
    blocks={"*": {"n_heads": 16, "n_kv_heads": 16, "d_head": 128}},
)
LARGE = partial(
    variant,
    pattern="*E" * 32,
    d_model=4096,
    d_latent=1024,
    moe=moe(128, 2688, "relu2"),
    blocks={"*": {"n_heads": 32, "n_kv_heads": 8, "d_head": 128}},
)
MIXED = partial(
    variant,
    pattern=HYBRID,
    d_model=4096,
    d_latent=1024,
    moe=moe(128, 2688, "relu2"),
    blocks={"*": {"n_heads": 32, "n_kv_heads": 8, "d_head": 128}, "M": HYBRID_MAMBA},
)


def printed(total: str, active: str) -> tuple[Published, ...]:
    """Published counts of the hybrid, which leave out the routers' weights."""
    return Published("params_total_no_router", total, NOTE), Published("params_active_no_router", active, NOTE)


LATENTMOE: dict[str, Preset] = {
    "latentmoe-16b-base": Preset(partial(SMALL, "base"), SOURCE),
    "latentmoe-16b-acc": Preset(partial(SMALL, "acc"), SOURCE),
    "latentmoe-16b-eff": Preset(partial(SMALL, "eff"), SOURCE),
    "latentmoe-95b-base": Preset(partial(LARGE, "base"), SOURCE),
    "latentmoe-95b-acc": Preset(partial(LARGE, "acc"), SOURCE),
    "latentmoe-95b-eff": Preset(partial(LARGE, "eff"), SOURCE),
    "latentmoe-hybrid-73b-base": Preset(partial(MIXED, "base"), SOURCE, printed("72.6", "8.09")),
    "latentmoe-hybrid-73b-acc": Preset(partial(MIXED, "acc"), SOURCE, printed("72.8", "8.02")),
    "latentmoe-hybrid-73b-eff": Preset(partial(MIXED, "eff"), SOURCE, printed("72.8", "5.91")),
}
