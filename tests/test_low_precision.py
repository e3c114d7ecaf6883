"""Quantised products: compared with quantisation by hand, unbiased, and independent of the number of devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from explore.blocks import BLOCKS, BlockKind
from explore.cost import DTYPES, in_formats, weight_bytes
from explore.model import LanguageModel, ModelConfig, quantizable_parts, quantize_products
from explore.number_formats import SCALE_BITS
from explore.ops import (
    Emulation,
    Quantizer,
    experts,
    forced_paths,
    hadamard,
    low_precision,
    quantize,
    rounding_generator,
)
from explore.ops.quantize import Blocks
from explore.precision import ELEMENTS, OperandFormat, Recipe, Until, is_before, named, products_at, products_of

NVFP4 = named("nvfp4")
PLAIN = NVFP4.model_copy(update={"stochastic": ()})
UNBIASED = NVFP4.model_copy(update={"scale_rounding": "up"})


def quantizer(recipe: Recipe, **emulation: Any) -> Quantizer:
    return Quantizer(recipe.format, products_of(recipe, recipe.format), Emulation(**emulation), 3, "in_proj")


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def linear(how: Quantizer, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result and both gradients of a linear layer."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = how.linear(x, weight)
    y.backward(dy)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


def of_tokens(x: Tensor, rotated: bool, **how: Any) -> Tensor:
    """Quantises (b, s, d) along tokens, each sequence separately with the scale of all; returns (b * s, d)."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 16))
    x = hadamard(x, 1) if rotated else x
    return quantize(x, "nvfp4", block_axis=1, **how).flatten(0, 1)


# The path that uses bf16 instructions


