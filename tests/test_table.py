"""Tables of runs: seeds as means with intervals, conditions, plain files, and the output of the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import run
from scipy import stats
from written_runs import RESULT, make_run

from explore.files import write_json
from explore.frontier import seed_means
from explore.table import load_runs, load_table, save_table, where

SCORES = {"ME": (2.0, 2.1, 2.3), "M*": (2.5, 2.4)}
"""Validation bits per byte of two patterns, by seed."""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs of two patterns from three and two seeds."""
    for i, (pattern, scores) in enumerate(SCORES.items()):
        for seed, score in enumerate(scores):
            key = f"{i}{seed}" * 32
            folder = make_run(tmp_path / "runs", "run", key, RESULT | {"val_bpb": score}, pattern=pattern)
            record = json.loads((folder / "experiment.json").read_text())
            record["experiment"] |= {"seed": seed, "name": pattern}
            write_json(folder / "experiment.json", record)
    return tmp_path / "runs"


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_a_pooled_interval(runs: Path) -> None:
    table = seed_means(load_runs(runs)).set_index("pattern")
    assert table["n_seeds"].to_dict() == {"ME": 3, "M*": 2}
    assert table["seeds"].to_dict() == {"ME": "0-2", "M*": "0, 1"}
    sums = sum(((np.array(scores) - np.mean(scores)) ** 2).sum() for scores in SCORES.values())
    dof = 5 - 2
    for pattern, scores in SCORES.items():
        low, _ = stats.t.interval(0.95, dof, np.mean(scores), np.sqrt(sums / dof / len(scores)))
        assert table.loc[pattern, "val_bpb"] == pytest.approx(np.mean(scores))
        assert table.loc[pattern, "val_bpb_half_width"] == pytest.approx(np.mean(scores) - low)


def test_one_run_has_no_interval_and_any_table_is_taken(runs: Path) -> None:
    one = seed_means(load_runs(runs).query("pattern == 'ME' and seed == 1"))
    assert (one["n_seeds"].tolist(), one["val_bpb"].tolist()) == ([1], [2.1])
    assert one["val_bpb_half_width"].isna().all()
    plain = pd.DataFrame({"anything": [1, 2], "val_bpb": [2.0, 2.1]})
    assert seed_means(plain)["val_bpb"].tolist() == [2.0, 2.1]
    assert len(seed_means(plain.iloc[:0])) == 0


@pytest.mark.parametrize(
    ("conditions", "n"),
    [
        (["val_bpb<2.3"], 2), (["val_bpb<=2.3"], 3), (["pattern=ME"], 3), (["pattern!=ME"], 2), (["pattern~M"], 5),
        (["seed>=1", "pattern=M*"], 1), (["flops_run>1T"], 5), (["recall>0"], 0), (["tuned=true"], 5),
    ],
)  # fmt: skip
def test_rows_are_kept_that_meet_all_conditions(runs: Path, conditions: list[str], n: int) -> None:
    assert len(where(load_runs(runs), *conditions)) == n


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("val_bpb", "--where must be COLUMN, one of = != < <= > >= ~ and a value, got 'val_bpb'"),
        ("val_bbp<2", "--where must be a column, got 'val_bbp'; did you mean 'val_bpb'?"),
        ("val_bpb<low", "--where: val_bpb must be compared with a number, got 'val_bpb<low'"),
    ],
)
def test_a_condition_that_cannot_be_met_is_refused(runs: Path, condition: str, message: str) -> None:
    with pytest.raises(ValueError, match="--where") as caught:
        where(load_runs(runs), condition)
    assert message in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_saved_table_is_read_like_a_folder_of_runs(runs: Path, tmp_path: Path, suffix: str) -> None:
    save_table(load_runs(runs), tmp_path / f"all{suffix}")
    again = load_table(tmp_path / f"all{suffix}")
    assert sorted(again["val_bpb"]) == sorted(score for scores in SCORES.values() for score in scores)
    assert len(load_table(tmp_path / f"all{suffix}", runs)) == 10


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, monkeypatch, "table", *args)
    assert (code, err, "…" in out) == (0, "", False)
    return out.splitlines()


def test_the_command_shows_folders_means_and_common_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    lines = shown(capsys, monkeypatch, runs)
    first = next(line for line in lines if line.startswith("● run-00000000"))
    half = seed_means(load_runs(runs))["val_bpb_half_width"].iloc[0]
    assert f"2.1333 ±{half:.4f}" in first
    assert "all: tokens 819k, corpus austen, d_model 128" in lines
    assert any(line.startswith("2 means of 5 runs") for line in lines)
    assert max(map(len, lines)) <= 80


def test_the_command_shows_every_run_and_the_columns_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    lines = shown(
        capsys, monkeypatch, runs, "--by-seed", "--columns", "seed,val_bpb", "--columns", "corpus", "--sort", "seed",
        "--where", "pattern=ME",
    )  # fmt: skip
    assert lines[0].split() == ["run", "seed", "val", "bpb", "corpus"]
    assert [line.split()[-3:-1] for line in lines[1:4]] == [["0", "2.0000"], ["1", "2.1000"], ["2", "2.3000"]]
    records = json.loads("\n".join(shown(capsys, monkeypatch, runs, "--json", "--where", "pattern=ME")))
    assert [record["val_bpb"] for record in records] == [2.0, 2.1, 2.3]


def test_committed_tables_of_records_and_of_runs_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).parents[1] / "sweeps" / "records"
    lines = shown(capsys, monkeypatch, folder / "latent_or_not.parquet", "--where", "d_model=64")
    assert any(line.startswith("3 means of 9 runs") for line in lines)
    assert shown(capsys, monkeypatch, folder / "pattern_grid.csv")[0].startswith(" ")
