"""The latent equivalents of a standard mixture of experts."""

from __future__ import annotations

from explore.blocks.moe import MoEConfig
from explore.foreign import check_type
from explore.ops import is_gated


def _alpha(standard: MoEConfig, d_model: int, d_latent: int) -> int:
    check_type(standard, MoEConfig, "standard must be an explore.MoEConfig")
    if standard.d_latent is not None:
        raise ValueError(f"d_latent: a standard MoE is needed, this one has d_latent={standard.d_latent}")
    if d_latent < 1 or d_model % d_latent:
        raise ValueError(f"d_latent: {d_latent} does not divide d_model={d_model}")
    return d_model // d_latent


def latent_eff(standard: MoEConfig, d_model: int, d_latent: int) -> MoEConfig:
    """l-MoE_eff of a standard MoE: alpha times the experts, the same top_k; cheaper at the same quality.

    alpha = d_model / d_latent; total parameters of the routed experts stay as they are.

    Source: arXiv 2601.18089, section 3.
    """
    alpha = _alpha(standard, d_model, d_latent)
    return standard.model_copy(update={"d_latent": d_latent, "n_experts": alpha * standard.n_experts})


def latent_acc(standard: MoEConfig, d_model: int, d_latent: int, *, pay_projections: bool = True) -> MoEConfig:
    """l-MoE_acc of a standard MoE: alpha times the experts and alpha times top_k; better at the same cost.

    Args:
        pay_projections: lower top_k by what the two latent projections cost, so that active parameters
            stay equal: alpha * top_k - 2 d_model / (g d_expert), g = 2 matrices in an expert, 3 if gated.
            Released configurations do (24 becomes 22); the paper's formula does not.

    Source: arXiv 2601.18089, section 3; the rule for top_k is derived from the released configurations.
    """
    eff = latent_eff(standard, d_model, d_latent)
    top_k = float(_alpha(standard, d_model, d_latent) * standard.top_k)
    if pay_projections:
        top_k -= 2 * d_model / ((3 if is_gated(standard.activation) else 2) * standard.d_expert)
    if round(top_k) < 1:
        raise ValueError(f"d_latent: at {d_latent} the two projections cost more than the experts that a token uses")
    return eff.model_copy(update={"top_k": round(top_k)})
