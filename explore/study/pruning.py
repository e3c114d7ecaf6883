"""Pruning with several objectives: a run is stopped on its learning curve, against the front at its own cost.

The cost of a trial is known before it is trained, so only its error is in question. At the same share of the schedule,
its value is compared with the best of all finished trials that cost no more: a trial that is behind those by more than
a margin will hardly end on the front, for they are cheaper and better. A trial that is cheaper than all others has
nobody to be compared with, and is never pruned.

The defaults are from the replay of a grid of 240 runs in 200 orders (`explore replay-pruning`): a margin of 0.02 from a
fifth of the schedule on spent 43% of the FLOPs and killed none of the 13 runs on the front, the worst of which was
behind by 0.017 on its way; 0.01 spent 35% and killed 4%. On fronts of random halves of the grid, a margin of 0.02 puts
2% of the members in danger, 0.03 less than half a percent. How many trials must have ended first hardly mattered.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import optuna
from optuna.trial import TrialState

from explore.quantities import objectives as allowed_objectives
from explore.quantities import quantity
from explore.study.storage import objectives_of
from explore.train import Judge


class Curve(NamedTuple):
    """A finished trial: what it cost, and its learning curve.

    Attributes:
        costs: what is known before training and shall be small, in one order for all trials.
        points: pairs of share of the schedule, rising, and bits per byte.
    """

    costs: tuple[float, ...]
    points: tuple[tuple[float, float], ...]

    def at(self, fraction: float) -> float | None:
        """The value at a share of the schedule, linear between the points; None outside of them."""
        i = bisect_left(self.points, (fraction, -math.inf))
        if i < len(self.points) and self.points[i][0] == fraction:
            return self.points[i][1]
        if i in (0, len(self.points)):
            return None
        (x0, y0), (x1, y1) = self.points[i - 1 : i + 1]
        return y0 + (y1 - y0) * (fraction - x0) / (x1 - x0)


@dataclass(frozen=True)
class FrontPruner:
    """Stops runs that are behind the front at their own cost.

    Attributes:
        margin: bits per byte that a run may be behind.
        min_trials: finished trials with a curve before any run is stopped.
        min_fraction: share of the schedule before which no run is stopped.
        rungs: shares of the schedule, in its stable phase, at which runs are validated and kept.
    """

    margin: float = 0.02
    min_trials: int = 5
    min_fraction: float = 0.2
    rungs: Sequence[float] = ()

    def verdict(self, curves: Sequence[Curve], costs: Sequence[float], fraction: float, value: float) -> str | None:
        """Why a run with these costs and this value at a share of its schedule is to be stopped, or None.

        Args:
            curves: of the finished trials.
        """
        if fraction < self.min_fraction or len(curves) < self.min_trials:
            return None
        rivals = (curve.at(fraction) for curve in curves if all(map(operator.le, curve.costs, costs)))
        best = min((rival for rival in rivals if rival is not None), default=None)
        if best is None or value <= best + self.margin:
            return None
        return (
            f"{value:.4f} bits per byte at {fraction:.0%} of the schedule, where a trial that costs no more had "
            f"{best:.4f}; the margin is {self.margin:g}"
        )

    def judge(self, study: optuna.Study, trial: optuna.Trial) -> Judge:
        """What `explore.train.fit` asks; it keeps the curve in the trial's user attribute `curve`.

        Raises:
            ValueError: the objectives do not fit, or the trial's user attributes do not tell its costs.
        """
        names = study.metric_names or []
        check_prunable(objectives_of(study) if names else {})
        costs = [name for name in names if quantity(name).role == "cost"]
        if missing := [name for name in costs if name not in trial.user_attrs]:
            raise ValueError(f"pruner: {missing[0]} is not among the user attributes of the trial before its training")
        own = [float(trial.user_attrs[name]) for name in costs]
        seen: dict[float, float] = {}

        def judge(fraction: float, value: float) -> str | None:
            seen[fraction] = value
            trial.set_user_attr("curve", [list(point) for point in sorted(seen.items())])
            return self.verdict(finished_curves(study, costs), own, fraction, value)

        return judge


def finished_curves(study: optuna.Study, costs: Sequence[str]) -> list[Curve]:
    """The curves of the complete trials of a study, as far as they have one, with these objectives as costs."""
    index = [(study.metric_names or []).index(name) for name in costs]
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return [
        Curve(tuple(trial.values[i] for i in index), tuple((x, y) for x, y in trial.user_attrs["curve"]))
        for trial in trials
        if trial.user_attrs.get("curve")
    ]


def check_prunable(objectives: Mapping[str, str]) -> None:
    """Refuses objectives for which a learning curve does not foretell the front.

    Raises:
        ValueError: they are not one loss of the run's own text and costs known before training, all minimized.
    """
    losses, costs = (
        [name for name, each in allowed_objectives().items() if each.role == role] for role in ("loss", "cost")
    )
    n_losses = sum(name in losses for name in objectives)
    known = all(name in (*losses, *costs) for name in objectives)
    minimized = all(direction == "minimize" for direction in objectives.values())
    if n_losses != 1 or len(objectives) < 2 or not known or not minimized:
        raise ValueError(
            f"pruner: the objectives must be to minimize one of {', '.join(losses)} and at least one of "
            f"{', '.join(costs)}, which are known before training, got {', '.join(objectives) or 'none'}"
        )
