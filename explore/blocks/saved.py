"""Saved tensors common to several blocks, and checks of parallel ranks."""

from __future__ import annotations

from typing import NamedTuple

from explore.cost import Cut, Saved, linear_input
from explore.ops import Activation, is_gated

KEPT_OF_ACTIVATION = {"relu2": 1, "swiglu": 3, "swiglu_clamped": 6}
"""Tensors of the result's width that this kit saves for an activation, besides the result itself."""


class Ranks(NamedTuple):
    """How parallel ranks split a block's weights and products, by ledger component.

    Attributes:
        replicated: weights that every tensor-parallel rank holds in full.
        routed: expert weights, which expert-parallel ranks split.
        full_width: weights whose products stay in full precision when the others use a narrow format.
        recomputed: products repeated when a Megatron-LM module is recomputed, by module name.
    """

    replicated: tuple[str, ...] = ()
    routed: tuple[str, ...] = ()
    full_width: tuple[str, ...] = ()
    recomputed: tuple[tuple[str, tuple[str, ...]], ...] = ()


def check_divides(ranks: str, n: int, field: str, size: int) -> None:
    """Checks that a number of ranks divides a size.

    Raises:
        ValueError: it does not; the message lists the numbers that do.
    """
    if size % n:
        allowed = ", ".join(str(k) for k in range(1, min(size, 1024) + 1) if size % k == 0)
        raise ValueError(f"{ranks} must divide {field}={size}, got {n}; {allowed} do")


def dropout_mask(component: str, d_model: int, seq_len: int) -> Saved:
    """The mask of the dropout on a block's output."""
    return Saved(component, "activation", d_model * seq_len, "byte", dropped_by=("no_dropout",))


def attention_saved(n_heads: int, d_out: int, d_model: int, seq_len: int) -> tuple[Saved, ...]:
    """Tensors that Megatron-LM saves for attention besides queries, keys and values: output and softmax statistics."""
    scores, unfused = n_heads * seq_len**2, ("fused_attention", "core_attn")
    return (
        Saved("attention", "attention", d_out * seq_len, narrow_copies=1, cut="width"),
        Saved("attention", "attention", n_heads * seq_len, "float32", cut="width", dropped_by=("core_attn",)),
        Saved("attention", "attention", scores, cut="width", dropped_by=unfused),
        Saved("attention", "attention", scores, "byte", cut="width", dropped_by=(*unfused, "no_dropout")),
        Saved("attention", "attention", scores, cut="width", dropped_by=(*unfused, "no_dropout")),
        dropout_mask("o_proj", d_model, seq_len),
    )


def inner_saved(
    component: str, numel_seq: int, activation: Activation, *, cut: Cut, dropped_by: tuple[str, ...], act: str = ""
) -> tuple[Saved, Saved]:
    """Tensors that Megatron-LM saves between the first and last matrix of an MLP: input and result of the activation.

    Args:
        numel_seq: elements of the result in one sequence.
        act: recomputed module that makes saving the result alone unnecessary.
    """
    projections = 2 if is_gated(activation) else 1
    drops_result = (*dropped_by, act) if act else dropped_by
    return (
        Saved(component, "activation", projections * numel_seq, cut=cut, dropped_by=dropped_by),
        linear_input(component, numel_seq, cut=cut, dropped_by=drops_result),
    )


def inner_kept(component: str, numel_seq: int, activation: Activation) -> tuple[Saved, Saved]:
    """Tensors that this kit saves between the first and last matrix of an MLP, in fp32."""
    return (
        Saved(component, "activation", KEPT_OF_ACTIVATION[activation] * numel_seq, "float32"),
        Saved(component, "linear input", numel_seq, "float32"),
    )


def norm_kept(component: str, width: int, seq_len: int, n_groups: int = 1) -> Saved:
    """Tensors that this kit saves for a norm, in fp32: its input and the scale of every group."""
    return Saved(component, "norm", (width + n_groups) * seq_len, "float32")
