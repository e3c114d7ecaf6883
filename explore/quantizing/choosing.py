"""The choice of a format for every component under a budget of bits, as an integer program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

RESOLUTION = 10**7
"""Steps to which the largest sensitivity, and the bits of the whole model, are rounded: the program is one of whole
numbers, so that the solver's own tolerance hides no better choice."""


class Choice(NamedTuple):
    """A format for every component.

    Attributes:
        formats: by component.
        sensitivity: sum over the components, in nats per token.
        bits: of all components together.
        status: what the solver said.
    """

    formats: dict[str, str]
    sensitivity: float
    bits: float
    status: str


def choose(
    sensitivity: Mapping[str, Mapping[str, float]], bits: Mapping[str, Mapping[str, float]], budget: float
) -> Choice:
    """The formats with the least sum of sensitivities that fit a budget; of equal sums, those with the fewest bits.

    Args:
        sensitivity: by component and format.
        bits: of the component's weights in that format.
        budget: bits of all components together.

    Raises:
        ValueError: no choice fits the budget.
    """
    pairs = [(name, format) for name, row in sensitivity.items() for format in row]
    least = sum(min(bits[name][format] for format in row) for name, row in sensitivity.items())
    if least > budget:
        raise ValueError(f"budget must be at least {least:g} bits, got {budget:g}")
    cost = np.array([bits[name][format] for name, format in pairs])
    error = np.array([sensitivity[name][format] for name, format in pairs])
    largest, unit = max(float(error.max()), np.finfo(float).tiny), float(cost.max())
    whole_error, whole_cost = np.round(error / largest * RESOLUTION), np.round(cost / unit * RESOLUTION)
    one_each = LinearConstraint(np.array([[float(name == other) for other, _ in pairs] for name in sensitivity]), 1, 1)
    slack = 0.0
    while True:
        fits = LinearConstraint(cost / unit, -np.inf, budget / unit - slack)
        best, status = _solve(whole_error, [one_each, fits])
        ties = LinearConstraint(whole_error / RESOLUTION, -np.inf, (whole_error @ best + 0.5) / RESOLUTION)
        chosen, _ = _solve(whole_cost, [one_each, fits, ties])
        if cost @ chosen <= budget:
            break
        slack = max(1e-9, 10 * slack)  # the solver meets a bound to its tolerance only
    formats = {name: format for (name, format), taken in zip(pairs, chosen, strict=True) if taken}
    return Choice(formats, float(error @ chosen), float(cost @ chosen), status)


def _solve(objective: np.ndarray, constraints: list[LinearConstraint]) -> tuple[np.ndarray, str]:
    """The optimum, with no gap left, as zeros and ones."""
    found = milp(
        objective,
        integrality=np.ones(len(objective), dtype=int),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise ValueError(f"the integer program has no solution: {found.message}")
    return np.round(found.x), str(found.message)
