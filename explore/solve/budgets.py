"""Budgets (the targets of a solve), free dimensions (the sizes that may change), and solutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from explore.foreign import did_you_mean, echo, shorten
from explore.formatting import read_count
from explore.model import ModelConfig
from explore.quantities import budgets

BUDGETS = budgets()
"""Allowed targets: FLOPs per token, parameters, and bytes of one sequence after `seq_len` tokens."""

RANGES: Mapping[str, tuple[int, int, int]] = {
    "d_model": (64, 16_384, 64),
    "d_ff": (16, 65_536, 16),
    "d_expert": (16, 16_384, 16),
    "d_shared": (16, 32_768, 16),
    "d_latent": (16, 8_192, 16),
    "n_experts": (8, 1_024, 8),
    "top_k": (1, 64, 1),
}
"""Default lowest value, highest value and step of a field."""

LARGEST_SIZE = 2**53
"""Largest value of a free dimension: floats represent every integer up to it."""


@dataclass(frozen=True)
class Free:
    """A dimension to solve for: a multiple of `step` from `low` to `high`.

    Attributes:
        field: a field of the model (`d_model`) or of a block (`blocks.E.d_expert`, or `E.d_expert`). A block's field
            without a letter (`d_expert`) is one dimension shared by every block of the pattern that has it.
    """

    field: str
    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("step", self.step)):
            if value < 1:
                raise ValueError(f"{shorten(self.field)}: {name} must be at least 1, got {echo(value)}")
        if self.high > LARGEST_SIZE:
            raise ValueError(f"{shorten(self.field)}: high must be at most {LARGEST_SIZE}, got {echo(self.high)}")
        if not self.lattice:
            raise ValueError(f"{shorten(self.field)}: no multiple of {self.step} is between {self.low} and {self.high}")

    @property
    def lattice(self) -> range:
        """The allowed values."""
        return range(-(-self.low // self.step) * self.step, self.high + 1, self.step)

    @classmethod
    def parse(cls, text: str) -> Free:
        """Reads `field`, `field=low:high` or `field=low:high:step`; missing parts come from `RANGES`.

        Raises:
            ValueError: the text has another form, or no value is allowed.
        """
        field, equals, bounds = text.strip().partition("=")
        low, high, step = RANGES.get(field.rpartition(".")[2], (1, 1_024, 1))
        if equals:
            try:
                low, high, *rest = (_whole(number) for number in bounds.split(":"))
                [step] = rest or [step]
            except ValueError:
                field = ""
        if not field:
            raise ValueError(f"free: {echo(text)} is not of the form field, field=low:high or field=low:high:step")
        return cls(field, low, high, step)

    @property
    def name(self) -> str:
        return self.field.rpartition(".")[2]

    def spread(self, n: int) -> list[int]:
        """Returns at most `n` of the allowed values, evenly spaced in their logarithm."""
        if len(values := self.lattice) <= n:
            return list(values)
        spaced = np.geomspace(values[0], values[-1], n).tolist()
        return sorted({values[round((value - values[0]) / self.step)] for value in spaced})


def _whole(text: str) -> int:
    """Reads a whole number, with or without a suffix: `64`, `4k`."""
    if text.strip().removeprefix("-").isdecimal():
        return int(text)
    value = read_count(text)
    if value != int(value):
        raise ValueError(f"must be a whole number, got {echo(text)}")
    return int(value)


class Residual(NamedTuple):
    """One budget of a solution.

    Attributes:
        target: value to reach or to compare with; None if there is none.
        solved: whether the budget was solved for.
        residual: value / target - 1.
        ok: value and target are within a factor of 1 + tolerance.
    """

    name: str
    value: float
    target: float | None
    solved: bool
    residual: float | None
    ok: bool | None


@dataclass(frozen=True)
class Solution:
    """The point nearest to the targets: the one with the smallest worst ratio to a target.

    Attributes:
        values: value of every solved field, by full path.
        residuals: one entry for each of `BUDGETS`, solved for or not.
        why: reason why the targets are not met; empty if they are.
    """

    model: ModelConfig
    values: Mapping[str, int]
    residuals: tuple[Residual, ...]
    seq_len: int
    tolerance: float
    why: str = ""

    @property
    def feasible(self) -> bool:
        """Whether every target is met within the tolerance."""
        return all(line.ok for line in self.residuals if line.solved)

    def __str__(self) -> str:
        lines = ["  ".join(f"{field}={value}" for field, value in self.values.items())]
        lines.append(f"{'budget':28}{'value':>20}{'target':>20}{'residual':>12}")
        for name, value, target, solved, residual, ok in self.residuals:
            shown = ("", "") if target is None or residual is None else (f"{target:,.0f}", f"{residual:+.2%}")
            verdict = "" if ok is None else ("ok" if ok else "off") + ("" if solved else ", not solved for")
            lines.append(f"{name:28}{value:>20,.0f}{shown[0]:>20}{shown[1]:>12}  {verdict}".rstrip())
        return "\n".join([*lines, *([f"infeasible: {self.why}"] if self.why else [])])


def known(name: str) -> str:
    """Checks that a budget exists and returns its name."""
    if name not in BUDGETS:
        hint = did_you_mean(name, BUDGETS)
        raise ValueError(f"targets: {echo(name)} is unknown; {hint}choose from {', '.join(BUDGETS)}")
    return name


def checked(targets: Mapping[str, float]) -> Mapping[str, float]:
    """Checks that the targets are positive and name known budgets, and returns them."""
    for name, target in targets.items():
        known(name)
        if not 0 < target < math.inf:
            raise ValueError(f"{name}: the target must be a positive number, got {target}")
    return targets


def off(value: float, target: float) -> float:
    """Distance of a value from its target, as the absolute logarithm of their ratio."""
    return abs(math.log(max(value, 1e-9) / target))


def residual(name: str, value: float, target: float | None, solved: bool, tolerance: float) -> Residual:
    """The residual of one budget against its target, if any."""
    if target is None:
        return Residual(name, value, None, solved, None, None)
    return Residual(name, value, target, solved, value / target - 1, off(value, target) <= math.log1p(tolerance))
