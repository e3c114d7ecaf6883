"""Fast ops against their truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from explore.ops import (
    attention,
    causal_conv1d,
    experts,
    forced_paths,
    linear_cross_entropy,
    rotate,
    ssd_chunked,
    ssd_recurrent,
)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("seq", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("n_groups", [1, 2, 8])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunks_compute_the_recurrence_and_all_its_gradients(seq: int, n_groups: int, with_state: bool) -> None:
    b, h, p, n = 2, 8, 4, 3
    X, dt, A, B, C, D, H = leaves(
        (b, seq, h, p), (b, seq, h), (h,), (b, seq, n_groups, n), (b, seq, n_groups, n), (h,), (b, h, p, n)
    )
    inputs = [X, dt, A, B, C, D, *([H] if with_state else [])]
    results = []
    for function in (ssd_recurrent, lambda *args: ssd_chunked(*args[:6], 64, *args[6:])):
        args = (X, F.softplus(dt), -A.exp(), B, C, D, *([H] if with_state else []))
        y, state = function(*args)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        gradients = torch.autograd.grad((y * weight).sum() + state.square().sum(), inputs)
        results.append((y, state, *gradients))
    for truth, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-9, atol=1e-9)


def test_shifted_products_are_the_convolution() -> None:
    x, weight, bias = leaves((2, 9, 5), (5, 1, 4), (5,))
    shifted = causal_conv1d(x, weight, bias)
    with forced_paths(conv="conv1d"):
        torch.testing.assert_close(shifted, causal_conv1d(x, weight, bias))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention_is_what_is_written_out(window: int | None) -> None:
    q, k, v = leaves((2, 4, 7, 6), (2, 2, 7, 6), (2, 2, 7, 6))
    results = []
    for path in ("sdpa", "written_out"):
        with forced_paths(attention=path):
            y = attention(q, k, v, window)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth)


def test_rotated_products_depend_on_relative_positions_alone() -> None:
    q, k = (x.expand(1, 1, 12, 8) for x in leaves((1, 1, 1, 8), (1, 1, 1, 8)))
    scores = (rotate(q, 10_000.0) @ rotate(k, 10_000.0).transpose(-1, -2))[0, 0]
    for offset in range(-11, 12):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_routed_experts_are_a_weighted_sum_over_all_experts(activation: str) -> None:
    x, up, gate, down, weights = leaves((10, 4), (5, 4, 6), (5, 4, 6), (5, 6, 4), (10, 2))
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(10)])  # the last expert gets nothing
    gated = gate if activation == "swiglu" else None
    y = experts(x, chosen, weights, up, gated, down, activation)  # type: ignore[arg-type]
    hidden = torch.einsum("td,edf->tef", x, up)
    hidden = F.relu(hidden) ** 2 if gated is None else F.silu(torch.einsum("td,edf->tef", x, gate)) * hidden
    every = torch.einsum("tef,efd->ted", hidden, down)
    dense = torch.zeros(10, 5, dtype=x.dtype).scatter_add(1, chosen, weights)
    torch.testing.assert_close(y, torch.einsum("te,ted->td", dense, every))


def test_loss_without_logits_is_the_cross_entropy_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.ops.loss.MAX_LOGITS", 3 * 11)
    hidden, weight = leaves((8, 4), (11, 4))
    targets = torch.tensor([0, 3, -100, 10, 5, -100, 2, 1])
    sliced = linear_cross_entropy(hidden, weight, targets)
    whole = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    torch.testing.assert_close(sliced, whole)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (sliced, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
