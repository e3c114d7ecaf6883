"""Fast ops compared with their references."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from explore.ops import (
    PATHS,
    activate,
    attention,
    causal_conv1d,
    delta_rule,
    experts,
    forced_paths,
    gated_group_rms_norm,
    l2_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rms_norm_before_gate,
    rotate,
    ssd,
    ssd_chunked,
    ssd_recurrent,
)
from explore.ops.loss import HeadGradients


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("path", ["transposed", "vectors"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 5), (33, 1), (0, 4)])
def test_few_rows_multiplied_as_the_transpose_give_the_same_values(
    shape: tuple[int, int], with_bias: bool, path: str
) -> None:
    x, weight, bias = (each.detach().float() for each in leaves((*shape, 6), (5, 6), (5,)))
    offset = bias if with_bias else None
    with torch.no_grad(), forced_paths(linear=path):
        found = linear(x, weight, offset)
    torch.testing.assert_close(found, F.linear(x, weight, offset), rtol=1e-5, atol=1e-5)
    assert found.shape == (*shape, 5)
    assert (found.stride(-1) != 1) == (shape in ((2, 1), (3, 5)))  # one row, many and none stay as they are


@pytest.mark.parametrize("seq", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("n_groups", [1, 2, 8])
@pytest.mark.parametrize("with_state", [False, True])
def test_the_chunked_form_equals_the_recurrence_with_all_gradients(seq: int, n_groups: int, with_state: bool) -> None:
    b, h, p, n = 2, 8, 4, 3
    X, dt, A, B, C, D, H = leaves(
        (b, seq, h, p), (b, seq, h), (h,), (b, seq, n_groups, n), (b, seq, n_groups, n), (h,), (b, h, p, n)
    )
    inputs = [X, dt, A, B, C, D, *([H] if with_state else [])]
    results = []
    for chunked in (False, True):
        args, before = (X, F.softplus(dt), -A.exp(), B, C, D), H if with_state else None
        y, state = ssd_chunked(*args, 64, before) if chunked else ssd_recurrent(*args, before)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        gradients = torch.autograd.grad((y * weight).sum() + state.square().sum(), inputs)
        results.append((y, state, *gradients))
    for truth, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-9, atol=1e-9)


def test_a_sequence_in_two_pieces_gives_the_same_as_in_one_piece() -> None:
    b, seq, h, p, g, n = 2, 50, 4, 3, 2, 5
    X, dt, A, B, C, D = leaves((b, seq, h, p), (b, seq, h), (h,), (b, seq, g, n), (b, seq, g, n), (h,))
    dt, A = F.softplus(dt), -A.exp()
    y, state = ssd(X, dt, A, B, C, D, 16)
    first, between = ssd(X[:, :21], dt[:, :21], A, B[:, :21], C[:, :21], D, 16)
    second, last = ssd(X[:, 21:], dt[:, 21:], A, B[:, 21:], C[:, 21:], D, 16, between)
    torch.testing.assert_close(torch.cat((first, second), dim=1), y)
    torch.testing.assert_close(last, state)


def test_strong_decay_and_long_chunks_stay_finite_in_fp32() -> None:
    X, dt, A, B, C, D = (
        x.float() for x in leaves((1, 256, 2, 4), (1, 256, 2), (2,), (1, 256, 1, 4), (1, 256, 1, 4), (2,))
    )
    args = (X, F.softplus(dt) + 5, -16 * A.exp(), B, C, D)
    fast, truth = ssd_chunked(*args, 256), ssd_recurrent(*args)
    torch.testing.assert_close(fast, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seq", [1, 3, 9])
@pytest.mark.parametrize("d_conv", [1, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_both_convolutions_are_the_sum_over_taps(seq: int, d_conv: int, with_bias: bool) -> None:
    x, weight, bias = leaves((2, seq, 5), (5, 1, d_conv), (5,))
    inputs = (x, weight, bias) if with_bias else (x, weight)
    truth = torch.stack(
        [
            with_bias * bias
            + sum(weight[:, 0, d_conv - 1 - back] * x[:, t - back] for back in range(min(d_conv, t + 1)))
            for t in range(seq)
        ],
        dim=1,
    )
    truths = (truth, *torch.autograd.grad(truth.square().sum(), inputs))
    for path in PATHS["conv"]:
        if path.compiled:
            continue
        with forced_paths(conv=path.name):
            y = causal_conv1d(x, weight, bias if with_bias else None)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
        for fast, slow in zip((y, *gradients), truths, strict=True):
            torch.testing.assert_close(fast, slow)


def test_the_gated_norm_gates_first_and_normalises_each_group_alone() -> None:
    x, z, weight = (leaf.detach().float() for leaf in leaves((2, 3, 12), (2, 3, 12), (12,)))
    truth = torch.empty_like(x)
    for b in range(2):
        for t in range(3):
            for start in (0, 4, 8):
                channels = [
                    float(x[b, t, c] * z[b, t, c] / (1 + torch.exp(-z[b, t, c]))) for c in range(start, start + 4)
                ]
                rms = (sum(c * c for c in channels) / 4 + 0.1) ** 0.5
                for c, channel in enumerate(channels, start=start):
                    truth[b, t, c] = weight[c] * channel / rms
    torch.testing.assert_close(gated_group_rms_norm(x, z, weight, 3, 0.1), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("seq", "before"), [(1, 0), (31, 0), (32, 0), (33, 0), (64, 0), (65, 0), (200, 0), (1, 63), (5, 60), (40, 30)]
)
def test_every_path_of_attention_equals_the_definition(
    window: int | None, n_kv_heads: int, seq: int, before: int
) -> None:
    context = before + seq
    q, k, v = leaves((2, 4, seq, 6), (2, n_kv_heads, context, 6), (2, n_kv_heads, context, 5))
    results = []
    for path in sorted(PATHS["attention"], key=lambda path: not path.reference):
        with forced_paths(attention=path.name):
            y = attention(q, k, v, window)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for truth, *fast in zip(*results, strict=True):
        for found in fast:
            torch.testing.assert_close(found, truth)


def test_a_query_averages_the_keys_in_its_window() -> None:
    q, k, v = leaves((1, 2, 7, 4), (1, 1, 7, 4), (1, 1, 7, 4))
    for path in PATHS["attention"]:
        with forced_paths(attention=path.name):
            y = attention(q, k, v, 3)
        for head in range(2):
            for t in range(7):
                seen = slice(max(0, t - 2), t + 1)
                weights = (k[0, 0, seen] @ q[0, head, t] / 2).exp()
                torch.testing.assert_close(y[0, head, t], (weights / weights.sum()) @ v[0, 0, seen])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [70, 1])
def test_every_path_of_attention_with_sinks_equals_the_definition(
    window: int | None, n_kv_heads: int, seq: int
) -> None:
    q, k, v, sinks = leaves((2, 4, seq, 6), (2, n_kv_heads, 75, 6), (2, n_kv_heads, 75, 5), (4,))
    results = []
    for path in ("written_out", "blocked", "sums"):
        with forced_paths(attention=path):
            y = attention(q, k, v, window, sinks)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v, sinks))))
    for truth, *fast in zip(*results, strict=True):
        for found in fast:
            torch.testing.assert_close(found, truth)


def test_a_sink_takes_softmax_weight_and_adds_no_value() -> None:
    q, k, v, sinks = leaves((1, 2, 5, 4), (1, 1, 5, 4), (1, 1, 5, 4), (2,))
    for path in PATHS["attention"]:
        with forced_paths(attention=path.name):
            y = attention(q, k, v, None, sinks)
        for head in range(2):
            for t in range(5):
                weights = (k[0, 0, : t + 1] @ q[0, head, t] / 2).exp()
                truth = weights @ v[0, 0, : t + 1] / (weights.sum() + sinks[head].exp())
                torch.testing.assert_close(y[0, head, t], truth)


def test_the_clamped_swiglu_is_its_formula() -> None:
    up, gate = torch.tensor([-9.0, 0.5, 9.0]), torch.tensor([-9.0, 0.5, 9.0])
    truth = [g / (1 + math.exp(-1.702 * g)) * (u + 1) for g, u in ((-9.0, -7.0), (0.5, 0.5), (7.0, 7.0))]
    torch.testing.assert_close(activate(up, gate, "swiglu_clamped"), torch.tensor(truth))


def test_a_rotation_with_a_later_start_equals_the_end_of_a_longer_one() -> None:
    (x,) = leaves((1, 2, 9, 6))
    torch.testing.assert_close(rotate(x[:, :, 4:], 100.0, 4), rotate(x, 100.0)[:, :, 4:])


def test_rotation_keeps_lengths_and_the_first_position() -> None:
    (x,) = leaves((2, 3, 12, 8))
    y = rotate(x, 10_000.0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(
        torch.ones(12, 4, dtype=torch.float64),
        torch.outer(torch.arange(12.0), 10_000.0 ** (-torch.arange(4) / 4)).double(),
    )
    torch.testing.assert_close(y, torch.cat((pairs.real, pairs.imag), dim=-1), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize(("n_tokens", "padded"), [(1, False), (2, True), (40, True), (41, False)])
def test_in_fp32_only_the_few_tokens_of_decoding_are_padded(
    monkeypatch: pytest.MonkeyPatch, n_tokens: int, padded: bool
) -> None:
    x, up, down, weights = (leaf.float() for leaf in leaves((n_tokens, 4), (5, 4, 6), (5, 6, 4), (n_tokens, 2)))
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(n_tokens)])

    def result() -> torch.Tensor:
        return experts(x, chosen, weights, up, None, down, "relu2")

    with forced_paths(experts="loop"):
        looped = result()
    loops: list[int] = []
    module = importlib.import_module("explore.ops.experts")
    loop = module._loop
    monkeypatch.setattr(module, "_loop", lambda x, *rest: (loops.append(len(x)), loop(x, *rest))[1])
    with torch.no_grad():
        torch.testing.assert_close(result(), looped.detach(), rtol=1e-5, atol=1e-6)
    assert loops == ([] if padded else [n_tokens])
    result()
    assert loops[-1] == n_tokens  # with gradients


def test_padded_experts_have_few_sizes_for_many_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    n_tokens, n_experts = 512, 4
    x, up, down, weights = (
        leaf.detach().bfloat16() for leaf in leaves((n_tokens, 4), (4, 4, 6), (4, 6, 4), (n_tokens, 2))
    )
    module = importlib.import_module("explore.ops.experts")
    run, sizes, busiest = module._run, [], []
    monkeypatch.setattr(module, "_run", lambda mlp, rows: (sizes.append(rows.shape[1]), run(mlp, rows))[1])
    for _ in range(20):
        chosen = torch.stack([torch.randperm(n_experts)[:2] for _ in range(n_tokens)])
        busiest.append(int(chosen.flatten().bincount().max()))
        experts(x, chosen, weights, up, None, down, "relu2")
    assert len(set(sizes)) < len(set(busiest))
    mean = 2 * n_tokens // n_experts
    assert all(load <= size < load + mean / 8 for load, size in zip(busiest, sizes, strict=True))


@pytest.mark.parametrize("n_groups", [1, 3])
def test_gradients_of_the_gated_norm_equal_autograd(n_groups: int) -> None:
    inputs = tuple(leaf.detach().float().requires_grad_() for leaf in leaves((2, 5, 12), (2, 5, 12), (12,)))
    dy = torch.randn(2, 5, 12)

    def results() -> tuple[torch.Tensor, ...]:
        y = gated_group_rms_norm(*inputs, n_groups, 0.1)
        return y, *torch.autograd.grad(y, inputs, dy)

    found = results()
    with forced_paths(gated_norm="eager"):
        for a, b in zip(found, results(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 12), (7, 33)])
def test_gradients_of_the_norm_equal_autograd(shape: tuple[int, ...], offset: float) -> None:
    x, weight, dy = leaves(shape, shape[-1:], shape)
    inputs = (x.detach() + offset).requires_grad_(), weight

    def results(*inputs: Tensor) -> tuple[Tensor, ...]:
        y = rms_norm(*inputs, 0.1)
        return y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))

    found, single = results(*inputs), results(*(leaf.detach().float().requires_grad_() for leaf in inputs))
    with forced_paths(norm="eager"):
        for exact, ours, rounded in zip(results(*inputs), found, single, strict=True):
            torch.testing.assert_close(ours, exact)
            torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_norm_accepts_any_layout_and_keeps_the_dtype() -> None:
    x, weight = leaves((2, 3, 5, 8), (8,))
    turned = x.detach().transpose(1, 2).requires_grad_()
    y = rms_norm(turned, weight, 0.1)
    assert torch.equal(y, rms_norm(turned.detach().contiguous(), weight, 0.1))
    (found,) = torch.autograd.grad(y, turned, y.detach())
    (expected,) = torch.autograd.grad(rms_norm(x, weight, 0.1), x, y.detach().transpose(1, 2))
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert rms_norm(x.to(torch.bfloat16), weight.float(), 0.1).dtype == torch.bfloat16


def test_unit_length_is_the_root_of_the_sum_of_squares_and_eps() -> None:
    (x,) = leaves((2, 3, 7))
    truth = 0.4 * x / (x.square().sum(-1, keepdim=True) + 0.1).sqrt()
    found = l2_norm(x, 0.1, 0.4)
    torch.testing.assert_close(found, truth)
    dy = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(found, x, dy), torch.autograd.grad(truth, x, dy))
    half = x.detach().bfloat16()
    torch.testing.assert_close(l2_norm(half, 0.1), l2_norm(half.float(), 0.1).bfloat16(), rtol=0, atol=0)
    assert not l2_norm(torch.zeros(2, 7), 1e-6).any()


def test_the_norm_before_the_gate_normalises_and_then_gates() -> None:
    x, z, weight = leaves((2, 3, 4, 7), (2, 3, 4, 7), (7,))
    truth = weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * z * z.sigmoid()
    found, dy = rms_norm_before_gate(x, z, weight, 0.1), torch.randn_like(x)
    torch.testing.assert_close(found, truth)
    for one, other in zip(*(torch.autograd.grad(y, (x, z, weight), dy) for y in (found, truth)), strict=True):
        torch.testing.assert_close(one, other)
    assert rms_norm_before_gate(x.bfloat16(), z.bfloat16(), weight.float(), 0.1).dtype == torch.bfloat16


def test_squared_relu_of_every_number_in_bf16_is_that_of_torch() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert every.isnan().sum() == 254
    torch.testing.assert_close(activate(every, None, "relu2"), F.relu(every).square(), rtol=0, atol=0, equal_nan=True)


def test_squared_relu_and_its_gradient() -> None:
    (x,) = leaves((50,))
    y = activate(x, None, "relu2")
    torch.testing.assert_close(y, F.relu(x).square())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(F.relu(x).square().sum(), x)[0])


def _scan(X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return ssd(X, F.softplus(dt), -A.exp(), B, C, D, 64)[0]


def _delta(Q: Tensor, K: Tensor, V: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return delta_rule(F.normalize(Q, dim=-1), F.normalize(K, dim=-1), V, F.logsigmoid(alpha), beta.sigmoid(), 64)[0]


CHOSEN = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i))[:2] for i in range(40)])
HALF: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "attention": (attention, ((2, 4, 100, 8), (2, 2, 100, 8), (2, 2, 100, 8)), (0, 1, 2)),
    "conv": (causal_conv1d, ((2, 50, 12), (12, 1, 4), (12,)), (0,)),
    "delta rule": (_delta, ((2, 130, 2, 8),) * 2 + ((2, 130, 4, 8), (2, 130, 4), (2, 130, 4)), (0, 1, 2)),
    "experts": (
        lambda x, up, down: experts(x, CHOSEN, torch.full((40, 2), 0.5), up, None, down, "relu2"),
        ((40, 16), (5, 16, 24), (5, 24, 16)),
        (),
    ),
    "loss": (lambda hidden, weight: linear_cross_entropy(hidden, weight, CHOSEN[:, 0]), ((40, 16), (30, 16)), ()),
    "norm": (lambda x, z, w: gated_group_rms_norm(x, z, w, 2, 1e-5), ((2, 30, 16), (2, 30, 16), (16,)), (0, 1)),
    "plain norm": (lambda x, w: rms_norm(x, w, 1e-5), ((2, 30, 16), (16,)), (0,)),
    "scan": (_scan, ((2, 130, 4, 8), (2, 130, 4), (4,), (2, 130, 2, 8), (2, 130, 2, 8), (4,)), (0, 3, 4)),
}
"""Ops with a backward pass of their own, the shapes of what they read, and which of it arrives in bf16."""


@pytest.mark.parametrize("name", HALF)
def test_gradients_in_mixed_precision_equal_those_in_double_up_to_rounding(name: str) -> None:
    op, shapes, half = HALF[name]
    exact = leaves(*shapes)
    mixed = [x.detach().to(torch.bfloat16 if i in half else torch.float32) for i, x in enumerate(exact)]
    mixed = [x.requires_grad_() for x in mixed]
    truth = op(*exact)
    weight = torch.linspace(-1, 3, truth.numel(), dtype=torch.float64).view_as(truth)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*mixed)
    gradients = torch.autograd.grad((found.double() * weight).sum(), mixed)
    for ours, double in zip(gradients, torch.autograd.grad((truth * weight).sum(), exact), strict=True):
        assert float((ours.double() - double).norm() / double.norm()) < 0.02


def test_an_invalid_target_is_refused_and_ignored_rows_may_hold_anything() -> None:
    hidden, weight = leaves((4, 4), (5, 4))
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1, -1, 2]))
    targets = torch.tensor([0, 1, -100, 2])
    loss = linear_cross_entropy(hidden, weight, targets)
    broken = hidden.detach().clone()
    broken[2] = math.nan
    torch.testing.assert_close(linear_cross_entropy(broken.requires_grad_(), weight, targets), loss)


def test_loss_without_logits_is_the_cross_entropy_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.ops.loss.MAX_LOGITS", 3 * 11)
    monkeypatch.setattr("explore.ops.loss.MIN_ROWS", 1)
    hidden, weight = leaves((8, 4), (11, 4))
    targets = torch.tensor([0, 3, -100, 10, 5, -100, 2, 1])
    sliced = linear_cross_entropy(hidden, weight, targets)
    whole = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    torch.testing.assert_close(sliced, whole)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (sliced, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ignored_tokens_get_no_logits_if_there_are_several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(HeadGradients):
        def add(self, rows: slice, dlogits: torch.Tensor) -> None:
            made.append(len(dlogits))
            super().add(rows, dlogits)

    monkeypatch.setattr("explore.ops.loss.HeadGradients", Counted)
    monkeypatch.setattr("explore.ops.loss.MIN_ROWS", 1)
    hidden, weight = leaves((8, 4), (11, 4))
    targets = torch.tensor([0, 3, -100, 10, 5, -100, 2, 1])
    for rows, slices in ((8, [8]), (4, [4, 2])):
        made.clear()
        monkeypatch.setattr("explore.ops.loss.MAX_LOGITS", rows * 11)
        linear_cross_entropy(hidden, weight, targets)
        assert made == slices


def test_ignored_targets_alone_give_zero_loss() -> None:
    hidden, weight = leaves((3, 4), (5, 4))
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), -100))
    assert float(loss.detach()) == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_triton_kernels_give_the_same_as_the_defaults() -> None:
    X, B, C = (x.float() for x in leaves((1, 9, 2, 3), (1, 9, 1, 4), (1, 9, 1, 4)))
    dt, A, D = torch.rand(1, 9, 2), -torch.rand(2), torch.rand(2)
    x, up, down, weights, hidden, head = (
        x.float() for x in leaves((7, 4), (3, 4, 5), (3, 5, 4), (7, 2), (5, 4), (11, 4))
    )
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(7)])
    targets = torch.tensor([0, 3, -100, 10, 5])

    def results() -> tuple[torch.Tensor, ...]:
        Y, state = ssd(X, dt, A, B, C, D, chunk_size=4)
        y = experts(x, chosen, weights, up, None, down, "relu2")
        return Y, state, y, linear_cross_entropy(hidden, head, targets)

    usual = results()
    with forced_paths(ssd="triton", experts="triton", loss="triton"):
        for a, b in zip(results(), usual, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
