"""Candidates: the children of some free sizes that meet budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from pydantic import ValidationError

from explore.compress.cutting import Cutter, fields, names
from explore.compress.measures import Setting, check_measure, measure
from explore.foreign import echo
from explore.model import ModelConfig
from explore.solve import Free

DEPTH = "depth"
"""A free size: how many layers are kept."""

STEPS = 16
"""Values of a free size from nothing to the parent's, where no step is given."""

LARGEST = 20_000
"""Most combinations of free sizes."""


class Candidate(NamedTuple):
    """A child that meets the budgets.

    Attributes:
        sizes: of what is free.
        n_dropped: layers that are left out.
        values: what it costs, by target.
        off: the largest relative distance from a target.
    """

    sizes: Mapping[str, int]
    n_dropped: int
    values: Mapping[str, float]
    off: float


@dataclass(frozen=True)
class Size:
    """A free size and its values, in rising order."""

    name: str
    values: tuple[int, ...]


def free_size(model: ModelConfig, text: str) -> Size:
    """Reads `NAME`, `NAME=LOW:HIGH` or `NAME=LOW:HIGH:STEP`: multiples of the step up to the parent's size.

    Without a range the values end with the parent's size, and go down to a quarter of it, or half of its layers.

    Raises:
        ValueError: no such size, or no value is left.
    """
    name, equals, _ = text.partition("=")
    if name == DEPTH:
        most, unit = model.n_layers, 1
    elif name == "d_model":
        most, unit = model.d_model, 1
    else:
        most, unit = _bounds(model, name)
    step = 1 if name == DEPTH else max(unit, most // STEPS // unit * unit)
    if equals:
        free = Free.parse(text if text.count(":") == 2 else f"{text}:{step}")
        values = [n for n in free.lattice if n <= most and n % unit == 0]
    else:
        low = math.ceil(most / 2) if name == DEPTH else max(unit, most // 4)
        values = list(range(most, low - 1, -step))[::-1]
    if not values:
        raise ValueError(f"free: {name} must have a value from {unit} to the parent's {most}, got {echo(text)}")
    return Size(name, tuple(values))


def _bounds(model: ModelConfig, name: str) -> tuple[int, int]:
    """The largest value that all layers with a field have, and what its values must be multiples of."""
    letter, _, field = name.rpartition(".")
    most, unit = [], 1
    for each in dict.fromkeys(model.pattern):
        axes = {axis.field or axis.name: axis for axis in model.blocks[each].axes()}
        if letter in ("", each) and field in axes:
            axis = axes[field]
            most.append(int(getattr(model.blocks[each], field)))
            if axis.within and not axis.per_index:
                unit = math.lcm(unit, axes[axis.within].size)
    if not most:
        raise ValueError(f"free must be among {DEPTH}, {', '.join(names(model))} for this parent, got {echo(name)}")
    return min(most), unit


def shape(cutter: Cutter, sizes: Mapping[str, int], n_dropped: int) -> ModelConfig:
    """The config of a child, without choosing what it keeps.

    Raises:
        ValueError: there is no such child.
    """
    model = cutter.model
    dropped = cutter.dropped(n_dropped)
    blocks = {}
    for letter, block in model.blocks.items():
        own = {name.rpartition(".")[2]: n for name, n in sizes.items() if name.rpartition(".")[0] in ("", letter)}
        counted = fields(block.axes()) if letter in model.pattern else []
        blocks[letter] = type(block).model_validate(
            {**block.model_dump(), **{field: n for field, n in own.items() if field in counted}}
        )
    content = {name: getattr(model, name) for name in ModelConfig.model_fields}
    pattern = "".join(letter for i, letter in enumerate(model.pattern) if i not in dropped)
    width = sizes.get("d_model", model.d_model)
    return ModelConfig.model_validate({**content, "d_model": width, "pattern": pattern, "blocks": blocks})


def candidates(
    cutter: Cutter, targets: Mapping[str, float], free: Sequence[Size], setting: Setting, tolerance: float = 0.01
) -> list[Candidate]:
    """Every child of the free sizes that meets all targets within the tolerance, in the order of its sizes.

    Args:
        tolerance: allowed relative distance from a target.

    Raises:
        ValueError: a target above the parent's cost, too many combinations, or none that meets the targets.
    """
    if not (targets and free):
        raise ValueError(f"{'free' if targets else 'target'}: at least one is required")
    if len({size.name for size in free}) < len(free):
        raise ValueError(f"free: each size must be named once, got {', '.join(size.name for size in free)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    for name, target in targets.items():
        check_measure(name)
        whole = measure(name, cutter.model, setting)
        if not 0 < target <= whole * (1 + tolerance):
            raise ValueError(f"{name}: must be above 0 and at most the parent's {_text(whole)}, got {_text(target)}")
    if (n := math.prod(len(size.values) for size in free)) > LARGEST:
        raise ValueError(f"free: at most {LARGEST:,} combinations can be looked at, got {n:,}; give larger steps")
    points = [each for each in _points(cutter, targets, free, setting) if each.off < math.inf]
    found = [each for each in points if each.off <= tolerance]
    if found:
        return found
    if not points:
        raise ValueError(f"free: none of the {n:,} combinations of sizes is a model")
    best = min(points, key=lambda each: each.off)
    worst = max(targets, key=lambda name: _off(best.values[name], targets[name]))
    sizes = ", ".join(f"{name}={value}" for name, value in best.sizes.items())
    raise ValueError(
        f"{worst}: no child comes within {tolerance:.1%} of {_text(targets[worst])}; "
        f"the nearest has {_text(best.values[worst])}, with {sizes}"
    )


def _points(
    cutter: Cutter, targets: Mapping[str, float], free: Sequence[Size], setting: Setting
) -> Iterator[Candidate]:
    for values in product(*(size.values for size in free)):
        sizes = dict(zip((size.name for size in free), values, strict=True))
        widths = {name: n for name, n in sizes.items() if name != DEPTH}
        n_dropped = cutter.model.n_layers - sizes.get(DEPTH, cutter.model.n_layers)
        try:
            child = shape(cutter, widths, n_dropped)
        except ValidationError:  # sizes that cannot go together, such as more active experts than there are
            continue
        costs = {name: measure(name, child, setting) for name in targets}
        yield Candidate(sizes, n_dropped, costs, max(_off(costs[name], target) for name, target in targets.items()))


def _off(value: float, target: float) -> float:
    """Relative distance of a value from a target, the same for a factor above and below."""
    return math.inf if value <= 0 else math.expm1(abs(math.log(value / target)))


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
