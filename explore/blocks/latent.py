"""The latent equivalents of a standard mixture of experts."""

from __future__ import annotations

from numbers import Integral

from explore.blocks.moe import MoEConfig
from explore.foreign import check_type
from explore.ops import is_gated


def _alpha(standard: MoEConfig, d_model: int, d_latent: int) -> int:
    check_type(standard, MoEConfig, "standard must be an explore.MoEConfig")
    if standard.d_latent is not None:
        raise ValueError(f"standard must have no d_latent, got d_latent={standard.d_latent}")
    check_type(d_model, Integral, "d_model must be a whole number")
    check_type(d_latent, Integral, "d_latent must be a whole number")
    if d_latent < 1 or d_model % d_latent:
        raise ValueError(f"d_latent must divide d_model={d_model}, got {d_latent}")
    return d_model // d_latent


def latent_eff(standard: MoEConfig, d_model: int, d_latent: int) -> MoEConfig:
    """l-MoE_eff of a standard MoE: alpha times as many experts, the same top_k; cheaper at equal quality.

    alpha = d_model / d_latent; the routed experts keep their total number of parameters.

    Source: arXiv 2601.18089, section 3.
    """
    alpha = _alpha(standard, d_model, d_latent)
    return standard.model_copy(update={"d_latent": d_latent, "n_experts": alpha * standard.n_experts})


def latent_acc(standard: MoEConfig, d_model: int, d_latent: int, *, pay_projections: bool = True) -> MoEConfig:
    """l-MoE_acc of a standard MoE: alpha times as many experts and alpha times top_k; better at equal cost.

    Args:
        pay_projections: lower top_k to pay for the two latent projections, so that active parameters stay equal:
            alpha * top_k - 2 d_model / (g d_expert), where g is 2 matrices per expert, or 3 if gated.
            Released configurations do this (24 becomes 22); the paper's formula does not.

    Source: arXiv 2601.18089, section 3; the rule for top_k is derived from the released configurations.
    """
    eff = latent_eff(standard, d_model, d_latent)
    top_k = float(_alpha(standard, d_model, d_latent) * standard.top_k)
    if pay_projections:
        top_k -= 2 * d_model / ((3 if is_gated(standard.activation) else 2) * standard.d_expert)
    if round(top_k) < 1:
        raise ValueError(
            f"d_latent must leave the latent projections cheaper than a token's active experts, got {d_latent}"
        )
    return eff.model_copy(update={"top_k": round(top_k)})
