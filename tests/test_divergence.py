"""The divergence from a teacher compared with its definition in float64, with its gradients and its memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from explore.ops import forced_paths, linear_kl

PATHS = ("sliced", "whole")


def draw(tokens: int, vocab_size: int, d_model: int, d_teacher: int, scale: float = 1.0) -> list[Tensor]:
    """Hidden states and heads of both models, and targets of which every third is ignored."""
    torch.manual_seed(0)
    shapes = ((tokens, d_model), (vocab_size, d_model), (tokens, d_teacher), (vocab_size, d_teacher))
    targets = torch.randint(vocab_size, (tokens,))
    targets[1::3] = -100
    return [*(scale * torch.randn(shape, dtype=torch.float64) for shape in shapes), targets]


def truth(h: Tensor, w: Tensor, g: Tensor, v: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    kl, cross_entropy = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i, target in enumerate(targets.tolist()):
        if target != -100:
            z, t = w @ h[i], v @ g[i]
            log_q, log_p = (x / temperature - (x / temperature).logsumexp(0) for x in (z, t))
            kl = kl + temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
            cross_entropy = cross_entropy + z.logsumexp(0) - z[target]
    return kl, cross_entropy


def gradients(kl: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(-0.3 * kl, (h, w))


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.ops.loss.MAX_LOGITS", 3 * 17)
    monkeypatch.setattr("explore.ops.loss.MIN_ROWS", 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_values_and_gradients_are_those_of_the_definition(
    path: str, temperature: float, tokens: int, small_slices: None
) -> None:
    inputs = draw(tokens, 17, 12, 20)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        h, w, g, v = (x.to(dtype).requires_grad_() for x in inputs[:4])
        exact = [x.detach().double().requires_grad_() for x in (h, w, g, v)]
        with forced_paths(divergence=path):
            kl, cross_entropy = linear_kl(h, w, g, v, inputs[4], temperature)
        kl_truth, cross_entropy_truth = truth(*exact, inputs[4], temperature)
        torch.testing.assert_close(kl.double(), kl_truth, rtol=rtol, atol=rtol)
        torch.testing.assert_close(cross_entropy.double(), cross_entropy_truth, rtol=rtol, atol=rtol)
        assert not cross_entropy.requires_grad
        for found, expected in zip(gradients(kl, h, w), gradients(kl_truth, *exact[:2]), strict=True):
            assert found.dtype == dtype
            assert float((found.double() - expected).norm() / expected.norm()) < rtol
        with torch.no_grad(), forced_paths(divergence=path):
            assert linear_kl(h, w, g, v, inputs[4], temperature).kl == kl


@pytest.mark.parametrize("path", PATHS)
def test_the_teacher_gets_no_gradient(path: str) -> None:
    h, w, g, v = (x.requires_grad_() for x in draw(5, 17, 12, 20)[:4])
    with forced_paths(divergence=path):
        linear_kl(h, w, g, v, torch.arange(5)).kl.backward()
    assert h.grad is not None
    assert g.grad is None
    assert v.grad is None


@pytest.mark.parametrize("path", PATHS)
def test_a_student_equal_to_its_teacher_has_zero_divergence(path: str) -> None:
    h, w = (x.float().requires_grad_() for x in draw(9, 17, 12, 12)[:2])
    with forced_paths(divergence=path):
        kl, _ = linear_kl(h, w, h, w, torch.arange(9))
    assert abs(float(kl.detach())) < 1e-5
    assert all(gradient.abs().max() < 1e-5 for gradient in torch.autograd.grad(kl, (h, w)))


def test_large_logits_neither_overflow_nor_vanish(small_slices: None) -> None:
    inputs = draw(8, 17, 12, 20, scale=30)
    h, w, g, v = (x.round().float().requires_grad_() for x in inputs[:4])
    assert float((h @ w.T).detach().abs().max()) > 1e3
    exact = [x.detach().double().requires_grad_() for x in (h, w, g, v)]
    (kl, _), (kl_truth, _) = linear_kl(h, w, g, v, inputs[4]), truth(*exact, inputs[4], 1.0)
    torch.testing.assert_close(kl.double(), kl_truth, rtol=1e-5, atol=0)
    for found, expected in zip(gradients(kl, h, w), gradients(kl_truth, *exact[:2]), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_ignored_targets_alone_give_zero_loss() -> None:
    h, w, g, v = (x.requires_grad_() for x in draw(3, 17, 12, 20)[:4])
    kl, cross_entropy = linear_kl(h, w, g, v, torch.full((3,), -100))
    assert float(kl.detach()) == float(cross_entropy) == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(kl, (h, w)))


@pytest.mark.parametrize("path", PATHS)
def test_each_side_multiplies_in_its_own_precision(path: str, small_slices: None) -> None:
    """The student computes in autocast's bf16, the teacher in the dtype of its hidden states."""
    inputs = draw(64, 17, 12, 20)
    h, w, g, v = (x.float().requires_grad_() for x in inputs[:4])
    (half_h, half_w), (half_g, half_v) = ((x.detach().bfloat16() for x in pair) for pair in ((h, w), (g, v)))
    for teacher, half_teacher in (((g, v), (g, v)), ((g.bfloat16(), v), (half_g, half_v))):
        with torch.autocast("cpu", torch.bfloat16), forced_paths(divergence=path):
            kl, _ = linear_kl(h, w, *teacher, inputs[4])
        with forced_paths(divergence=path):
            rounded = [x.detach().float() for x in (half_h, half_w, *half_teacher)]
            expected, _ = linear_kl(*rounded, inputs[4])
        assert float(kl.detach()) == pytest.approx(float(expected), rel=0.01)  # but for the rounding of the logits
        found, exact = gradients(kl, h, w), [x.detach().double().requires_grad_() for x in (h, w)]
        kl_truth, _ = truth(*exact, *(x.detach().double() for x in (g, v)), inputs[4], 1.0)
        for ours, double in zip(found, gradients(kl_truth, *exact), strict=True):
            assert ours.dtype == torch.float32
            assert float((ours.double() - double).norm() / double.norm()) < 0.02


