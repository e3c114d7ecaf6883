"""Explains why targets cannot be met: the bounds that prevent it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from explore.solve.budgets import Free
from explore.solve.search import Point, Search, neighbours


def why(search: Search, point: Point, tolerance: float) -> str:
    """Names the targets that are out of reach, and the bounds that prevent them."""
    within, score = math.log1p(tolerance), search.score(point)

    def helps(free: Sequence[Free], beyond: Free | None = None) -> bool:
        other = search.changed(free)
        best = other.best()
        inside = beyond is not None and beyond.low <= best[search.free.index(beyond)] <= beyond.high
        return not inside and other.score(best) <= max(within, 0.9 * score)

    lines = [line for name in search.targets if (line := _out_of_reach(search, name, within))]
    if not lines:
        lines = [f"{' and '.join(search.targets)}: each can be met, but not together"]
    ends = [
        (i, bound, wider)
        for i, (each, value) in enumerate(zip(search.free, point, strict=True))
        for bound, wider in _relaxed(each, value)
    ]
    one = [bound for i, bound, wider in ends if helps([*search.free[:i], wider, *search.free[i + 1 :]], search.free[i])]
    together = {i: wider for i, _, wider in ends}
    fine = [replace(each, low=each.lattice[0], step=max(1, each.step // 4)) for each in search.free]
    if one:
        lines.append(f"in the way: {', '.join(one)}")
    elif len(ends) > 1 and helps([together.get(i, each) for i, each in enumerate(search.free)]):
        lines.append(f"in the way, together: {', '.join(bound for _, bound, _ in ends)}")
    elif tuple(fine) != search.free and helps(fine):
        coarse = (f"{each.field} in steps of {each.step}" for each in search.free if each.step > 1)
        lines.append(f"too coarse: {', '.join(coarse)}")
    else:
        around = product(*map(neighbours, search.free, point))
        single = [near for near in around if sum(map(operator.ne, near, point)) == 1]
        refused = dict.fromkeys(reason for near in single if (reason := search.refusal(near)))
        lines.append(f"in the way: {'; '.join(refused) or 'the fixed dimensions'}")
    return "; ".join(lines)


def _out_of_reach(search: Search, name: str, within: float) -> str:
    """The nearest value to a target if it is the only one, as text; empty if that meets it."""
    target = search.targets[name]
    alone = search.changed(targets={name: target})
    best = alone.best()
    if alone.score(best) <= within:
        return ""
    [value] = alone.found[best] or (0,)
    tried = [values[0] for values in alone.found.values() if values]
    word = "least" if min(tried) > target else "most" if max(tried) < target else "nearest"
    return f"{name}: {value:,.0f} is the {word} in reach, target {target:,.0f}"


def _relaxed(free: Free, value: int) -> list[tuple[str, Free]]:
    """The bounds that a value has reached, each with a dimension whose bound is four times wider."""
    low, high = free.lattice[0], free.lattice[-1]
    found = []
    if value == low > 1:
        lower = max(1, low // 4)
        found.append((f"{free.field} >= {low}", replace(free, low=lower, step=min(free.step, lower))))
    if value == high:
        found.append((f"{free.field} <= {high}", replace(free, high=4 * high)))
    return found
