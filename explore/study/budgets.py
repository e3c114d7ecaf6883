"""Fair budgets: the solver gives every trial of a sweep the same parameters, FLOPs or state bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from explore.experiment import Experiment
from explore.model import ModelConfig
from explore.quantities import quantity
from explore.solve import BUDGETS, Free, solve


class RejectedError(ValueError):
    """Raised for a trial that must not be trained, with the reason; a rejected trial costs nothing."""


@dataclass(frozen=True)
class Budgets:
    """The budgets that every trial of a sweep meets.

    Attributes:
        targets: budgets of `explore.solve.BUDGETS`, such as `{"params_active": 1.2e6}`.
        free: dimensions that the solver sets, as in `explore solve --free`: `d_model=64:256:32`, `E.d_expert`.
            Dimensions of blocks that a pattern lacks are skipped.
        seq_len: sequence length in tokens at which FLOPs and state are counted.
        tolerance: largest allowed relative residual.
        compare: further budgets whose residual is recorded but not solved for.
    """

    targets: Mapping[str, float]
    free: Sequence[str]
    seq_len: int
    tolerance: float = 0.01
    compare: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.targets, *self.compare):
            if name not in BUDGETS:
                raise ValueError(f"budgets must be among {', '.join(BUDGETS)}, got {name!r}")

    def model(self, trial: optuna.Trial | optuna.trial.FixedTrial, content: Mapping[str, Any]) -> ModelConfig:
        """The model with these fields that meets the targets; records the residuals of all budgets in the trial.

        Raises:
            RejectedError: no values of the free dimensions meet the targets.
        """
        free = [each for each in map(Free.parse, self.free) if _applies(each, content)]
        if not free:
            raise RejectedError(f"{content.get('pattern')} has none of the free dimensions {', '.join(self.free)}")
        solution = solve(
            content, self.targets, free, seq_len=self.seq_len, tolerance=self.tolerance, compare=self.compare
        )
        if not solution.feasible:
            raise RejectedError(f"{content.get('pattern')} does not meet the budgets: {solution.why}")
        trial.set_user_attr(
            "residuals", {each.name: each.residual for each in solution.residuals if each.residual is not None}
        )
        return solution.model


def _applies(free: Free, content: Mapping[str, Any]) -> bool:
    """Whether a model with these fields has the dimension."""
    model = ModelConfig.model_validate({"d_model": 64, **content})
    letter, _, name = free.field.removeprefix("blocks.").rpartition(".")
    letters = [letter] if letter else list(model.pattern)
    fields = [type(model.blocks[each]).model_fields for each in letters if each in model.pattern]
    return (not letter and name in ModelConfig.model_fields) or any(name in each for each in fields)


def check_not_tied(objectives: Mapping[str, str], budgets: Budgets | None, experiment: Experiment) -> None:
    """Rejects an objective that is the same for every trial.

    Raises:
        ValueError: an objective is fixed by a budget, or is the training FLOPs of runs with fixed FLOPs.
    """
    targets = budgets.targets if budgets is not None else {}
    for name in objectives:
        by = next((f"budgets.{each}" for each in (name, quantity(name).tied_to) if each in targets), None)
        if name == "flops_run" and experiment.train.flops is not None:
            by = "train.flops"
        if by is not None:
            raise ValueError(f"objectives: {name!r} is tied by {by}, so it cannot be an objective too")
