"""Products with quantised operands, for linear layers, experts and latent projections.

A linear layer has three products: y = x W, dx = dy W^T and dW = x^T dy. Each operand of each product is quantised from
the tensor in high precision, along the axis that the product sums over, and dequantised. The product is computed in
fp32, and its result is rounded to the dtype of the run. The path `bf16` computes the same product with the bf16
instructions of a CPU: all formats fit bf16 apart from the scale of the whole tensor, which divides the result instead.

Shapes: rows (r, d) of all tokens, sorted by expert and then by sequence; e experts, 1 in a linear layer. The rows of a
sequence are padded with zeros to whole blocks, so no block along tokens crosses from one sequence to the next; in
hardware blocks do. The values and their rounding are therefore the same for any split of the sequences among devices.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.grouped import bf16_instructions, grouped_outer, grouped_product
from explore.ops.hadamard import hadamard
from explore.ops.linear import linear
from explore.ops.paths import OpPath, declare, path_of, product_dtype
from explore.ops.quantize import (
    SCALED_AS_WHOLE,
    Blocks,
    count_lost,
    quantize_blocks,
    quantize_compiled,
    tensor_scale,
)
from explore.ops.rounding import rounding_bits, rounding_generator, rounding_noise
from explore.precision import FORMATS, OPERANDS, UNQUANTIZED, Operand, OperandFormat, Product, Products

declare(
    "quantized_product",
    OpPath("fp32", default_on="any", reference=True, countable=True),
    OpPath("bf16", countable=True),
)


@dataclass(eq=False)
class Emulation:
    """State shared by all quantisers of a model at one step of a run.

    Attributes:
        seed: seed of the run, on which stochastic rounding depends.
        step: number of completed optimizer steps.
        products: products quantised at this step.
        first: index of this process's first sequence in the whole batch.
        stride: distance between its sequences in the batch.
        reduce_max: takes a tensor's maximum over all processes, in place; None for a single process.
        is_off: modules compute as if they had no quantiser, as before `Recipe.since`.
        lost: accumulated counts of `count_lost` by letter, component and operand; None disables counting.
    """

    seed: int = 0
    step: int = 0
    products: frozenset[Product] = frozenset(OPERANDS)
    first: int = 0
    stride: int = 1
    reduce_max: Callable[[Tensor], None] | None = None
    is_off: bool = False
    lost: dict[tuple[str, str, str], Tensor] | None = None


@dataclass(eq=False)
class Layout:
    """Which rows belong to which expert and sequence.

    Attributes:
        counts: rows of every sequence, by expert.
    """

    counts: list[list[int]]

    @cached_property
    def loads(self) -> list[int]:
        """Rows of each expert."""
        return [sum(counts) for counts in self.counts]

    def expert_of(self, device: torch.device) -> Tensor:
        """The expert of each row."""
        loads = torch.tensor(self.loads, device=device)
        return torch.arange(len(loads), device=device).repeat_interleave(loads, output_size=sum(self.loads))


@dataclass(eq=False)
class Quantizer:
    """Quantises the operands of a linear layer, or of the experts of a layer.

    Attributes:
        format: format of the component.
        products: formats of the operands by product; a product without an entry is computed without a quantiser.
        layer: index of the layer, or the name of a part outside the layers.
        name: name of the module in the layer. Stochastic rounding depends on `layer` and `name`.
        component: letter and component of the ledger under which elements are counted.
    """

    format: str
    products: Products
    emulation: Emulation = field(default_factory=Emulation)
    layer: int | str = 0
    name: str = ""
    component: tuple[str, str] = ("", "")

    @property
    def grain(self) -> int:
        """The rows of a sequence are padded to a multiple of this number; it is 1 if there is no backward pass."""
        if "weight_gradient" not in self.products or not torch.is_grad_enabled():
            return 1
        x, dy = self.products["weight_gradient"]
        return lcm(x.grain, dy.grain)

    def linear(
        self,
        x: Float[Tensor, "*dims d_in"],
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, " d_out"] | None = None,
    ) -> Float[Tensor, "*dims d_out"]:
        """Returns x W^T + b; the last axis of `dims` counts the positions of a sequence."""
        if self.emulation.is_off:
            return linear(x, weight, bias)
        sequences = x.flatten(0, -3) if x.ndim > 2 else x.reshape(1, -1, x.shape[-1])
        n_sequences, length, _ = sequences.shape
        filled = length + -length % self.grain
        rows = F.pad(sequences, (0, 0, 0, filled - length)).flatten(0, 1)  # r d_in
        filled_y = self.product(rows, weight.T[None], Layout([[filled] * n_sequences]))
        y: Tensor = filled_y.unflatten(0, (n_sequences, filled))[:, :length].reshape(*x.shape[:-1], len(weight))
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y

    def product(
        self, rows: Float[Tensor, "r d_in"], weight: Float[Tensor, "e d_in d_out"], layout: Layout, name: str = ""
    ) -> Float[Tensor, "r d_out"]:
        """Multiplies rows by the weights of their expert.

        Args:
            weight: weights in the dtype of the optimizer, so that their gradient is not rounded to a narrower dtype.
            layout: rows by expert and sequence; each number is a multiple of `grain`.
            name: name of the weight if the module has several.
        """
        dtype = torch.float32 if self.format in UNQUANTIZED else product_dtype(rows)
        device = rows.device.type
        is_compiled = path_of("quantize", device) == "compiled"
        # Not for experts: their numbers of rows vary, and oneDNN generates code for every shape.
        is_fast = rows.is_cpu and len(weight) == 1 and path_of("quantized_product", device) == "bf16"
        call = _Call(self, layout, name, dtype, is_compiled, is_fast)
        y: Tensor = _Product.apply(rows.to(dtype), weight, call)  # type: ignore[no-untyped-call]
        return y


class _Operand(NamedTuple):
    """A quantised operand of a product.

    Attributes:
        values: its values, times `scale`.
        scale: one number for each expert; None for 1.
    """

    values: Tensor
    scale: Tensor | None = None


class _Call(NamedTuple):
    """One product of a layer and the quantiser of its operands.

    Attributes:
        dtype: dtype of operands without a quantiser.
        is_fast: products whose operands fit bf16 use its instructions.
    """

    quantizer: Quantizer
    layout: Layout
    name: str
    dtype: torch.dtype
    is_compiled: bool
    is_fast: bool

    def rows(self, product: Product, operand: Operand, rows: Tensor) -> _Operand:
        """Quantises activations or gradients, in blocks along tokens for the weight gradient, else along features."""
        how = self._how(product, operand)
        if how is None or how.format is None:
            return _Operand(rows if how is None else rows.float())
        axis = 0 if product == "weight_gradient" else 1
        if how.hadamard:
            rows = hadamard(rows, axis, how.hadamard)
        blocks = _blocks(how, axis, per_expert=False)
        amax = self._amax(rows) if blocks.format.scaling in SCALED_AS_WHOLE else None  # e
        noise = self._noise_of_rows(rows, f"{operand} {product}") if how.stochastic else None
        by_row = None if amax is None else self._by_row(amax, rows.device)
        return self._quantized(rows, noise, blocks, amax, by_row, product, operand)

    def weight(self, product: Product, weight: Tensor) -> _Operand:
        """Quantises weights (e, d_in, d_out) in blocks along the axis that the product sums over."""
        how = self._how(product, "w")
        if how is None or how.format is None:
            return _Operand(weight if how is None else weight.float())
        axis = 1 if product == "forward" else 2
        if how.hadamard:
            weight = hadamard(weight, axis, how.hadamard)
        # Values that do not depend on the product have one name, so both products draw the same noise.
        generator = (
            self._generator("w" if how.has_no_axis else f"w {product}", weight.device) if how.stochastic else None
        )
        noise = None if generator is None else rounding_noise(weight, generator)
        blocks = _blocks(how, axis, per_expert=True)
        amax = weight.abs().amax((1, 2)).float() if blocks.format.scaling in SCALED_AS_WHOLE else None  # e
        by_weight = None if amax is None else amax[:, None, None]
        return self._quantized(weight, noise, blocks, amax, by_weight, product, "w")

    def is_narrow(self, product: Product) -> bool:
        """Whether a product of quantised operands is computed with bf16 instructions."""
        operands = [self._how(product, operand) for operand in OPERANDS[product]]
        return self.is_fast and all(how is not None and self._fits_bf16(how) for how in operands)

    def has_one_weight(self) -> bool:
        """Whether the forward product and the input gradient use the same quantised weight."""
        one, other = self._how("forward", "w"), self._how("input_gradient", "w")
        is_same = one is not None and one == other and one.has_no_axis
        return is_same and self.is_narrow("forward") == self.is_narrow("input_gradient")

    def has_one_gradient(self) -> bool:
        """Whether both products of the backward pass use the same quantised gradient."""
        one, other = self._how("input_gradient", "dy"), self._how("weight_gradient", "dy")
        is_same = one is not None and one == other and one.has_no_axis and not one.stochastic
        return is_same and self.is_narrow("input_gradient") == self.is_narrow("weight_gradient")

    def multiplied(self, rows: _Operand, weight: _Operand, product: Product) -> Tensor:
        """Multiplies rows by the weights of their expert."""
        with bf16_instructions() if self.is_narrow(product) else nullcontext():
            y = grouped_product(rows.values, weight.values, self.layout.loads)
        for scale in (rows.scale, weight.scale):
            if scale is not None:
                y.div_(self._by_row(scale, y.device))
        return y

    def outer(self, x: _Operand, dy: _Operand) -> Tensor:
        """The gradient of the weights of every expert."""
        with bf16_instructions() if self.is_narrow("weight_gradient") else nullcontext():
            dweight = grouped_outer(x.values, dy.values, self.layout.loads)
        for scale in (x.scale, dy.scale):
            if scale is not None:
                dweight.div_(scale[:, None, None])
        return dweight

    def _how(self, product: Product, operand: Operand) -> OperandFormat | None:
        """How an operand is quantised; None if its product is computed without a quantiser."""
        if product not in self.quantizer.emulation.products or product not in self.quantizer.products:
            return None
        return self.quantizer.products[product][OPERANDS[product].index(operand)]

    def _fits_bf16(self, how: OperandFormat) -> bool:
        return self.dtype == torch.bfloat16 if how.format is None else FORMATS[how.format].fits_bf16

    def _quantized(
        self,
        x: Tensor,
        noise: Tensor | None,
        blocks: Blocks,
        amax: Tensor | None,
        amax_of_each: Tensor | None,
        product: Product,
        operand: Operand,
    ) -> _Operand:
        """Quantises a tensor.

        Args:
            amax: largest magnitude of each expert, in formats that scale whole tensors.
            amax_of_each: the same, to broadcast against `x`.
        """
        whole = amax is None or not self.is_narrow(product)
        y = (quantize_compiled if self.is_compiled else quantize_blocks)(x, noise, blocks, amax_of_each, whole)
        if (lost := self.quantizer.emulation.lost) is not None:
            key, counts = (*self.quantizer.component, f"{operand} {product}"), count_lost(x, y, blocks, amax_of_each)
            lost[key] = lost[key] + counts if key in lost else counts
        return _Operand(y, None if amax is None or whole else tensor_scale(amax, blocks))

    def _amax(self, rows: Tensor) -> Tensor:
        """Largest magnitude of the rows of each expert, over all processes."""
        ends = [
            torch.stack(part.aminmax()) if len(part) else part.new_zeros(2) for part in rows.split(self.layout.loads)
        ]
        amax = torch.stack(ends).abs().amax(1).float()
        if (reduce_max := self.quantizer.emulation.reduce_max) is not None:
            reduce_max(amax)
        return amax

    def _by_row(self, number: Tensor, device: torch.device) -> Tensor:
        """The number of each row's expert: (r, 1), or (1, 1) for one expert."""
        return (number if len(number) == 1 else number[self.layout.expert_of(device)])[:, None]

    def _noise_of_rows(self, rows: Tensor, operand: str) -> Tensor:
        """Random bits of every row, drawn sequence by sequence, so they do not depend on the device of a sequence."""
        emulation, by_sequence = self.quantizer.emulation, []
        for i, counts in enumerate(zip(*self.layout.counts, strict=True)):
            generator = self._generator(f"{operand} {emulation.first + i * emulation.stride}", rows.device)
            drawn = rounding_bits(sum(counts) * rows.shape[1], generator).view(-1, rows.shape[1])
            by_sequence.append(drawn.split(counts))
        return torch.cat([part for parts in zip(*by_sequence, strict=True) for part in parts]).float()  # by expert

    def _generator(self, operand: str, device: torch.device) -> torch.Generator:
        quantizer = self.quantizer
        tensor = " ".join(filter(None, (quantizer.name, self.name, operand)))
        return rounding_generator(quantizer.emulation.seed, quantizer.emulation.step, quantizer.layer, tensor, device)


