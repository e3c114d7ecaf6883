"""Tensors that a mixture of experts saves for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from explore.blocks.saved import dropout_mask, inner_kept, inner_saved
from explore.cost import Saved, linear_input

if TYPE_CHECKING:
    from explore.blocks.moe import MoEConfig


def moe_saved(config: MoEConfig, d_model: int, seq_len: int) -> tuple[Saved, ...]:
    """Tensors that Megatron-LM saves."""
    d_routed, latent, shared = config.d_latent or d_model, config.d_latent is not None, config.shared_mlp()
    routed, moe, readers = config.top_k * seq_len, ("moe",), latent + (shared is not None)
    expert, activated = inner_saved(
        "experts", config.d_expert * routed, config.activation, cut="expert width", dropped_by=moe, act="moe_act"
    )
    weighted = ("memory_efficient_permutation", "moe")
    rows = [
        # The router reads the full-precision input; the latent projection and shared experts may keep narrow copies.
        Saved("router", "norm", d_model * seq_len, narrow_copies=readers, dropped_by=("layernorm",)),
        Saved("router", "routing", 2 * config.n_experts * seq_len, "float32", dropped_by=moe),
        linear_input("experts", d_routed * routed, cut="expert tokens", dropped_by=moe)._replace(group="expert"),
        expert._replace(group="expert"),
        activated._replace(group="expert"),
        Saved("experts", "expert", d_routed * routed, cut="expert tokens", dropped_by=weighted),
    ]
    if config.latent_norm != "none":
        rows.append(Saved("latent_norm", "norm", d_routed * seq_len, dropped_by=moe))
    if latent:
        rows.append(linear_input("latent_up", d_routed * seq_len, dropped_by=moe))
    if shared is not None:
        dropped_by = ("shared_experts", "moe")
        rows += inner_saved("shared", shared.d_ff * seq_len, config.activation, cut="width", dropped_by=dropped_by)
        if config.shared_gate:  # the shared experts' output and the gate
            rows.append(Saved("shared_gate", "activation", (d_model + 1) * seq_len, dropped_by=dropped_by))
    return (*rows, dropout_mask("experts", d_model, seq_len))


def moe_kept(config: MoEConfig, d_model: int, seq_len: int) -> tuple[Saved, ...]:
    """Tensors that this kit saves on its default paths."""
    d_routed, latent, shared = config.d_latent or d_model, config.d_latent is not None, config.shared_mlp()
    chosen = config.top_k * seq_len
    # Scores, and the tensors for normalising the chosen scores and for the balance loss.
    scores = config.n_experts * seq_len + (2 * chosen + seq_len) * config.normalize_weights
    balanced = ((config.n_experts + 1) * seq_len + config.n_experts) if config.aux_loss_coef > 0 else 0
    rows = [
        Saved("router", "linear input", d_model * seq_len, "float32"),
        Saved("router", "routing", scores + balanced, "float32"),
        Saved("experts", "routing", (2 + config.bias) * chosen, "int64"),  # experts, rows, and experts of rows
        Saved("experts", "routing", chosen, "float32"),
        *(row._replace(group="expert") for row in inner_kept("experts", config.d_expert * chosen, config.activation)),
        Saved("experts", "expert", 2 * d_routed * chosen, "float32"),  # inputs and outputs
    ]
    if config.router_input == "latent" or config.latent_norm == "input":
        rows.append(Saved("latent_down", "norm", d_routed * seq_len, "float32"))
    if config.latent_norm == "combined":
        rows.append(Saved("latent_norm", "norm", d_routed * seq_len, "float32"))
    if config.latent_norm != "none":
        rows.append(Saved("latent_norm", "norm", seq_len, "float32"))
    if latent:
        rows.append(Saved("latent_up", "linear input", d_routed * seq_len, "float32"))
    if shared is not None:
        rows += inner_kept("shared", shared.d_ff * seq_len, config.activation)
        if config.shared_gate:
            rows.append(Saved("shared_gate", "activation", (d_model + 1) * seq_len, "float32"))
    return tuple(rows)
