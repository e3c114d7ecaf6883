"""The integer program of `explore puzzle` compared with enumeration of all choices."""

from __future__ import annotations

import random
import time
from itertools import product
from typing import Any

import pytest

from explore.bench.compress import random_program
from explore.compress.program import Budget, NoSolutionError, Row, Same, solve


def case(rng: random.Random, n_items: int, n_options: int, n_budgets: int, *, alike: bool) -> dict[str, Any]:
    """A small program with few distinct integers, so that many choices are equally good."""
    sizes = [n_options if alike else rng.randint(1, n_options) for _ in range(n_items)]

    def rows(most: int) -> list[list[float]]:
        return [[float(rng.randint(0, most)) for _ in range(size)] for size in sizes]

    budgets = []
    for _ in range(n_budgets):
        costs = rows(9)
        least, most = (sum(end(row) for row in costs) for end in (min, max))
        budgets.append(Budget(costs, least + rng.choice([0.3, 0.5, 0.8]) * (most - least)))
    return {"values": rows(4), "ties": rows(3), "budgets": budgets}


def enumerated(program: dict[str, Any], allowed: Any = lambda _: True) -> tuple[int, ...] | None:
    """The best choice: the smallest value, then the smallest tie-breaker, then the first in order of the options."""

    def total(rows: list[list[float]], choice: tuple[int, ...]) -> float:
        return sum(row[option] for row, option in zip(rows, choice, strict=True))

    every = product(*(range(len(row)) for row in program["values"]))
    fitting = [
        choice
        for choice in every
        if all(total(costs, choice) <= most for costs, most in program["budgets"]) and allowed(choice)
    ]
    return min(fitting, key=lambda c: (total(program["values"], c), total(program["ties"], c), c), default=None)


@pytest.mark.parametrize("seed", range(50))
def test_the_solution_equals_enumeration(seed: int) -> None:
    rng = random.Random(seed)
    program = case(rng, rng.randint(1, 5), 4, rng.randint(0, 3), alike=False)
    best = enumerated(program)
    if best is None:
        with pytest.raises(NoSolutionError):
            solve(**program)
        return
    found = solve(**program)
    assert found.options == best
    assert found.value == sum(row[option] for row, option in zip(program["values"], best, strict=True))
    assert "Optimal" in found.status
    assert found.gap == 0


@pytest.mark.parametrize("seed", range(20))
def test_items_that_must_be_the_same_take_the_best_common_option(seed: int) -> None:
    rng = random.Random(100 + seed)
    program = case(rng, 5, 3, 1, alike=True)
    groups = [Same([0, 2, 3], frozenset({2})), Same([1, 4])]

    def is_same(choice: tuple[int, ...]) -> bool:
        first = {choice[i] for i in (0, 2, 3)} - {2}
        return len(first) <= 1 and choice[1] == choice[4]

    best = enumerated(program, is_same)
    if best is None:
        with pytest.raises(NoSolutionError):
            solve(**program, same=groups)
        return
    assert solve(**program, same=groups).options == best


@pytest.mark.parametrize("seed", range(10))
def test_constraints_bound_the_choice(seed: int) -> None:
    program = case(random.Random(200 + seed), 5, 3, 1, alike=True)
    two_last = Row({(i, 2): 1.0 for i in range(5)}, 2, 2)
    best = enumerated(program, lambda choice: choice.count(2) == 2)
    if best is None:
        with pytest.raises(NoSolutionError):
            solve(**program, rows=[two_last])
        return
    assert solve(**program, rows=[two_last]).options == best


def test_a_bound_is_met_exactly() -> None:
    """Costs of billions: the solver's tolerance would accept one that is slightly too large."""
    costs = [[3_000_000_000.0, 2_999_999_999.0], [3_000_000_000.0, 2_999_999_999.0]]
    values = [[0.0, 1.0], [0.0, 1.5]]
    found = [solve(values, costs, [Budget(costs, most)]).options for most in (6e9, 6e9 - 1, 6e9 - 2)]
    assert found == [(0, 0), (1, 0), (1, 1)]


def test_a_model_of_88_layers_with_60_variants_each_takes_seconds() -> None:
    program = random_program(0)
    assert {len(row) for row in program["values"]} == {60}
    assert len(program["values"]) == 88
    start = time.process_time()
    found = solve(**program)
    assert time.process_time() - start < 20  # 2 s are the aim on an idle machine
    for costs, most in program["budgets"]:
        assert sum(row[option] for row, option in zip(costs, found.options, strict=True)) <= most
    assert "Optimal" in found.status
