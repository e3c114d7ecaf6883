"""The C++ convolution, norms and scan compared with their definitions in float64; benches of all C++ kernels."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.causal_attention import bench as attention_bench
from explore.kernels.causal_conv import bench as conv_bench
from explore.kernels.causal_conv import causal_conv
from explore.kernels.cpp import computes, timing
from explore.kernels.grouped_experts import bench as experts_bench
from explore.kernels.grouped_experts import grouped_experts
from explore.kernels.rms_norm import bench as norm_bench
from explore.kernels.rms_norm import rms_norm
from explore.kernels.row_cross_entropy import bench as loss_bench
from explore.kernels.row_cross_entropy import row_cross_entropy
from explore.kernels.ssd_chunks import bench as ssd_bench
from explore.kernels.ssd_chunks import ssd_chunks
from explore.ops import forced_paths, paths_in_use
from explore.ops.ssd import ssd_recurrent

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
"""Largest norm of a difference over the norm of the exact tensor."""
EPS = 1e-5
by_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_exact(
    kernel: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Compares outputs and the gradients of all inputs, with the same random weights in the loss."""
    if not computes(inputs[0]):
        pytest.skip("this CPU has no bf16 instructions")

    def results(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        random = torch.Generator().manual_seed(1)
        loss = sum((y.double() * torch.randn(y.shape, generator=random)).sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    found = results(kernel, [x.detach().requires_grad_() for x in inputs])
    exact = results(definition, [x.detach().double().requires_grad_() for x in inputs])
    for i, (ours, truth) in enumerate(zip(found, exact, strict=True)):
        assert (ours.double() - truth).norm() <= TOLERANCES[dtype] * truth.norm() + 1e-9, i


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


# The convolution


@by_dtype
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 130, 40, 4), (1, 2, 7, 4), (1, 64, 16, 1), (1, 65, 33, 3), (2, 1, 5, 2)])
def test_the_convolution_and_its_gradients_equal_the_definition(
    shape: tuple[int, int, int, int], with_bias: bool, silu: bool, dtype: torch.dtype
) -> None:
    b, seq, c, k = shape

    def definition(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.conv1d(F.pad(x.transpose(1, 2), (k - 1, 0)), weight, bias, groups=c).transpose(1, 2)
        return F.silu(y) if silu else y

    x = normal(b, seq, c + 3, dtype=dtype)[..., 3:]  # as a part of the projection
    inputs = [x, normal(c, 1, k), *([normal(c)] if with_bias else [])]
    assert_exact(lambda x, weight, bias=None: causal_conv(x, weight, bias, silu), definition, inputs, dtype)


def test_a_convolution_over_more_positions_than_the_kernel_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^x must be .* at most 4 taps; got torch\.float32 on cpu, 5 taps$"):
        causal_conv(normal(1, 9, 4), normal(4, 1, 5), None)


# Norms


@by_dtype
@pytest.mark.parametrize("n_groups", [1, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(2, 70, 48), (3, 20), (1, 200, 64), (1, 1, 12)])
def test_norms_and_their_gradients_equal_the_definition(
    shape: tuple[int, ...], gated: bool, n_groups: int, dtype: torch.dtype
) -> None:
    def definition(x: Tensor, weight: Tensor, z: Tensor | None = None) -> Tensor:
        u = (x if z is None else x * F.silu(z)).unflatten(-1, (n_groups, -1))
        return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS)).flatten(-2) * weight

    c = shape[-1]
    z = normal(*shape[:-1], c + 3, dtype=dtype)[..., :c]  # as a part of the projection
    inputs = [normal(*shape, dtype=dtype), normal(c), *([z] if gated else [])]
    assert_exact(lambda x, weight, z=None: rms_norm(x, weight, EPS, z, n_groups), definition, inputs, dtype)


# The scan


