"""Pruning against the front at a trial's own cost, and the compute that it would have saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from explore.cli import main
from explore.frontier import hypervolume, pareto_front
from explore.study.prune_replay import mean_outcomes, pruning_outcomes, read_curves, simulate_search
from explore.study.pruning import Curve, FrontPruner, finished_curves

EAGER = FrontPruner(margin=0.0, min_trials=0, min_fraction=0.0)
SHARES = (0.2, 0.4, 0.6, 0.8)


def curves(n: int, seed: int = 0) -> list[Curve]:
    draws = np.random.default_rng(seed)
    return [
        Curve((float(draws.integers(1, 9)),), tuple(zip(SHARES, draws.uniform(2, 3, 4).tolist(), strict=True)))
        for _ in range(n)
    ]


def study(storage: Any = None, objectives: Sequence[str] = ("val_bpb", "flops_run")) -> optuna.Study:
    made = optuna.create_study(
        storage=storage, study_name="s", directions=["minimize"] * len(objectives), load_if_exists=True
    )
    made.set_metric_names(list(objectives))
    return made


def tell(made: optuna.Study, flops: float, curve: Sequence[tuple[float, float]], state: TrialState) -> None:
    trial = made.ask()
    trial.set_user_attr("flops_run", flops)
    if curve:
        trial.set_user_attr("curve", curve)
    made.tell(trial, [curve[-1][1] if curve else 2.0, flops] if state == TrialState.COMPLETE else None, state)


pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


# The rule


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.4])
def test_a_run_is_stopped_if_one_of_at_most_its_cost_was_better_by_more_than_the_margin(margin: float) -> None:
    pruner, finished = FrontPruner(margin=margin, min_trials=0, min_fraction=0.0), curves(30)
    table = pd.DataFrame([{"flops": c.costs[0], **dict(c.points)} for c in finished])
    stopped = 0
    for (flops,), points in curves(60, seed=1):
        for share, value in points:
            rivals = table.loc[table["flops"] <= flops, share]
            expected = bool((rivals + margin < value).any())
            assert (pruner.verdict(finished, [flops], share, value) is not None) == expected
            stopped += expected
    assert 20 < stopped < 240


def test_a_trial_that_is_cheaper_than_all_others_is_never_stopped() -> None:
    finished = [Curve((2.0,), ((0.5, 1.0),)), Curve((3.0,), ((0.5, 0.5),))]
    assert EAGER.verdict(finished, [1.99], 0.5, 1e9) is None
    assert EAGER.verdict(finished, [2.0], 0.5, 1.0) is None
    assert EAGER.verdict(finished, [2.0], 0.5, 1.01) is not None
    assert EAGER.verdict(finished, [2.99], 0.5, 1.0) is None
    assert EAGER.verdict(finished, [3.0], 0.5, 1.0) is not None


def test_a_run_is_stopped_only_if_no_cost_of_the_other_is_higher() -> None:
    finished = [Curve((2.0, 10.0), ((0.5, 1.0),)), Curve((1.0, 20.0), ((0.5, 1.5),))]
    assert EAGER.verdict(finished, [3.0, 9.0], 0.5, 9.0) is None
    assert EAGER.verdict(finished, [1.5, 25.0], 0.5, 1.4) is None
    assert EAGER.verdict(finished, [1.5, 25.0], 0.5, 1.6) is not None
    assert EAGER.verdict(finished, [2.0, 25.0], 0.5, 1.4) is not None


def test_nothing_is_stopped_in_the_warm_up() -> None:
    finished = [Curve((1.0,), ((0.1, 1.0), (0.9, 1.0)))] * 4
    pruner = FrontPruner(margin=0.0, min_trials=4, min_fraction=0.4)
    assert pruner.verdict(finished, [1.0], 0.4, 2.0) is not None
    assert pruner.verdict(finished, [1.0], 0.39, 2.0) is None
    assert pruner.verdict(finished[1:], [1.0], 0.4, 2.0) is None


def test_curves_are_read_between_their_points_and_not_beyond() -> None:
    xs, ys = [0.2, 0.4, 0.7], [3.0, 2.5, 2.2]
    curve = Curve((1.0,), tuple(zip(xs, ys, strict=True)))
    for share in np.linspace(0.2, 0.7, 11):
        assert curve.at(float(share)) == pytest.approx(np.interp(share, xs, ys))
    assert [curve.at(x) for x in xs] == ys
    assert curve.at(0.199) is curve.at(0.701) is None
    assert EAGER.verdict([curve], [1.0], 0.1, 99.0) is EAGER.verdict([curve], [1.0], 0.9, 99.0) is None


def test_a_reason_names_both_values_the_cost_and_the_margin() -> None:
    reason = FrontPruner(margin=0.02, min_trials=0).verdict([Curve((1.0,), ((0.4, 2.5),))], [1.0], 0.4, 2.5301)
    assert reason == (
        "2.5301 bits per byte at 40% of the schedule, where a trial that costs no more had 2.5000; the margin is 0.02"
    )


# In a study


def test_curves_and_so_pruning_survive_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first, pruner = study(url), FrontPruner(margin=0.02, min_trials=1, min_fraction=0.2)
    trial = first.ask()
    trial.set_user_attr("flops_run", 1e9)
    judge = pruner.judge(first, trial)
    assert [judge(share, value) for share, value in ((0.2, 3.0), (0.4, 2.5), (1.0, 2.0))] == [None] * 3
    first.tell(trial, [2.0, 1e9])
    again = study(url)
    assert again.trials[0].user_attrs["curve"] == [[0.2, 3.0], [0.4, 2.5], [1.0, 2.0]]
    assert finished_curves(again, ["flops_run"]) == [Curve((1e9,), ((0.2, 3.0), (0.4, 2.5), (1.0, 2.0)))]
    rival = again.ask()
    rival.set_user_attr("flops_run", 2e9)
    judge = pruner.judge(again, rival)
    assert judge(0.2, 3.02) is None
    assert judge(0.4, 2.53) is not None
    assert study(url).trials[1].user_attrs["curve"] == [[0.2, 3.02], [0.4, 2.53]]


def test_a_trial_is_judged_by_the_complete_trials_that_have_a_curve() -> None:
    made = study()
    tell(made, 1.0, [(0.5, 1.0)], TrialState.PRUNED)
    tell(made, 1.0, [(0.5, 1.0)], TrialState.FAIL)
    tell(made, 1.0, [], TrialState.COMPLETE)
    running = made.ask()
    running.set_user_attr("curve", [(0.5, 1.0)])
    trial = made.ask()
    trial.set_user_attr("flops_run", 5.0)
    judge = EAGER.judge(made, trial)
    assert judge(0.5, 9.0) is None
    tell(made, 4.0, [(0.5, 1.0)], TrialState.COMPLETE)  # by another worker, meanwhile
    assert judge(0.5, 9.0) is not None


def test_a_repeated_point_of_a_curve_is_kept_once_and_in_order() -> None:
    made = study()
    trial = made.ask()
    trial.set_user_attr("flops_run", 5.0)
    judge = EAGER.judge(made, trial)
    for share, value in ((0.4, 2.0), (0.2, 3.0), (0.4, 2.0)):
        judge(share, value)
    assert made.trials[0].user_attrs["curve"] == [[0.2, 3.0], [0.4, 2.0]]


@pytest.mark.parametrize(
    "objectives",
    [
        ("val_bpb",),
        ("flops_run", "params_total"),
        ("val_bpb", "tokens_per_s"),
        ("val_bpb", "flops_run", "train_s"),
        ("val_bpb", "val_loss", "flops_run"),
        ("recall", "flops_run"),
    ],
    ids="-".join,
)
def test_objectives_that_are_not_on_the_curve_are_refused_in_one_line(objectives: tuple[str, ...]) -> None:
    made = study(objectives=objectives)
    with pytest.raises(ValueError, match=rf"^pruner: the objectives must be one of .*; got {', '.join(objectives)}$"):
        EAGER.judge(made, made.ask())


def test_an_error_to_maximize_and_objectives_without_names_are_refused() -> None:
    made = optuna.create_study(directions=["maximize", "minimize"])
    with pytest.raises(ValueError, match=r"; got none$"):
        EAGER.judge(made, made.ask())
    made.set_metric_names(["val_bpb", "flops_run"])
    with pytest.raises(ValueError, match=r"; got val_bpb, flops_run$"):
        EAGER.judge(made, made.ask())


def test_a_trial_without_a_cost_is_refused() -> None:
    made = study(objectives=("params_active", "val_loss", "flops_run"))
    trial = made.ask()
    trial.set_user_attr("flops_run", 1.0)
    with pytest.raises(ValueError, match="pruner: params_active is not among the user attributes of the trial"):
        EAGER.judge(made, trial)


# Replay


def table(n: int = 24, seed: int = 0) -> pd.DataFrame:
    """Runs whose error falls with their cost, and whose curves rank them slightly wrongly at first."""
    draws = np.random.default_rng(seed)
    flops = draws.integers(1, 20, n).astype(float)
    error = 3 - 0.3 * np.log(flops) + draws.uniform(0, 0.3, n)
    shares = {f"val_bpb_at_{100 * s:.0f}": error + 2 * (1 - s) + draws.normal(0, 0.1 * (1 - s), n) for s in SHARES}
    return pd.DataFrame({"flops_run": flops, "val_bpb": error, **shares, "val_bpb_at_100": error})


def test_a_replay_is_a_search_trial_by_trial() -> None:
    """Compares with a study that trains each row with the judge of its trial."""
    rows, pruner = table(), FrontPruner(margin=0.03, min_trials=3, min_fraction=0.2)
    order = np.random.default_rng(7).permutation(len(rows)).tolist()
    made, finished, spent, total = study(), [], [], 0.0
    for i in order:
        row = rows.iloc[i]
        trial = made.ask()
        trial.set_user_attr("flops_run", row["flops_run"])
        judge = pruner.judge(made, trial)
        for share in SHARES:
            if judge(share, row[f"val_bpb_at_{100 * share:.0f}"]) is not None:
                made.tell(trial, state=TrialState.PRUNED)
                total += share * row["flops_run"]
                break
        else:
            made.tell(trial, [row["val_bpb"], row["flops_run"]])
            total += row["flops_run"]
            finished.append(i)
            spent.append(total)
    found = simulate_search(read_curves(rows), order, pruner)
    assert found.finished == finished
    assert 3 < len(finished) < len(rows)
    assert [*found.spent, found.total] == pytest.approx([*spent, total])


def test_a_replay_counts_stopped_runs_and_the_front_reached() -> None:
    rows, pruner = table(), FrontPruner(margin=0.0, min_trials=2, min_fraction=0.2)
    (found,) = pruning_outcomes(rows, [pruner], [5])
    order = np.random.default_rng(5).permutation(len(rows)).tolist()
    done = simulate_search(read_curves(rows), order, pruner)
    stopped = set(order) - set(done.finished)
    front = set(np.flatnonzero(pareto_front(rows)))
    assert found["killed"] == pytest.approx(len(stopped & front) / len(front)) != 0
    assert found["stopped"] == pytest.approx(len(stopped) / len(rows))
    assert found["spent"] == pytest.approx(done.total / rows["flops_run"].sum())
    reference = (rows["flops_run"].max(), rows["val_bpb"].max())
    for share in (0.25, 0.5, 1.0):
        budget = share * rows["flops_run"].sum()
        plain = [i for i, spent in zip(order, rows["flops_run"].iloc[order].cumsum(), strict=True) if spent <= budget]
        ours = [i for i, spent in zip(done.finished, done.spent, strict=True) if spent <= budget]
        volumes = [hypervolume(rows.iloc[those], reference) for those in (ours, plain)]
        assert found[f"volume_at_{100 * share:.0f}"] == pytest.approx(volumes[0] / volumes[1])


def test_an_infinite_margin_prunes_nothing() -> None:
    (found,) = pruning_outcomes(table(), [FrontPruner(margin=1e9, min_trials=0)], [0])
    assert (found["spent"], found["stopped"], found["killed"]) == (1.0, 0.0, 0.0)
    assert {found[name] for name in found if name.startswith("volume")} == {1.0}


def test_a_wider_margin_spends_more_and_kills_less() -> None:
    pruners = [FrontPruner(margin=margin, min_trials=3) for margin in (0.0, 0.05, 0.2)]
    summary = mean_outcomes(pd.DataFrame(pruning_outcomes(table(), pruners, range(20)))).set_index("margin")
    assert summary["spent"].is_monotonic_increasing
    assert summary["killed"].is_monotonic_decreasing
    assert summary.loc[0.0, "spent"] < 0.8
    assert (summary["spent_low"] <= summary["spent"]).all()
    assert (summary["spent"] <= summary["spent_high"]).all()


def test_a_summary_averages_over_the_orders() -> None:
    rows = pd.DataFrame(pruning_outcomes(table(), [EAGER, FrontPruner(margin=0.1, min_trials=0)], range(8)))
    summary = mean_outcomes(rows)
    assert summary["margin"].tolist() == [0.0, 0.1]
    for margin, part in rows.groupby("margin"):
        row = summary[summary["margin"] == margin].iloc[0]
        assert row["killed"] == pytest.approx(part["killed"].to_numpy().mean())
        assert row["spent_low"] == pytest.approx(np.percentile(part["spent"], 2.5))
        assert row["spent_high"] == pytest.approx(np.percentile(part["spent"], 97.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["flops_run"]}, "column 'flops_run' is missing"),
        ({"drop": [f"val_bpb_at_{share}" for share in (20, 40, 60, 80)]}, "no column val_bpb_at_20"),
        ({"nan": "val_bpb_at_40"}, "val_bpb_at_40 must be there for every row"),
    ],
)
def test_a_table_that_cannot_be_replayed_is_refused(change: dict[str, Any], message: str) -> None:
    rows = table().drop(columns=change.get("drop", []))
    if "nan" in change:
        rows.loc[3, change["nan"]] = np.nan
    with pytest.raises(ValueError, match=message):
        list(pruning_outcomes(rows, [EAGER], [0]))


def test_the_command_prints_the_results_of_the_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table()
    rows.to_csv(tmp_path / "runs.csv", index=False)
    arguments = [str(tmp_path / "runs.csv"), "--seeds", "4", "--margin", "0.05", "--min-trials", "3"]

    def printed(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["explore", "replay-pruning", *arguments, *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    pruner = FrontPruner(margin=0.05, min_trials=3)
    expected = mean_outcomes(pd.DataFrame(pruning_outcomes(rows, [pruner], range(4)))).to_dict("records")
    for row, wanted in zip(json.loads(printed("--json")), expected, strict=True):
        assert row == pytest.approx(wanted)
    assert f"{expected[0]['spent']:.3f}" in printed()
