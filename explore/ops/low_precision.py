"""Products with quantised operands, for linear layers, experts and latent projections.

A linear layer has three products: y = x W, dx = dy W^T and dW = x^T dy. Each operand of each product is quantised from
the tensor in high precision, along the axis that the product sums over, and dequantised. The product is computed in
fp32, and its result is rounded to the dtype of the run.

Shapes: rows (r, d) of all tokens, sorted by expert and then by sequence; e experts, 1 in a linear layer. The rows of a
sequence are padded with zeros to whole blocks, so no block along tokens crosses from one sequence to the next; in
hardware blocks do. The values and their rounding are therefore the same for any split of the sequences among devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.grouped import grouped_outer, grouped_product
from explore.ops.hadamard import hadamard
from explore.ops.linear import linear
from explore.ops.paths import path_of, product_dtype
from explore.ops.quantize import Blocks, count_lost, quantize_blocks, quantize_compiled
from explore.ops.rounding import rounding_generator, rounding_noise
from explore.precision import FORMATS, OPERANDS, UNQUANTIZED, Operand, OperandFormat, Product, Products


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
        is_compiled = path_of("quantize", rows.device.type) == "compiled"
        call = _Call(self, layout, name, is_compiled)
        y: Tensor = _Product.apply(rows.to(dtype), weight, call)  # type: ignore[no-untyped-call]
        return y


class _Call(NamedTuple):
    """One product of a layer and the quantiser of its operands."""

    quantizer: Quantizer
    layout: Layout
    name: str
    is_compiled: bool

    def rows(self, product: Product, operand: Operand, rows: Tensor) -> Tensor:
        """Quantises activations or gradients, in blocks along tokens for the weight gradient, else along features."""
        how = self._how(product, operand)
        if how is None or how.format is None:
            return rows if how is None else rows.float()
        axis = 0 if product == "weight_gradient" else 1
        if how.hadamard:
            rows = hadamard(rows, axis, how.hadamard)
        blocks = _blocks(how, axis, per_expert=False)
        amax = self._amax(rows) if blocks.format.scaling in ("tensor", "e4m3") else None
        noise = self._noise_of_rows(rows, f"{operand} {product}") if how.stochastic else None
        return self._quantized(rows, noise, blocks, amax, f"{operand} {product}")

    def weight(self, product: Product, weight: Tensor) -> Tensor:
        """Quantises weights (e, d_in, d_out) in blocks along the axis that the product sums over."""
        how = self._how(product, "w")
        if how is None or how.format is None:
            return weight if how is None else weight.float()
        axis = 1 if product == "forward" else 2
        if how.hadamard:
            weight = hadamard(weight, axis, how.hadamard)
        # Values that do not depend on the product have one name, so both products draw the same noise.
        generator = (
            self._generator("w" if how.has_no_axis else f"w {product}", weight.device) if how.stochastic else None
        )
        noise = None if generator is None else rounding_noise(weight, generator)
        return self._quantized(weight, noise, _blocks(how, axis, per_expert=True), None, f"w {product}")

    def has_one_weight(self) -> bool:
        """Whether the forward product and the input gradient use the same quantised weight."""
        one, other = self._how("forward", "w"), self._how("input_gradient", "w")
        return one is not None and one == other and one.has_no_axis

    def has_one_gradient(self) -> bool:
        """Whether both products of the backward pass use the same quantised gradient."""
        one, other = self._how("input_gradient", "dy"), self._how("weight_gradient", "dy")
        return one is not None and one == other and one.has_no_axis and not one.stochastic

    def _how(self, product: Product, operand: Operand) -> OperandFormat | None:
        """How an operand is quantised; None if its product is computed without a quantiser."""
        if product not in self.quantizer.emulation.products or product not in self.quantizer.products:
            return None
        return self.quantizer.products[product][OPERANDS[product].index(operand)]

    def _quantized(self, x: Tensor, noise: Tensor | None, blocks: Blocks, amax: Tensor | None, operand: str) -> Tensor:
        y = (quantize_compiled if self.is_compiled else quantize_blocks)(x, noise, blocks, amax)
        if (lost := self.quantizer.emulation.lost) is not None:
            key, counts = (*self.quantizer.component, operand), count_lost(x, y, blocks, amax)
            lost[key] = lost[key] + counts if key in lost else counts
        return y

    def _amax(self, rows: Tensor) -> Tensor:
        """Largest magnitude of the rows of each row's expert, over all processes: (r, 1), or (1, 1) for one expert."""
        n_experts = len(self.layout.counts)
        amax = rows.new_zeros(n_experts, dtype=torch.float32)
        expert_of = None if n_experts == 1 else self.layout.expert_of(rows.device)
        # By rows, `aminmax` is several times slower than the two reductions.
        low, high = rows.aminmax() if expert_of is None else (rows.amin(1), rows.amax(1))
        largest = torch.maximum(-low, high).float()
        amax = amax + largest if expert_of is None else amax.scatter_reduce(0, expert_of, largest, "amax")
        if (reduce_max := self.quantizer.emulation.reduce_max) is not None:
            reduce_max(amax)
        return (amax if expert_of is None else amax[expert_of])[:, None]

    def _noise_of_rows(self, rows: Tensor, operand: str) -> Tensor:
        """Random bits of every row, drawn sequence by sequence, so they do not depend on the device of a sequence."""
        emulation, by_sequence = self.quantizer.emulation, []
        for i, counts in enumerate(zip(*self.layout.counts, strict=True)):
            generator = self._generator(f"{operand} {emulation.first + i * emulation.stride}", rows.device)
            drawn = rounding_noise(rows.new_empty(()).expand(sum(counts), rows.shape[1]), generator)
            by_sequence.append(drawn.split(counts))
        return torch.cat([part for parts in zip(*by_sequence, strict=True) for part in parts])  # by expert

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
            y = grouped_product(call.rows("forward", "x", rows), w, call.layout.loads)
        ctx.save_for_backward(rows, weight, w if call.has_one_weight() else None)
        ctx.call = call
        return y.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, w = ctx.saved_tensors
        call, loads = ctx.call, ctx.call.layout.loads
        dx = dweight = given = None
        with torch.autocast(rows.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if w is None:
                    w = call.weight("input_gradient", weight.to(rows.dtype))
                given = call.rows("input_gradient", "dy", dy)
                dx = grouped_product(given, w.transpose(1, 2), loads).to(rows.dtype)
            if ctx.needs_input_grad[1]:
                if given is None or not call.has_one_gradient():
                    given = None  # frees it before the other is made
                    given = call.rows("weight_gradient", "dy", dy)
                dweight = grouped_outer(call.rows("weight_gradient", "x", rows), given, loads).to(weight.dtype)
        return dx, dweight, None
