"""Candidates: children with free sizes that meet budgets."""

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
"""Name of the free size for the number of layers."""

STEPS = 16
"""Number of steps from 0 to the parent's size when no step is given."""

LARGEST = 20_000
"""Maximum number of combinations of free sizes."""


class Candidate(NamedTuple):
    """A child that meets the budgets.

    Attributes:
        sizes: values of the free sizes.
        n_dropped: number of removed layers.
        values: cost by target.
        off: largest relative error over the targets.
    """

    sizes: Mapping[str, int]
    n_dropped: int
    values: Mapping[str, float]
    off: float


@dataclass(frozen=True)
class Size:
    """A free size and its values in ascending order."""

    name: str
    values: tuple[int, ...]


def free_size(model: ModelConfig, text: str) -> Size:
    """Reads `NAME`, `NAME=LOW:HIGH` or `NAME=LOW:HIGH:STEP`: multiples of the step up to the parent's size.

    The default range goes from a quarter (for layers, half) of the parent's size up to that size.

    Raises:
        ValueError: no such size, or the range holds no value.
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
    """Returns the largest value possible in all layers with a field, and the unit its values must be multiples of."""
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
    """Returns a child's config without choosing which indices it keeps.

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
    """Returns every child that meets all targets within the tolerance, ordered by sizes.

    Args:
        tolerance: allowed relative error (0.01 = 1%).

    Raises:
        ValueError: a target exceeds the parent's cost, there are too many combinations, or none meets the targets.
    """
    check_search(cutter.model, targets, free, setting, tolerance)
    points = [each for each in _points(cutter, targets, free, setting) if each.off < math.inf]
    found = [each for each in points if each.off <= tolerance]
    if found:
        return found
    if not points:
        n = math.prod(len(size.values) for size in free)
        raise ValueError(f"free: none of the {n:,} combinations of sizes is a model")
    best = min(points, key=lambda each: each.off)
    worst = max(targets, key=lambda name: _off(best.values[name], targets[name]))
    sizes = ", ".join(f"{name}={value}" for name, value in best.sizes.items())
    raise ValueError(
        f"{worst}: no child comes within {tolerance:.1%} of {_text(targets[worst])}; "
        f"the nearest has {_text(best.values[worst])}, with {sizes}"
    )


def check_search(
    model: ModelConfig, targets: Mapping[str, float], free: Sequence[Size], setting: Setting, tolerance: float
) -> None:
    """Checks a search for candidates against the parent's config, before anything is enumerated.

    Raises:
        ValueError: a target exceeds the parent's cost, there are too many combinations, or something is missing.
    """
    if not (targets and free):
        raise ValueError(f"{'free' if targets else 'target'}: at least one is required")
    if len({size.name for size in free}) < len(free):
        raise ValueError(f"free: each size must be named once, got {', '.join(size.name for size in free)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    for name, target in targets.items():
        check_measure(name)
        whole = measure(name, model, setting)
        if not 0 < target <= whole * (1 + tolerance):
            raise ValueError(f"{name}: must be above 0 and at most the parent's {_text(whole)}, got {_text(target)}")
    if (n := math.prod(len(size.values) for size in free)) > LARGEST:
        raise ValueError(f"free: at most {LARGEST:,} combinations can be looked at, got {n:,}; give larger steps")


def _points(
    cutter: Cutter, targets: Mapping[str, float], free: Sequence[Size], setting: Setting
) -> Iterator[Candidate]:
    for values in product(*(size.values for size in free)):
        sizes = dict(zip((size.name for size in free), values, strict=True))
        widths = {name: n for name, n in sizes.items() if name != DEPTH}
        n_dropped = cutter.model.n_layers - sizes.get(DEPTH, cutter.model.n_layers)
        try:
            child = shape(cutter, widths, n_dropped)
        except ValidationError:  # inconsistent sizes, such as more active experts than experts
            continue
        costs = {name: measure(name, child, setting) for name in targets}
        yield Candidate(sizes, n_dropped, costs, max(_off(costs[name], target) for name, target in targets.items()))


def _off(value: float, target: float) -> float:
    """Relative error of a value; the same for a factor above and below the target."""
    return math.inf if value <= 0 else math.expm1(abs(math.log(value / target)))


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
