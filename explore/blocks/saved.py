"""What several blocks keep for the backward pass, and which sizes parallel ranks divide."""

from __future__ import annotations

from typing import NamedTuple

from explore.cost import Cut, Saved, linear_input
from explore.ops import Activation, is_gated

KEPT_OF_ACTIVATION = {"relu2": 1, "swiglu": 3, "swiglu_clamped": 6}
"""Tensors as wide as the result that this kit keeps of an activation, the result apart."""


class Ranks(NamedTuple):
    """How weights and products of a block are divided among parallel ranks, by component of its ledger.

    Attributes:
        replicated: weights that every tensor-parallel rank holds whole.
        routed: weights of experts, which expert-parallel ranks divide.
        full_width: weights whose products stay in full width where others are taken in a narrow format.
        recomputed: products that are taken again when one of Megatron-LM's modules is recomputed, by its name.
    """

    replicated: tuple[str, ...] = ()
    routed: tuple[str, ...] = ()
    full_width: tuple[str, ...] = ()
    recomputed: tuple[tuple[str, tuple[str, ...]], ...] = ()


def check_divides(ranks: str, n: int, field: str, size: int) -> None:
    """Refuses a number of ranks that does not divide a size.

    Raises:
        ValueError: it does not; with the numbers that do.
    """
    if size % n:
        allowed = ", ".join(str(k) for k in range(1, min(size, 1024) + 1) if size % k == 0)
        raise ValueError(f"{ranks} must divide {field}={size}, got {n}; {allowed} do")


def dropout_mask(component: str, d_model: int, seq_len: int) -> Saved:
    """The mask of the dropout before the residual stream."""
    return Saved(component, "activation", d_model * seq_len, "byte", dropped_by=("no_dropout",))


def attention_saved(n_heads: int, d_out: int, d_model: int, seq_len: int) -> tuple[Saved, ...]:
    """What Megatron-LM keeps of attention beside queries, keys and values: its output, and what its softmax needs."""
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
    """What Megatron-LM keeps between the first and the last matrix of an MLP: the activation's input, and its result.

    Args:
        numel_seq: elements of the result in one sequence.
        act: a recomputed module that drops the result alone.
    """
    projections = 2 if is_gated(activation) else 1
    drops_result = (*dropped_by, act) if act else dropped_by
    return (
        Saved(component, "activation", projections * numel_seq, cut=cut, dropped_by=dropped_by),
        linear_input(component, numel_seq, cut=cut, dropped_by=drops_result),
    )


def inner_kept(component: str, numel_seq: int, activation: Activation) -> tuple[Saved, Saved]:
    """The same in this kit, in fp32."""
    return (
        Saved(component, "activation", KEPT_OF_ACTIVATION[activation] * numel_seq, "float32"),
        Saved(component, "linear input", numel_seq, "float32"),
    )


def norm_kept(component: str, width: int, seq_len: int, n_groups: int = 1) -> Saved:
    """What this kit keeps of a norm, in fp32: its input, and the scale of every group."""
    return Saved(component, "norm", (width + n_groups) * seq_len, "float32")
