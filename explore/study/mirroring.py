"""A study in Weights & Biases: its frontier and table as one run, and its workspace and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import optuna
import pandas as pd
from optuna.trial import TrialState

from explore.figures import family_styles, frontier_table, mark, plot_frontier, save_figure
from explore.formatting.markdown import code, inline
from explore.frontier.gate import UNGATED, is_ungated
from explore.quantities import quantity
from explore.runs import find_runs
from explore.study.storage import objectives_of
from explore.table import load_runs, tabulate
from explore.tracking import PROJECT, Pages, WandbMode, log_sweep, run_id

QUALITY, COSTS = "val_bpb", ("flops_run", "params_active")
"""Default axes of a frontier if the study's objectives name no others."""
LONGEST_TABLE = 30
FIRST_DRAWN = 3
"""Number of complete trials before the frontier of a running sweep is first drawn."""


def send_sweep(study: optuna.Study, runs: Path, mode: WandbMode, say: Callable[[str], None]) -> None:
    """Draws the frontier of a study in its folder of runs, and sends it with the table of runs.

    Problems here are reported, not raised: the trials are safe on disk.

    Args:
        say: receives one line on a problem.
    """
    table = runs_of(study, runs)
    try:
        png = draw_frontier(study, runs, table)
        log_sweep(study.study_name, table, png, runs, mode, question=str(study.user_attrs.get("question", "")))
    except Exception as error:
        say(f"no frontier for Weights & Biases: {' '.join(str(error).split())}")


def draw_frontier(study: optuna.Study, runs: Path, table: pd.DataFrame) -> Path:
    """Draws the frontier of a study in its folder of runs.

    Args:
        table: the study's rows of the table of runs.

    Returns:
        The path of the PNG.
    """
    quality, (cost, *_) = frontier_axes(study)
    drawn = plot_frontier(table, cost, quality)
    if is_ungated(runs):
        mark(drawn, UNGATED)
    return save_figure(drawn, runs / "frontier.png")[0]


class GrowingFrontier:
    """Draws the frontier of a running sweep: early, whenever its runs have doubled, and at the end."""

    def __init__(self, study: optuna.Study, runs: Path, say: Callable[[str], None]) -> None:
        self.study, self.runs, self.say = study, runs, say
        self._drawn = 0

    def refresh(self, *, is_last: bool = False) -> None:
        """Draws the frontier if it is due; problems are reported and stop nothing."""
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
    """The workspace and report of a study.

    Args:
        runs: the folder of its runs, which the report tabulates.
        entity: account or team; default: the user's account.
    """
    quality, costs = frontier_axes(study)
    trials = Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))
    counts = ", ".join(f"{n} {state}" for state, n in sorted(trials.items())) or "none"
    table = runs_of(study, runs) if runs is not None else tabulate()
    return Pages(
        name=study.study_name,
        project=project,
        group=study.study_name,
        question=str(study.user_attrs.get("question", "")),
        quality=quality,
        costs=costs,
        table=front_markdown(table, costs[0], quality),
        notes=[f"Trials when this was written: {counts}.", *_notes(table)],
        colors=_colors(table),
        entity=entity,
    )


def runs_pages(runs: Path, project: str = PROJECT, entity: str = "") -> Pages:
    """The workspace and report of a folder of runs: all runs of the project, and a table of this folder's runs."""
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
    """Columns for a study's figure: the quality axis, and the cost axes with the study's objectives first."""
    names = list(objectives_of(study))
    quality = next((name for name in names if quantity(name).is_quality), QUALITY)
    costs = [name for name in names if not quantity(name).is_quality]
    return quality, costs + [cost for cost in COSTS if cost not in costs]


def runs_of(study: optuna.Study, runs: Path) -> pd.DataFrame:
    """The rows of the table of runs that belong to a study's trials, with all their seeds."""
    try:
        folders, table = find_runs(runs), load_runs(runs)
    except ValueError:  # there is no run yet
        return tabulate()
    keys = {trial.user_attrs.get("key") for trial in study.get_trials(deepcopy=False)}
    own = {folder.key for folder in folders if folder.trial.get("study") == study.study_name}
    return table[table["key"].isin(keys | own)].reset_index(drop=True)


def front_markdown(table: pd.DataFrame, cost: str, quality: str) -> str:
    """The runs on the front as a Markdown table, by increasing cost; empty if there are none."""
    front = frontier_table(table, cost, quality)
    front = front[front["on_front"]].head(LONGEST_TABLE)
    if front.empty:
        return ""
    x, y = quantity(cost), quantity(quality)
    lines = [f"| family | pattern | {x.axis_label} | {y.axis_label} | run |", "|---|---|--:|--:|---|"]
    for row in front.to_dict("records"):
        numbers = f"{x.text(row[cost])} | {y.text(row[quality])}"
        family, pattern, run = (str(row[name]) for name in ("family", "pattern", "run"))
        lines.append(f"| {inline(family)} | {code(pattern)} | {numbers} | {inline(run)} |")
    return "\n".join(lines)


def _notes(table: pd.DataFrame) -> list[str]:
    """Caveats that a claim based on these runs must state."""
    if table.empty:
        return ["No run has ended yet."]
    status = Counter(table["status"])
    n_seeds = table["seed"].nunique()
    corpora = ", ".join(sorted(set(table["corpus"].dropna().map(lambda corpus: Path(corpus).name)))) or "unknown"
    return [
        "Runs: "
        + ", ".join(f"{n} {inline(name)}" for name, n in sorted(status.items()))
        + f"; corpus: {inline(corpora)}.",
        "One seed per point: differences within the spread between seeds are not resolved."
        if n_seeds == 1
        else f"{n_seeds} seeds, each drawn as a separate point.",
        "FLOPs are training FLOPs of a run: every matrix product, forward and backward.",
    ]


def _colors(table: pd.DataFrame) -> dict[str, str]:
    """The family colour of each run, as in the figures, by W&B run id."""
    styles = family_styles(table["family"].dropna())
    known = table.dropna(subset=["key", "family"])
    return {
        run_id(key): "#" + "".join(f"{round(255 * part):02x}" for part in styles[family].color)
        for key, family in zip(known["key"], known["family"], strict=True)
    }
