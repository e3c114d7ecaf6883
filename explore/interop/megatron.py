"""Megatron-LM arguments that train the same architecture at scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explore.blocks import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, MoEConfig
from explore.interop.refusals import of_kind, one_config_a_kind, refuse, require, standard_pattern
from explore.model import ModelConfig

TARGET = "Megatron-LM"
KINDS: Mapping[type[BlockConfig], str] = {Mamba2Config: "M", AttentionConfig: "*", MLPConfig: "-", MoEConfig: "E"}

MAMBA: Mapping[str, tuple[Any, ...]] = {"d_conv": (4,), "dt_min": (0.001,), "dt_max": (0.1,), "norm_eps": (1e-5,)}
"""Fixed values of Megatron-LM's Mamba mixer."""
ATTENTION: Mapping[str, tuple[Any, ...]] = {
    "window": (None,),
    "bias": ("none", "qkv"),
    "qk_norm": (False,),
    "sinks": (False,),
    "output_gate": (False,),
    "d_rope": (None,),
    "d_conv": (None,),
}
MOE: Mapping[str, tuple[Any, ...]] = {
    "router_input": ("model",),
    "latent_norm": ("none",),
    "bias": (False,),
    "shared_gate": (False,),
}
ACTIVATIONS = {"relu2": "--squared-relu", "swiglu": "--swiglu"}

Arguments = list[tuple[str, ...]]


