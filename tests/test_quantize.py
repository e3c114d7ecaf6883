"""Quantisers compared with ml_dtypes, torchao, a plain reference and tables by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from explore.ops import hadamard, quantize, rounding_generator
from explore.ops.hadamard import hadamard_matrix
from explore.ops.quantize import Blocks, quantize_blocks, quantize_compiled
from explore.ops.quantize_plain import quantize_plain
from explore.ops.rounding import power_of_two_below, rounding_noise
from explore.precision import ELEMENTS, FORMATS

BFLOATS = torch.arange(2**16, dtype=torch.int32).short().view(torch.bfloat16)
ELEMENT_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
NARROW = [name for name, entry in FORMATS.items() if ELEMENTS[entry.element].bits <= 8 and name != "e8m0"]
SCALED = [name for name in NARROW if FORMATS[name].scaling != "none"]
BLOCKED = [name for name in NARROW if FORMATS[name].block]


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, except that all NaNs are equal."""
    bits = found.view(torch.int32) == expected.float().view(torch.int32)
    return bool((bits | (found.isnan() & expected.isnan())).all())


def spread(seed: int, *shape: int) -> Tensor:
    """Numbers of many magnitudes; in bf16 if the seed is odd."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))
    return x.bfloat16() if seed % 2 else x


@pytest.mark.parametrize("element", ELEMENT_DTYPES)
def test_every_bfloat_rounds_as_in_ml_dtypes(element: str) -> None:
    x = BFLOATS.float()
    if element in ("e2m1", "e4m3", "e5m2"):  # ml_dtypes has NaN or infinity where these saturate
        x = x.clamp(-ELEMENTS[element].largest, ELEMENTS[element].largest)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(x.numpy().astype(ELEMENT_DTYPES[element]).astype(np.float32))
    if element == "e2m1":  # which has no NaN
        expected[x.isnan()] = torch.nan
    assert same(quantize(BFLOATS, element), expected)


def test_ties_of_e2m1_go_to_the_even_code() -> None:
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0, 7.0: 6.0, math.inf: 6.0}
    x = torch.tensor(list(ties))
    assert same(quantize(x, "e2m1"), torch.tensor(list(ties.values())))
    assert same(quantize(-x, "e2m1"), -torch.tensor(list(ties.values())))


def test_powers_of_two_are_exact_at_every_exponent() -> None:
    powers = np.ldexp(np.float64(1), np.arange(-149, 128))
    for toward in (1, np.inf, 0):
        x = np.nextafter(powers.astype(np.float32), np.float32(toward)) if toward != 1 else powers.astype(np.float32)
        x = x[x > 0]
        expected = np.ldexp(np.float32(1), np.frexp(x)[1] - 1)
        assert same(power_of_two_below(torch.from_numpy(x)), torch.from_numpy(expected))
    assert power_of_two_below(torch.tensor(ELEMENTS["fp32"].largest)) == 2.0**127


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", NARROW)
def test_the_fast_quantiser_equals_the_plain_one(name: str, stochastic: bool, square: bool) -> None:
    shapes = [((65,), -1), ((3, 33), 1), ((129, 5), 0), ((2, 17, 20), -2)]
    cases = (
        product(shapes, (False, True), ("nearest", "up")) if name == "nvfp4" else product(shapes, [False], ["nearest"])
    )
    for seed, ((shape, axis), four_over_six, scale_rounding) in enumerate(cases):
        if square and (not FORMATS[name].block or len(shape) < 2):
            continue
        x = spread(seed, *shape)
        options = {
            "block_axis": axis,
            "square": square,
            "per_expert": len(shape) == 3,
            "four_over_six": four_over_six,
            "scale_rounding": scale_rounding,
        }
        noise = rounding_noise(x.float(), rounding_generator(seed, 0, 0, "x")) if stochastic else None
        expected = quantize_plain(x, name, noise, **options)
        rounding = "stochastic" if stochastic else "nearest"
        found = quantize(x, name, rounding=rounding, generator=rounding_generator(seed, 0, 0, "x"), **options)
        assert same(found, expected), (shape, axis, options)


@pytest.mark.parametrize("name", ["fp8", "fp8-blocks", "mxfp8", "nvfp4"])
def test_the_compiled_region_gets_whole_blocks_and_padding_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = FORMATS[name]

    def region(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def uncompiled(x: Tensor, noise: Tensor | None, how: Blocks, *more: Any) -> Tensor:
            assert all(x.shape[axis] % entry.block == 0 for axis in how.axes(x.ndim))
            return function(x, noise, how, *more)

        return uncompiled

    monkeypatch.setattr(sys.modules["explore.ops.quantize"], "compiled", region)
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((48, 200), {"axis": 1}), ((200, 48), {"axis": 0}), ((3, 40, 24), {"axis": 1, "per_expert": True}),
        ((3, 40, 200), {"square": True, "per_expert": True}),
    ]  # fmt: skip
    for shape, fields in cases:
        x, how = spread(0, *shape), Blocks(entry, **fields)
        for noise in (None, rounding_noise(x, rounding_generator(0, 0, 0, "x"))):
            found = quantize_compiled(x, noise, how)
            assert found.shape == x.shape
            assert torch.equal(found, quantize_blocks(x, noise, how)), (shape, fields)


@pytest.mark.slow
def test_a_thousand_tensors_in_mx_formats_equal_torchao() -> None:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    special = torch.tensor([0.0, 1e-40, 1e-36, 3e38, torch.inf, torch.nan])[:, None].repeat(1, 32)
    special[4:, 1:] = 1.0
    tensors = [special, *(spread(seed, 4, 64) * 2.0 ** (seed % 40 - 20) for seed in range(1000))]
    for name, dtype in {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}.items():
        for x in tensors:
            expected = MXTensor.to_mx(x, dtype, 32, ScaleCalculationMode.RCEIL).dequantize(torch.float32)
            assert same(quantize(x, name), expected)


def test_a_thousand_tensors_in_fp8_equal_torchao() -> None:
    """Scales of a tensor in both elements; scales of rows and squares of 128, which are powers of two."""
    from torchao.float8.float8_utils import amax_to_scale, to_fp8_saturated

    def theirs(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, is_power: bool = False) -> Tensor:
        scale = amax_to_scale(x.abs().max(), dtype, is_power)
        return to_fp8_saturated(x * scale, dtype).float() / scale

    for seed in range(1000):
        x = spread(seed, 3, 200).float() * 2.0 ** (seed % 40 - 20)
        assert same(quantize(x, "fp8"), theirs(x))
        assert same(quantize(x, "fp8-e5m2"), theirs(x, torch.float8_e5m2))
        in_rows = [theirs(block, is_power=True) for row in x for block in row.split(128)]
        assert same(quantize(x, "fp8-blocks"), torch.cat(in_rows).view_as(x))
        in_squares = [theirs(block, is_power=True) for block in x.split(128, dim=1)]
        assert same(quantize(x, "fp8-blocks", square=True), torch.cat(in_squares, dim=1))


def test_nvfp4_equals_torchao_on_a_thousand_tensors_with_power_of_two_scales() -> None:
    """Elsewhere torchao rounds twice where Transformer Engine rounds once."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    for seed in range(1000):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
        x = x.bfloat16() if seed % 2 else x
        x[0, 0] = 2688 / 2**8
        x *= 2.0 ** (seed % 40 - 20)
        theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.float().abs().max()))
        assert same(quantize(x, "nvfp4"), theirs.dequantize(torch.float32))


