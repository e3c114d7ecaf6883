"""Chooses a format for every component under a bit budget, by integer programming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from explore.compress.program import Budget, solve


class Choice(NamedTuple):
    """A format for every component.

    Attributes:
        formats: format by component.
        sensitivity: sum over the components, in nats per token.
        bits: total bits of all components.
        status: the solver's message.
    """

    formats: dict[str, str]
    sensitivity: float
    bits: float
    status: str


def choose(
    sensitivity: Mapping[str, Mapping[str, float]], bits: Mapping[str, Mapping[str, float]], budget: float
) -> Choice:
    """Returns the formats with the lowest total sensitivity within a budget; ties go to the fewest bits.

    Args:
        sensitivity: sensitivity by component and format.
        bits: bits of the component's weights in each format.
        budget: total bits of all components.

    Raises:
        ValueError: no choice fits the budget.
    """
    errors = [list(row.values()) for row in sensitivity.values()]
    costs = [[bits[name][format] for format in row] for name, row in sensitivity.items()]
    if (least := sum(map(min, costs))) > budget:
        raise ValueError(f"budget must be at least {least:g} bits, got {budget:g}")
    found = solve(errors, costs, [Budget(costs, budget)])
    pairs = zip(sensitivity.items(), found.options, strict=True)
    formats = {name: list(row)[option] for (name, row), option in pairs}
    spent = sum(bits[name][format] for name, format in formats.items())
    return Choice(formats, found.value, spent, found.status)
