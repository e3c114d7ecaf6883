"""The gate: synthetic studies with known answers pass or fail each condition as they should."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_line import run as run_command
from small_runs import STEPS, result, tiny, train, write_corpus
from small_sweeps import quiet, study_of, write_gated

from explore.frontier.floors import add_floors
from explore.frontier.gate import Gate, Target, gate_report, gate_runs
from explore.runs import find_runs
from explore.study import load_sweep, run_gated
from explore.study.mirroring import draw_frontier
from explore.table import load_runs
from explore.train import LitLanguageModel
from explore.train.module import KEPT_LOAD

ROOT = Path(__file__).resolve().parent.parent
GATE = Gate(baseline="base", worse=("squeezed",), trivial=("dense",), effect=0.01, source="print")
EFFECTS = {"base": 0.0, "squeezed": 0.05, "dense": 0.04, "new": -0.01}


def study(sd: float = 0.001, effects: dict[str, float] = EFFECTS, **columns: Any) -> pd.DataFrame:
    """A study that passes; `columns` replace values of its runs, for all or by arm."""
    rng = np.random.default_rng(0)
    rows = []
    for size in (48, 96):
        for arm, effect in effects.items():
            for seed in range(5):
                row = {
                    "run": f"{arm}-{size}-{seed}",
                    "status": "finished",
                    "arm": arm,
                    "d_model": size,
                    "seed": seed,
                    "test_bpb": 2.0 - size / 1000 + effect + sd * rng.standard_normal(),
                    "ngram_test_bpb": 2.1,
                    "ngram_order": 3,
                    "corpus": "gutenberg",
                    "test_documents": 10,
                    "tokens": 4_000_000,
                    "params_active_no_embeddings": 100_000,
                    "n_steps": 4000,
                    "decay": 0.2,
                    "max_violation": 0.2,
                    "tuned": True,
                }
                if size == 48:
                    row |= {
                        name: value.get(arm, row[name]) if isinstance(value, dict) else value
                        for name, value in columns.items()
                    }
                rows.append(row)
    return pd.DataFrame(rows)


NO_CURVES = pd.DataFrame(columns=["run", "step"])


def failed(runs: pd.DataFrame, gate: Gate = GATE, curves: pd.DataFrame = NO_CURVES, seeds: int = 5) -> dict[str, str]:
    report = gate.check(runs, curves, seeds)
    assert report.size == "d_model 48"
    assert report.passed == (report.reason == "")
    table = report.table()
    assert report.passed == (table["verdict"] == "passed").all()
    return table[table["verdict"] == "failed"].set_index("condition")["found"].to_dict()


def test_a_sound_study_passes() -> None:
    assert failed(study()) == {}


@pytest.mark.parametrize(
    ("columns", "condition", "found"),
    [
        ({"ngram_test_bpb": 1.9}, "base beats the floor", "1.95"),
        ({"ngram_test_bpb": float("nan")}, "base beats the floor", "1.95"),
        ({"test_documents": float("nan")}, "units of the score", "a part of the split"),
        ({"test_documents": 4}, "units of the score", "whole split, 4 documents"),
        ({"tokens": 1_900_000}, "tokens per active parameter of the layers", "19.0"),
        ({"n_steps": 2999}, "optimizer steps", "2,999"),
        ({"decay": 0.05}, "last tenth of the curve", "not measured"),
        ({"n_steps": {"new": 5000}}, "optimizer steps of the schedule of all arms", "4,000 and 5,000"),
        ({"tokens": {"new": 8_000_000}}, "training tokens of all arms", "4e+06 and 8e+06"),
        ({"max_violation": {"new": 0.6}}, "max violation of routers", "0.60 (new)"),
        ({"tuned": {"new": False}}, "learning rate", "not tuned, or at an end of its grid: new"),
    ],
)
def test_each_condition_can_fail_alone_and_reports_the_value_found(
    columns: dict[str, Any], condition: str, found: str
) -> None:
    (only,) = failed(study(**columns)).items()
    assert only[0] == condition
    assert only[1].startswith(found)


def test_an_undetected_positive_control_fails() -> None:
    found = failed(study(effects=EFFECTS | {"squeezed": 0.0}))
    assert list(found) == ["control squeezed"]
    assert found["control squeezed"].endswith("not resolved")
    found = failed(study(effects=EFFECTS | {"squeezed": -0.05}))
    assert found["control squeezed"].endswith("better")  # a control that must be worse
    assert failed(study(effects=EFFECTS | {"dense": -0.05})) == {}  # a trivial arm may be either
    without = study()
    without = without[(without["arm"] != "dense") | (without["d_model"] != 48)]
    assert failed(without) == {"control dense": "no run at this size"}


def test_arms_that_the_gate_does_not_examine_change_no_control() -> None:
    def controls(runs: pd.DataFrame) -> pd.DataFrame:
        table = GATE.check(runs, NO_CURVES, 5).table()
        return table[table["condition"].str.startswith("control") | (table["condition"] == "resolvable difference")]

    runs = study()
    own = runs[runs["arm"] != "new"]
    bimodal = runs.assign(test_bpb=runs["test_bpb"] + 0.5 * ((runs["arm"] == "new") & (runs["seed"] % 2)))
    few = runs[(runs["arm"] != "new") | (runs["seed"] == 0)]
    for each in (runs, bimodal, few):
        pd.testing.assert_frame_equal(controls(each), controls(own))
    assert (controls(own)["verdict"] == "passed").all()


@pytest.mark.parametrize(
    ("diverged", "others", "passes", "words"),
    [
        (5, 0.0, True, "5 of 5 runs diverged, which counts as worse"),
        (2, 0.05, True, "2 of 5 runs diverged and the rest are worse than every run of the baseline"),
        (2, -0.05, False, "2 of 5 runs diverged, but not all others are worse"),
    ],
)
@pytest.mark.parametrize("control", ["squeezed", "dense"])
def test_a_control_that_diverges_counts_as_worse(
    control: str, diverged: int, others: float, passes: bool, words: str
) -> None:
    runs = study(effects=EFFECTS | {control: others})
    broken = (runs["arm"] == control) & (runs["seed"] < diverged) & (runs["d_model"] == 48)
    runs.loc[broken, ["status", "test_bpb"]] = ["diverged", float("nan")]
    report = GATE.check(runs, NO_CURVES, 5)
    row = report.table().set_index("condition").loc[f"control {control}"]
    assert row["found"].startswith(words)
    assert report.passed == passes == (row["verdict"] == "passed")


def test_a_control_does_not_count_as_worse_if_the_baseline_diverges_too() -> None:
    runs = study()
    broken = ((runs["arm"] == "squeezed") | (runs["arm"] == "base") & (runs["seed"] == 4)) & (runs["d_model"] == 48)
    runs.loc[broken, ["status", "test_bpb"]] = ["diverged", float("nan")]
    assert failed(runs) == {"control squeezed": "5 of 5 runs diverged, but so did 1 of the baseline"}


def test_a_control_that_other_documents_could_reverse_is_not_detected() -> None:
    runs = study()

    def documents(spread: float) -> pd.DataFrame:
        rng = np.random.default_rng(2)
        turn = spread * rng.standard_normal(10)
        rows = []
        for run in runs[runs["d_model"] == 48].itertuples():
            bits = run.test_bpb + (turn - turn.mean()) * (run.arm == "squeezed")
            rows += [(run.run, k, bits[k] * 1000 * np.log(2), 250, 1000) for k in range(10)]
        return pd.DataFrame(rows, columns=["run", "document", "nats", "n_targets", "n_bytes"])

    sound = GATE.check(runs, NO_CURVES, 5, documents(0.01))
    assert sound.passed
    assert sound.table().set_index("condition").loc["control squeezed", "found"].endswith("worse, over 10 documents")
    report = GATE.check(runs, NO_CURVES, 5, documents(0.2))
    assert report.reason.startswith("at d_model 48: control squeezed: +0.0")
    assert "not resolved, over 10 documents" in report.reason


def test_seeds_that_cannot_resolve_the_published_effect_fail() -> None:
    noisy = study(sd=0.008)
    assert list(failed(noisy)) == ["resolvable difference"]
    shares = dataclasses.replace(GATE, shares=True, effect=1.0)
    assert failed(noisy, shares) == {}  # the noise of scores does not matter
    assert failed(noisy, shares, seeds=1) == {"resolvable difference": "inf% of 1 seeds"}
    assert failed(noisy, dataclasses.replace(shares, effect=0.5)) == {"resolvable difference": "60% of 5 seeds"}
    assert failed(noisy, seeds=40) == {}  # as many seeds are planned beyond the pilot
    averaged = Gate(baseline="base", worse=("squeezed",), trivial=("dense",), effect=0.01, source="print", n_sizes=8)
    assert failed(noisy, averaged) == {}


def test_a_curve_without_decay_must_be_flat_at_its_end() -> None:
    runs = study(decay=0.0)

    def curves(drop: float) -> pd.DataFrame:
        rng = np.random.default_rng(1)
        rows = []
        for name in runs.loc[runs["d_model"] == 48, "run"]:
            last = 2.0 - drop + 0.001 * rng.standard_normal()
            rows += [(name, 3000, 2.1), (name, 3600, 2.0), (name, 4000, last)]
        return pd.DataFrame(rows, columns=["run", "step", "val_bpb"])

    assert failed(runs, curves=curves(0.0)) == {}
    found = failed(runs, curves=curves(0.02))
    assert found["last tenth of the curve"].startswith("-0.0")


def test_a_task_with_its_own_floor_needs_no_documents() -> None:
    runs = study(corpus=None, ngram_test_bpb=float("nan"), test_documents=float("nan"))
    runs = runs.assign(recall=3.0 - runs["test_bpb"])
    recall = Gate(
        baseline="base",
        worse=("squeezed",),
        trivial=("dense",),
        effect=0.01,
        source="print",
        value="recall",
        floor=0.25,
    )
    assert failed(runs, recall) == {}
    assert list(failed(runs.assign(recall=runs["recall"] - 0.9), recall)) == ["base beats the floor"]


def test_targets_bound_single_arms() -> None:
    runs = study()
    bounds = (Target("new", "test_bpb", below=1.95), Target("dense", "test_bpb", at_least=1.98))
    gate = dataclasses.replace(GATE, trivial=(), targets=bounds)
    assert gate.arms == ("base", "squeezed", "new", "dense")
    assert failed(runs, gate) == {}
    tighter = dataclasses.replace(gate, targets=(Target("new", "test_bpb", below=1.93), *bounds[1:]))
    (found,) = failed(runs, tighter).items()
    assert found == ("test bits per byte of new", "1.942")
    missed = (Target("dense", "test_bpb", at_least=2.1), Target("gone", "recall", below=1))
    higher = dataclasses.replace(gate, targets=missed)
    reached, absent = failed(runs, higher).values()
    assert float(reached) == pytest.approx(1.992, abs=0.002)
    assert absent == "not measured"


def test_what_a_gate_needs_is_known_before_any_run() -> None:
    gate = dataclasses.replace(GATE, targets=(Target("new", "test_bpb", below=1.95),))
    needs = gate.needs(5)
    assert list(needs) == ["condition", "needed"]
    found = gate.check(study(), NO_CURVES, 5).table()
    assert needs["condition"].tolist() == found["condition"].tolist()
    same = ~needs["condition"].isin(["base beats the floor"])  # what the n-gram scores is not known yet
    assert needs.loc[same, "needed"].tolist() == found.loc[same, "needed"].tolist()
    assert needs["needed"][0].startswith("below an n-gram model of the same tokens")


def test_a_bigram_is_no_floor() -> None:
    assert failed(study(ngram_order=3)) == {}
    assert failed(study(ngram_order={"base": 4})) == {}
    found = failed(study(ngram_order={"base": 2}))
    assert list(found) == ["base beats the floor"]
    assert found["base beats the floor"].endswith("compared with a model of order 2")


def test_a_gate_without_controls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate.worse must name at least one arm in a tuple, got \(\)"):
        Gate(baseline="base", worse=(), trivial=("dense",), effect=0.01, source="print")
    with pytest.raises(ValueError, match="exactly one of at_least and below must be given for recall of new"):
        Target("new", "recall")
    with pytest.raises(ValueError, match=r"gate\.effect must be positive, got 0"):
        Gate(baseline="base", worse=("a",), trivial=("dense",), effect=0, source="print")
    with pytest.raises(ValueError, match="gate: needs finished runs, got none"):
        failed(study().assign(status="diverged"))


def test_the_old_latent_study_fails_with_a_reason() -> None:
    sweep = load_sweep(ROOT / "sweeps" / "latent_or_not.py")
    assert sweep.gate is not None
    report = gate_report(sweep.gate, sweep.seeds, ROOT / "sweeps" / "records" / "latent_or_not.parquet")
    assert not report.passed
    table = report.table().set_index("condition")
    wrong = {
        "moe beats the floor",
        "control squeezed4",
        "resolvable difference",
        "units of the score",
        "tokens per active parameter of the layers",
        "optimizer steps",
        "max violation of routers",
    }
    assert wrong <= set(table.index[table["verdict"] == "failed"])
    assert table.loc["moe beats the floor", "found"] == "2.699"
    assert table.loc["moe beats the floor", "needed"] == "below 2.268 (n-gram)"
    assert report.reason.startswith("at d_model 24: moe beats the floor: 2.699, needed below 2.268")


@pytest.mark.slow
def test_a_sweep_runs_the_smallest_size_first_and_stops_if_its_gate_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, runs = write_gated(tmp_path / "sweep"), tmp_path / "runs"
    args = ("sweep", str(path), "--trials", "4", "--runs", str(runs), "--workers", "1")
    code, out, err = run_command(capsys, monkeypatch, *args)
    assert code == 1
    assert set(load_runs(runs)["d_model"]) == {32}
    assert "gate of width, at d_model 32" in out
    assert "failed" in out
    assert "[" not in out.partition("units of the score")[2]  # the verdicts are coloured, not marked up
    assert "width: the gate fails at d_model 32" in err
    assert "stopped (--ungated continues anyway)" in err
    code, out, err = run_command(capsys, monkeypatch, *args, "--ungated")
    assert code == 0
    assert set(load_runs(runs)["d_model"]) == {32, 64}
    assert "continued because of --ungated" in err
    assert (pd.read_csv(runs / "gate.csv")["verdict"] == "failed").any()
    marked = []
    monkeypatch.setattr("explore.study.mirroring.mark", lambda figure, words: marked.append(words))
    draw_frontier(study_of(runs), runs, load_runs(runs))
    assert marked == ["ungated"]


def test_a_gate_needs_a_grid_with_its_sizes(tmp_path: Path) -> None:
    path = write_gated(tmp_path / "sweep")
    path.write_text(path.read_text().replace('sampler = "grid"', 'sampler = "random"'))
    with pytest.raises(ValueError, match="gate: must come with sampler = 'grid', got 'random'"):
        load_sweep(path)
    path = write_gated(tmp_path / "other")
    path.write_text(path.read_text().replace('arm="n_layers"', 'arm="kind", size="depth"'))
    with pytest.raises(ValueError, match="gate: must come with a grid that has 'depth' or 'kind'"):
        load_sweep(path)


def test_a_study_of_one_size_runs_the_arms_of_its_gate_first_and_baselines_once(tmp_path: Path) -> None:
    path = write_gated(tmp_path / "sweep")
    text = path.read_text().replace('"d_model": [64, 32], "n_layers": [2, 1]', '"d_model": [32], "n_layers": [3, 2, 1]')
    path.write_text(text.replace('arm="n_layers"', 'arm="n_layers", size="seq_len"'))
    sweep = load_sweep(path)
    assert [point["n_layers"] for point in sweep.first] == [2, 1]
    assert [each.model.n_layers for each in sweep.design] == [2, 1, 3]
    path.write_text(path.read_text().replace('size="seq_len"', 'size="d_model"'))  # a size of the grid, with one value
    assert [point["n_layers"] for point in load_sweep(path).first] == [2, 1]
    path.write_text(path.read_text() + 'baselines = ({"d_model": 32, "n_layers": 1, "lr": 0.002},)\n')
    assert [point["n_layers"] for point in load_sweep(path).first] == [2]


def test_a_gate_may_change_under_its_study(tmp_path: Path) -> None:
    path = write_gated(tmp_path / "sweep")
    before = load_sweep(path).code
    path.write_text(path.read_text().replace('source="print"', 'source="elsewhere"'))
    assert load_sweep(path).code == before


def test_floors_are_stored_with_runs_and_in_records_without_changing_keys(tmp_path: Path) -> None:
    path, runs, records = write_gated(tmp_path / "sweep", floor="None"), tmp_path / "runs", tmp_path / "records.parquet"
    _, report = run_gated(load_sweep(path), 4, runs, ungated=True, records=records, console=quiet())
    assert report is not None
    for table in (load_runs(runs), load_runs(records)):
        assert set(table["d_model"]) == {32, 64}
        assert table["ngram_test_bpb"].notna().tolist() == (table["n_layers"] == 2).tolist()  # the baseline's alone
    assert gate_runs(records)["ngram_order"].notna().tolist() == load_runs(records)["ngram_test_bpb"].notna().tolist()
    keys = [each.key for each in find_runs(records)]
    assert add_floors(records) == 6
    again = load_runs(records)
    assert again["ngram_test_bpb"].notna().all()
    assert [each.key for each in find_runs(records)] == keys
    assert add_floors(records) == 0


def test_max_violation_averages_the_loads_of_many_steps_also_over_a_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, balance = tiny(write_corpus(tmp_path), "E"), LitLanguageModel._balance
    loads, stops = list[np.ndarray](), [InterruptedError()]

    def stopping(self: LitLanguageModel) -> None:
        if len(loads) == 10 and stops:
            raise stops.pop()  # after the checkpoint of step 10
        loads.append(self._load[0].double().numpy().copy())
        balance(self)

    monkeypatch.setattr(LitLanguageModel, "_balance", stopping)
    with pytest.raises(InterruptedError):
        train(one, tmp_path / "runs", checkpoint_every=5)
    folder = train(one, tmp_path / "runs", checkpoint_every=5)
    assert len(loads) == STEPS
    weights = KEPT_LOAD ** np.arange(STEPS)[::-1]
    mean = weights @ np.array(loads)
    assert result(folder)["max_violation"] == pytest.approx(mean.max() / mean.mean() - 1, rel=1e-5)
    assert loads[-1].max() / loads[-1].mean() > mean.max() / mean.mean()


def test_random_routing_has_less_than_the_allowed_violation_if_loads_are_averaged() -> None:
    rng = np.random.default_rng(0)
    loads = rng.multinomial(2048 * 6, np.full(256, 1 / 256), size=500)
    mean = KEPT_LOAD ** np.arange(500)[::-1] @ loads
    assert mean.max() / mean.mean() - 1 < 0.1 * GATE.max_violation
    assert (loads.max(axis=1) / loads.mean(axis=1) - 1).mean() > 0.8 * GATE.max_violation