def test_the_scale_of_a_block_of_nvfp4_is_rounded_once() -> None:
    x = torch.zeros(2, 16)
    x[0, 0] = 192  # S = 2688 / 192 = 14
    x[1, :3] = torch.tensor([4.5, 1.0, -3.0])  # 4.5 * (14 * (1 / 6)) is above 10.5, and (4.5 / 6) * 14 is 10.5: even 10
    y = quantize(x, "nvfp4")
    assert y[0, 0] == 192
    assert same(y[1, :3], torch.tensor([6.0, 1.5, -4.0]) * 11 / 14)


def test_blocks_of_nvfp4_with_subnormal_and_zero_scales() -> None:
    x = torch.zeros(5, 16)
    x[0, 0] = 2688  # S = 1
    x[1, :2] = torch.tensor([6 * 2.0**-9, 2.0**-9])  # the smallest E4M3 number
    x[2, :2] = torch.tensor([6 * 2.5 * 2.0**-9, 2.0**-9])  # a tie, to the even 2 * 2^-9
    x[3, :2] = torch.tensor([6 * 2.0**-11, 2.0**-12])  # rounds to a scale of 0
    y = quantize(x, "nvfp4")
    assert same(y[1:3, :2], torch.tensor([[6.0, 1.0], [12.0, 1.0]]) * 2.0**-9)
    assert (y[3:] == 0).all()
    assert same(quantize(x, "nvfp4", scale_rounding="up")[3, :2], torch.tensor([1.5, 0.0]) * 2.0**-9)


