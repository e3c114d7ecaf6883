"""Pruning with several objectives: a run is stopped if its learning curve falls behind the front at its own cost.

The cost of a trial is known before training; only its error is unknown. At the same share of the schedule, its value is
compared with the best finished trial that costs no more: a trial that is behind by more than a margin is unlikely to
end on the front, because a cheaper trial is better. A trial cheaper than all others has no rival and is never pruned.

The defaults come from a replay of a grid of 240 runs in 200 orders (`explore replay-pruning`). A margin of 0.02 from a
fifth of the schedule on spent 43% of the FLOPs and killed none of the 13 runs on the front, the worst of which was
behind by 0.017 at some point; 0.01 spent 35% and killed 4%. On fronts of random halves of the grid, a margin of 0.02
endangers 2% of the runs on the front, 0.03 less than half a percent. The required number of trials hardly matters.
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
    """A finished trial: its costs and its learning curve.

    Attributes:
        costs: cost objectives, known before training, in the same order for all trials.
        points: pairs (share of the schedule, bits per byte), by increasing share.
    """

    costs: tuple[float, ...]
    points: tuple[tuple[float, float], ...]

    def at(self, fraction: float) -> float | None:
        """The value at a share of the schedule, linearly interpolated; None outside the points."""
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
        margin: allowed gap behind the front, in bits per byte.
        min_trials: number of finished trials with a curve required before any run is stopped.
        min_fraction: share of the schedule before which no run is stopped.
        rungs: shares of the schedule, in its stable phase, at which runs are validated and their checkpoints kept.
    """

    margin: float = 0.02
    min_trials: int = 5
    min_fraction: float = 0.2
    rungs: Sequence[float] = ()

    def verdict(self, curves: Sequence[Curve], costs: Sequence[float], fraction: float, value: float) -> str | None:
        """The reason to stop a run with these costs and this value at a share of its schedule; None to continue.

        Args:
            curves: learning curves of the finished trials.
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
        """A judge for `explore.train.fit`; it records the curve in the trial's user attribute `curve`.

        Raises:
            ValueError: the objectives cannot be pruned, or the trial's user attributes lack its costs.
        """
        names = study.metric_names or []
        check_prunable(objectives_of(study) if names else {})
        costs = [name for name in names if quantity(name).role == "cost"]
        if missing := [name for name in costs if name not in trial.user_attrs]:
            raise ValueError(f"pruner: {missing[0]} is not among the user attributes of the trial before its training")
        own = [float(trial.user_attrs[name]) for name in costs]
        points: dict[float, float] = {}

        def judge(fraction: float, value: float) -> str | None:
            points[fraction] = value
            trial.set_user_attr("curve", [list(point) for point in sorted(points.items())])
            return self.verdict(finished_curves(study, costs), own, fraction, value)

        return judge


def finished_curves(study: optuna.Study, costs: Sequence[str]) -> list[Curve]:
    """The curves of a study's complete trials that have one, with these objectives as costs."""
    index = [(study.metric_names or []).index(name) for name in costs]
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return [
        Curve(tuple(trial.values[i] for i in index), tuple((x, y) for x, y in trial.user_attrs["curve"]))
        for trial in trials
        if trial.user_attrs.get("curve")
    ]


def check_prunable(objectives: Mapping[str, str]) -> None:
    """Rejects objectives for which a learning curve does not predict the front.

    Raises:
        ValueError: the objectives are not one loss on the run's own text plus costs known before training, all
            minimized.
    """
    losses, costs = (
        [name for name, each in allowed_objectives().items() if each.role == role] for role in ("loss", "cost")
    )
    n_losses = sum(name in losses for name in objectives)
    known = all(name in (*losses, *costs) for name in objectives)
    minimized = all(direction == "minimize" for direction in objectives.values())
    if n_losses != 1 or len(objectives) < 2 or not known or not minimized:
        raise ValueError(
            f"pruner: the objectives must be one of {', '.join(losses)} and costs known before training, such as "
            f"{costs[0]}, all to minimize; got {', '.join(objectives) or 'none'}"
        )