class Largest(TorchDispatchMode):
    """Records the size of the largest result of any operation."""

    n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.n_elements = max(self.n_elements, each.numel())
        return out


@pytest.mark.parametrize(("path", "largest"), [("sliced", 64 * 300), ("whole", 640 * 300)])
def test_no_tensor_is_as_large_as_the_logits(path: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.ops.loss.MAX_LOGITS", 1)
    h, w, g, v = (x.float().requires_grad_() for x in draw(640, 300, 8, 12)[:4])
    with Largest() as seen, forced_paths(divergence=path):
        torch.autograd.grad(linear_kl(h, w, g, v, torch.zeros(640, dtype=torch.int64)).kl, (h, w))
    assert seen.n_elements == largest


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_nonpositive_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature must be above 0, got "):
        linear_kl(*draw(3, 17, 12, 20), temperature)


def test_the_gradient_keeps_its_size_when_the_temperature_changes() -> None:
    h, w, g, v = (1e-2 * x for x in draw(8, 17, 12, 20)[:4])
    h, targets = h.requires_grad_(), torch.zeros(8, dtype=torch.int64)
    sizes = [torch.autograd.grad(linear_kl(h, w, g, v, targets, tau).kl, h)[0].norm() for tau in (1.0, 10.0)]
    assert float(sizes[1] / sizes[0]) == pytest.approx(1, rel=0.01)


def test_a_hard_teacher_gives_the_cross_entropy() -> None:
    """A teacher with probability 1 for the targets has an entropy of 0."""
    h, w = (x.requires_grad_() for x in draw(9, 17, 12, 12)[:2])
    targets = torch.arange(9)
    hard = 1e4 * F.one_hot(targets, 17).double()
    kl, cross_entropy = linear_kl(h, w, hard, torch.eye(17, dtype=torch.float64), targets)
    torch.testing.assert_close(kl.detach(), cross_entropy)
