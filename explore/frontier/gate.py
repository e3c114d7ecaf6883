"""The gate of a study: conditions that its smallest size must meet before the study may draw a conclusion.

A study says nothing about an effect if its models lose to an n-gram, its positive control is not detected, or its seeds
cannot resolve the effect. So its sweep file declares a `Gate`, the sweep runs the smallest size first, and neither the
sweep nor a finding continues if a condition fails.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from explore.frontier.along import last_change
from explore.frontier.columns import check_columns, numbers
from explore.frontier.comparisons import BETTER, WORSE, compare
from explore.frontier.floors import FLOOR_ORDER
from explore.frontier.intervals import resolvable
from explore.frontier.scores import resolvable_share
from explore.quantities import quantity
from explore.runs import find_runs
from explore.table import load_documents, load_metrics, load_params, load_runs, read_table

PASSED, FAILED = "passed", "failed"
MIN_DOCUMENTS: Final = 5
FLAT: Final = 0.1
"""Fraction at the end of a curve that must be flat or inside the decay."""
ABSENT: Final = "not measured"
Counts = Mapping[Hashable, int]
"""Number of diverged runs of each arm that has one."""
ANY_FLOOR: Final = "an n-gram model of the same tokens: `explore eval RUN --ngram 3 --save` adds it"
GATE_FILE: Final = "gate.csv"
"""File in a sweep's folder of runs with the latest result of its gate."""
UNGATED: Final = "ungated"
"""Warning in tables and figures of a study that does not pass its gate."""


@dataclass(frozen=True)
class Condition:
    """One condition of a gate.

    Attributes:
        name: the quantity checked.
        found: its value in the runs.
        needed: the required value.
        passed: whether the condition holds.
    """

    name: str
    found: str
    needed: str
    passed: bool


@dataclass(frozen=True)
class GateReport:
    """The result of a gate.

    Attributes:
        size: the size that was checked, such as `d_model 24`.
        conditions: all conditions, in order.
    """

    size: str
    conditions: tuple[Condition, ...]

    @property
    def passed(self) -> bool:
        """Whether all conditions hold."""
        return all(each.passed for each in self.conditions)

    @property
    def reason(self) -> str:
        """The failed conditions in one line; empty if none fails."""
        failed = [f"{each.name}: {each.found}, needed {each.needed}" for each in self.conditions if not each.passed]
        return f"at {self.size}: " + "; ".join(failed) if failed else ""

    def table(self) -> pd.DataFrame:
        """Columns condition, found, needed and verdict (`passed` or `failed`), one row per condition."""
        rows = [(each.name, each.found, each.needed, PASSED if each.passed else FAILED) for each in self.conditions]
        return pd.DataFrame(rows, columns=["condition", "found", "needed", "verdict"])


@dataclass(frozen=True)
class Target:
    """A bound on the mean of one arm over its seeds.

    Attributes:
        arm: the arm.
        value: column of the score.
        at_least: lower bound; None for none.
        below: upper bound, excluded; None for none.
    """

    arm: Hashable
    value: str
    at_least: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.below is None):
            raise ValueError(f"target: exactly one of at_least and below must be given for {self.value} of {self.arm}")

    def check(self, rows: pd.DataFrame, arm: str) -> Condition:
        """The condition on the rows of an arm, named by the column `arm`."""
        own = rows[rows[arm] == self.arm]
        mean = float(numbers(own, self.value).mean()) if len(own) and self.value in own else math.nan
        holds = mean >= self.at_least if self.at_least is not None else mean < (self.below or 0.0)
        words = f"at least {self.at_least:g}" if self.at_least is not None else f"below {self.below:g}"
        found = f"{mean:.3f}" if math.isfinite(mean) else ABSENT
        return Condition(f"{quantity(self.value).label.lower()} of {self.arm}", found, words, passed=bool(holds))


