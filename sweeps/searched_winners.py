"""Do the winners of `searched_frontier.py`, trained on fresh seeds, beat the hand-made family?

`found1` to `found3` are the three best models that the search found, by bits per byte on validation. `hand1` to `hand6`
are its hand-made baselines in the same order. Both are read from the records of the search. Training FLOPs, tokens and
the learning rate of each model are those of the search. The search had seed 0; the seeds here are 100, 101 and 102. The
claim is about bits per byte on the test text, which no choice was based on.

Primary comparison, fixed in advance: `found1` against `hand1`, the best found against the best hand-made. Every run has
at least six training tokens per active parameter of the layers of the hand-made `MEM*EME`. Budget: one and a half CPU
hours.

    explore sweep sweeps/searched_winners.py --trials 9 --workers 2 --records sweeps/records/searched_winners.parquet
"""

import runpy
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import optuna
import pandas as pd

from explore import Experiment
from explore.figures import RunFigure, draw_comparisons, stacked
from explore.frontier import arms_table, compare, pairs_table
from explore.runs import RunFolder, find_runs
from explore.study.budgets import RejectedError

SEARCH = Path(__file__).with_name("searched_frontier.py")
RECORDS = SEARCH.parent / "records" / "searched_frontier.parquet"
FIRST_SEED = 100

objectives = {"val_bpb": "minimize"}
sampler = "grid"
grid = {"arm": ("found1", "hand1", "found2", "found3", "hand2", "hand3", "hand4", "hand5", "hand6")}
seeds = 3


@cache
def ranked() -> dict[str, RunFolder]:
    """The finished runs of the search, the best first, by the names of their arms."""
    if not RECORDS.is_file():
        raise ValueError(f"{RECORDS}: is missing; `explore sweep {SEARCH} --records {RECORDS}` makes it")
    baselines = runpy.run_path(str(SEARCH))["baselines"]
    runs = [run for run in find_runs(RECORDS) if run.status == "finished"]
    arms, n = {}, {"hand": 0, "found": 0}
    for run in sorted(runs, key=lambda run: run.row()["val_bpb"]):
        kind = "hand" if run.trial["params"] in baselines else "found"
        n[kind] += 1
        arms[f"{kind}{n[kind]}"] = run
    return arms


def experiment(trial: optuna.Trial) -> Experiment:
    """What the search trained under this name, from another seed."""
    arm = trial.suggest_categorical("arm", grid["arm"])
    run = ranked().get(arm)
    if run is None:
        raise RejectedError(f"the search has no {arm}")
    return run.load_experiment().model_copy(update={"name": arm, "seed": FIRST_SEED})


def tables(
    runs: pd.DataFrame, pairs: pd.DataFrame, documents: pd.DataFrame | None = None
) -> Mapping[str, pd.DataFrame]:
    """The model of every arm, its bits per byte in the search and on fresh seeds, and its difference from `hand1`."""
    runs = runs[runs["status"] == "finished"].drop(columns=["tuned", "lr_sensitivity"])
    rows = {arm: run.row() for arm, run in ranked().items()}
    searched = pd.DataFrame.from_dict(rows, orient="index")[["tuned", "lr_sensitivity", "val_bpb"]]
    runs = runs.assign(arm=runs["name"]).join(searched.rename(columns={"val_bpb": "search_val_bpb"}), on="arm")
    what = ["pattern", "n_experts", "top_k", "d_latent", "search_val_bpb"]
    models = runs.groupby("arm")[what].first().reset_index()
    fresh = runs.drop(columns="search_val_bpb")
    return {
        "arms": models.merge(arms_table(fresh, "arm", "hand1"), on="arm"),
        "differences": compare(runs, "arm", "hand1", primary=["found1"], documents=documents),
        "pairs": pairs_table(runs, pairs, "arm", "hand1"),
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Differences from the best hand-made model; labels show active experts, all experts and the latent's width."""
    drawn, (ax,) = stacked([2.6], "Do the winners of a search beat the hand-made family?")
    names = {}
    for row in tables["arms"].sort_values("arm").itertuples():
        experts = f", {row.top_k} of {row.n_experts}" if pd.notna(row.n_experts) else ""
        latent = f" in {row.d_latent}" if pd.notna(row.d_latent) else ""
        names[row.arm] = f"{row.arm.rstrip('0123456789')}: {row.pattern}{experts}{latent}"
    draw_comparisons(ax, tables["differences"], names, "Test bits per byte,\ndifference from the best hand-made")
    return drawn