@pytest.mark.parametrize("name", SCALED)
def test_zeros_and_the_smallest_numbers_stay_finite(name: str) -> None:
    assert same(quantize(torch.zeros(3, 40), name), torch.zeros(3, 40))
    for smallest in (2.0**-149, 2.0**-130, 2.0**-120):
        y = quantize(torch.full((2, 40), smallest), name)
        assert (y >= 0).all()
        assert (y <= 2 * smallest).all()
    if FORMATS[name].scaling != "e8m0":  # there 2^-120 is below the smallest scale
        torch.testing.assert_close(y, torch.full_like(y, smallest), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", SCALED)
def test_infinities_saturate_and_nan_propagates(name: str) -> None:
    x = torch.ones(2, 256)
    x[1, 0] = torch.inf
    y = quantize(x, name)
    largest = {"nvfp4": 6 * 448, "mxfp8": torch.inf, "mxfp4": torch.inf}.get(
        name, ELEMENTS[FORMATS[name].element].largest
    )
    assert y[1, 0] == largest
    assert not y.isnan().any()
    x[1, 0] = torch.nan
    y = quantize(x, name)
    assert y[1, 0].isnan()
    assert y[0].isnan().all() == (name == "nvfp4")  # other formats fall back to a scale of 1
    assert y[0].isnan().any() == (name == "nvfp4")


def test_current_scaling_by_hand() -> None:
    x = torch.tensor([7.0, -3.5, 0.1, 1.0])  # the scale is 448 / 7 = 64
    assert same(quantize(x, "fp8"), torch.tensor([448.0, -224.0, 6.5, 64.0]) / 64)
    assert same(quantize(x, "fp8-e5m2"), torch.tensor([57344.0, -28672.0, 768.0, 8192.0]) / 8192)


def test_blocks_of_fp8_have_powers_of_two_rounded_down() -> None:
    x = torch.zeros(1, 130)
    x[0, :3] = torch.tensor([5.0, 1.1, 0.3])  # 448 / 5 = 89.6, so 64
    x[0, 128:] = torch.tensor([0.07, 0.01])  # 448 / 0.07 = 6400, so 4096
    expected = torch.zeros(1, 130)
    expected[0, :3] = torch.tensor([320.0, 72.0, 20.0]) / 64
    expected[0, 128:] = torch.tensor([288.0, 40.0]) / 4096
    assert same(quantize(x, "fp8-blocks"), expected)


def test_groups_of_int8_by_hand() -> None:
    x = torch.tensor([12.7, -6.36, 0.24, 0.26])  # steps of 0.1
    assert same(quantize(x, "int8"), torch.tensor([127.0, -64.0, 2.0, 3.0]) / (127 / torch.tensor(12.7)))


def test_four_over_six_takes_the_better_scale() -> None:
    x = torch.zeros(3, 16)
    x[0, 0] = 1536  # 256 * 6, so S = 1
    x[1, :2] = torch.tensor([8.0, 6.0])  # 4 and 3 at a scale of 2; at 8 / 6, that is 1.375, neither is met
    x[2, :2] = torch.tensor([12.0, 2.0])  # 6 and 1 at a scale of 2, and at 3 the second is 1.5
    assert same(quantize(x, "nvfp4", four_over_six=True), x)
    six = quantize(x * 1.75, "nvfp4")  # whose tensor bound is 448, so S is 1 as well
    assert not same(six[1], x[1] * 1.75)


def test_four_over_six_divides_by_six_before_it_multiplies_as_in_transformer_engine() -> None:
    x = torch.zeros(2, 16)
    x[0, 0] = 7.0
    S = torch.tensor(1536.0) / 7
    x[1, :2] = torch.tensor([0.08544921875, 12 / float(S)])  # 18.75 / 6 is a tie of 3 and 3.25, and 3 is even
    assert float(x[1, 0] * (S * (1 / 6))) > 3.125
    assert same(quantize(x, "nvfp4", four_over_six=True)[1, :2], torch.tensor([18.0, 12.0]) / S)


@pytest.mark.parametrize("name", BLOCKED)
def test_squares_are_invariant_under_transposition_and_axes_follow_it(name: str) -> None:
    x = spread(1, 40, 33)
    assert same(quantize(x.T, name, square=True), quantize(x, name, square=True).T)
    assert same(quantize(x, name, block_axis=0), quantize(x.T, name).T)
    assert not same(quantize(x, name, block_axis=0), quantize(x, name))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_experts_have_scales_of_their_own(name: str) -> None:
    x = spread(0, 3, 20, 32) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    found = quantize(x, name, per_expert=True)
    assert same(found, torch.stack([quantize(expert, name) for expert in x]))
    assert not same(found, quantize(x, name))


def test_nvfp4_of_gaussians_has_the_published_error() -> None:
    x = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    error = ((quantize(x, "nvfp4") - x).square().sum() / x.square().sum()).item()
    assert error == pytest.approx(0.0090, rel=0.02)


@pytest.mark.parametrize("name", [*NARROW, "fp16", "bf16"])
def test_stochastic_rounding_has_the_mean_of_the_tensor(name: str) -> None:
    n = 20_000
    row = torch.tensor([3.0, 0.3, -1.2345, 0.01, 2.9, -0.7, 1.0, 0.11, 1e-3, -2.2, 1.9, 0.5, -0.07, 0.2, 1.3, 0.0])
    generator = rounding_generator(0, 0, 0, "x")
    # Rows are quantised alike: every block, and the whole tensor, has the same largest magnitude.
    y = quantize(row.repeat(n, 1), name, rounding="stochastic", generator=generator, scale_rounding="up").double()
    spread_of_mean = y.std(0) / n**0.5
    assert ((y.mean(0) - row.double()).abs() <= 5 * spread_of_mean + 1e-7).all()
    assert all(len(column.unique()) <= 2 for column in y.T)
    if ELEMENTS[FORMATS[name].element].bits <= 8:
        assert (spread_of_mean > 0).sum() > 8


def test_the_largest_elements_saturate_under_scales_of_nvfp4_rounded_to_nearest() -> None:
    row = torch.zeros(1000, 32)
    row[:, 0] = 2688  # S = 1
    row[:, 16] = 6 * 1.05  # whose scale is 1
    generator = rounding_generator(0, 0, 0, "x")
    assert (quantize(row, "nvfp4", rounding="stochastic", generator=generator)[:, 16] == 6).all()


def test_probabilities_of_stochastic_rounding() -> None:
    x = torch.full((100_000,), 2.25)  # a quarter of the way from 2 to 3
    y = quantize(x, "e2m1", rounding="stochastic", generator=rounding_generator(0, 0, 0, "x"))
    assert (y == 3).float().mean().item() == pytest.approx(0.25, abs=0.006)
    assert ((y == 2) | (y == 3)).all()


def test_a_generator_depends_only_on_its_key() -> None:
    x = torch.randn(1000)

    def drawn(*key: object) -> Tensor:
        return quantize(x, "nvfp4", rounding="stochastic", generator=rounding_generator(*key))  # type: ignore[arg-type]

    first = drawn(1, 2, 3, "dy")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert same(drawn(1, 2, 3, "dy"), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (
        (0, 2, 3, "dy"),
        (1, 0, 3, "dy"),
        (1, 2, 0, "dy"),
        (1, 2, 3, "dy^T"),
        (1, 2, "3", "dy"),
        (12, 3, 3, "dy"),
    ):
        assert not same(drawn(*other), first)


@pytest.mark.parametrize(("shape", "axis"), [((32,), 0), ((3, 48), -1), ((48, 3), 0), ((2, 32, 5), 1)])
def test_hadamard_is_a_product_with_an_orthonormal_matrix(shape: tuple[int, ...], axis: int) -> None:
    matrix = torch.tensor(hadamard_matrix(16), dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=0)
    x = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0)).float()  # whose sums bf16 holds
    expected = (x.double().movedim(axis, -1).unflatten(-1, (-1, 16)) @ matrix).flatten(-2).movedim(-1, axis)
    assert same(hadamard(x, axis), expected.float())


