"""Budgets and free dimensions: what a model should come to, and what may change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from explore.foreign import did_you_mean, echo, shorten
from explore.model import ModelConfig
from explore.quantities import budgets

BUDGETS = budgets()
"""What can be a target: FLOPs are per token, bytes those of one sequence after `seq_len` tokens."""

RANGES: Mapping[str, tuple[int, int, int]] = {
    "d_model": (64, 16_384, 64),
    "d_ff": (16, 65_536, 16),
    "d_expert": (16, 16_384, 16),
    "d_shared": (16, 32_768, 16),
    "d_latent": (16, 8_192, 16),
    "n_experts": (8, 1_024, 8),
    "top_k": (1, 64, 1),
}
"""Lowest value, highest value and step of a field for which none are given."""

LARGEST_SIZE = 2**53
"""Largest value of a dimension that is solved for: floats hold every whole number up to it."""


@dataclass(frozen=True)
class Free:
    """A dimension to solve for: a multiple of `step` from `low` to `high`.

    Attributes:
        field: a field of the model (`d_model`) or of a block (`blocks.E.d_expert`, or `E.d_expert`). The name of
            a block's field alone (`d_expert`) is one dimension that every block of the pattern with such a field
            shares.
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
            raise ValueError(f"{shorten(self.field)}: no multiple of {self.step} lies from {self.low} to {self.high}")

    @property
    def lattice(self) -> range:
        """The values that are allowed."""
        return range(-(-self.low // self.step) * self.step, self.high + 1, self.step)

    @classmethod
    def parse(cls, text: str) -> Free:
        """Reads `field`, `field=low:high` or `field=low:high:step`; `RANGES` has what is not given.

        Raises:
            ValueError: not of that form, or no value is left.
        """
        field, equals, bounds = text.strip().partition("=")
        low, high, step = RANGES.get(field.rpartition(".")[2], (1, 1_024, 1))
        if equals:
            try:
                low, high, *rest = (int(number) for number in bounds.split(":"))
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
        """At most `n` of the allowed values, spread evenly in their logarithm, or all."""
        if len(values := self.lattice) <= n:
            return list(values)
        spaced = np.geomspace(values[0], values[-1], n).tolist()
        return sorted({values[round((value - values[0]) / self.step)] for value in spaced})


class Residual(NamedTuple):
    """One budget of a solution.

    Attributes:
        target: what it should be, or what it is compared with; none when absent.
        solved: it was solved for.
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
    """The nearest point to the targets: the one whose worst target is least off, as a ratio.

    Attributes:
        values: value of every field that was solved for, under its whole path.
        residuals: all of `BUDGETS`, solved for or not.
        why: what is in the way of the targets; empty where they are met.
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
    """The name, if there is such a budget."""
    if name not in BUDGETS:
        hint = did_you_mean(name, BUDGETS)
        raise ValueError(f"targets: {echo(name)} is unknown; {hint}allowed are {', '.join(BUDGETS)}")
    return name


def checked(targets: Mapping[str, float]) -> Mapping[str, float]:
    """The targets, if they are of known budgets and positive."""
    for name, target in targets.items():
        known(name)
        if not 0 < target < math.inf:
            raise ValueError(f"{name}: the target must be a positive number, got {target}")
    return targets


def off(value: float, target: float) -> float:
    """How far a value is off its target, as the logarithm of a ratio."""
    return abs(math.log(max(value, 1e-9) / target))


def residual(name: str, value: float, target: float | None, solved: bool, tolerance: float) -> Residual:
    """One budget beside its target, if there is one."""
    if target is None:
        return Residual(name, value, None, solved, None, None)
    return Residual(name, value, target, solved, value / target - 1, off(value, target) <= math.log1p(tolerance))
