"""Variants of a trained layer: fewer indices of an axis, a linear map, or no layer.

Source: the search space of Puzzle, arXiv 2411.19146, section 2.1, along all axes that blocks declare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from explore.blocks import Axis, BlockConfig, Dim, LinearMapConfig
from explore.compress.cutting import Cutter, fields
from explore.config import Config
from explore.foreign import echo
from explore.model import ModelConfig

Change = Literal["cut", "pooled", "linear", "none"]
How = Literal["whole", "cut", "pooled", "linear", "none"]
"""whole: the unchanged layer; cut: fewer indices of some axes; pooled: means over indices of an axis that other axes
share, such as KV heads, where a cut would also remove query heads; linear: one matrix; none: the layer is
removed."""

REPLACEMENTS: tuple[Change, ...] = get_args(Change)

SHARES = (0.5, 0.25)
"""Fractions of an axis that are offered besides the whole."""


class Variant(NamedTuple):
    """A variant of one layer.

    Attributes:
        name: name in tables, such as `n_experts=4`.
        how: kind of change to the layer.
        block: its config; None if the layer is removed.
        sizes: config fields smaller than the parent's.
    """

    name: str
    how: How
    block: BlockConfig | None
    sizes: Mapping[str, int]

    @property
    def is_trained(self) -> bool:
        """Whether it has its own weights."""
        return self.how not in ("whole", "none")


class Offer(Config):
    """The variants in a library.

    Attributes:
        shares: fractions of an axis to keep, below 1.
        vary: sizes to vary, such as `n_experts` or `E.n_experts`; empty varies all.
        at_once: maximum number of sizes of one block cut together.
        replacements: kinds of change to layers.
    """

    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = SHARES
    vary: tuple[str, ...] = ()
    at_once: int = Field(default=1, ge=1, le=4)
    replacements: tuple[Change, ...] = REPLACEMENTS

    def check(self, model: ModelConfig) -> None:
        """Checks that the model has the sizes in `vary`.

        Raises:
            ValueError: a size does not exist.
        """
        known = _known(model)
        for name in self.vary:
            if name not in known and name not in {each.partition(".")[2] for each in known}:
                names = ", ".join(known)
                raise ValueError(f"vary must be a size of this parent, got {echo(name)}; choose from {names}")

    def within(self, model: ModelConfig) -> Offer:
        """This offer without sizes that a model does not have any more."""
        known = {part for name in _known(model) for part in (name, name.partition(".")[2])}
        return self.model_copy(update={"vary": tuple(name for name in self.vary if name in known)})


def _known(model: ModelConfig) -> list[str]:
    """The sizes of a model, by letter."""
    return [name for letter in dict.fromkeys(model.pattern) for name in _names(letter, model.blocks[letter])]


def _names(letter: str, block: BlockConfig) -> list[str]:
    return [f"{letter}.{field}" for field in fields(block.axes())]


def variants(letter: str, block: BlockConfig, offer: Offer) -> list[Variant]:
    """Returns the variants of a layer, the whole one first, then in descending size."""
    found = [Variant("whole", "whole", block, {}), *_smaller(letter, block, offer)]
    if "linear" in offer.replacements:
        found.append(Variant("linear", "linear", LinearMapConfig(), {}))
    if "none" in offer.replacements:
        found.append(Variant("none", "none", None, {}))
    unique: dict[BlockConfig | None, Variant] = {}
    for each in found:
        unique.setdefault(each.block, each)
    return list(unique.values())


def _smaller(letter: str, block: BlockConfig, offer: Offer) -> Iterator[Variant]:
    axes = {axis.field or axis.name: axis for axis in block.axes()}
    sizes = {
        field: _sizes(block, axis, offer.shares)
        for field, axis in axes.items()
        if not offer.vary or field in offer.vary or f"{letter}.{field}" in offer.vary
    }
    for n_fields in range(1, offer.at_once + 1):
        for together in combinations(sizes, n_fields):
            for values in product(*(sizes[field] for field in together)):
                cut = dict(zip(together, values, strict=True))
                name = ", ".join(f"{field}={n}" for field, n in cut.items())
                if n_fields == 1 and "pooled" in offer.replacements and is_pooled(block, axes[together[0]], values[0]):
                    yield from _variant(f"{name} pooled", "pooled", block, cut)
                elif "cut" in offer.replacements:
                    yield from _variant(name, "cut", block, _within(block, cut))


def _variant(name: str, how: How, block: BlockConfig, sizes: Mapping[str, int]) -> Iterator[Variant]:
    try:
        yield Variant(name, how, type(block).model_validate({**block.model_dump(), **sizes}), sizes)
    except ValidationError:  # inconsistent sizes, such as more active experts than experts
        return


def _sizes(block: BlockConfig, axis: Axis, shares: Sequence[float]) -> list[int]:
    """Returns sizes of an axis below the parent's, descending, as multiples of its outer axis."""
    most = int(getattr(block, axis.field or axis.name))
    unit = 1
    if axis.within and not axis.per_index:
        unit = next(each.size for each in block.axes() if each.name == axis.within)
    found = {max(unit, round(share * most / unit) * unit) for share in shares}
    return sorted((n for n in found if n < most), reverse=True)


