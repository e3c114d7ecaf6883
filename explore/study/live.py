"""The table of a running sweep on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from explore.formatting import duration
from explore.quantities import Quantity, headlines, quantity
from explore.study.lease import is_left, is_rejected
from explore.study.storage import objectives_of
from explore.table import cell, model_label

SPARKS = "▁▂▃▄▅▆▇█"
STATE_WIDTH = 24
"""Columns of the terminal for how a trial stands; the whole reason is in the study."""


class SweepTable:
    """Draws the trials of a study anew after each change; off a terminal, prints a line for each that ended."""

    def __init__(self, study: optuna.Study, n_trials: int, console: Console) -> None:
        self.study, self.n_trials, self.console = study, n_trials, console
        self.objectives = tuple(objectives_of(study))
        self.live = Live(console=console, auto_refresh=False, get_renderable=self.render)
        self._printed = {trial.number for trial in self._trials() if trial.state.is_finished()}

    def __enter__(self) -> SweepTable:  # noqa: PYI034 - the shape checks of the tests cannot read Self
        if self.console.is_terminal:
            self.live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def refresh(self) -> None:
        """Shows how the study stands now."""
        if self.console.is_terminal:
            self.live.refresh()
            return
        new = [trial for trial in self._trials() if trial.state.is_finished() and trial.number not in self._printed]
        front = self._front() if new else set()
        for trial in new:
            self._printed.add(trial.number)
            cells = [text for text in self._row(trial, front) if text]
            self.console.print("  ".join(cells), highlight=False, soft_wrap=True)

    def render(self) -> Table:
        """The table: one row a trial, the latest ones where not all fit; Pareto-optimal ones are marked."""
        trials, front = self._trials(), self._front()
        ended = sum(trial.state.is_finished() for trial in trials)
        n_rejected = sum(map(is_rejected, self._all()))
        table = Table(
            box=None,
            padding=(0, 1, 0, 0),
            title=f"{self.study.study_name}: {ended} of {self.n_trials} trials",
            caption="● on the front" + (f"; {n_rejected} rejected before training" if n_rejected else ""),
            title_justify="left",
            caption_justify="left",
        )
        for column in ("trial", "model", "pattern"):
            table.add_column(column, no_wrap=True)
        objectives = (quantity(name) for name in self.objectives)
        for column in (*(each.header for each in (*self._known(), *objectives)), "time"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("curve", no_wrap=True)
        table.add_column("state", no_wrap=True, overflow="ellipsis", max_width=STATE_WIDTH)
        room = max(4, self.console.height - 12)
        for trial in trials[-room:]:
            table.add_row(*self._row(trial, front))
        table.columns = [column for column in table.columns if any(column.cells)]  # none that is empty throughout
        return table

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _trials(self) -> list[FrozenTrial]:
        """Those that count: neither rejected, nor in the queue, nor left to another trial."""
        return [
            trial
            for trial in self._all()
            if trial.state != TrialState.WAITING and not is_left(trial) and not is_rejected(trial)
        ]

    def _known(self) -> list[Quantity]:
        """What is shown of a trial beside its objectives: headlines that are known before training."""
        return [each for each in headlines() if each.is_known and each.name not in self.objectives]

    def _front(self) -> set[int]:
        return {trial.number for trial in self.study.best_trials}

    def _row(self, trial: FrozenTrial, front: set[int]) -> list[str]:
        about = trial.user_attrs
        # The attributes of a trial are those of `trial.json` and, under their names, its costs.
        known = {each.name: about.get(each.name, each.read({"trial": about})) for each in self._known()}
        values = trial.values or [None] * len(self.objectives)
        return [
            f"{'●' if trial.number in front else ' '}{trial.number:>3}",
            model_label(about.get("name", ""), about.get("family", ""), about.get("pattern", "")),
            about.get("pattern", ""),
            *(cell(each, {**about, **known}) for each in self._known()),
            *(quantity(name).text(value) for name, value in zip(self.objectives, values, strict=True)),
            duration(about["took_s"]) if "took_s" in about else "",
            sparkline([value for _, value in about.get("curve", [])]),
            _state(trial),
        ]


def sparkline(values: list[float]) -> str:
    """A curve in one line of text, the highest value as the highest bar."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    return "".join(SPARKS[round((value - low) / ((high - low) or 1) * (len(SPARKS) - 1))] for value in values)


def _state(trial: FrozenTrial) -> str:
    about: Mapping[str, Any] = trial.user_attrs
    if trial.state == TrialState.RUNNING:
        return "training" if "confirmed" in about else "starting"
    outcome = about.get("outcome", "failed")
    return str(outcome if outcome == "done" else f"{outcome}: {about.get('reason', '')}".removesuffix(": "))