@by_dtype
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("b", "seq", "g", "r", "p", "n", "q"),
    [
        (2, 64, 1, 2, 8, 16, 16),
        (1, 70, 2, 3, 32, 64, 64),
        (2, 10, 1, 1, 4, 6, 16),
        (1, 50, 1, 2, 16, 18, 40),
        (1, 33, 2, 1, 20, 10, 32),
        (1, 1, 1, 2, 4, 4, 8),
    ],
)
def test_the_scan_and_its_gradients_equal_the_recurrence(
    b: int, seq: int, g: int, r: int, p: int, n: int, q: int, with_state: bool, dtype: torch.dtype
) -> None:
    h = g * r
    inputs = [
        normal(b, seq, h * p + 5, dtype=dtype)[..., 5:].unflatten(-1, (h, p)),  # as a part of the convolution's output
        F.softplus(normal(b, seq, h, seed=1) - 2),
        -normal(h, seed=2).abs() - 0.1,
        normal(b, seq, g, n, dtype=dtype, seed=3),
        normal(b, seq, g, n, dtype=dtype, seed=4),
        normal(h, seed=5),
        *([normal(b, h, p, n, seed=6)] if with_state else []),
    ]

    def kernel(X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None) -> Any:
        return ssd_chunks(X, dt, A, B, C, D, q, state)

    assert_exact(kernel, ssd_recurrent, inputs, dtype)


def test_the_scan_needs_gradients_of_one_output_only() -> None:
    X, dt, A, B, C, D = ssd_bench.inputs((1, 32, 1, 2, 8, 8, 16), torch.float32)
    both = ssd_chunks(X, dt, A, B, C, D, 16)
    for output in both:
        alone = ssd_chunks(X, dt, A, B, C, D, 16)[0 if output is both[0] else 1]
        (dX,) = torch.autograd.grad(alone.sum(), X)
        zero = both[1 if output is both[0] else 0].sum() * 0
        (expected,) = torch.autograd.grad(output.sum() + zero, X, retain_graph=True)
        torch.testing.assert_close(dX, expected)


# Experts