@dataclass(frozen=True)
class Gate:
    """A study's own declaration of what it needs in order to answer its question.

    Attributes:
        baseline: the arm from which differences are computed.
        worse: positive controls: arms that must be resolved as worse than the baseline, or diverge while it does not.
        trivial: dense or otherwise trivial arms, whose difference from the baseline must be resolved, with either sign.
        effect: smallest effect that the study addresses, in the unit of `value`.
        source: where that effect comes from, such as a publication.
        arm: column of the arms: a parameter of the trials, or a column of the table of runs.
        size: column of the sizes; the smallest is checked. If it is not in the sweep's grid, all trials have one size.
        where: column values that select the runs of the gate.
        value: column of the score.
        floor: score that the baseline must beat; None takes that of an n-gram model of its own tokens.
        targets: bounds on the means of single arms.
        shares: the primary claim compares shares of seeds that succeed, and `effect` is a difference of shares.
        n_sizes: sizes over which the primary claim is averaged.
        min_steps: minimum optimizer steps.
        min_tokens: minimum training tokens per active parameter of the layers; 0 sets no condition.
        max_violation: limit, in every arm, on the load of the fullest expert divided by the mean load, minus 1. Loads
            are averages over about 100 steps; records of earlier versions have the load of the last step alone.
        alike: columns in which all arms must agree.
    """

    baseline: Hashable
    worse: tuple[Hashable, ...]
    effect: float
    source: str
    trivial: tuple[Hashable, ...] = ()
    arm: str = "arm"
    size: str = "d_model"
    where: Mapping[str, Any] = field(default_factory=dict)
    value: str = "test_bpb"
    floor: float | None = None
    targets: tuple[Target, ...] = ()
    shares: bool = False
    n_sizes: int = 1
    min_steps: int = 3000
    min_tokens: float = 20.0
    max_violation: float = 0.5
    alike: tuple[str, ...] = ("n_steps", "tokens")

    def __post_init__(self) -> None:
        for name in ("worse", "trivial"):
            arms = getattr(self, name)
            if isinstance(arms, str) or (name == "worse" and not arms):
                least = "at least one arm" if name == "worse" else "arms"
                raise ValueError(f"gate.{name} must name {least} in a tuple, got {arms!r}")
        if not (math.isfinite(self.effect) and self.effect > 0):
            raise ValueError(f"gate.effect must be positive, got {self.effect!r}")
        if self.n_sizes < 1:
            raise ValueError(f"gate.n_sizes must be at least 1, got {self.n_sizes}")

    @property
    def arms(self) -> tuple[Hashable, ...]:
        """The arms that the gate examines one by one."""
        named = (self.baseline, *self.worse, *self.trivial, *(each.arm for each in self.targets))
        return tuple(dict.fromkeys(named))

    def smallest(self, runs: pd.DataFrame) -> pd.DataFrame:
        """The finished runs of the smallest size.

        Raises:
            ValueError: a column is missing, or no run is left.
        """
        chosen = self.selected(runs)
        if chosen.empty:
            only = "".join(f" with {column}={allowed}" for column, allowed in self.where.items())
            raise ValueError(f"gate: needs finished runs{only}, got none")
        return pd.DataFrame(chosen[chosen[self.size] == chosen[self.size].min()])

    def selected(self, runs: pd.DataFrame, status: str = "finished") -> pd.DataFrame:
        """The runs of all sizes that `where` selects and that have this status.

        Raises:
            ValueError: a column is missing.
        """
        check_columns(runs, [self.arm, self.size, *self.where])
        chosen = runs[runs["status"] == status] if "status" in runs else runs[[status == "finished"] * len(runs)]
        for column, allowed in self.where.items():
            chosen = chosen[chosen[column] == allowed]
        return pd.DataFrame(chosen)

    def check(
        self, runs: pd.DataFrame, curves: pd.DataFrame, seeds: int, documents: pd.DataFrame | None = None
    ) -> GateReport:
        """Checks the conditions on the runs of the smallest size.

        Args:
            runs: one row per run, as from `explore.table.load_runs`, with the columns `arm`, `size` and `where`.
            curves: learning curves, as from `explore.table.load_metrics`; used if runs have no decay.
            seeds: planned number of seeds per arm.
            documents: scores by document, as from `explore.table.load_documents`; the intervals of the controls then
                include documents.

        Raises:
            ValueError: a column is missing, or no run is left.
        """
        rows, diverged = self.smallest(runs), self.selected(runs, "diverged")
        diverged = diverged[diverged[self.size] == rows[self.size].iloc[0]]
        conditions = tuple(self._conditions(rows, curves, seeds, documents, Counter(diverged[self.arm])))
        return GateReport(f"{self.size} {rows[self.size].iloc[0]}", conditions)

    def needs(self, seeds: int) -> pd.DataFrame:
        """The conditions before any run: columns condition and needed."""
        counts = ["tokens", "n_steps", "max_violation", "params_active_no_embeddings"]
        none = pd.DataFrame(columns=[self.arm, self.size, "seed", self.value, *counts], dtype="float64")
        report = GateReport("", tuple(self._conditions(none, pd.DataFrame(), seeds, None, {})))
        return report.table()[["condition", "needed"]]

    def _conditions(
        self, rows: pd.DataFrame, curves: pd.DataFrame, seeds: int, documents: pd.DataFrame | None, diverged: Counts
    ) -> Iterator[Condition]:
        yield from self._floor(rows)
        yield from self._controls(rows, seeds, documents, diverged)
        yield from (each.check(rows, self.arm) for each in self.targets)
        yield from self._whole(rows)
        yield from self._training(rows, curves)
        yield from self._alike(rows)

    def _floor(self, rows: pd.DataFrame) -> Iterator[Condition]:
        own = rows[rows[self.arm] == self.baseline]
        name, sign = f"{self.baseline} beats the floor", quantity(self.value).sign
        side = "below" if sign > 0 else "above"
        column = f"ngram_{self.value.removeprefix('whole_')}"
        floor, words = self.floor, ""
        if floor is None and column in own and own[column].notna().any():
            floor, words = float(own[column].mean()), " (n-gram)"
        score = float(numbers(own, self.value).mean()) if len(own) else math.nan
        found = f"{score:.3f}" if math.isfinite(score) else ABSENT
        if floor is None:
            yield Condition(name, found, f"{side} {ANY_FLOOR}", passed=False)
            return
        orders = numbers(own, "ngram_order") if words and "ngram_order" in own else np.empty(0)
        if (orders < FLOOR_ORDER).any():
            text = f"{found}, compared with a model of order {int(np.nanmin(orders))}"
            yield Condition(name, text, f"{side} {ANY_FLOOR}", passed=False)
            return
        yield Condition(name, found, f"{side} {floor:.3f}{words}", passed=sign * score < sign * floor)

    def _controls(
        self, rows: pd.DataFrame, seeds: int, documents: pd.DataFrame | None, diverged: Counts
    ) -> Iterator[Condition]:
        """Conditions on the controls; the noise is that of the baseline and of controls without diverged runs."""
        controls = dict.fromkeys((*self.worse, *self.trivial))
        arms = [each for each in controls if each not in diverged and (rows[self.arm] == each).any()]
        why = None
        scores = None if documents is None or documents.empty or not self.value.endswith("_bpb") else documents
        pool = rows[rows[self.arm].isin([self.baseline, *arms])] if arms or diverged else rows  # without any control
        try:
            found, by_seed = (
                compare(pool, self.arm, self.baseline, value=self.value, primary=arms, documents=each)
                for each in (scores, None)
            )
        except ValueError as error:
            found, by_seed, why = pd.DataFrame(columns=[self.arm]), pd.DataFrame(), str(error)
        found = found.set_index(self.arm)
        for kind, wanted in (("worse", (WORSE,)), ("trivial", (BETTER, WORSE))):
            for each in getattr(self, kind):
                words = "worse" if kind == "worse" else "resolved either way"
                if each in diverged:
                    text, holds = self._diverged(rows, each, diverged)
                    yield Condition(f"control {each}", text, words, holds)
                elif each not in arms:
                    yield Condition(f"control {each}", "no run at this size", words, passed=False)
                elif each not in found.index:
                    yield Condition(f"control {each}", why or ABSENT, words, passed=False)
                else:
                    row = found.loc[each]
                    text = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] {row['verdict']}"
                    text += f", over {row['n_documents']} documents" if row["n_documents"] else ""
                    yield Condition(f"control {each}", text, words, passed=row["verdict"] in wanted)
        needed = f"at most {self.effect:g} ({self.source})"
        if found.empty:
            yield Condition("resolvable difference", why or ABSENT, needed, passed=False)
            return
        sd, dof = float(by_seed["sd"].iloc[0]), float(by_seed["dof"].iloc[0])
        spread = sd * math.sqrt(2 / seeds / self.n_sizes)
        least = resolvable_share(seeds) if self.shares else resolvable(spread, dof)
        text = f"{least:.0%} of {seeds} seeds" if self.shares else f"{least:.4f} by {seeds} seeds"
        if self.n_sizes > 1:
            text += f" and {self.n_sizes} sizes"
        yield Condition("resolvable difference", text, needed, passed=least <= self.effect)

    def _diverged(self, rows: pd.DataFrame, arm: Hashable, diverged: Counts) -> tuple[str, bool]:
        """Whether a control with diverged runs counts as worse, in words; its other runs must all be worse."""
        sign = quantity(self.value).sign
        own, base = (sign * numbers(rows[rows[self.arm] == each], self.value) for each in (arm, self.baseline))
        text = f"{diverged[arm]} of {diverged[arm] + len(own)} runs diverged"
        if self.baseline in diverged:
            return f"{text}, but so did {diverged[self.baseline]} of the baseline", False
        if not len(own):
            return f"{text}, which counts as worse", True
        if len(base) and own.min() > base.max():
            return f"{text} and the rest are worse than every run of the baseline, which counts as worse", True
        return f"{text}, but not all others are worse than every run of the baseline", False

    def _whole(self, rows: pd.DataFrame) -> Iterator[Condition]:
        if self.value.startswith("recall") or ("corpus" in rows and rows["corpus"].isna().all()):
            yield Condition("units of the score", "sequences drawn at random", "independent units", passed=True)
            return
        needed = f"the whole split, {MIN_DOCUMENTS} documents or more"
        n = numbers(rows, "test_documents") if "test_documents" in rows else np.full(len(rows), math.nan)
        if not len(n) or np.isnan(n).any():
            yield Condition("units of the score", "a part of the split", needed, passed=False)
            return
        least = int(n.min())
        yield Condition("units of the score", f"whole split, {least} documents", needed, least >= MIN_DOCUMENTS)

    def _training(self, rows: pd.DataFrame, curves: pd.DataFrame) -> Iterator[Condition]:
        per_parameter = numbers(rows, "tokens") / numbers(rows, "params_active_no_embeddings")
        least = float(per_parameter.min(initial=math.inf))
        steps = float(numbers(rows, "n_steps").min(initial=math.inf))
        if self.min_tokens:
            yield Condition(
                "tokens per active parameter of the layers",
                f"{least:.1f}" if math.isfinite(least) else ABSENT,
                f"at least {self.min_tokens:g}",
                passed=least >= self.min_tokens,
            )
        found = f"{steps:,.0f}" if math.isfinite(steps) else ABSENT
        yield Condition("optimizer steps", found, f"at least {self.min_steps:,}", passed=steps >= self.min_steps)
        decay = numbers(rows, "decay") if "decay" in rows else np.full(len(rows), math.nan)
        needed = "inside the decay, or flat within noise"
        if len(decay) and (decay >= FLAT).all():
            yield Condition("last tenth of the curve", f"inside a decay of {decay.min():.0%}", needed, passed=True)
            return
        change = last_change(curves, rows["run"][decay < FLAT] if "run" in rows else [], FLAT)
        text = ABSENT if change is None else f"{change[0]:+.4f} ± {change[1]:.4f}"
        yield Condition("last tenth of the curve", text, needed, change is not None and abs(change[0]) <= change[1])

    def _alike(self, rows: pd.DataFrame) -> Iterator[Condition]:
        for column in self.alike:
            values = sorted(rows[column].dropna().unique()) if column in rows else []
            text = " and ".join(f"{value:,g}" for value in (values[0], values[-1])) if len(values) > 1 else "equal"
            label = quantity(column).label.lower()
            yield Condition(f"{label} of all arms", text if values else ABSENT, "equal", passed=len(values) == 1)
        loads = rows.groupby(self.arm)["max_violation"].mean() if "max_violation" in rows else pd.Series(dtype=float)
        if loads.notna().any() or rows.empty:
            text = f"{loads.max():.2f} ({loads.idxmax()})" if len(loads) else ABSENT
            needed = f"below {self.max_violation:g} in every arm"
            yield Condition("max violation of routers", text, needed, passed=bool(loads.max() < self.max_violation))
        tuned = rows["tuned"].fillna(value=False).astype(bool) if "tuned" in rows else pd.Series([False])
        without = sorted({str(arm) for arm in rows.loc[~tuned, self.arm]}) if "tuned" in rows else ["all arms"]
        text = "interior in every arm" if not without else f"not tuned, or at an end of its grid: {', '.join(without)}"
        yield Condition("learning rate", text, "tuned, interior to its grid", passed=not without)


