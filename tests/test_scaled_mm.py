"""Emulated FP8 beside torch's own FP8 products: the same operands, so the same results but for the accumulation."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from explore.model import LanguageModel, ModelConfig, quantize_products
from explore.ops import Emulation, Quantizer, low_precision
from explore.precision import named, products_of

FP8 = named("fp8")
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
ACCUMULATED = {"cpu": 2.0**-18, "cuda": 2.0**-10}
"""Error of a sum of products, relative to the sum of their magnitudes: fp32, and what tensor cores keep of FP8."""
STEPS = 4


@cache
def why_not(device: str) -> str:
    """Why torch makes no FP8 products on a device; empty where it does."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return f"{torch.cuda.get_device_name()} has no FP8 products: they need compute capability 8.9"
    one = torch.ones(16, 16, device=device)
    try:
        for left, right in ((torch.float8_e4m3fn, torch.float8_e4m3fn), (torch.float8_e5m2, torch.float8_e4m3fn)):
            real_product(element(one, left), element(one, right))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"torch {torch.__version__} makes no FP8 products on {device}: {str(error).splitlines()[0]}"
    return ""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if reason := why_not(name):
        pytest.skip(reason)
    return name


def element(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor in FP8, and what it is multiplied by to be read: its largest magnitude becomes that of the dtype."""
    amax = x.abs().amax().float()
    scale = torch.where(amax > 0, torch.full_like(amax, LARGEST[dtype]) / amax, 1.0)
    return (x.float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale.reciprocal()


def real_product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """The product of two matrices in FP8, in fp32. Lengths are filled up with zeros to the 16 that kernels ask for."""
    (a, scale_a), (b, scale_b) = left, right
    m, n = a.shape[0], b.shape[1]
    a, b = (F.pad(x.float(), (0, -x.shape[1] % 16, 0, -x.shape[0] % 16)).to(x.dtype) for x in (a, b))
    columns = b.t().contiguous().t()
    y: Tensor = torch._scaled_mm(a.contiguous(), columns, scale_a, scale_b, out_dtype=torch.float32)
    return y[:m, :n]


def held(x: Tensor) -> tuple[Tensor, Tensor]:
    """The elements and the scale of a tensor that an emulated quantiser has made: it is read, not rounded again."""
    for dtype in LARGEST:
        q, scale = element(x, dtype)
        if torch.allclose(q.float() * scale, x.float(), rtol=1e-6, atol=0):
            return q, scale
    raise AssertionError("not a tensor in FP8")


def assert_accumulated(found: Tensor, emulated: Tensor, magnitudes: Tensor, device: str) -> None:
    """Element by element, the difference is a small part of the summed magnitudes."""
    assert ((found - emulated).abs() <= ACCUMULATED[device] * magnitudes).all()
    assert (found != 0).float().mean() > 0.9


@pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(64, 48, 32), (37, 64, 80), (256, 512, 128)])
def test_the_three_products_of_a_linear_layer_are_those_of_fp8(device: str, tokens: int, d_in: int, d_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(shape, generator=generator).to(device) * size
        for shape, size in (((tokens, d_in), 3.0), ((d_out, d_in), 0.02), ((tokens, d_out), 1e-4))
    )
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = Quantizer("fp8", products_of(FP8, "fp8"), Emulation()).linear(*leaves)
    y.backward(dy)

    qx, qw = (element(each, torch.float8_e4m3fn) for each in (x, weight))
    qdy = element(dy, torch.float8_e5m2)
    for found, emulated, (left, right) in (
        (real_product(qx, transposed(qw)), y.detach(), (qx, transposed(qw))),
        (real_product(qdy, qw), leaves[0].grad, (qdy, qw)),
        (real_product(transposed(qdy), qx), leaves[1].grad, (transposed(qdy), qx)),
    ):
        assert emulated is not None
        magnitudes = read(left).abs() @ read(right).abs()
        assert_accumulated(found, emulated, magnitudes, device)


def transposed(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return x[0].t(), x[1]


def read(x: tuple[Tensor, Tensor]) -> Tensor:
    return x[0].float() * x[1]


def losses(model: LanguageModel, device: str) -> list[float]:
    """Losses of a few steps of training from the same weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:]).cross_entropy
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def built(device: str) -> LanguageModel:
    latent = {"kind": "moe", "n_experts": 4, "top_k": 2, "d_expert": 32, "d_shared": 32, "d_latent": 16}
    torch.manual_seed(0)
    content = {"d_model": 64, "vocab_size": 64, "pattern": "ME*-", "blocks": {"E": latent}}
    return ModelConfig.model_validate(content).build().to(device)


@pytest.mark.slow
def test_a_model_trained_with_real_fp8_products_has_the_emulated_losses(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = losses(built(device), device)
    model = built(device)
    quantize_products(model, FP8)
    emulated = losses(model, device)

    n_products = 0

    def product(rows: Tensor, weight: Tensor, loads: list[int]) -> Tensor:
        nonlocal n_products
        n_products += 1
        return torch.cat([real(part, one) for part, one in zip(rows.split(loads), weight, strict=True)])

    def outer(rows: Tensor, other: Tensor, loads: list[int]) -> Tensor:
        return torch.stack(
            [real(part.t(), one) for part, one in zip(rows.split(loads), other.split(loads), strict=True)]
        )

    def real(left: Tensor, right: Tensor) -> Tensor:
        if not left.numel():
            return left.new_zeros(left.shape[0], right.shape[1])
        return real_product(held(left), held(right))

    monkeypatch.setattr(low_precision, "grouped_product", product)
    monkeypatch.setattr(low_precision, "grouped_outer", outer)
    model = built(device)
    quantize_products(model, FP8)
    found = losses(model, device)
    assert n_products > 2 * STEPS * 10  # of about ten layers with products, forward and backward
    assert found == pytest.approx(emulated, rel=2e-4)
    assert max(abs(a - b) for a, b in zip(emulated, plain, strict=True)) > 2e-4 * plain[0]