def _blocks(how: OperandFormat, axis: int, *, per_expert: bool) -> Blocks:
    assert how.format is not None
    return Blocks(FORMATS[how.format], axis, how.square, per_expert, how.four_over_six, how.scale_rounding)


class _Product(torch.autograd.Function):
    """Multiplies rows by the weights of their expert, with quantised operands in this product and in both gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Float[Tensor, "r d_in"], weight: Float[Tensor, "e d_in d_out"], call: _Call
    ) -> Float[Tensor, "r d_out"]:
        with torch.autocast(rows.device.type, enabled=False):
            w = call.weight("forward", weight.to(rows.dtype))
            y = call.multiplied(call.rows("forward", "x", rows), w, "forward")
        ctx.save_for_backward(rows, weight, *(w if call.has_one_weight() else (None, None)))
        ctx.call = call
        return y.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, values, scale = ctx.saved_tensors
        call = ctx.call
        dx = dweight = given = None
        with torch.autocast(rows.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if values is None:
                    values, scale = call.weight("input_gradient", weight.to(rows.dtype))
                given = call.rows("input_gradient", "dy", dy)
                w = _Operand(values.transpose(1, 2), scale)
                dx = call.multiplied(given, w, "input_gradient").to(rows.dtype)
            if ctx.needs_input_grad[1]:
                if given is None or not call.has_one_gradient():
                    given = None  # frees it before the other is made
                    given = call.rows("weight_gradient", "dy", dy)
                dweight = call.outer(call.rows("weight_gradient", "x", rows), given).to(weight.dtype)
        return dx, dweight, None
