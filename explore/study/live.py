"""The table of a running sweep, on the terminal and in a notebook."""

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
from explore.formatting.html import block, line, note, progress, table
from explore.quantities import Quantity, headlines, quantity
from explore.study.lease import is_left, is_rejected
from explore.study.storage import objectives_of
from explore.table import cell, model_label
from explore.terminal import NotebookOutput, bars

ENDLESS = 10_000
"""A terminal width at which no table is squeezed."""
NAMES, LAST = ("trial", "model", "pattern"), ("time", "curve", "state")
"""Headers before the quantities and after them."""
LEFT = (*NAMES, "curve", "state")
"""Headers of the columns of text."""
NOTEBOOK_ROWS = 40
STATE_WIDTH = 24
"""Characters shown of a trial's state; the study has the full reason."""


class SweepTable:
    """Redraws the table of a study's trials after each change; without a terminal, prints a line per ended trial."""

    def __init__(self, study: optuna.Study, n_trials: int, console: Console) -> None:
        self.study, self.n_trials, self.console = study, n_trials, console
        self.objectives = tuple(objectives_of(study))
        self.live = Live(console=console, auto_refresh=False, get_renderable=self.render)
        self.notebook = NotebookOutput()
        self._headed = False
        self._printed = {trial.number for trial in self._trials() if trial.state.is_finished()}

    def __enter__(self) -> SweepTable:  # noqa: PYI034 - the shape checks of the tests cannot read Self
        if self.console.is_terminal:
            self.live.start(refresh=True)
        elif self._in_notebook:
            self.notebook.show(self.render_html())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()
        elif self._in_notebook:
            self.notebook.show(self.render_html())

    def refresh(self) -> None:
        """Shows the current state of the study."""
        if self.console.is_terminal:
            self.live.refresh()
            return
        if self._in_notebook:
            if self.notebook.is_due():
                self.notebook.show(self.render_html())
            return
        new = [trial for trial in self._trials() if trial.state.is_finished() and trial.number not in self._printed]
        front = self._front() if new else set()
        if new and not self._headed:
            self._headed = True
            self.console.print("  ".join(self._header()), highlight=False, soft_wrap=True)
        for trial in new:
            self._printed.add(trial.number)
            cells = [text or "-" for text in self._row(trial, front)]
            self.console.print("  ".join(cells), highlight=False, soft_wrap=True)

    def render(self, *, whole: bool = False) -> Table:
        """The table: one row per trial, with Pareto-optimal ones marked. Columns that do not fit are left out.

        Args:
            whole: show all trials, not only the latest ones that fit the screen.
        """
        trials, front = self._trials(), self._front()
        known, heads = self._known(), self._header()
        rows = [self._row(trial, front) for trial in (trials if whole else trials[-max(4, self.console.height - 12) :])]
        shown = [i for i in range(len(heads)) if any(row[i] for row in rows)]  # skip empty columns
        spare = [
            heads.index(name)
            for name in ("model", *(each.header for each in reversed(known)), "time", "state", "curve")
        ]
        while True:
            table = Table(
                box=None,
                padding=(0, 1, 0, 0),
                title=f"{self.study.study_name}: {self._n_ended(trials)} of {self.n_trials} trials",
                caption=self._legend(),
                title_justify="left",
                caption_justify="left",
            )
            for i in shown:
                width = STATE_WIDTH if heads[i] == "state" else None
                table.add_column(
                    heads[i], justify="left" if heads[i] in LEFT else "right", no_wrap=True, max_width=width
                )
            for row in rows:
                table.add_row(*(row[i] for i in shown))
            endless = self.console.options.update(max_width=ENDLESS)
            dropped = next((i for i in spare if i in shown), None)
            if dropped is None or self.console.measure(table, options=endless).maximum <= self.console.width:
                return table
            shown.remove(dropped)

    def render_html(self) -> str:
        """A progress bar and the table in HTML, for a notebook; only the latest trials if there are many."""
        trials, front = self._trials(), self._front()
        ended = self._n_ended(trials)
        rows = [self._row(trial, front) for trial in trials[-NOTEBOOK_ROWS:]]
        header = self._header()
        kept = [i for i in range(len(header)) if any(row[i] for row in rows)]  # skip empty columns
        shown = [[row[i] for i in kept] for row in rows]
        return block(
            line(self.study.study_name),
            progress(ended / self.n_trials if self.n_trials else 0.0, f"{ended} of {self.n_trials} trials"),
            table(
                [header[i] for i in kept],
                shown,
                left=[at for at, i in enumerate(kept) if header[i] in LEFT],
            )
            if rows
            else "",
            note(self._legend()) if rows else "",
        )

    @property
    def _in_notebook(self) -> bool:
        return self.console.is_jupyter and not self.console.quiet

    def _header(self) -> list[str]:
        objectives = (quantity(name) for name in self.objectives)
        return [*NAMES, *(each.header for each in (*self._known(), *objectives)), *LAST]

    def _legend(self) -> str:
        n_rejected = sum(map(is_rejected, self._all()))
        return "● on the front" + (f"; {n_rejected} rejected before training" if n_rejected else "")

    @staticmethod
    def _n_ended(trials: list[FrozenTrial]) -> int:
        return sum(trial.state.is_finished() for trial in trials)

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _trials(self) -> list[FrozenTrial]:
        """Trials that are not rejected, not in the queue, and not replaced by a retry."""
        return [
            trial
            for trial in self._all()
            if trial.state != TrialState.WAITING and not is_left(trial) and not is_rejected(trial)
        ]

    def _known(self) -> list[Quantity]:
        """Quantities shown besides the objectives: headlines known before training."""
        return [each for each in headlines() if each.is_known and each.name not in self.objectives]

    def _front(self) -> set[int]:
        return {trial.number for trial in self.study.best_trials}

    def _row(self, trial: FrozenTrial, front: set[int]) -> list[str]:
        about = trial.user_attrs
        # A trial's attributes hold the fields of `trial.json`, and its costs by name.
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
    """A curve as one line of bars; the highest value has the highest bar."""
    return bars(values)[0] if len(values) > 1 else ""


def _state(trial: FrozenTrial) -> str:
    about: Mapping[str, Any] = trial.user_attrs
    if trial.state == TrialState.RUNNING:
        return "training" if "confirmed" in about else "starting"
    outcome = about.get("outcome", "failed")
    return str(outcome if outcome == "done" else f"{outcome}: {about.get('reason', '')}".removesuffix(": "))
