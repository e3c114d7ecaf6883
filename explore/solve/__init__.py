"""Budget solver: finds sizes with which a pattern meets targets for FLOPs, parameters and state.

It makes comparisons fair: a standard MoE and its latent form, for example, at equal active and total parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from explore.cost import SEQ_LEN
from explore.model import ModelConfig
from explore.solve.budgets import BUDGETS, RANGES, Free, Residual, Solution, checked, known, residual
from explore.solve.search import Search, path
from explore.solve.why import why

__all__ = ["BUDGETS", "RANGES", "Free", "Residual", "Solution", "match", "solve"]


def solve(
    content: Mapping[str, Any] | ModelConfig,
    targets: Mapping[str, float],
    free: Iterable[Free | str],
    *,
    seq_len: int = SEQ_LEN,
    tolerance: float = 0.01,
    compare: Mapping[str, float] | None = None,
) -> Solution:
    """Finds values of the free dimensions with which a model meets its targets.

    Candidates that `ModelConfig` rejects are skipped, and so are latents wider than the model.

    Args:
        content: fields of the model. Missing block sizes follow `d_model`; a `ModelConfig` has all sizes, so they stay
            fixed.
        free: dimensions, or texts for `Free.parse`.
        compare: further budgets whose residual is reported but not solved for.

    Raises:
        ValueError: a budget or field is unknown, a target is not positive, or no candidate is a valid model.
    """
    targets, compare = checked(targets), checked(compare or {})
    dimensions = tuple(Free.parse(each) if isinstance(each, str) else each for each in free)
    if not (targets and dimensions):
        raise ValueError(f"{'free' if targets else 'targets'}: at least one is required")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    if isinstance(content, ModelConfig):
        content = {name: getattr(content, name) for name in type(content).model_fields}
    search = Search(content, dimensions, targets, seq_len)
    point = search.best()
    cost = (model := search.model(point)).cost(seq_len)
    residuals = tuple(
        residual(name, getattr(cost, name), {**compare, **targets}.get(name), name in targets, tolerance)
        for name in BUDGETS
    )
    values = {path(place): n for n, places in zip(point, search.places, strict=True) for place in places}
    solution = Solution(model, values, residuals, seq_len, tolerance)
    return solution if solution.feasible else replace(solution, why=why(search, point, tolerance))


def match(
    reference: ModelConfig,
    content: Mapping[str, Any] | ModelConfig,
    free: Iterable[Free | str],
    budgets: Sequence[str] = ("params_active", "params_total"),
    *,
    seq_len: int = SEQ_LEN,
    tolerance: float = 0.01,
) -> Solution:
    """Solves for these budgets of a reference model, and reports the residuals of all its other budgets."""
    cost = reference.cost(seq_len)
    everything = {name: getattr(cost, name) for name in BUDGETS}
    targets = {name: everything[name] for name in map(known, budgets)}
    compare = {name: value for name, value in everything.items() if value > 0}
    return solve(content, targets, free, seq_len=seq_len, tolerance=tolerance, compare=compare)
