"""Fair learning rates: a few short runs tune the rate of each architecture before it is compared with others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from explore.experiment import Experiment
from explore.quantities import objectives, unknown


@dataclass(frozen=True)
class Tuned:
    """A learning rate, and how it was found.

    Attributes:
        interior: whether the best rate of the grid lies between two tried rates.
        sensitivity: added loss at half or twice the learning rate, from the fitted parabola; None at an edge.
        pilots: score of each tried rate; infinite for a run that diverged.
    """

    lr: float
    interior: bool
    sensitivity: float | None
    pilots: dict[float, float]


@dataclass(frozen=True)
class LearningRates:
    """A learning-rate search within a trial: short runs (pilots) on a geometric grid, until the best rate is interior.

    Pilots are separate experiments: they are found by their keys, and all seeds of an architecture share them. Where
    runs are scored on whole splits, pilots are scored on windows sampled from them.

    Attributes:
        low: lowest rate of the grid.
        high: upper bound of the grid.
        start: first rate to try, with its neighbours.
        factor: ratio between neighbouring rates.
        share: tokens of a pilot as a fraction of the run's tokens.
        by: quantity that ranks the rates; default: validation bits per byte, or nats per token for synthetic tasks.
        precision: precision of pilots; default: that of the run. Runs that differ in precision alone then share pilots
            and rate.
    """

    low: float = 2.5e-4
    high: float = 3.2e-2
    start: float = 4e-3
    factor: float = 2.0
    share: float = 0.25
    by: str | None = None
    precision: Literal["fp32", "bf16"] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"learning_rates.low must be above 0 and below high={self.high}, got {self.low}")
        if not self.factor > 1:
            raise ValueError(f"learning_rates.factor must be above 1, got {self.factor}")
        if not 0 < self.share <= 1:
            raise ValueError(f"learning_rates.share must be above 0 and at most 1, got {self.share}")
        if self.by is not None and self.by not in (allowed := objectives()):
            raise unknown(self.by, list(allowed), "learning_rates.by")

    @property
    def grid(self) -> tuple[float, ...]:
        """All rates that may be tried, in increasing order."""
        n = int(math.log(self.high / self.low, self.factor) + 1e-9) + 1
        return tuple(float(f"{self.low * self.factor**i:.3g}") for i in range(n))

    def pilot(self, experiment: Experiment, lr: float) -> Experiment:
        """A short run of an experiment at another learning rate, the same for every seed."""
        tokens = max(1, round(self.share * experiment.n_steps)) * experiment.batch_tokens
        changes: dict[str, Any] = {"lr": lr, "tokens": tokens, "flops": None}
        if self.precision is not None:
            changes["precision"] = self.precision
        if self.by is None and experiment.train.stop_recall is None:
            changes["val_every"] = None  # only a pilot's final score counts
        if experiment.train.evaluation == "whole":
            changes["evaluation"] = "sampled"  # both splits in full would cost more than the pilot
        train = experiment.train.model_copy(update=changes)
        return experiment.model_copy(update={"name": f"pilot-{experiment.name}", "train": train, "seed": 0})

    def search(self, score: Callable[[float], float]) -> Tuned:
        """Walks downhill on the grid until the best rate has a tried neighbour on each side, or the grid ends.

        Args:
            score: returns the score of a run at a rate, signed so that lower is better; infinite if training diverges.
        """
        grid = self.grid
        middle = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / self.start)))
        wanted = [i for i in (middle - 1, middle, middle + 1) if 0 <= i < len(grid)]
        best, found = middle, dict[int, float]()
        while wanted:
            found |= {i: score(grid[i]) for i in wanted}
            best = min(found, key=lambda i: (found[i], i))
            wanted = [i for i in (best - 1, best + 1) if 0 <= i < len(grid) and i not in found]
        pilots = {grid[i]: found[i] for i in sorted(found)}
        below, above = found.get(best - 1), found.get(best + 1)
        if below is None or above is None:
            return Tuned(grid[best], False, None, pilots)
        if not math.isfinite(above):
            return Tuned(grid[best], True, below - found[best], pilots)
        # The vertex of the parabola through the three, in units of log(factor).
        curvature = below - 2 * found[best] + above
        offset = 0.5 * (below - above) / curvature if curvature > 0 else 0.0
        lr = float(f"{grid[best] * self.factor**offset:.3g}")
        return Tuned(lr, True, 0.5 * curvature * (math.log(2) / math.log(self.factor)) ** 2, pilots)