def megatron_arguments(
    model: ModelConfig, seq_len: int | None = None, mtp_weight: float | None = None
) -> tuple[Arguments, list[str]]:
    """Returns the architecture's arguments with their values, and notes on settings left to the user.

    Args:
        seq_len: tokens per training sequence.
        mtp_weight: loss weight of multi-token prediction.

    Raises:
        ValueError: Megatron-LM cannot express the model; the message names the field.

    Source: Megatron Core 0.19.2, `pretrain_hybrid.py`.
    """
    blocks = one_config_a_kind(model, KINDS, TARGET)
    mamba, attention = of_kind(blocks, "M", Mamba2Config), of_kind(blocks, "*", AttentionConfig)
    mlp, moe = of_kind(blocks, "-", MLPConfig), of_kind(blocks, "E", MoEConfig)
    pattern = standard_pattern(model.pattern, model, KINDS)
    notes = []
    arguments: Arguments = [("--use-mcore-models",)]
    if model.mtp is not None:
        pattern += ("/" + standard_pattern(model.mtp.pattern, model, KINDS)) * model.mtp.n_depths
    arguments += [
        ("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
        ("--hybrid-layer-pattern", pattern),
        ("--hidden-size", str(model.d_model)),
        ("--vocab-size", str(model.vocab_size)),
        ("--make-vocab-size-divisible-by", "1"),
        *(() if model.tie_embeddings else (("--untie-embeddings-and-output-weights",),)),
        ("--normalization", "RMSNorm"),
        ("--norm-epsilon", repr(model.norm_eps)),
        ("--init-method-std", repr(model.std)),
        ("--disable-bias-linear",),
        ("--attention-dropout", "0.0"),
        ("--hidden-dropout", "0.0"),
        *_activation({"-": mlp, "E": moe}),
        *_attention(attention),
    ]
    if mamba is not None:
        require("blocks.M", mamba, MAMBA, TARGET)
        arguments += [
            ("--mamba-num-heads", str(mamba.n_heads)),
            ("--mamba-head-dim", str(mamba.d_head)),
            ("--mamba-state-dim", str(mamba.d_state)),
            ("--mamba-num-groups", str(mamba.n_groups)),
        ]
        if mamba.chunk_size != 128:
            notes.append(f"its scan runs in chunks of 128, not {mamba.chunk_size}: the same result, other FLOPs")
    if mlp is not None:
        arguments.append(("--ffn-hidden-size", str(mlp.d_ff)))
    if moe is not None:
        arguments += _moe(moe)
        if mlp is None:
            arguments.append(("--ffn-hidden-size", str(moe.d_expert)))
    if model.mtp is not None:
        arguments.append(("--mtp-num-layers", str(model.mtp.n_depths)))
        arguments += [("--mtp-use-repeated-layer",)] if model.mtp.shared and model.mtp.n_depths > 1 else []
        arguments += [("--mtp-loss-scaling-factor", repr(mtp_weight))] if mtp_weight is not None else []
    if seq_len is not None:
        arguments += [("--seq-length", str(seq_len)), ("--max-position-embeddings", str(seq_len))]
    notes.append("optimizer, data, tokenizer and parallelism are left to you")
    return arguments, notes


def _activation(blocks: Mapping[str, MLPConfig | MoEConfig | None]) -> Arguments:
    """One argument for all MLPs and experts."""
    chosen = {letter: block.activation for letter, block in blocks.items() if block is not None}
    for letter, activation in chosen.items():
        if activation not in ACTIVATIONS:
            raise refuse(f"blocks.{letter}.activation", activation, TARGET, " or ".join(map(repr, ACTIVATIONS)))
    if len(set(chosen.values())) > 1:
        raise ValueError(
            f"blocks.E.activation: {chosen['E']!r} differs from {chosen['-']!r} of '-'; {TARGET} has one for both"
        )
    return [(ACTIVATIONS[activation],) for activation in set(chosen.values())]


def _attention(attention: AttentionConfig | None) -> Arguments:
    if attention is None:
        return [("--num-attention-heads", "1"), ("--position-embedding-type", "none")]  # required, used by no layer
    require("blocks.*", attention, ATTENTION, TARGET)
    theta = attention.rope_theta
    if theta is not None and theta != int(theta):
        raise refuse("blocks.*.rope_theta", theta, TARGET, "whole numbers")
    return [
        ("--num-attention-heads", str(attention.n_heads)),
        ("--group-query-attention",),
        ("--num-query-groups", str(attention.n_kv_heads)),
        ("--kv-channels", str(attention.d_head)),
        *((("--add-qkv-bias",),) if attention.bias == "qkv" else ()),
        ("--position-embedding-type", "none" if theta is None else "rope"),
        *(() if theta is None else (("--rotary-base", str(int(theta))),)),
    ]


def _moe(moe: MoEConfig) -> Arguments:
    require("blocks.E", moe, MOE, TARGET)
    sigmoid = moe.router_score == "sigmoid"
    if moe.expert_bias and not sigmoid:
        raise refuse("blocks.E.expert_bias", True, TARGET, "False (if router_score is 'softmax')")
    if moe.normalize_weights and moe.top_k == 1:
        raise refuse("blocks.E.normalize_weights", True, TARGET, "False (if top_k is 1)")
    if sigmoid and not moe.normalize_weights and moe.top_k > 1:
        raise refuse("blocks.E.normalize_weights", False, TARGET, "True (if router_score is 'sigmoid')")
    shared = moe.shared_mlp()
    return [
        ("--num-experts", str(moe.n_experts)),
        ("--moe-router-topk", str(moe.top_k)),
        ("--moe-ffn-hidden-size", str(moe.d_expert)),
        *((("--moe-latent-size", str(moe.d_latent)),) if moe.d_latent is not None else ()),
        *((("--moe-shared-expert-intermediate-size", str(shared.d_ff)),) if shared is not None else ()),
        ("--moe-router-score-function", moe.router_score),
        *((("--moe-router-pre-softmax",),) if not sigmoid and not moe.normalize_weights else ()),
        ("--moe-router-topk-scaling-factor", repr(moe.routed_scaling_factor)),
        ("--moe-router-dtype", "fp32"),
        *(
            (("--moe-router-enable-expert-bias",), ("--moe-router-bias-update-rate", repr(moe.bias_update_rate)))
            if moe.expert_bias
            else ()
        ),
        ("--moe-router-load-balancing-type", "seq_aux_loss" if moe.aux_loss_coef else "none"),
        ("--moe-aux-loss-coeff", repr(moe.aux_loss_coef)),
        ("--moe-grouped-gemm",),
    ]