def test_hadamard_pads_an_axis_and_keeps_products_over_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-4, 5, (37, n), generator=generator).float() for n in (5, 6))
    rotated_x, rotated_y = hadamard(x, 0), hadamard(y, 0)
    assert rotated_x.shape == (48, 5)
    torch.testing.assert_close(rotated_x.T @ rotated_y, x.T @ y, rtol=1e-2, atol=0.5)


def test_hadamard_spreads_an_outlier_with_the_signs_of_transformer_engine() -> None:
    outlier = torch.zeros(16)
    outlier[3] = 4
    assert same(hadamard(outlier), torch.tensor([-1.0, 1, 1, -1]).repeat(4))  # the fourth sign is -1
    assert torch.tensor(hadamard_matrix(16))[:, 0].sign().tolist() == [1, 1, 1, -1, 1, *[-1] * 6, 1, -1, 1, -1, -1]


@pytest.mark.parametrize("size", [4, 128])
def test_hadamard_of_other_sizes(size: int) -> None:
    matrix = torch.tensor(hadamard_matrix(size), dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert hadamard(torch.ones(3, 130), size=size).shape == (3, -(-130 // size) * size)


def test_quantisation_has_no_gradient_and_accepts_an_empty_tensor() -> None:
    x = torch.randn(2, 16, requires_grad=True)
    assert not quantize(x, "nvfp4").requires_grad
    assert not hadamard(x).requires_grad
    assert quantize(torch.empty(0, 16), "nvfp4").shape == (0, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nvfp5"}, "format must be one of fp32, .*, nvfp4, int8, got 'nvfp5'"),
        ({"rounding": "stochastic"}, "generator must be given for stochastic rounding"),
        ({"block_axis": 2}, "block_axis must be from -2 to 1, got 2"),
        ({"block_axis": 0, "per_expert": True}, "block_axis must not be the axis of the experts, got 0"),
        ({"square": True, "per_expert": True}, "per_expert needs an axis of experts before the others, got .* 2 axes"),
        ({"format": "mxfp4", "four_over_six": True}, "four_over_six needs nvfp4, got 'mxfp4'"),
        ({"format": "e8m0", "rounding": "stochastic", "generator": torch.Generator()}, "rounding of e8m0 must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(4, 16), **{"format": "nvfp4", **options})  # type: ignore[arg-type]
