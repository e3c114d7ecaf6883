"""A small block of each kind and option, for tests that cover all of them."""

from __future__ import annotations

import torch

from explore.blocks import (
    BLOCKS,
    AttentionConfig,
    BlockConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    Mixer,
    MLAConfig,
    MLPConfig,
    MoEConfig,
)

D_MODEL = 32
VARIANTS: dict[str, BlockConfig] = {kind.letter: kind.example for kind in BLOCKS} | {
    "rope": AttentionConfig(n_heads=4, n_kv_heads=1, d_head=8, rope_theta=10_000.0),
    "window": AttentionConfig(n_heads=2, n_kv_heads=2, d_head=16, window=5),
    "biases": AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, bias="qkv"),
    "norms and sinks": AttentionConfig(
        n_heads=4, n_kv_heads=2, d_head=8, bias="all", qk_norm=True, sinks=True, window=6, rope_theta=1e4
    ),
    "gate": AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, bias="qkv", output_gate=True, rope_theta=1e4, d_rope=4),
    "convolution": AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, d_conv=4),
    "convolution, window": AttentionConfig(
        n_heads=4, n_kv_heads=1, d_head=8, d_conv=3, window=6, qk_norm=True, rope_theta=1e4, output_gate=True
    ),
    "full-rank queries": MLAConfig(n_heads=2, kv_rank=8, d_nope=8, d_rope=4, d_v=16),
    "swiglu": MLPConfig(d_ff=24, activation="swiglu"),
    "clamped": MLPConfig(d_ff=24, activation="swiglu_clamped"),
    "expert biases": MoEConfig(
        n_experts=4, top_k=2, d_expert=8, n_shared=0, activation="swiglu_clamped", bias=True, router_score="softmax"
    ),
    "one group": Mamba2Config(n_heads=2, d_head=16, d_state=8, n_groups=1, chunk_size=8),
    "softmax": MoEConfig(n_experts=6, top_k=3, d_expert=8, n_shared=0, activation="swiglu", router_score="softmax"),
    "a key head each": GatedDeltaNetConfig(n_heads=3, n_key_heads=3, d_k=12, d_v=8, d_conv=2, chunk_size=8),
    "many groups": Mamba2Config(n_heads=8, d_head=4, d_state=8, n_groups=8, d_conv=2, chunk_size=64),
    "shared gate": MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared=2, d_shared=8, shared_gate=True),
    "latent norm": MoEConfig(n_experts=4, top_k=1, d_expert=8, n_shared=2, d_shared=8, d_latent=8, latent_norm="input"),
    "latent router": MoEConfig(
        n_experts=4, top_k=2, d_expert=8, d_shared=8, d_latent=8, latent_norm="combined", router_input="latent"
    ),
}


def built(config: BlockConfig) -> Mixer:
    torch.manual_seed(0)
    mixer = config.build(D_MODEL)
    mixer.init_weights(0.2, 0.2)
    return mixer