@pytest.mark.parametrize("name", ["fp8", "fp8-blocks", "mxfp8", "mxfp4", "nvfp4"])
def test_bf16_instructions_read_exact_operands_and_give_the_same_products(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exact(product: Any) -> Any:
        def checked(left: Tensor, right: Tensor, loads: list[int]) -> Tensor:
            if torch.backends.mkldnn.matmul.fp32_precision == "bf16":  # type: ignore[attr-defined]
                seen.append(all(torch.equal(each.bfloat16().float(), each) for each in (left, right)))
            return product(left, right, loads)

        return checked

    for product in ("grouped_product", "grouped_outer"):
        monkeypatch.setattr(low_precision, product, exact(getattr(low_precision, product)))
    rows, weight, dy = tensors((96, 128), (1, 128, 256), (96, 256))
    found: list[list[Tensor]] = []
    for path in ("fp32", "bf16"):
        seen: list[bool] = []
        leaves = [each.clone().requires_grad_() for each in (rows, weight)]
        with forced_paths(quantized_product=path):
            y = quantizer(named(name)).product(*leaves, low_precision.Layout([[32, 64]]))
            y.backward(dy)
        assert seen == ([True] * 3 if path == "bf16" else [])
        found.append([y.detach(), *(each.grad for each in leaves if each.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * one.abs().max().item())


def test_bf16_instructions_are_not_used_for_operands_in_fp32() -> None:
    formats = {"forward": (OperandFormat("nvfp4"), OperandFormat(None))}
    for dtype, expected in ((torch.float32, False), (torch.bfloat16, True)):
        how = Quantizer("nvfp4", formats)  # type: ignore[arg-type]
        call = low_precision._Call(how, low_precision.Layout([[16]]), "", dtype, False, True)
        assert call.is_narrow("forward") == expected


# Comparison with quantisation by hand


@pytest.mark.parametrize("rotated", [True, False])
def test_every_product_of_a_linear_layer_has_its_own_operands(rotated: bool) -> None:
    x, weight, dy = tensors((2, 37, 48), (40, 48), (2, 37, 40))  # neither 37 nor 40 is a multiple of 16
    recipe = PLAIN if rotated else PLAIN.model_copy(update={"hadamard": ()})
    y, dx, dweight = linear(quantizer(recipe), x, weight, dy)
    w = quantize(weight, "nvfp4", square=True)
    torch.testing.assert_close(y, quantize(x, "nvfp4") @ w.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, quantize(dy, "nvfp4") @ w, rtol=1e-5, atol=1e-5)
    expected = of_tokens(dy, rotated).T @ of_tokens(x, rotated)
    torch.testing.assert_close(dweight, expected, rtol=1e-5, atol=1e-5)


def test_weight_blocks_that_are_not_square_lie_along_the_summed_axis() -> None:
    x, weight, dy = tensors((1, 16, 48), (32, 48), (1, 16, 32))
    y, dx, _ = linear(quantizer(PLAIN.model_copy(update={"square_weights": False})), x, weight, dy)
    torch.testing.assert_close(y, quantize(x, "nvfp4") @ quantize(weight, "nvfp4").T, rtol=1e-5, atol=1e-5)
    expected = quantize(dy, "nvfp4") @ quantize(weight, "nvfp4", block_axis=0)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_fp8_are_e5m2() -> None:
    x, weight, dy = tensors((2, 20, 24), (24, 24), (2, 20, 24))
    y, dx, dweight = linear(quantizer(named("fp8")), x, weight, dy)
    x, w, dy = quantize(x, "fp8"), quantize(weight, "fp8"), quantize(dy, "fp8-e5m2")
    torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dy @ w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight, dy.flatten(0, 1).T @ x.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8-blocks", "mxfp8", "mxfp4"])
def test_other_recipes_quantise_along_the_sum(name: str) -> None:
    x, weight, dy = tensors((1, 256, 128), (128, 128), (1, 256, 128))
    recipe = named(name).model_copy(update={"stochastic": (), "hadamard": ()})
    y, dx, dweight = linear(quantizer(recipe), x, weight, dy)
    square = recipe.square_weights
    torch.testing.assert_close(y, quantize(x, name) @ quantize(weight, name, square=square).T, rtol=1e-5, atol=1e-4)
    expected = quantize(dy, name) @ quantize(weight, name, block_axis=0, square=square)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-4)
    expected = quantize(dy[0], name, block_axis=0).T @ quantize(x[0], name, block_axis=0)
    torch.testing.assert_close(dweight, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
def test_a_disabled_product_is_exact(product: str) -> None:
    x, weight, dy = tensors((2, 32, 32), (32, 32), (2, 32, 32))
    exact = {"forward": x @ weight.T, "input_gradient": dy @ weight, "weight_gradient": None}
    exact["weight_gradient"] = dy.flatten(0, 1).T @ x.flatten(0, 1)
    found = linear(quantizer(NVFP4.model_copy(update={product: False})), x, weight, dy)
    off = linear(quantizer(NVFP4, products=frozenset(exact) - {product}), x, weight, dy)
    for (name, expected), one, other in zip(exact.items(), found, off, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one, expected, rtol=1e-5, atol=1e-5) == (name == product)


def test_results_are_rounded_to_the_dtype_of_the_run_and_gradients_of_weights_are_not() -> None:
    x, weight, dy = tensors((1, 32, 32), (32, 32), (1, 32, 32))
    high = [each.to(torch.bfloat16) for each in (x, weight, dy)]
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, dweight = linear(quantizer(PLAIN), x, weight, high[2])
    expected = quantize(high[0], "nvfp4") @ quantize(high[1], "nvfp4", square=True).T
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.to(torch.bfloat16), rtol=2**-8, atol=1e-6)
    assert dx.dtype == torch.float32
    expected = of_tokens(high[2], True).T @ of_tokens(high[0], True)
    torch.testing.assert_close(dweight, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(dweight, dweight.to(torch.bfloat16).float())


@pytest.mark.parametrize("n_sequences", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_each_expert_is_quantised_transposed_and_rotated_on_its_own_rows(n_sequences: int, gated: bool) -> None:
    n_tokens, n_experts, d, f = 40, 4, 32, 16
    x, up, gate, down, dy = tensors(
        (n_tokens, d), (n_experts, d, f), (n_experts, d, f), (n_experts, f, d), (n_tokens, d)
    )
    x = x * torch.logspace(-3, 3, n_tokens)[:, None]  # so that scales of experts differ
    chosen = torch.rand(n_tokens, n_experts - 1, generator=torch.Generator().manual_seed(1)).topk(2).indices
    weights = torch.rand(n_tokens, 2, generator=torch.Generator().manual_seed(2))
    leaves = [each.clone().requires_grad_() for each in (x, up, gate, down)]
    how, act = quantizer(PLAIN), "swiglu" if gated else "relu2"
    y = experts(
        leaves[0], chosen, weights, leaves[1], leaves[2] if gated else None, leaves[3], act,
        quantizer=how, n_sequences=n_sequences,
    )  # fmt: skip
    y.backward(dy)
    expected, others = torch.zeros_like(y), [each.clone().requires_grad_() for each in (x, up, gate, down)]
    for i in range(n_experts):
        token, place = (chosen == i).nonzero(as_tuple=True)
        sequence = token // (n_tokens // n_sequences)
        rows = others[0][token]
        inner = _grouped(rows, others[1][i], sequence, n_sequences)
        if gated:
            inner = torch.nn.functional.silu(_grouped(rows, others[2][i], sequence, n_sequences)) * inner
        else:
            inner = inner.relu().square()
        out = _grouped(inner, others[3][i], sequence, n_sequences)
        expected = expected.index_add(0, token, out * weights[token, place][:, None])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    expected.backward(dy)
    for one, other in zip(leaves, others, strict=True):
        if one.grad is not None:
            assert other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()))
    assert leaves[1].grad is not None
    assert not leaves[1].grad[-1].any()  # no token was sent there


class _Grouped(torch.autograd.Function):
    """Rows of one expert times its weight, quantised by hand; blocks along tokens are within a sequence."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
        ctx.save_for_backward(rows, weight, sequence)
        ctx.n_sequences = n_sequences
        return quantize(rows, "nvfp4") @ quantize(weight, "nvfp4", square=True) if len(rows) else rows @ weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, sequence = ctx.saved_tensors
        if not len(rows):
            return dy @ weight.T, torch.zeros_like(weight), None, None
        dx = quantize(dy, "nvfp4") @ quantize(weight, "nvfp4", square=True).T

        def transposed(x: Tensor) -> Tensor:
            parts = [x[sequence == i] for i in range(ctx.n_sequences)]
            parts = [torch.nn.functional.pad(part, (0, 0, 0, -len(part) % 16)) for part in parts]
            return quantize(hadamard(torch.cat(parts), 0), "nvfp4", block_axis=0)

        return dx, transposed(rows).T @ transposed(dy), None, None


def _grouped(rows: Tensor, weight: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    y: Tensor = _Grouped.apply(rows, weight, sequence, n_sequences)  # type: ignore[no-untyped-call]
    return y


# Stochastic rounding


def test_stochastically_rounded_gradients_are_unbiased() -> None:
    """Kernels that round to zero, or always down, also train, but are wrong."""
    x, weight, dy = tensors((2, 32, 32), (32, 32), (2, 32, 32))
    w = quantize(weight, "nvfp4", square=True)
    expected = (dy @ w, hadamard(dy, 1).flatten(0, 1).T @ of_tokens(x, True))
    sums, n = [torch.zeros(2, 32, 32, dtype=torch.double), torch.zeros(32, 32, dtype=torch.double)], 100
    for step in range(n):
        _, *found = linear(quantizer(UNBIASED, step=step), x, weight, dy)
        for total, each in zip(sums, found, strict=True):
            total += each
    _, *nearest = linear(quantizer(PLAIN), x, weight, dy)
    for total, truth, biased in zip(sums, expected, nearest, strict=True):
        error = (total / n - truth).norm() / truth.norm()
        assert error < 0.025  # single draws are off by 0.15, and the mean of 100 by a tenth of that
        assert (biased - truth).norm() / truth.norm() > 0.05


def test_rounding_noise_depends_on_seed_step_layer_and_tensor() -> None:
    x, weight, dy = tensors((2, 16, 16), (16, 16), (2, 16, 16))

    def dx(**changes: Any) -> Tensor:
        how = quantizer(NVFP4, **{name: changes.pop(name) for name in ("seed", "step") if name in changes})
        for name, value in changes.items():
            setattr(how, name, value)
        return linear(how, x, weight, dy)[1]

    first = dx()
    assert torch.equal(dx(), first)
    for change in ({"seed": 1}, {"step": 1}, {"layer": 4}, {"name": "out_proj"}):
        assert not torch.equal(dx(**change), first), change
    dy = dy[:1].expand(2, -1, -1).clone()
    one, other = dx()
    assert not torch.equal(one, other)  # sequences do not share random bits


@pytest.mark.parametrize("recipe", [NVFP4, named("fp8"), NVFP4.model_copy(update={"stochastic": ("x", "w", "dy")})])
def test_devices_that_share_a_batch_give_the_same_result_as_one(recipe: Recipe) -> None:
    x, weight, dy = tensors((4, 24, 32), (32, 32), (4, 24, 32))
    largest: list[Tensor] = []
    whole = linear(quantizer(recipe, reduce_max=lambda amax: largest.append(amax.clone())), x, weight, dy)
    dweight = torch.zeros_like(weight)
    for rank in range(2):
        rest = iter(largest)
        how = quantizer(recipe, first=rank, stride=2, reduce_max=lambda amax, rest=rest: amax.copy_(next(rest)))
        y, dx, part = linear(how, x[rank::2], weight, dy[rank::2])
        assert torch.equal(y, whole[0][rank::2])
        assert torch.equal(dx, whole[1][rank::2])
        dweight += part
    torch.testing.assert_close(dweight, whole[2], rtol=1e-5, atol=1e-5)


def test_experts_on_two_devices_give_the_same_result_as_on_one() -> None:
    n, e = 24, 3
    x, up, down, dy = tensors((4 * n, 32), (e, 32, 16), (e, 16, 32), (4 * n, 32))
    chosen = torch.rand(4 * n, e, generator=torch.Generator().manual_seed(1)).topk(2).indices
    weights = torch.rand(4 * n, 2, generator=torch.Generator().manual_seed(2))

    def run(places: list[int], how: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.cat([torch.arange(i * n, (i + 1) * n) for i in places])
        leaves = [each.clone().requires_grad_() for each in (x[own], up, down)]
        given = (chosen[own], weights[own], leaves[1], None, leaves[2], "relu2")
        y = experts(leaves[0], *given, quantizer=how, n_sequences=len(places))
        y.backward(dy[own])
        assert leaves[1].grad is not None
        assert leaves[0].grad is not None
        return y.detach(), leaves[0].grad, leaves[1].grad

    largest: list[Tensor] = []
    whole = run([0, 1, 2, 3], quantizer(NVFP4, reduce_max=lambda amax: largest.append(amax.clone())))
    total = torch.zeros_like(up)
    for rank in range(2):
        rest = iter(largest)
        how = quantizer(NVFP4, first=rank, stride=2, reduce_max=lambda amax, rest=rest: amax.copy_(next(rest)))
        y, dx, part = run([rank, rank + 2], how)
        for one, other in ((y, whole[0]), (dx, whole[1])):
            assert torch.equal(one, other.view(4, n, -1)[rank::2].flatten(0, 1))
        total += part
    torch.testing.assert_close(total, whole[2], rtol=1e-5, atol=1e-6 * float(whole[2].abs().max()))


# Models


def model(pattern: str = "ME-*/*", **blocks: Any) -> LanguageModel:
    moe = {"kind": "moe", "n_experts": 4, "top_k": 2, "d_expert": 16, "d_shared": 16, "d_latent": 16}
    record = {"d_model": 64, "vocab_size": 64, "pattern": pattern, "blocks": {"E": moe, **blocks}}
    torch.manual_seed(0)
    return ModelConfig.model_validate(record).build()


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.letter)
def test_every_matrix_of_the_ledger_can_be_quantised(kind: BlockKind) -> None:
    config = ModelConfig(
        d_model=32, vocab_size=64, pattern=f"{kind.letter}/{kind.letter}", blocks={kind.letter: kind.example}
    )
    lm = config.build()
    rows = {(row.layer, row.letter, row.entry.component) for row in config.ledger(16) if row.entry.sums_over}
    parts = list(quantizable_parts(lm))
    assert {(part.layer, part.letter, part.component) for part in parts} == rows - {(None, "/", "head")}
    found = {id(weight) for part in parts for weight in part.module.parameters(recurse=False)}
    matrices = {
        id(weight) for name, weight in lm.named_parameters() if weight.ndim > 1 and "conv1d" not in name
    } - {id(lm.embedding.weight)}  # fmt: skip
    assert matrices <= found
    assert len({(part.layer, part.name) for part in parts}) == len(parts)


def losses_and_gradients(lm: LanguageModel, recipe: Recipe) -> tuple[float, Tensor]:
    quantize_products(lm, recipe)
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    lm.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.high == "bf16"):
        loss = lm.loss(tokens[:, :-1], tokens[:, 1:], mtp=True)
    assert loss.mtp is not None
    (loss.cross_entropy + loss.mtp.mean()).backward()
    gradients = [weight.grad.flatten() for weight in lm.parameters() if weight.grad is not None]
    return loss.cross_entropy.item(), torch.cat(gradients)


def test_a_backward_recipe_leaves_the_loss_and_a_forward_recipe_changes_it() -> None:
    lm = model()
    plain, gradients = losses_and_gradients(lm, named("bf16"))
    backward, found = losses_and_gradients(lm, NVFP4.model_copy(update={"forward": False}))
    assert backward == pytest.approx(plain, abs=2e-3)
    assert (found - gradients).norm() > 0.05 * gradients.norm()
    forward = NVFP4.model_copy(update={"input_gradient": False, "weight_gradient": False})
    assert abs(losses_and_gradients(lm, forward)[0] - plain) > 1e-4
    again, same = losses_and_gradients(lm, named("bf16"))  # takes every quantiser away
    assert again == plain
    assert torch.equal(same, gradients)


@pytest.mark.parametrize(
    ("rule", "changes_loss"),
    [
        ({"letters": "M"}, True),
        ({"components": ["head"]}, True),
        ({"components": ["router"]}, False),  # too little of it to be seen before training
        ({"components": ["experts"]}, True),
        ({"letters": "/"}, False),
    ],
)
def test_only_components_named_by_a_rule_are_quantised(rule: dict[str, Any], changes_loss: bool) -> None:
    lm = model()
    recipe = Recipe.model_validate({"format": "fp32", "rules": [{"format": "fp8", **rule}]})
    plain, exact = losses_and_gradients(lm, named("fp32"))
    found, gradients = losses_and_gradients(lm, recipe)
    assert (found != plain) == changes_loss
    assert torch.isfinite(gradients).all()
    assert not torch.equal(gradients, exact)
    named_parts = {part.component for part in quantizable_parts(lm) if part.module.quantizer is not None}
    assert named_parts == (set(rule["components"]) if "components" in rule else named_parts)
    assert named_parts


def test_recomputed_layers_are_rounded_identically() -> None:
    lm = model()
    _, expected = losses_and_gradients(lm, NVFP4)
    lm.recompute = True
    _, found = losses_and_gradients(lm, NVFP4)
    assert torch.equal(found, expected)


def test_until_switches_products_off_for_the_rest_of_the_run() -> None:
    recipe = NVFP4.model_copy(update={"until": Until(forward=0.82, backward=1)})
    backward = {"input_gradient", "weight_gradient"}
    assert products_at(recipe, 81, 100) == {"forward", *backward}
    assert products_at(recipe, 82, 100) == products_at(recipe, 100, 100) == backward
    assert products_at(NVFP4, 100, 100) == {"forward", *backward}
    assert not is_before(NVFP4, 0, 100)


def test_nothing_is_quantised_before_since() -> None:
    recipe = NVFP4.model_copy(update={"since": 0.7})
    assert products_at(recipe, 69, 100) == frozenset()
    assert products_at(recipe, 70, 100) == products_at(recipe, 100, 100) == products_at(NVFP4, 0, 100)
    assert [is_before(recipe, step, 100) for step in (0, 69, 70, 100)] == [True, True, False, False]


def test_lost_elements_are_counted() -> None:
    x, weight, dy = tensors((1, 16, 16), (16, 16), (1, 16, 16))
    x[0, 0, :8] = 0
    x[0, 0, 8:12] = 1e-6  # beside elements of about 1: below half of the smallest value
    how = quantizer(PLAIN, lost={})
    how.component = ("M", "in_proj")
    linear(how, x, weight, dy)
    lost = how.emulation.lost
    assert lost is not None
    assert {operand for _, _, operand in lost} == {
        "x forward", "w forward", "dy input_gradient", "x weight_gradient", "dy weight_gradient"
    }  # fmt: skip
    n, flushed, saturated = lost["M", "in_proj", "x forward"].tolist()
    y = quantize(x, "nvfp4")
    assert n == 256 - 8
    assert flushed == int(((y == 0) & (x != 0)).sum())
    assert flushed >= 4
    largest = y.abs().unflatten(-1, (-1, 16)).amax(-1, keepdim=True).expand(-1, -1, -1, 16).flatten(2)
    beyond = (x.abs() > largest * (1 + 2**-12)) & (y.abs() == largest)
    assert saturated == int(beyond.sum()) > 0


def test_the_generator_of_a_tensor_is_its_own() -> None:
    one, other = (torch.randn(4, generator=rounding_generator(0, 0, 0, name)) for name in ("a", "b"))
    assert not torch.equal(one, other)


def test_components_in_wider_formats_are_rounded_as_these_formats_are() -> None:
    """In Nemotron 3's recipe Mamba's output projection is MXFP8, which has no rotation and no stochastic rounding."""
    recipe = named("nemotron-3-nvfp4")
    assert {how for pair in products_of(recipe, "mxfp8").values() for how in pair} == {OperandFormat("mxfp8")}
    assert products_of(recipe, "fp8-blocks")["forward"][1].square
    left, right = products_of(recipe, "nvfp4")["weight_gradient"]
    assert (left.hadamard, right.hadamard, left.stochastic, right.stochastic) == (16, 16, False, True)
    own = named("mxfp8").model_copy(update={"stochastic": ("dy",)})
    assert products_of(own, "mxfp8")["input_gradient"][0].stochastic


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "fp8-blocks"},
        {"base": "fp8-blocks"},
        {"base": "fp8-blocks", "square_weights": False},
        {"rules": [{"format": "fp8-blocks", "components": ["up"]}]},
        {"format": "fp8-blocks", "rules": [{"format": "mxfp8", "components": ["up"]}]},
        {"format": "mxfp4"},
    ],
)
def test_the_ledger_counts_the_scales_of_the_weights_that_are_multiplied(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"d_model": 128, "vocab_size": 32, "pattern": "-", "blocks": {"-": {"d_ff": 256}}}
    config, recipe = ModelConfig.model_validate(content), Recipe.model_validate(fields)
    bits, real = 0.0, low_precision.quantize_blocks

    def counted(x: Tensor, noise: Tensor | None, how: Blocks, *more: Any) -> Tensor:
        nonlocal bits
        if how.per_expert:  # weights, not activations
            n_scales = x.numel() / (how.format.block**2 if how.square else how.format.block)
            bits += x.numel() * ELEMENTS[how.format.element].bits + n_scales * SCALE_BITS[how.format.scaling]
        return real(x, noise, how, *more)

    monkeypatch.setattr(low_precision, "quantize_blocks", counted)
    model = config.build()
    quantize_products(model, recipe)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    ledger = in_formats(config.ledger(4), recipe)
    lines = [row.entry for row in ledger if row.entry.is_quantized]
    assert sum(weight_bytes(each, DTYPES) for each in lines) == bits / 8 > 0
    plain, others = config.ledger(4).weight_bytes(), sum(2 * each.params for each in lines)
    assert ledger.weight_bytes() == plain - others + bits / 8
