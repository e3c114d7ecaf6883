"""The gated delta rule: the chunked form compared with the recurrence in float64, and both with transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from explore.ops import delta_rule, delta_rule_chunked, delta_rule_recurrent, forced_paths, l2_norm
from explore.ops.delta_rule import backward_extra_flops, chunked_flops, step_flops
from explore.proof import count_flops


class Inputs(NamedTuple):
    Q: Tensor
    K: Tensor
    V: Tensor
    log_alpha: Tensor
    beta: Tensor
    state: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.detach().to(dtype).requires_grad_() for x in self))

    def between(self, start: int, end: int) -> tuple[Tensor, ...]:
        return tuple(x[:, start:end] for x in self[:-1])


def inputs(seq: int, *, b: int = 2, g: int = 2, h: int = 4, k: int = 5, v: int = 3) -> Inputs:
    """Random inputs in float64, with keys and queries of unit length."""
    torch.manual_seed(0)
    Q, K, V, state = (
        torch.randn(shape, dtype=torch.float64) for shape in ((b, seq, g, k),) * 2 + ((b, seq, h, v), (b, h, v, k))
    )
    log_alpha, beta = -torch.rand(b, seq, h, dtype=torch.float64), torch.rand(b, seq, h, dtype=torch.float64)
    return Inputs(F.normalize(Q, dim=-1), F.normalize(K, dim=-1), V, log_alpha, beta, state).to(torch.float64)


Rule = Callable[[Inputs], tuple[Tensor, Tensor]]


def results(rule: Rule, given: Inputs, wanted: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """Outputs, last state, and gradients of a scalar that depends on both unevenly."""
    Y, S = rule(given)
    weight = torch.linspace(-1, 1, Y.numel(), dtype=Y.dtype).view_as(Y)
    return (Y, S, *torch.autograd.grad((Y * weight).sum() + S.square().sum(), wanted or given))


def chunked(chunk_size: int) -> Rule:
    return lambda x: delta_rule_chunked(*x[:-1], chunk_size, x.state)


def recurrent(x: Inputs) -> tuple[Tensor, Tensor]:
    return delta_rule_recurrent(*x)


def assert_equal(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def test_the_recurrence_equals_the_equation_of_the_paper() -> None:
    x = inputs(9)
    Y, S = torch.empty_like(x.V), x.state.detach().clone()
    for batch in range(2):
        for head in range(4):
            M = S[batch, head].clone()
            for t in range(9):
                key, query = x.K[batch, t, head // 2], x.Q[batch, t, head // 2]
                alpha, beta = x.log_alpha[batch, t, head].exp(), x.beta[batch, t, head]
                M = alpha * M @ (torch.eye(5, dtype=torch.float64) - beta * torch.outer(key, key))
                M = M + beta * torch.outer(x.V[batch, t, head], key)
                Y[batch, t, head] = M @ query
            S[batch, head] = M
    assert_equal(recurrent(x), (Y, S), 1e-12)


@pytest.mark.parametrize("seq", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 256])
@pytest.mark.parametrize(("g", "h"), [(1, 1), (2, 4), (3, 3)])
def test_the_chunked_form_equals_the_recurrence_with_all_gradients(seq: int, chunk_size: int, g: int, h: int) -> None:
    x = inputs(seq, g=g, h=h)
    assert_equal(results(chunked(chunk_size), x), results(recurrent, x), 1e-9)


@pytest.mark.parametrize("path", ["recurrent", "chunked"])
def test_an_absent_state_equals_a_zero_state(path: str) -> None:
    x = inputs(70)
    zero = x._replace(state=torch.zeros_like(x.state))
    with forced_paths(delta_rule=path):
        absent = results(lambda x: delta_rule(*x[:-1], 16), x, x[:-1])
        given = results(lambda x: delta_rule(*x[:-1], 16, x.state), zero, zero[:-1])
    assert_equal(absent, given, 1e-12)


@pytest.mark.parametrize("cuts", [(21,), (1, 64), (16, 17, 18)])
def test_a_sequence_in_pieces_gives_the_same_as_in_one_piece(cuts: tuple[int, ...]) -> None:
    x = inputs(80)

    def in_pieces(x: Inputs) -> tuple[Tensor, Tensor]:
        outputs, state = [], x.state
        for start, end in zip((0, *cuts), (*cuts, 80), strict=True):
            Y, state = delta_rule(*x.between(start, end), 16, state)
            outputs.append(Y)
        return torch.cat(outputs, dim=1), state

    assert_equal(results(in_pieces, x), results(chunked(16), x), 1e-9)


def test_a_step_is_one_position_of_the_recurrence_and_may_overwrite_the_state() -> None:
    x = inputs(1)
    truth = results(recurrent, x)
    assert_equal(results(lambda x: delta_rule(*x[:-1], 64, x.state), x), truth, 1e-12)
    state = x.state.detach().clone()
    with torch.no_grad():
        Y, S = delta_rule(*x[:-1], 64, state, in_place=True)
    assert_equal((Y, S), truth[:2], 1e-12)
    assert S.data_ptr() == state.data_ptr()


def test_a_step_takes_inputs_in_any_layout() -> None:
    x = inputs(1)
    turned = (M.transpose(0, -1).contiguous().transpose(0, -1) for M in x)  # the batch lies innermost
    assert_equal(delta_rule(*x[:-1], 64, x.state), delta_rule(*list(turned)[:-1], 64, x.state), 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("keys", ["identical", "similar", "random"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_ill_conditioned_keys_and_decays_are_accurate_in_fp32(keys: str, alpha: float, beta: float) -> None:
    """With equal keys, beta 1 and no decay, powers of the triangle grow to 1e18, but its inverse stays below 2."""
    x = inputs(200, k=8)
    spread = {"identical": 0.0, "similar": 0.01, "random": 1.0}[keys]
    K = F.normalize(x.K[:, :1] + spread * x.K, dim=-1)
    log_alpha = torch.full_like(x.log_alpha, -200.0 if alpha == 0 else torch.tensor(alpha).log().item())
    exact = x._replace(K=K, log_alpha=log_alpha, beta=torch.full_like(x.beta, beta)).to(torch.float64)
    truth, found = results(recurrent, exact), results(chunked(64), exact.to(torch.float32))
    for one, other in zip(found, truth, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


def test_decays_of_very_different_strength_in_one_chunk_stay_finite() -> None:
    """In fp32 the precision of a sum of logarithms depends on its size: thousands here, so about 1e-4."""
    x = inputs(200)
    log_alpha = torch.where(torch.arange(200)[:, None] % 7 == 3, -300.0, -1e-3).expand_as(x.log_alpha)
    exact = x._replace(log_alpha=log_alpha.double()).to(torch.float64)
    assert_equal(results(chunked(64), exact.to(torch.float32)), results(recurrent, exact), 5e-3)


def test_under_autocast_the_state_is_fp32_and_results_are_near_the_reference() -> None:
    x = inputs(200, k=16, v=16)
    truth = results(recurrent, x)
    low = Inputs(*(y.detach().bfloat16() for y in x[:3]), *(y.detach().float() for y in x[3:]))
    with torch.autocast("cpu", torch.bfloat16):
        Y, S = delta_rule_chunked(*low[:-1], 64, low.state)
        Y_step, S_step = delta_rule(*low.between(0, 1), 64, low.state)
    assert (Y.dtype, S.dtype) == (Y_step.dtype, S_step.dtype) == (torch.bfloat16, torch.float32)
    for one, other in ((Y, truth[0]), (S, truth[1]), (Y_step, truth[0][:, :1])):
        assert (one.double() - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize(("seq", "chunk_size"), [(1, 64), (63, 64), (64, 64), (65, 64), (200, 64), (200, 48)])
def test_products_are_counted_as_they_run_forward_and_backward(seq: int, chunk_size: int) -> None:
    x = inputs(seq, b=1, g=2, h=6, k=5, v=7).to(torch.float32)
    forward = sum(chunked_flops(seq, 6, 2, 5, 7, chunk_size).values())
    extra = backward_extra_flops(seq, 6, 5, 7, chunk_size)
    assert count_flops(lambda: chunked(chunk_size)(x)) == forward
    assert count_flops(lambda: sum(y.sum() for y in chunked(chunk_size)(x)).backward()) == 3 * forward + extra


def test_the_products_of_a_step_are_counted_as_they_run() -> None:
    x = inputs(1, b=1, g=2, h=6, k=5, v=7)
    step = step_flops(6, 5, 7)
    assert count_flops(lambda: delta_rule(*x[:-1], 64, x.state)) == sum(step.values())
    assert step.keys() <= chunked_flops(1, 6, 2, 5, 7, 64).keys()


@pytest.mark.parametrize("seq", [1, 64, 150])
@pytest.mark.parametrize("rule", ["chunk", "recurrent"])
def test_transformers_computes_the_same(seq: int, rule: str) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = getattr(modeling, f"torch_{rule}_gated_delta_rule")
    x = inputs(seq, k=16, v=8).to(torch.float32)
    raw = x._replace(Q=3 * x.Q, K=3 * x.K).to(torch.float32)  # both normalise keys and queries themselves

    def peer(x: Inputs) -> tuple[Tensor, Tensor]:
        Y, S = theirs(*x[:-1], initial_state=x.state.mT, output_final_state=True, use_qk_l2norm_in_kernel=True)
        return Y, S.mT

    def ours(x: Inputs) -> tuple[Tensor, Tensor]:
        Q, K = l2_norm(x.Q, 1e-6, x.Q.shape[-1] ** -0.5), l2_norm(x.K, 1e-6)
        return delta_rule_chunked(Q, K, x.V, x.log_alpha, x.beta, 64, x.state)

    assert_equal(results(ours, raw), results(peer, raw), 1e-5)
