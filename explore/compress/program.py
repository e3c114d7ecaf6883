"""Integer program: choose one option per item with the least total value under budgets, solved to optimality.

Values are rounded to integers so that the solver's tolerance cannot hide a better choice. Ties go to the lower
tie-breaker, then to the first choice in the order of the options, item by item.

Source: Puzzle, arXiv 2411.19146, section 3; so is the constraint that makes further solutions differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from explore.terminal import c_output_discarded

RESOLUTION = 10**7
"""Integer to which the largest value, and the largest tie-breaker, are scaled."""

STEPS = 10**4
"""Largest coefficient of a bound after scaling; the solver meets bounds to 1e-6."""

SLACK = RESOLUTION * 1e-6
"""Allowed error of the linear relaxation: an option is ruled out only if it costs more than this above the optimum."""

ROUNDING = 1e-12
"""Relative error of a cost sum that is ignored."""

Rows = Sequence[Sequence[float]]
"""Numbers by item and option."""


class Budget(NamedTuple):
    """An upper bound on the total cost of the chosen options.

    Attributes:
        costs: cost by item and option.
        most: largest allowed sum.
    """

    costs: Rows
    most: float


class Row(NamedTuple):
    """A bound on the choice: low <= sum of the weights of chosen (item, option) pairs <= high."""

    weights: Mapping[tuple[int, int], float]
    low: float
    high: float


class Same(NamedTuple):
    """Items that must take the same option.

    Attributes:
        items: item indices; all have the same number of options.
        free: options that an item may take on its own.
    """

    items: Sequence[int]
    free: frozenset[int] = frozenset()


class Solution(NamedTuple):
    """One option for every item.

    Attributes:
        options: option index by item.
        value: minimised sum of values.
        status: the solver's message.
        gap: relative gap to the bound proved by the solver.
    """

    options: tuple[int, ...]
    value: float
    status: str
    gap: float


class NoSolutionError(ValueError):
    """No choice meets the bounds."""


def solve(
    values: Rows,
    ties: Rows,
    budgets: Sequence[Budget] = (),
    rows: Sequence[Row] = (),
    same: Sequence[Same] = (),
) -> Solution:
    """Returns the choice with the least sum of values.

    Args:
        values: values to minimise, by item and option.
        ties: tie-breakers, minimised among equal sums of values.
        budgets: bounds on sums of costs.
        rows: further bounds.
        same: groups of items that take the same option.

    Raises:
        NoSolutionError: nothing meets the bounds.
    """
    program = _Program(values, budgets, rows, same)
    whole, second = program.whole(values), program.whole(ties)
    while True:
        program.allow(np.ones(program.n))
        best, status, gap = program.minimum(whole, [])
        program.allow(program.possible(whole, best))
        tied = [program.at_most(whole, best)]
        chosen = best
        if program.has_other(best, tied):
            chosen, _, _ = program.minimum(second, tied)
            chosen = program.first(chosen, [*tied, program.at_most(second, chosen)])
        if program.fits(chosen):
            break
        program.fixed.append(program.other_than(chosen))  # the solver meets bounds only to its tolerance
    options = program.options(chosen)
    value = float(sum(values[i][option] for i, option in enumerate(options)))
    return Solution(options, value, status, gap)


class _Program:
    """The constraints, over one binary variable per option of each item and of each group."""

    def __init__(self, values: Rows, budgets: Sequence[Budget], rows: Sequence[Row], same: Sequence[Same]) -> None:
        self.sizes = [len(row) for row in values]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(int)
        self.n = int(self.starts[-1])
        self.n_shared = sum(self.sizes[group.items[0]] for group in same)
        self.budgets = [(flat(budget.costs), budget.most) for budget in budgets]
        self.fixed = [self._constraint({(i, c): 1.0 for i in range(len(values)) for c in self._columns(i)}, 1, 1)]
        for row in rows:
            self.fixed.append(self._constraint({(0, self._column(*at)): w for at, w in row.weights.items()}, *row[1:]))
        self._add_same(same)
        self.allow(np.ones(self.n))

    def allow(self, options: np.ndarray) -> None:
        """Restricts the choice to options marked 1; the others are marked 0."""
        self.upper = np.concatenate([options, np.ones(self.n_shared)])

    def _add_same(self, same: Sequence[Same]) -> None:
        """Ties the options of a group's items to the group's variables."""
        column = self.n
        for group in same:
            options = range(self.sizes[group.items[0]])
            self.fixed.append(self._constraint({(0, column + k): 1.0 for k in options}, 1, 1))
            bound = [(i, k) for i in group.items for k in options if k not in group.free]
            own = {(row, self._column(i, k)): 1.0 for row, (i, k) in enumerate(bound)}
            shared = {(row, column + k): -1.0 for row, (_, k) in enumerate(bound)}
            if bound:
                self.fixed.append(self._constraint(own | shared, -np.inf, 0))
            column += len(options)

    def _column(self, item: int, option: int) -> int:
        return int(self.starts[item]) + option

    def _columns(self, item: int) -> range:
        return range(int(self.starts[item]), int(self.starts[item + 1]))

    def _constraint(self, entries: Mapping[tuple[int, int], float], low: float, high: float) -> LinearConstraint:
        rows, columns = np.array(list(entries)).T
        shape = (int(rows.max()) + 1, self.n + self.n_shared)
        return LinearConstraint(csr_array((list(entries.values()), (rows, columns)), shape=shape), low, high)

    def whole(self, rows: Rows) -> np.ndarray:
        """Scales numbers to integers up to `RESOLUTION`, each item's least at 0; sums keep their order."""
        above = flat(rows) - np.concatenate([np.full(len(row), min(row)) for row in rows])
        whole: np.ndarray = np.round(above / max(float(above.max()), np.finfo(float).tiny) * RESOLUTION)
        return whole

    def at_most(self, objective: np.ndarray, chosen: np.ndarray) -> LinearConstraint:
        """Bounds an objective by its value at a choice."""
        unit = RESOLUTION / STEPS
        return LinearConstraint(self._padded(objective) / unit, -np.inf, (objective @ chosen + 0.5) / unit)

    def _padded(self, of_options: np.ndarray) -> np.ndarray:
        return np.concatenate([of_options, np.zeros(self.n_shared)])

    def fits(self, chosen: np.ndarray) -> bool:
        return all(costs @ chosen <= most + ROUNDING * abs(most) for costs, most in self.budgets)

    def options(self, chosen: np.ndarray) -> tuple[int, ...]:
        return tuple(int(chosen[start:end].argmax()) for start, end in pairwise(self.starts))

    def has_other(self, chosen: np.ndarray, ties: list[LinearConstraint]) -> bool:
        """Whether another choice meets the same bounds."""
        try:
            self.minimum(np.zeros(self.n), [*ties, self.other_than(chosen)])
        except NoSolutionError:
            return False
        return True

    def first(self, chosen: np.ndarray, ties: list[LinearConstraint]) -> np.ndarray:
        """Returns the first of equally good choices in the order of the options, item by item."""
        if not self.has_other(chosen, ties):
            return chosen
        for i, size in enumerate(self.sizes):
            order = np.zeros(self.n)
            order[self.starts[i] : self.starts[i + 1]] = np.arange(size)
            chosen, _, _ = self.minimum(order, ties)
            ties = [*ties, self._constraint({(0, self._column(i, self.options(chosen)[i])): 1.0}, 1, 1)]
        return chosen

    def possible(self, objective: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Marks the options that a choice as good as the given one can contain: few, so ties are quick to break.

        The optimum of the linear relaxation plus an option's reduced cost is a lower bound on every choice with it.
        """
        every = [*self.fixed, *self._fits()]
        rows = vstack([csr_array(each.A) for each in every])  # type: ignore[arg-type]
        low, high = np.concatenate([each.lb for each in every]), np.concatenate([each.ub for each in every])
        above, below = np.isfinite(low), np.isfinite(high)
        with c_output_discarded():
            found = linprog(
                self._padded(objective),
                A_ub=vstack([rows[below], -rows[above]]),
                b_ub=np.concatenate([high[below], -low[above]]),
                bounds=(0, 1),
            )
        if found.fun is None:
            return np.ones(self.n)
        bound = found.fun + found.lower.marginals[: self.n]
        marked: np.ndarray = bound <= objective @ chosen + SLACK
        return marked.astype(float)

    def other_than(self, chosen: np.ndarray) -> LinearConstraint:
        """Returns a constraint that excludes a choice."""
        taken = self.options(chosen)
        return self._constraint({(0, self._column(*at)): 1.0 for at in enumerate(taken)}, -np.inf, len(taken) - 1)

    def minimum(self, objective: np.ndarray, ties: list[LinearConstraint]) -> tuple[np.ndarray, str, float]:
        """Returns the optimum as zeros and ones, the solver's message, and the remaining gap.

        Raises:
            NoSolutionError: there is none.
        """
        with c_output_discarded():
            found = milp(
                self._padded(objective),
                integrality=np.ones(self.n + self.n_shared, dtype=int),
                bounds=Bounds(0, self.upper),
                constraints=[*self.fixed, *self._fits(), *ties],
                options={"mip_rel_gap": 0},
            )
        if found.x is None:
            raise NoSolutionError(f"the integer program has no solution: {found.message}")
        return np.round(found.x[: self.n]), str(found.message), float(found.mip_gap or 0)

    def _fits(self) -> list[LinearConstraint]:
        """The budgets, each counted from the least that its items can cost, in units that suit the solver."""
        fits = []
        for costs, most in self.budgets:
            least = np.concatenate(
                [np.full(end - start, costs[start:end].min()) for start, end in pairwise(self.starts)]
            )
            unit = max(float((costs - least).max()), np.finfo(float).tiny) / STEPS
            room = most - least[self.starts[:-1]].sum()
            fits.append(LinearConstraint(self._padded(costs - least) / unit, -np.inf, room / unit))
        return fits


def flat(rows: Rows) -> np.ndarray:
    """Concatenates the numbers of all items."""
    return np.array([value for row in rows for value in row], dtype=float)
