"""A study as a whole in Weights & Biases: its frontier and table as a run, and its workspace and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import optuna
import pandas as pd
from optuna.trial import TrialState

from explore.figures import family_styles, frontier_table, mark, plot_frontier, save_figure
from explore.frontier.gate import UNGATED, is_ungated
from explore.quantities import quantity
from explore.runs import find_runs
from explore.study.storage import objectives_of
from explore.table import load_runs, tabulate
from explore.tracking import PROJECT, Pages, WandbMode, log_sweep, run_id

QUALITY, COSTS = "val_bpb", ("flops_run", "params_active")
"""Axes of a frontier unless the objectives of a study name others."""
LONGEST_TABLE = 30
FIRST_DRAWN = 3
"""Complete trials after which the frontier of a running sweep is drawn first."""


def send_sweep(study: optuna.Study, runs: Path, mode: WandbMode, say: Callable[[str], None]) -> None:
    """Draws the frontier of a study into its folder of runs, and sends it with the table of its runs.

    Nothing that goes wrong here is an error: the trials are on disk.

    Args:
        say: told in one line what could not be done.
    """
    table = runs_of(study, runs)
    try:
        png = draw_frontier(study, runs, table)
        log_sweep(study.study_name, table, png, runs, mode, question=str(study.user_attrs.get("question", "")))
    except Exception as error:
        say(f"no frontier for Weights & Biases: {' '.join(str(error).split())}")


def draw_frontier(study: optuna.Study, runs: Path, table: pd.DataFrame) -> Path:
    """Draws the frontier of a study into its folder of runs.

    Args:
        table: its rows of the table of runs.

    Returns:
        The PNG.
    """
    quality, (cost, *_) = frontier_axes(study)
    drawn = plot_frontier(table, cost, quality)
    if is_ungated(runs):
        mark(drawn, UNGATED)
    return save_figure(drawn, runs / "frontier.png")[0]


class GrowingFrontier:
    """The frontier of a sweep, drawn while it runs: soon, whenever it has twice as many runs, and at its end."""

    def __init__(self, study: optuna.Study, runs: Path, say: Callable[[str], None]) -> None:
        self.study, self.runs, self.say = study, runs, say
        self._drawn = 0

    def refresh(self, *, is_last: bool = False) -> None:
        """Draws it where it is time; what goes wrong is said, and ends nothing."""
        complete = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if len(complete) < (self._drawn + 1 if is_last else max(FIRST_DRAWN, 2 * self._drawn)):
            return
        self._drawn = len(complete)
        try:
            path = draw_frontier(self.study, self.runs, runs_of(self.study, self.runs))
            self.say(f"the frontier of {len(complete)} trials: {path}")
        except Exception as error:
            self.say(f"no frontier yet: {' '.join(str(error).split())}")


def study_pages(study: optuna.Study, runs: Path | None, project: str = PROJECT, entity: str = "") -> Pages:
    """What the workspace and the report of a study show.

    Args:
        runs: the folder of its runs, of which the report has a table.
        entity: the account's own when empty.
    """
    quality, costs = frontier_axes(study)
    trials = Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))
    told = ", ".join(f"{n} {state}" for state, n in sorted(trials.items())) or "none"
    table = runs_of(study, runs) if runs is not None else tabulate()
    return Pages(
        name=study.study_name,
        project=project,
        group=study.study_name,
        question=str(study.user_attrs.get("question", "")),
        quality=quality,
        costs=costs,
        table=front_markdown(table, costs[0], quality),
        notes=[f"Trials when this was written: {told}.", *_notes(table)],
        colors=_colors(table),
        entity=entity,
    )


def runs_pages(runs: Path, project: str = PROJECT, entity: str = "") -> Pages:
    """What the workspace and the report of a folder of runs show: all runs of the project, and a table of these."""
    table = load_runs(runs)
    return Pages(
        name=runs.resolve().name,
        project=project,
        costs=COSTS,
        table=front_markdown(table, COSTS[0], QUALITY),
        notes=_notes(table),
        colors=_colors(table),
        entity=entity,
    )


def frontier_axes(study: optuna.Study) -> tuple[str, list[str]]:
    """Columns of the figure of a study: the quality, and the costs against which it stands, its own objective first."""
    names = list(objectives_of(study))
    quality = next((name for name in names if quantity(name).is_quality), QUALITY)
    costs = [name for name in names if not quantity(name).is_quality]
    return quality, costs + [cost for cost in COSTS if cost not in costs]


def runs_of(study: optuna.Study, runs: Path) -> pd.DataFrame:
    """The rows of the table of runs that are trials of a study, with all their seeds."""
    try:
        folders, table = find_runs(runs), load_runs(runs)
    except ValueError:  # there is no run yet
        return tabulate()
    keys = {trial.user_attrs.get("key") for trial in study.get_trials(deepcopy=False)}
    own = {folder.key for folder in folders if folder.trial.get("study") == study.study_name}
    return table[table["key"].isin(keys | own)].reset_index(drop=True)


def front_markdown(table: pd.DataFrame, cost: str, quality: str) -> str:
    """The runs on the front as a table in Markdown, by rising cost; nothing where there are none."""
    front = frontier_table(table, cost, quality)
    front = front[front["on_front"]].head(LONGEST_TABLE)
    if front.empty:
        return ""
    x, y = quantity(cost), quantity(quality)
    lines = [f"| family | pattern | {x.axis_label} | {y.axis_label} | run |", "|---|---|--:|--:|---|"]
    for row in front.to_dict("records"):
        numbers = f"{x.text(row[cost])} | {y.text(row[quality])}"
        lines.append(f"| {row['family']} | `{row['pattern']}` | {numbers} | {row['run']} |")
    return "\n".join(lines)


def _notes(table: pd.DataFrame) -> list[str]:
    """What a claim made of these runs must carry."""
    if table.empty:
        return ["No run has ended yet."]
    status = Counter(table["status"])
    n_seeds = table["seed"].nunique()
    corpora = ", ".join(sorted(set(table["corpus"].dropna().map(lambda corpus: Path(corpus).name)))) or "unknown"
    return [
        "Runs: " + ", ".join(f"{n} {name}" for name, n in sorted(status.items())) + f"; corpus: {corpora}.",
        "One seed a point: differences within the spread between seeds are not resolved."
        if n_seeds == 1
        else f"{n_seeds} seeds, each a point of its own.",
        "FLOPs are training FLOPs of a run: every matrix product, forward and backward.",
    ]


def _colors(table: pd.DataFrame) -> dict[str, str]:
    """Colours of the families, as in the figures, by the id of a run in Weights & Biases."""
    styles = family_styles(table["family"].dropna())
    known = table.dropna(subset=["key", "family"])
    return {
        run_id(key): "#" + "".join(f"{round(255 * part):02x}" for part in styles[family].color)
        for key, family in zip(known["key"], known["family"], strict=True)
    }
