"""The study of children and models from scratch: its arms, their rates, and seeds that are complete."""

from __future__ import annotations

import itertools
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from small_runs import tiny, write_corpus

from explore.compress import LayerCut, Plan
from explore.experiment import Experiment
from explore.runs import RunFolder, walk_runs
from explore.study.sweep_file import load_sweep
from explore.table import load_runs

FILE = Path(__file__).parent.parent / "sweeps" / "parent_or_scratch.py"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a parent of four small layers, of which every child keeps two, and runs of six steps."""
    spec = spec_from_file_location("parent_or_scratch", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    corpus = write_corpus(tmp_path)

    def parent(seed: int) -> Experiment:
        return tiny(corpus, "*-*-", name="parent", seed=seed, train__tokens=8 * 4 * 32)

    def plans(parent: RunFolder) -> dict[str, str]:
        paths = {}
        pairs = itertools.combinations(range(4), 2)
        for i, (arm, kept) in enumerate(zip(module.DISTILLED, pairs, strict=False)):
            plan = Plan.keep_all(parent, flops=1e9 + i).model_copy(
                update={"layers": tuple(LayerCut(drop=layer not in kept) for layer in range(4))}
            )
            plan.save(parent.path / f"{arm}.json")
            paths[arm] = str(parent.path / f"{arm}.json")
        return paths

    for name, value in (("parent_experiment", parent), ("plans", plans), ("CHILD_STEPS", 6), ("SEQ_LEN", 32)):
        monkeypatch.setattr(module, name, value)
    return module


def run(study: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["parent_or_scratch.py", *map(str, words)])
    study.main()


@pytest.mark.slow
def test_a_seed_has_every_arm_at_its_own_rate_and_is_not_trained_again(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, records = tmp_path / "runs", tmp_path / "records.parquet"
    with pytest.raises(SystemExit, match=r"has no rate for parent; run --seeds 0 first"):
        run(study, monkeypatch, "--runs", runs, "--seeds", 1)
    run(study, monkeypatch, "--runs", runs, "--seeds", 0, "--records", records)
    found = {each.load_experiment().name: each for each in walk_runs(runs)}
    assert sorted(found) == sorted(["parent", *study.DISTILLED, "scratch", "scratch-kd", "scratch-whole"])
    experiments = {name: each.load_experiment() for name, each in found.items()}
    for name, one in experiments.items():
        assert one.train.objective.kind == (
            "distillation" if name in (*study.DISTILLED, "scratch-kd") else "next_token"
        )
        assert one.start.kind == ("parent" if name in study.DISTILLED else "fresh")
        assert one.train.lr == found[name].trial["lr"]
    assert experiments["scratch"].model == experiments["scratch-kd"].model == experiments["puzzle"].model
    row = found["puzzle"].row()
    spent = row["flops_run"] + row["flops_teacher"] + row["flops_before"]
    assert experiments["scratch-whole"].train.flops == pytest.approx(spent)
    assert row["flops_before"] > found["parent"].row()["flops_run"] > 0

    before = {each.path: each.path.stat().st_mtime_ns for each in found.values()}
    run(study, monkeypatch, "--runs", tmp_path / "again", "--seeds", 0, "--records", records)
    assert len(list(walk_runs(tmp_path / "again"))) == len(before)
    assert not list((tmp_path / "again").glob("*/checkpoints"))
    (whole,) = (tmp_path / "again").glob("scratch-whole-*")
    shutil.rmtree(whole)  # the only arm that needs no weights
    run(study, monkeypatch, "--runs", tmp_path / "again", "--seeds", 0)
    assert [path.parent.name for path in (tmp_path / "again").glob("*/checkpoints")] == [whole.name]
    capsys.readouterr()
    run(study, monkeypatch, "--runs", runs, "--seeds", 1)
    seeds = load_runs(runs).groupby("name")["seed"].nunique()
    assert set(seeds) == {2}
    assert "puzzle beats the floor" in capsys.readouterr().out
    assert load_runs(runs)["ngram_test_bpb"].groupby(load_runs(runs)["seed"]).nunique().to_list() == [1, 1]

    three = pd.concat([load_runs(runs), load_runs(runs).query("seed == 0").assign(seed=2)])
    found = study.tables(three[(three["name"] != "greedy") | (three["seed"] == 0)], None, None)
    assert set(found["differences"]["name"]) == {"random", "width", "depth", "scratch", "scratch-kd", "scratch-whole"}
    flops = found["flops"].set_index("name")
    assert flops.loc["puzzle", "flops_with_parent"] == pytest.approx(flops.loc["scratch-whole", "flops_run"], rel=0.01)
    labels = [text.get_text() for text in study.figure(found).axes[0].get_yticklabels()]
    assert labels == [study.NAMES[arm] for arm in study.NAMES if arm != "greedy"]


def test_its_reports_are_loaded_and_explore_sweep_says_how_it_runs() -> None:
    assert load_sweep(FILE, or_script=True).seeds == 3
    with pytest.raises(
        ValueError, match=r"experiment\(trial\) -> Experiment is missing; if it is a script, run it with"
    ):
        load_sweep(FILE)
