"""The op counter fails on unknown operations, and random models have the costs of the ledger."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from explore.blocks import BLOCKS, AttentionConfig
from explore.ops import forced_paths
from explore.proof import (
    FREE,
    PRODUCTS,
    OpCounter,
    Phase,
    UnknownOpError,
    check,
    count_flops,
    random_case,
    random_model,
    tally,
)

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}


@torch.library.custom_op("test_proof::hidden_product", mutates_args=())
def hidden_product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def test_products_are_counted_by_their_shapes_forward_and_backward() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    assert count_flops(lambda: F.linear(a, b.T, torch.zeros(7))) == 2 * 3 * 5 * 7
    x, filters = torch.randn(2, 6, 9, requires_grad=True), torch.randn(6, 1, 4, requires_grad=True)
    one = 2 * (2 * 6 * 6) * 4
    assert count_flops(lambda: F.conv1d(x, filters, groups=6)) == one
    assert count_flops(lambda: F.conv1d(x, filters, groups=6).sum().backward()) == 3 * one
    assert count_flops(lambda: F.conv1d(x.detach(), filters, groups=6).sum().backward()) == 2 * one
    triangle, columns = torch.eye(5).expand(3, 5, 5).clone().requires_grad_(), torch.randn(3, 5, 7, requires_grad=True)

    def solved() -> Tensor:
        return torch.linalg.solve_triangular(triangle, columns, upper=False, unitriangular=True)

    by_substitution = 3 * 7 * sum(2 * row for row in range(5))
    assert count_flops(solved) == by_substitution
    assert count_flops(lambda: solved().sum().backward()) == 2 * by_substitution + 2 * 3 * 5 * 5 * 7


def test_an_unknown_operation_is_an_error_and_never_free() -> None:
    q = torch.randn(1, 2, 8, 4)
    with FlopCounterMode(display=False) as silent:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
        hidden_product(q[0, 0], q[0, 0].T)
    assert silent.get_total_flops() == 0
    with pytest.raises(UnknownOpError, match="scaled_dot_product"), OpCounter():
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with pytest.raises(UnknownOpError, match="hidden_product"), OpCounter():
        hidden_product(q[0, 0], q[0, 0].T)
    identity = torch.eye(3)
    with pytest.raises(UnknownOpError, match="cholesky"), OpCounter():
        torch.linalg.cholesky(identity)


def test_fused_attention_is_detected() -> None:
    mixer = AttentionConfig(n_heads=2, n_kv_heads=2, d_head=4).build(8)
    mixer.init_weights(0.2, 0.2)
    x = torch.randn(1, 8, 8)
    assert count_flops(lambda: mixer(x)) == 4 * (2 * 8 * 8 * 8) + 2 * (2 * 2 * 8 * 8 * 4)
    with pytest.raises(UnknownOpError), forced_paths(attention="sdpa"), OpCounter():
        mixer(x)


def test_shifted_products_are_free_to_the_counter_so_the_harness_forces_the_convolution() -> None:
    mixer, seq = EXAMPLES["M"].build(32), 16
    mixer.init_weights(0.2, 0.2)
    x = torch.randn(1, seq, 32)
    conv = next(entry.flops_seq for entry in EXAMPLES["M"].entries(32, seq) if entry.component == "conv1d")
    with forced_paths(conv="shift"), OpCounter() as shifted:
        mixer(x)
    assert count_flops(lambda: mixer(x)) - shifted.flops == conv > 0


def test_no_operation_is_both_free_and_counted() -> None:
    assert not FREE & PRODUCTS.keys()


def test_random_models_have_the_flops_of_the_ledger_in_every_phase() -> None:
    cases = [case for number in range(25) for case in check(*random_case(1, number))]
    assert [case for case in cases if case.expected != case.found] == []
    assert tally(cases) == dict.fromkeys(get_args(Phase), (25, 25))


def test_a_wrong_count_is_found() -> None:
    right = next(check(*random_case(0, 0)))
    wrong = right._replace(expected=right.expected + 1)
    assert tally((right, wrong))["params"] == (2, 1)


def test_random_models_reach_every_kind_of_block_and_option() -> None:
    models = [random_model(random.Random(i)) for i in range(300)]
    assert {letter for model in models for letter in model.pattern} == set(EXAMPLES)
    assert {model.mtp is None for model in models} == {True, False}
    for name in (
        "window",
        "bias",
        "qk_norm",
        "sinks",
        "output_gate",
        "d_rope",
        "d_conv",
        "shared_gate",
        "q_rank",
        "d_latent",
        "latent_norm",
        "router_input",
        "activation",
    ):
        values = {str(getattr(block, name)) for model in models for block in model.layers if hasattr(block, name)}
        assert len(values) > 1, name