def gate_runs(*roots: str | Path) -> pd.DataFrame:
    """The table of the runs below the roots, with the parameters of their trials, and the order of their floors.

    Raises:
        ValueError: a root does not exist or holds no run.
    """
    runs, params = load_runs(*roots), load_params(*roots)
    new = [column for column in params if column == "run" or column not in runs]
    orders = {run.path.resolve().name: run.evals.get("ngram", {}).get("order") for run in find_runs(*roots)}
    return runs.merge(params[new], on="run", how="left").assign(ngram_order=runs["run"].map(orders).astype("float64"))


def gate_report(gate: Gate, seeds: int, *roots: str | Path) -> GateReport:
    """Checks a gate on the runs below the roots, which may be tables of records.

    Raises:
        ValueError: as for `Gate.check`, or a root holds no run.
    """
    split = gate.value.removeprefix("whole_").partition("_")[0]
    documents = load_documents(*roots, split=split if split in ("val", "test") else "test")
    return gate.check(gate_runs(*roots), load_metrics(*roots), seeds, documents)


def is_ungated(runs: Path) -> bool:
    """Whether the sweep with this folder of runs continued although its gate failed."""
    path = runs / GATE_FILE
    return path.is_file() and bool((read_table(path)["verdict"] == FAILED).any())
