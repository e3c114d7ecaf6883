"""Suggestions for the sizes of blocks that fit any width: what must divide is made to, so no draw is wasted.

All parameters have the same distribution in every trial, whatever `d_model` is: exponents of two and ratios. Where a
size must divide another, it is the largest power of two up to the suggested one that does; so at a width such as 96
two suggestions can come to the same sizes. Each function returns fields of a block's config.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from optuna.trial import BaseTrial

Range = tuple[int, int]
"""The least and the largest power of two."""

MULTIPLE = 8
"""Widths that follow from a ratio are rounded to multiples of it."""


def suggest_mamba(
    trial: BaseTrial,
    d_model: int,
    *,
    expand: Range = (2, 2),
    d_head: Range = (16, 64),
    d_state: Range = (16, 128),
    n_groups: Range = (1, 4),
    name: str = "mamba",
) -> dict[str, int]:
    """Sizes of a Mamba-2 block: n_heads * d_head is `expand` times the width, n_groups divides n_heads."""
    d_inner = d_model * _power(trial, f"{name}_expand", expand)
    head = math.gcd(_power(trial, f"{name}_d_head", d_head), d_inner)
    state = _power(trial, f"{name}_d_state", d_state)
    n_heads = d_inner // head
    groups = math.gcd(_power(trial, f"{name}_n_groups", n_groups), n_heads)
    return {"n_heads": n_heads, "d_head": head, "d_state": state, "n_groups": groups}


def suggest_attention(
    trial: BaseTrial,
    d_model: int,
    *,
    d_head: Range = (16, 64),
    sharing: Range = (1, 4),
    name: str = "attention",
) -> dict[str, int]:
    """Sizes of an attention block whose heads together are as wide as the model.

    Args:
        sharing: query heads to a head of keys and values.
    """
    head = math.gcd(_power(trial, f"{name}_d_head", d_head), d_model)
    n_heads = d_model // head
    shared = math.gcd(_power(trial, f"{name}_sharing", sharing), n_heads)
    return {"n_heads": n_heads, "n_kv_heads": n_heads // shared, "d_head": head}


def suggest_mlp(
    trial: BaseTrial, d_model: int, *, ratios: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 6.0), name: str = "mlp"
) -> dict[str, int]:
    """The inner width of an MLP, as a ratio to the model's."""
    return {"d_ff": _width(d_model, trial.suggest_categorical(f"{name}_ratio", list(ratios)))}


def suggest_moe(
    trial: BaseTrial,
    d_model: int,
    *,
    kind: Literal["standard", "latent", "either"] = "either",
    n_experts: Range = (8, 64),
    sparsity: Range = (2, 16),
    compression: Range = (2, 4),
    ratios: Sequence[float] = (0.25, 0.5, 1.0),
    shared_ratios: Sequence[float] = (0.0, 1.0, 2.0),
    name: str = "moe",
) -> dict[str, int]:
    """Sizes of a mixture of experts, latent or not.

    Args:
        kind: `either` lets every trial choose.
        sparsity: experts to each one that a token uses; top_k is at least 1.
        compression: d_model / d_latent, as far as it divides.
        ratios: of d_expert to d_model.
        shared_ratios: of the shared experts' width to d_model; 0 is none.
    """
    experts = _power(trial, f"{name}_n_experts", n_experts)
    top_k = max(1, experts // _power(trial, f"{name}_sparsity", sparsity))
    sizes = {"n_experts": experts, "top_k": top_k}
    sizes["d_expert"] = _width(d_model, trial.suggest_categorical(f"{name}_ratio", list(ratios)))
    shared = trial.suggest_categorical(f"{name}_shared_ratio", list(shared_ratios))
    sizes |= {"n_shared": 1, "d_shared": _width(d_model, shared)} if shared else {"n_shared": 0}
    if kind == "either":
        latent = trial.suggest_categorical(f"{name}_kind", ["standard", "latent"]) == "latent"
    elif kind in ("standard", "latent"):
        latent = kind == "latent"
    else:
        raise ValueError(f"kind: {kind!r} is not allowed; standard, latent and either are")
    if latent:
        sizes["d_latent"] = d_model // math.gcd(_power(trial, f"{name}_compression", compression), d_model)
    return sizes


def _power(trial: BaseTrial, name: str, powers: Range) -> int:
    """A power of two; its exponent is the parameter, so that neighbours are near each other for a sampler."""
    low, high = powers
    if not (0 < low <= high and low & (low - 1) == 0 and high & (high - 1) == 0):
        raise ValueError(f"{name}: {powers} is not allowed; two powers of two in rising order are")
    exponent: int = trial.suggest_int(f"{name}_log2", low.bit_length() - 1, high.bit_length() - 1)
    return 1 << exponent


def _width(d_model: int, ratio: float) -> int:
    return max(MULTIPLE, round(ratio * d_model / MULTIPLE) * MULTIPLE)
