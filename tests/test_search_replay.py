"""The replay benchmark: regrets by hand, searches that follow the rules of sweeps, verdicts on made-up results."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import FixedTrial, TrialState

from explore.cli import main
from explore.search.replay import SIMPLEST_FIRST, judge, mean_regrets, regret, sampler_regrets, search_table, space_of
from explore.search.samplers import DrawnSampler, ExhaustedError
from explore.study import load_sweep

PATTERNS = ["".join(p) for n in (2, 3) for p in itertools.product("M*", *["M-E"] * (n - 2), "-E")]


@pytest.fixture
def table() -> pd.DataFrame:
    """Artificial results: larger models cost more and are better, attention helps, experts help most at the end."""
    rows = []
    for pattern, d_model in itertools.product(PATTERNS, (64, 96, 128)):
        flops = 1e9 * d_model * (len(pattern) + pattern.count("E"))
        bpb = 3 - 0.2 * math.log(flops / 1e9) - 0.1 * pattern.count("*") - 0.05 * pattern.endswith("E")
        rows.append({"pattern": pattern, "d_model": d_model, "flops_run": flops, "val_bpb": bpb})
    return pd.DataFrame(rows)


def area(points: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area of a union of rectangles, from the cells between all coordinates."""
    xs = sorted({math.log10(x) for x, _ in points} | {math.log10(reference[0])})
    ys = sorted({y for _, y in points} | {reference[1]})
    cells = itertools.product(itertools.pairwise(xs), itertools.pairwise(ys))
    return sum(
        (x1 - x0) * (y1 - y0) for (x0, x1), (y0, y1) in cells if any(math.log10(x) <= x0 and y <= y0 for x, y in points)
    )


def test_regret_is_the_share_of_the_missing_area(table: pd.DataFrame) -> None:
    reference = (table["flops_run"].max(), table["val_bpb"].max())
    points = list(table[["flops_run", "val_bpb"]].itertuples(index=False, name=None))
    some = [3, 10, 17, 20]
    expected = 1 - area([points[i] for i in some], reference) / area(points, reference)
    assert regret(table, table.iloc[some]) == pytest.approx(expected)
    assert regret(table, table) == pytest.approx(0)
    assert regret(table, table.iloc[:0]) == 1


def test_the_space_of_a_table_has_its_points(table: pd.DataFrame) -> None:
    space = space_of(table.sample(frac=1, random_state=0))
    assert set(space.patterns.patterns()) == set(PATTERNS)
    assert space.axes == {"d_model": (64, 96, 128)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="val_bpb"), "column 'val_bpb' is missing"),
        (lambda t: t.iloc[1:], "rows of a grid of"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "rows of a grid of"),
        (lambda t: t[t["pattern"] != "MM-"], "all are needed"),
        (lambda t: t.assign(val_bpb=np.nan), "must be there for every row"),
    ],
)
def test_a_table_that_is_not_a_grid_is_refused(table: pd.DataFrame, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_of(change(table))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SIMPLEST_FIRST if name != "gp"])
def test_a_search_counts_repeated_draws_of_an_experiment(table: pd.DataFrame, name: str) -> None:
    found, repeats = search_table(table, space_of(table), name, 0, 20)
    assert len(found) == len(set(found)) == len(repeats) == 20
    assert repeats == sorted(repeats)
    assert search_table(table, space_of(table), name, 0, 12) == (found[:12], repeats[:12])
    assert search_table(table, space_of(table), name, 1, 20)[0] != found


def test_a_sampler_receives_the_recorded_results_of_its_draws(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    created, create = [], optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **how: created.append(create(**how)) or created[0])
    found, _ = search_table(table, space_of(table), "nsga2", 0, 25)
    (study,) = created
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert [trial.values for trial in done] == table.iloc[found][["val_bpb", "flops_run"]].to_numpy().tolist()
    assert [trial.params["d_model"] for trial in done] == table.iloc[found]["d_model"].tolist()


def test_gp_searches_too(table: pd.DataFrame) -> None:
    assert len(search_table(table, space_of(table), "gp", 0, 11)[0]) == 11


def test_an_exhaustive_search_has_no_regret(table: pd.DataFrame) -> None:
    (row,) = sampler_regrets(table, ["random"], [len(table)], [0])
    assert row["regret"] == pytest.approx(0)
    assert row["repeats"] > len(table)


@pytest.mark.slow
def test_the_first_trials_of_a_search_are_those_of_a_shorter_one(table: pd.DataFrame) -> None:
    results = pd.DataFrame(sampler_regrets(table, ["random", "tpe"], [5, 12, 16], range(3)))
    shorter = pd.DataFrame(sampler_regrets(table, ["random", "tpe"], [12], range(3)))
    assert results[results["trials"] == 12].reset_index(drop=True).equals(shorter)
    for _, search_of_one in results.groupby(["sampler", "seed"]):
        assert search_of_one.sort_values("trials")["regret"].is_monotonic_decreasing


