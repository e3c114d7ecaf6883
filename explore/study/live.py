"""The table of a running sweep on the terminal."""

from __future__ import annotations

from types import TracebackType

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from explore.study.storage import INTERRUPTED
from explore.study.sweep_file import Sweep

SHOWN = (TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING)


class SweepTable:
    """Draws the trials of a study anew after each change; off a terminal, prints a line for each that ended."""

    def __init__(self, sweep: Sweep, study: optuna.Study, n_trials: int, console: Console) -> None:
        self.sweep, self.study, self.n_trials, self.console = sweep, study, n_trials, console
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
        for trial in self._trials():
            if trial.state.is_finished() and trial.number not in self._printed:
                self._printed.add(trial.number)
                self.console.print(
                    "  ".join(cell for cell in self._row(trial) if cell), highlight=False, soft_wrap=True
                )

    def render(self) -> Table:
        """The table: one row a trial, the latest ones where not all fit; Pareto-optimal ones are marked."""
        trials = self._trials()
        ended = sum(trial.state.is_finished() for trial in trials)
        table = Table(
            title=f"{self.sweep.name}: {ended} of {self.n_trials} trials",
            caption="● on the front",
            title_justify="left",
            caption_justify="left",
        )
        for column in ("trial", "family", "pattern"):
            table.add_column(column)
        for column in ("params", "active", "FLOPs", *self.sweep.objectives, "time"):
            table.add_column(column, justify="right")
        table.add_column("state")
        room = max(4, self.console.height - 12)
        for trial in trials[-room:]:
            table.add_row(*self._row(trial))
        return table

    def _trials(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False, states=SHOWN)
        return [trial for trial in trials if trial.user_attrs.get("reason") != INTERRUPTED]

    def _row(self, trial: FrozenTrial) -> list[str]:
        about = trial.user_attrs
        front = trial.state == TrialState.COMPLETE and any(
            trial.number == best.number for best in self.study.best_trials
        )
        values = [f"{value:.4g}" for value in trial.values] if trial.values else [""] * len(self.sweep.objectives)
        state = {TrialState.COMPLETE: "done", TrialState.RUNNING: "training"}.get(
            trial.state, about.get("reason", "failed")
        )
        return [
            f"{'●' if front else ' '}{trial.number:>3}",
            about.get("family", ""),
            about.get("pattern", ""),
            _millions(about.get("params_total")),
            _millions(about.get("params_active")),
            f"{about['flops_run']:.2g}" if "flops_run" in about else "",
            *values,
            f"{about['took_s']:.0f} s" if "took_s" in about else "",
            str(state),
        ]


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}M"
