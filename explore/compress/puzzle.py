"""Chooses a replacement for every layer under budgets by integer programming, and baselines for comparison.

Source: Puzzle, arXiv 2411.19146, section 3; the baselines are those of its table 14.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from explore.compress.library import Library, Replacement, find_library
from explore.compress.measures import Setting, check_measure, measure
from explore.compress.plan import FRESH_LETTERS, Plan
from explore.compress.program import Budget, NoSolutionError, Row, Rows, Same, Solution, solve
from explore.model import ModelConfig
from explore.runs import RunFolder

SIZE = "params_total"
"""Tie-breaker between equal divergences: the fewest parameters."""

MOST_TIGHTENED = 8
"""Maximum number of times a budget is tightened when costs are not additive."""


class Choice(NamedTuple):
    """One replacement for every layer.

    Attributes:
        options: replacement index by layer.
        predicted: sum of each replacement's own divergence, in nats per token.
        costs: the child's cost, by budget.
        status: the solver's message; empty without a solver.
        gap: relative gap to the bound proved by the solver.
    """

    options: tuple[int, ...]
    predicted: float
    costs: Mapping[str, float]
    status: str = ""
    gap: float | None = None


@dataclass(frozen=True)
class Limits:
    """Limits on a child.

    Attributes:
        most: upper bounds, by measure.
        same: all kept layers of one letter have the same replacement.
        drop: number of removed layers; None allows any.
    """

    most: Mapping[str, float]
    same: bool = False
    drop: int | None = None

    def with_budget(self, name: str, most: float) -> Limits:
        """Returns these limits with a further budget."""
        return Limits({**self.most, name: most}, self.same, self.drop)


class Puzzle:
    """Finds the best children of a library under limits, in a given setting."""

    def __init__(self, library: Library, setting: Setting) -> None:
        self.library, self.setting = library, setting
        self._costs: dict[str, list[list[float]]] = {}

    @property
    def parent(self) -> ModelConfig:
        """The parent's config."""
        return self.library.parent_model

    @cached_property
    def divergences(self) -> list[list[float]]:
        """Divergence of every replacement alone, by layer."""
        return [[each.kl for each in layer] for layer in self.library.layers]

    def parent_cost(self, name: str) -> float:
        """Cost of the parent."""
        return self.cost_of(self.parent, name)

    def cost_of(self, model: ModelConfig, name: str) -> float:
        """Cost of a model in the children's setting."""
        return measure(name, model, self.setting)

    def costs(self, name: str) -> list[list[float]]:
        """Cost of each replacement minus that of the layer itself, by layer; changes are additive."""
        if name not in self._costs:
            whole, known, rows = self.parent_cost(name), {}, []
            for i, layer in enumerate(self.library.layers):
                row = []
                for each in layer:
                    if (at := (self.parent.layers[i], each.block)) not in known:
                        known[at] = self.cost_of(self._replaced(i, each), name) - whole
                    row.append(known[at])
                rows.append(row)
            self._costs[name] = rows
        return self._costs[name]

    def _replaced(self, layer: int, by: Replacement) -> ModelConfig:
        """Returns the parent with one layer replaced."""
        model = self.parent
        if by.how == "whole":
            return model
        letter = next(each for each in FRESH_LETTERS if each not in model.blocks)
        middle, blocks = "", dict(model.blocks)
        if by.block is not None:
            middle, blocks[letter] = letter, by.block
        pattern = model.pattern[:layer] + middle + model.pattern[layer + 1 :]
        content = {name: getattr(model, name) for name in ModelConfig.model_fields}
        return ModelConfig.model_validate({**content, "pattern": pattern, "blocks": blocks})

    def plan(self, choice: Choice, limits: Limits, **origin: float) -> Plan:
        """Returns the plan of a choice; its origin holds the limits, and the solver's message and gap."""
        asked = tuple(f"{name}={value:g}" for name, value in limits.most.items())
        about: dict[str, bool | float | str] = {"same": limits.same} if limits.same else {}
        if choice.gap is not None:
            about |= {"status": choice.status, "gap": choice.gap}
        return self.library.plan(choice.options, most=asked, predicted=choice.predicted, **about, **origin)

    def solve(self, limits: Limits, *, solutions: int = 1, differ: int = 1) -> list[Choice]:
        """Returns the best choices, best first.

        Args:
            solutions: number of choices.
            differ: minimum number of layers in which each differs from all earlier ones.

        Raises:
            ValueError: too few choices meet the limits.
        """
        self.check(limits)
        n = len(self.library.layers)
        if solutions < 1 or not 1 <= differ <= n:
            raise ValueError(f"solutions must be at least 1 and differ from 1 to {n}, got {solutions} and {differ}")
        found: list[Choice] = []
        while len(found) < solutions:
            others = [Row(dict.fromkeys(enumerate(each.options), 1.0), -math.inf, n - differ) for each in found]
            try:
                found.append(self._best(self.divergences, limits, others))
            except NoSolutionError:
                if found:
                    raise ValueError(
                        f"solutions must be at most {len(found)} under these budgets if they differ in {differ} "
                        f"layers, got {solutions}"
                    ) from None
                raise self._unmet(limits) from None
        return found

    def check(self, limits: Limits) -> None:
        """Checks limits against the parent and the library.

        Raises:
            ValueError: a limit is impossible or above the parent's cost.
        """
        n = len(self.library.layers)
        if limits.drop is not None and not 0 <= limits.drop < n:
            raise ValueError(f"drop: must be from 0 to {n - 1} of {n} layers, got {limits.drop}")
        if limits.drop and not self._all("none"):
            raise ValueError(f"drop: must be 0 if replacements do not include none, got {limits.drop}")
        for name, most in limits.most.items():
            check_measure(name)
            if not 0 < most <= (whole := self.parent_cost(name)):
                raise ValueError(f"{name}: must be above 0 and at most the parent's {_text(whole)}, got {_text(most)}")

    def _best(self, values: Rows, limits: Limits, others: Sequence[Row] = ()) -> Choice:
        """Returns the choice with the least sum of values."""
        rows, same = self._rows(limits), self._same(limits)
        tightened = dict(limits.most)
        for _ in range(MOST_TIGHTENED):
            budgets = [Budget(self.costs(name), most - self.parent_cost(name)) for name, most in tightened.items()]
            found = solve(values, self.costs(SIZE), budgets, [*rows, *others], same)
            choice = self.choice(found.options, limits, found)
            over = {name: choice.costs[name] - most for name, most in limits.most.items()}
            if all(excess <= 1e-9 * limits.most[name] for name, excess in over.items()):
                return choice
            tightened = {name: most - max(0.0, over[name]) for name, most in tightened.items()}
        raise NoSolutionError("the budgets cannot be met by adding up what layers cost")

    def choice(self, options: Sequence[int], limits: Limits, solution: Solution | None = None) -> Choice:
        """Returns a choice with its costs measured on the actual child."""
        child = self.library.plan(options).model()
        costs = {name: self.cost_of(child, name) for name in limits.most}
        predicted = float(sum(row[k] for row, k in zip(self.divergences, options, strict=True)))
        details = {} if solution is None else {"status": solution.status, "gap": solution.gap}
        return Choice(tuple(options), predicted, costs, **details)  # type: ignore[arg-type]

    def _rows(self, limits: Limits) -> list[Row]:
        """Returns bounds on the number of removed layers."""
        n, none = len(self.library.layers), self._all("none")
        low, high = (0, n - 1) if limits.drop is None else (limits.drop, limits.drop)
        return [Row(none, low, high)] if none else []

    def _all(self, *hows: str) -> dict[tuple[int, int], float]:
        """Returns the replacements of some kinds, each with weight 1."""
        layers = enumerate(self.library.layers)
        return {(i, k): 1.0 for i, layer in layers for k, each in enumerate(layer) if each.how in hows}

    def _same(self, limits: Limits) -> list[Same]:
        """Groups the layers of each letter; every layer may still be removed on its own."""
        if not limits.same:
            return []
        groups: dict[str, list[int]] = {}
        for i, letter in enumerate(self.parent.pattern):
            groups.setdefault(letter, []).append(i)
        layers = self.library.layers
        free = {
            letter: [k for k, each in enumerate(layers[at[0]]) if each.how == "none"] for letter, at in groups.items()
        }
        return [Same(at, frozenset(free[letter])) for letter, at in groups.items()]

    def _unmet(self, limits: Limits) -> ValueError:
        """Returns an error that names the unreachable budget and its minimum, or the minimum of every budget alone."""
        bare, alone = Limits({}, limits.same, limits.drop), dict[str, float]()
        for name, most in limits.most.items():
            others = {other: value for other, value in limits.most.items() if other != name}
            for given in (bare, Limits(others, limits.same, limits.drop)):
                try:
                    best = self._best(self.costs(name), given)
                except NoSolutionError:
                    continue
                least = self.cost_of(self.library.plan(best.options).model(), name)
                if least > most:
                    with_others = " with the other budgets" if given.most else ""
                    return ValueError(f"{name}: must be at least {_text(least)}{with_others}, got {_text(most)}")
                alone.setdefault(name, least)
        given_text = ", ".join(f"{name}={_text(most)}" for name, most in limits.most.items())
        least_text = ", ".join(f"{name}={_text(least)}" for name, least in alone.items())
        return ValueError(f"no child meets {given_text} together; the least of each alone is {least_text}")

    # Baselines

    def baselines(self, limits: Limits, seed: int = 0) -> Iterator[tuple[str, Choice]]:
        """Yields the choices of simpler methods under the same budgets, by name, if they find one."""
        trained = self._all("cut", "pooled", "linear")
        small = [Row(trained, 0, 0)] if trained else []
        methods: dict[str, Callable[[], Choice]] = {
            "greedy": lambda: self._stepwise(limits, None),
            "random": lambda: self._stepwise(limits, random.Random(seed)),
            "most parameters": lambda: self._best([[-n for n in row] for row in self.costs(SIZE)], limits),
            "whole layers only": lambda: self._best(self.divergences, limits, small),
        }
        for name, choose in methods.items():
            try:
                yield name, choose()
            except NoSolutionError:
                continue

    def _stepwise(self, limits: Limits, rng: random.Random | None) -> Choice:
        """Applies replacements one at a time until the budgets are met.

        Each is the one with the least added divergence per saving, or a random one.
        """
        options = [0] * len(self.library.layers)
        costs = {name: self.costs(name) for name in limits.most}
        left = {name: self.parent_cost(name) - most for name, most in limits.most.items()}

        def excess(change: Mapping[str, float]) -> float:
            return sum(max(0.0, left[name] + change.get(name, 0.0)) / limits.most[name] for name in left)

        while (now := excess({})) > 0:
            moves = []
            for i, layer in enumerate(self.library.layers):
                kept = sum(self.library.layers[j][k].how != "none" for j, k in enumerate(options) if j != i)
                for k, each in enumerate(layer):
                    change = {name: rows[i][k] - rows[i][options[i]] for name, rows in costs.items()}
                    saved = now - excess(change)
                    if saved > 0 and (each.how != "none" or kept):
                        added = self.divergences[i][k] - self.divergences[i][options[i]]
                        moves.append((added / saved, i, k, change))
            if not moves:
                raise NoSolutionError("no further replacement saves anything")
            _, i, k, change = min(moves, key=lambda move: move[:3]) if rng is None else rng.choice(moves)
            options[i] = k
            left = {name: value + change[name] for name, value in left.items()}
        return self.choice(options, limits)


def puzzle(
    run: RunFolder | str | Path | Library,
    most: Mapping[str, float],
    *,
    same: bool = False,
    drop: int | None = None,
    setting: Setting | None = None,
) -> tuple[Plan, Choice]:
    """Returns the best child of a library under budgets, as a plan with its prediction.

    Args:
        run: run folder with a library from `explore puzzle` or `explore.train.block_library`, or the library itself.
        most: upper bounds by measure, such as `{"params_active": 1e6}`.
        same: as in `Limits`.
        drop: as in `Limits`.
        setting: context, batch, dtypes and hardware for costs; None uses one sequence of the run.

    Raises:
        ValueError: there is no library, or no child meets the budgets.
    """
    if isinstance(run, Library):
        library = run
    else:
        folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
        library = find_library(folder.path)
    context = int(library.about["seq_len"])
    solver, limits = Puzzle(library, setting or Setting(context)), Limits(most, same, drop)
    (choice,) = solver.solve(limits)
    return solver.plan(choice, limits), choice


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