def made_up(**regrets: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {"sampler": name, "seed": seed, "trials": 40, "regret": value, "repeats": seed}
        for name, values in regrets.items()
        for seed, value in enumerate(values)
    )


def test_a_summary_has_means_and_paired_differences() -> None:
    noise = np.linspace(-0.1, 0.1, 21)
    results = made_up(random=list(0.3 + noise), tpe=list(0.2 + noise))
    summary = mean_regrets(results).set_index("sampler")
    assert list(summary.index) == ["random", "tpe"]
    assert summary.loc["tpe", "regret"] == pytest.approx(0.2)
    error = noise.std() / math.sqrt(21)
    assert summary.loc["tpe", "regret_high"] - 0.2 == pytest.approx(1.96 * error, rel=0.05)
    for column in ("difference", "difference_low", "difference_high"):  # the noise is the same for both
        assert summary.loc["tpe", column] == pytest.approx(-0.1)
    assert summary.loc["tpe", "repeats"] == 10


def test_the_verdict_is_the_winner_or_the_simplest_sampler_not_resolved_from_it() -> None:
    noise = np.linspace(-0.1, 0.1, 21)
    clear = made_up(random=list(0.3 + noise), tpe=list(0.2 + noise), gp=list(0.25 + noise))
    assert judge(clear, 40) == ("tpe", "tpe")
    close = made_up(random=list(0.201 + noise[::-1]), tpe=list(0.2 + noise), qmc=list(0.3 + noise))
    assert judge(close, 40) == ("tpe", "random")
    beaten = made_up(random=list(0.3 + noise), gp=list(0.2 + noise), nsga2=list(0.201 + noise[::-1]))
    assert judge(beaten, 40) == ("gp", "nsga2")


SWEEP = Path(__file__).parents[1] / "sweeps" / "pattern_grid.py"


def test_the_grid_of_the_sweep_file_is_the_space_of_its_record() -> None:
    sweep = load_sweep(SWEEP)
    record = pd.read_csv(SWEEP.parent / "records" / "pattern_grid.csv")
    space, study = space_of(record), optuna.create_study(sampler=DrawnSampler("grid", 0, sweep.grid))
    points = [sweep.experiment(study.ask()).model for _ in range(len(record))]
    assert [(model.pattern, model.d_model) for model in points] == list(
        itertools.product(space.patterns.model_copy(update={"letters": "M*-E"}).patterns(), space.axes["d_model"])
    )
    with pytest.raises(ExhaustedError, match="all 240 points"):
        sweep.experiment(study.ask())


def test_the_record_has_the_costs_of_the_experiments() -> None:
    sweep, record = load_sweep(SWEEP), pd.read_csv(SWEEP.parent / "records" / "pattern_grid.csv")
    for row in record.sample(20, random_state=0).to_dict("records"):
        params = {**sweep.grid["pattern"].params(row["pattern"]), "d_model": row["d_model"]}
        experiment = sweep.experiment(FixedTrial(params))
        cost = experiment.model.cost(experiment.data.seq_len)
        assert (row["params_total"], row["params_active"]) == (cost.params_total, cost.params_active)
        assert row["flops_run"] == pytest.approx(experiment.flops_run)
        assert row["val_bpb_at_100"] == pytest.approx(row["val_bpb"], rel=1e-6)  # the validation is in fp32


def test_the_command_prints_the_table_and_the_verdict(
    table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.csv"
    table.to_csv(path, index=False)
    command = ["explore", "replay-samplers", str(path), "--trials", "10", "--seeds", "3", "--sampler", "random"]
    command += ["--sampler", "qmc"]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    expected = mean_regrets(pd.DataFrame(sampler_regrets(table, ["random", "qmc"], [10], range(3))))
    found = json.loads(run("--json"))
    assert [row["regret"] for row in found["summary"]] == pytest.approx(list(expected["regret"]))
    least = expected.loc[expected["regret"].idxmin(), "sampler"]
    assert found["verdicts"]["10"]["least"] == least
    assert f"10 trials: {least} has the lowest regret" in run()


def test_a_table_that_cannot_be_replayed_is_refused_by_the_command(
    table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.csv"
    table.to_csv(path, index=False)
    for more, message in (
        (["--sampler", "grid"], "which draw at random, got 'grid'"),
        (["--sampler", "best"], "got 'best'"),
        (["--trials", "1000"], "trials must be between 1 and "),
        (["--axis", "width", "--sampler", "random", "--seeds", "2"], "column 'width' is missing"),
    ):
        monkeypatch.setattr(sys, "argv", ["explore", "replay-samplers", str(path), *more])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