def _within(block: BlockConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the sizes with inner axes of the cut ones scaled in proportion."""
    found = dict(sizes)
    for axis in block.axes():
        field = axis.field or axis.name
        if axis.within in sizes and not axis.per_index and field not in sizes:
            outer = next(each.size for each in block.axes() if each.name == axis.within)
            found[field] = int(getattr(block, field)) // outer * sizes[axis.within]
    return found


def is_pooled(block: BlockConfig, axis: Axis, n: int) -> bool:
    """Whether an axis can be pooled to `n` means: another axis must share it, as query heads share KV heads."""
    return axis.size % n == 0 and any(each.within == axis.name and not each.per_index for each in block.axes())


def starting_weights(cutter: Cutter, layer: int, variant: Variant) -> dict[str, Tensor]:
    """Returns the initial mixer weights of a smaller variant of a layer, by name in the mixer."""
    prefix = f"layers.{layer}.mixer."
    own = {name: weight for name, weight in cutter.weights.items() if name.startswith(prefix)}
    if variant.how == "pooled":
        ((axis, n),) = variant.sizes.items()
        block = cutter.model.layers[layer]
        sizes = {each.name: each.size for each in block.axes()}
        local = {name.removeprefix(prefix): weight for name, weight in own.items()}
        return {name: pooled(weight, block.layout()[name], axis, n, sizes) for name, weight in local.items()}
    plan = cutter.plan({f"{layer}.{field}": n for field, n in variant.sizes.items()})
    return {name.removeprefix(prefix): weight for name, weight in plan.cut_weights(own).items()}


def pooled(weight: Tensor, dims: Sequence[Dim], axis: str, n: int, sizes: Mapping[str, int]) -> Tensor:
    """Returns a weight with consecutive indices of an axis averaged, so that `n` remain.

    Source: key and value heads as in arXiv 2305.13245, section 2.1.

    Args:
        dims: axes of its dimensions.
        sizes: sizes of all axes.
    """
    for k, dim in enumerate(dims):
        if not any(axis in stretch for stretch in dim):
            continue
        shapes = [[part if isinstance(part, int) else sizes[part] for part in stretch] for stretch in dim]
        parts = list(weight.split([math.prod(shape) for shape in shapes], k))
        for i, (stretch, shape) in enumerate(zip(dim, shapes, strict=True)):
            if axis in stretch:
                at = stretch.index(axis)
                runs = [*shape[:at], n, shape[at] // n, *shape[at + 1 :]]
                parts[i] = parts[i].unflatten(k, runs).mean(k + at + 1).flatten(k, k + len(shape) - 1)
        weight = torch.cat(parts, k)
    return weight