@by_dtype
@pytest.mark.parametrize(
    ("t", "k", "e", "d", "f"), [(40, 2, 4, 8, 16), (300, 3, 7, 48, 40), (5, 1, 3, 4, 6), (400, 2, 2, 20, 10)]
)
def test_experts_and_their_gradients_equal_the_definition(
    t: int, k: int, e: int, d: int, f: int, dtype: torch.dtype
) -> None:
    """All tokens of the first experts together are more than a block; some experts have none."""
    chosen = normal(t, e).add(torch.arange(e) < 2).topk(k).indices

    def definition(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        of_all = torch.einsum("etf,efd->etd", torch.einsum("td,edf->etf", x, up).relu().square(), down)
        return (of_all[chosen, torch.arange(t)[:, None]] * weights[..., None]).sum(1)

    inputs = [normal(t, d, dtype=dtype), normal(t, k).abs(), normal(e, d, f, dtype=dtype), normal(e, f, d, dtype=dtype)]
    assert_exact(lambda x, weights, up, down: grouped_experts(x, chosen, weights, up, down), definition, inputs, dtype)


# The loss


@by_dtype
@pytest.mark.parametrize("shape", [(5, 3), (70, 100), (2, 16), (1, 1), (0, 9)])
def test_losses_and_the_gradient_of_logits_equal_torchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if not computes(torch.empty(0, dtype=dtype)):
        pytest.skip("this CPU has no bf16 instructions")
    logits = (30 * normal(*shape)).to(dtype)
    targets = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(0))
    targets[1:2] = -100
    exact = logits.double().requires_grad_()
    truth = F.cross_entropy(exact, targets, reduction="none")
    losses = row_cross_entropy(logits, targets, -100)
    torch.testing.assert_close(losses.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    if len(logits):
        (gradient,) = torch.autograd.grad(truth.sum(), exact)
        assert (logits.double() - gradient).norm() <= TOLERANCES[dtype] * gradient.norm() + 1e-6


# All


def test_strong_decay_gives_finite_gradients() -> None:
    X, _, _, B, C, D = ssd_bench.inputs((1, 64, 1, 2, 8, 8, 32), torch.float32)
    dt = torch.full((1, 64, 2), 50.0, requires_grad=True)
    A = torch.full((2,), -20.0, requires_grad=True)
    Y, _ = ssd_chunks(X, dt, A, B, C, D, 32)
    assert all(torch.isfinite(x).all() for x in (Y, *torch.autograd.grad(Y.sum(), (X, dt, A, B, C, D))))


@pytest.mark.parametrize(
    "bench", [conv_bench, experts_bench, norm_bench, ssd_bench], ids=lambda bench: bench.__name__.split(".")[-2]
)
def test_the_number_of_threads_changes_no_bit(bench: Any) -> None:
    shape = {
        conv_bench: (4, 100, 16, 4),
        experts_bench: (300, 2, 5, 8, 12),
        loss_bench: (50, 33),
        norm_bench: (200, 16, "gated"),
        ssd_bench: (2, 40, 2, 4, 8, 8, 16),
    }[bench]
    tensors = bench.inputs(shape, torch.float32)
    call = bench.kernel if bench is not ssd_bench else lambda *tensors: ssd_bench.kernel(*tensors, q=16)
    n_threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(timing.results(call, tensors))
    finally:
        torch.set_num_threads(n_threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: causal_conv(x, normal(4, 1, 2), None),
        lambda x: rms_norm(x, normal(4), EPS),
        lambda x: grouped_experts(x[0], torch.zeros(3, 1).long(), x[0, :, :1], normal(1, 4, 2), normal(1, 2, 4)),
        lambda x: row_cross_entropy(x[0], torch.zeros(3).long(), -100),
        lambda x: ssd_chunks(x[..., None, :], x[..., :1], normal(1), x[..., None, :], x[..., None, :], normal(1), 2),
    ],
    ids=["conv", "norm", "experts", "loss", "ssd"],
)
def test_other_dtypes_are_refused_by_name(call: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"must be .*on a CPU, .* got torch\.float64.* on cpu"):
        call(normal(1, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("bench", "shape"),
    [
        (attention_bench, (1, 64, 2, 1, 8)),
        (conv_bench, (1, 64, 8, 4)),
        (experts_bench, (64, 2, 4, 8, 8)),
        (loss_bench, (16, 9)),
        (norm_bench, (64, 8, "gated")),
        (ssd_bench, (1, 64, 1, 2, 8, 8, 16)),
    ],
    ids=["attention", "conv", "experts", "loss", "norm", "ssd"],
)
def test_a_bench_prints_a_line_for_each_way(
    bench: Any, shape: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SHAPES", (shape,))
    monkeypatch.setattr(timing, "REPEATS", 1)
    n_threads = torch.get_num_threads()
    try:
        assert bench.main(["--threads", "1"]) == 0
    finally:
        torch.set_num_threads(n_threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-5] for line in lines[2:4]] == ["kernel", "torch"]


def test_ops_in_dtypes_without_a_kernel_run_uncompiled() -> None:
    from explore.ops import causal_conv1d, gated_group_rms_norm, ssd
    from explore.ops import rms_norm as norm_op

    x, scale = normal(1, 5, 4, dtype=torch.float64), normal(4, dtype=torch.float64)
    X = x.unflatten(-1, (2, 2))

    def outputs() -> list[Tensor]:
        return [
            causal_conv1d(x, normal(4, 1, 2, dtype=torch.float64), None, silu=True),
            norm_op(x.requires_grad_(), scale, EPS),
            gated_group_rms_norm(x, x, scale, 2, EPS),
            ssd(X, X[..., 0].abs(), -scale[:2].abs(), X[:, :, :1], X[:, :, :1], scale[:2], 2)[0],
        ]

    plain = outputs()
    with forced_paths(**dict.fromkeys(("conv", "norm", "gated_norm", "ssd"), "compiled")):
        assert paths_in_use()["conv"] == "compiled"
        for found, expected in zip(outputs(), plain, strict=True):
            assert torch.equal(found, expected)
