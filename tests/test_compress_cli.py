"""`explore score` and `explore cut`: what they print, write and refuse."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from small_runs import tiny, train, write_corpus

import explore.cli.cut
import explore.cli.puzzle
import explore.cli.score  # noqa: F401
from explore.compress import Cutter, Plan, Scores
from explore.compress.candidates import shape
from explore.compress.measures import Setting, measure
from explore.cost import Dtypes
from explore.figures import draw_layers, draw_scores, layers_table, plot_scores, scores_table
from explore.formatting import ranges
from explore.runs import RunFolder
from explore.weights import read_weights

BLOCKS = {
    "M": {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 16},
    "-": {"d_ff": 24},
    "E": {"n_experts": 6, "top_k": 2, "d_expert": 6, "d_shared": 16},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    model = {"model__d_model": 32, "model__blocks": BLOCKS, "train__tokens": 3 * 128, "train__eval_tokens": 320}
    return train(tiny(corpus, "M-E-", **model), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def unscored(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A copy of the run without scores and plans."""
    copy = tmp_path_factory.mktemp("unscored") / finished.path.name
    shutil.copytree(finished.path, copy, ignore=shutil.ignore_patterns("scores-*", "plans"))
    return RunFolder(copy)


@pytest.fixture
def explore_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(run, capsys, monkeypatch)


@pytest.fixture
def scored(finished: RunFolder, explore_: Any) -> Path:
    code, printed, _ = explore_("score", str(finished.path), "--tokens", "512", "--json")
    assert code == 0
    record = json.loads(printed)
    assert record["key"] == Scores.load(record["scores"]).key
    return Path(record["scores"])


def test_score_prints_its_file_and_key(finished: RunFolder, explore_: Any, scored: Path, tmp_path: Path) -> None:
    scores = Scores.load(scored)
    assert (scored.parent, scored.name) == (finished.path, f"scores-{scores.key[:8]}.parquet")
    code, printed, _ = explore_(
        "score", str(finished.path), "--tokens", "512", "--figure", str(tmp_path / "scores.png")
    )
    assert code == 0
    assert "3 -" in printed
    assert str(scored) in printed.replace("\n", "")
    assert all(len(line) <= 80 for line in printed.splitlines()[:-2])
    assert (tmp_path / "scores.svg").stat().st_size > 1000


def test_cut_writes_a_plan_and_counts_and_scores_its_child(
    finished: RunFolder, explore_: Any, scored: Path, tmp_path: Path
) -> None:
    options = ("--keep", "d_model=24", "--keep", "3.d_ff=10", "--drop-layer", "2", "--scores", str(scored))
    code, printed, _ = explore_("cut", str(finished.path), *options, "--out", str(tmp_path / "plan.json"), "--json")
    assert code == 0
    record = json.loads(printed)
    plan = Plan.load(record["plan"])
    assert record["plan"] == str(tmp_path / "plan.json")
    child = plan.model()
    assert record["config"] == child.model_dump(mode="json")
    assert (child.d_model, child.pattern) == (24, "M-a")
    assert record["cost"]["params_total"] == child.cost(32).params_total
    assert record["candidates"] == []
    assert record["zero_shot"]["parent_val_loss"] == pytest.approx(finished.result["val_loss"])  # type: ignore[index]
    built = child.build()
    built.load_state_dict(plan.apply(read_weights(finished.path / "checkpoints" / "last.ckpt")))


def test_show_prints_the_removed_parts_and_writes_nothing(finished: RunFolder, explore_: Any, scored: Path) -> None:
    options = ("--keep", "M.n_heads=2", "--drop-layers", "1", "--drop-mtp", "--scores", str(scored))
    code, printed, _ = explore_("cut", str(finished.path), *options, "--show")
    assert code == 0
    assert "layer 0 M: n_heads 4 -> 2, cut: " in printed
    assert "left out" in printed
    assert not (finished.path / "plans").exists()


def test_targets_give_the_best_children_first_and_a_plan_of_each(
    finished: RunFolder, explore_: Any, scored: Path
) -> None:
    options = ["--target", "params_active=12k", "--free", "d_model=16:32:2", "--free", "depth", "--tolerance", "0.1"]
    options += ["--scores", str(scored), "--best", "2", "--json"]
    code, printed, _ = explore_("cut", str(finished.path), *options)
    assert code == 0
    record = json.loads(printed)
    assert len(record["candidates"]) == 2 <= record["n_candidates"]
    losses = [each["val_loss"] for each in record["candidates"]]
    assert losses == sorted(losses)
    assert losses[0] == record["zero_shot"]["val_loss"]
    assert record["plan"] == record["candidates"][0]["plan"]
    for each in record["candidates"]:
        cost = Plan.load(each["plan"]).model().cost(32).params_active
        assert cost == each["costs"]["params_active"]
        assert cost == pytest.approx(12_000, rel=0.1)


def test_targets_hold_together_at_a_context_a_batch_dtypes_and_hardware(
    finished: RunFolder, explore_: Any, scored: Path
) -> None:
    options = ["--context", "1000", "--batch-size", "4", "--weight-dtype", "float8", "--hardware", "A100"]
    options += ["--free", "d_model=16:32:8", "--free", "d_ff=8:24:8", "--tolerance", "0.2", "--scores", str(scored)]
    model = finished.load_experiment().model
    setting = Setting(1000, 4, Dtypes(weight="float8"), "A100")
    names = ("memory_bytes", "decode_s")
    targets = [word for name in names for word in ("--target", f"{name}={0.8 * measure(name, model, setting)}")]
    code, printed, _ = explore_("cut", str(finished.path), *targets, *options, "--json")
    assert code == 0
    for each in json.loads(printed)["candidates"]:
        child = Plan.load(each["plan"]).model()
        assert each["costs"] == {name: measure(name, child, setting) for name in names}


def test_a_target_that_only_the_least_important_layer_meets_is_met(
    finished: RunFolder, explore_: Any, scored: Path
) -> None:
    """Before the parent is scored, another layer may count as the least important."""
    model = finished.load_experiment().model
    cutter = Cutter.of(finished, scores=Scores.load(scored))
    target = measure("params_active", shape(cutter, {}, 1), Setting(32))
    options = ("--target", f"params_active={target}", "--free", "depth=3:3", "--tolerance", "0.001")
    code, printed, err = explore_("cut", str(finished.path), *options, "--scores", str(scored), "--json")
    assert code == 0, err
    (found,) = json.loads(printed)["candidates"]
    assert found["costs"] == {"params_active": target}
    assert len(found["pattern"]) == model.n_layers - 1


def test_a_share_of_the_parent_is_the_same_target_as_its_number(
    finished: RunFolder, explore_: Any, scored: Path
) -> None:
    options = ["--free", "d_model=16:32:2", "--free", "depth", "--tolerance", "0.1", "--scores", str(scored), "--json"]
    half = finished.load_experiment().model.cost(32).params_active / 2
    found = []
    for target in ("params_active=50%", f"params_active={half}"):
        code, printed, _ = explore_("cut", str(finished.path), "--target", target, *options)
        assert code == 0
        found.append([each["costs"] for each in json.loads(printed)["candidates"]])
    assert found[0] == found[1] != []
    assert all(each["params_active"] == pytest.approx(half, rel=0.1) for each in found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--target params_active=half --free d_ff",
            "--target must be of the form BUDGET=VALUE, such as params_active=1.5M or 50%, got 'params_active=half'",
        ),
        ("--target params_actve=50% --free d_ff", "--target: 'params_actve' is unknown; did you mean 'params_active'?"),
        ("--keep d_ff", "--keep must be of the form SIZE=N, such as d_model=96, got 'd_ff'"),
        ("--keep d_ff=1.5", "--keep must be of the form SIZE=N"),
        ("--keep d_gg=3", "keep must be among d_model, M.n_groups"),
        ("--keep d_ff=25", "layers.1: d_ff: must be from 1 to 24, got 25"),
        ("--keep d_model=0", "d_model: must be from 1 to 32, got 0"),
        ("--keep n_experts=0", "layers.2: n_experts: must be from 1 to 6, got 0"),
        ("--keep 9.d_ff=8", "keep must be among d_model, M.n_groups"),
        ("--keep n_experts=1", "layers.2: top_k: must be at most n_experts=1, got 2"),
        ("--keep M.n_heads=3", "layers.0: n_heads: must be a multiple of n_groups, 2, got 3"),
        ("--drop-layer 4", "drop: a layer must be from 0 to 3, got 4"),
        ("--drop-layers 4", "drop: must be from 0 to 3 of 4 layers, got 4"),
        ("--drop-layer 0 --drop-layer 1 --drop-layer 2 --drop-layer 3", "layers: at least 1 of 4 must be kept"),
        ("--drop-layer 0 --drop-layers 1", "--drop-layers: must not be combined with --drop-layer"),
        ("--target params_active=9k --keep d_ff=3", "--target: must not be combined with --keep"),
        ("--target params_active=9M --free d_ff", "params_active: must be above 0 and at most the parent's"),
        ("--target params_active=9k", "free: at least one is required"),
        (
            "--target params_active=9k --free d_ff --free d_ff=8:24",
            "free: each size must be named once, got d_ff, d_ff",
        ),
        (
            "--by weight --keep d_ff=8",
            "by must be one of activation, frequency, magnitude, random, reverse, got 'weight'",
        ),
        ("--effect time --drop-layers 1", "effect must be one of mse, kl, loss, influence, got 'time'"),
        ("--scores nowhere.parquet", "nowhere.parquet: is not a table of scores"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    unscored: RunFolder, explore_: Any, options: str, message: str
) -> None:
    before = sorted(unscored.path.rglob("*"))
    code, _, printed = explore_("cut", str(unscored.path), *options.split())
    assert (code, len(printed.splitlines())) == (2, 1)
    assert printed.startswith(f"error: {message}")
    assert len(printed) < 400
    assert sorted(unscored.path.rglob("*")) == before


def test_a_run_that_has_not_finished_is_refused(explore_: Any, finished: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "experiment.json").write_text((finished.path / "experiment.json").read_text())
    (tmp_path / "result.json").write_text('{"status": "diverged"}')
    for command, *options in (("score",), ("cut",), ("puzzle", "--max", "params_active=50%")):
        code, _, printed = explore_(command, str(tmp_path), *options)
        assert code == 2
        assert printed == f"error: {tmp_path}: must be a finished run, and is diverged; train it to its end first\n"


def test_scores_of_another_parent_are_refused(finished: RunFolder, explore_: Any, scored: Path, tmp_path: Path) -> None:
    scores = Scores.load(scored)
    other = Scores(scores.table, {**scores.about, "parent": "0" * 64})
    other.save(tmp_path / "scores.parquet")
    code, _, printed = explore_("cut", str(finished.path), "--scores", str(tmp_path / "scores.parquet"))
    assert code == 2
    assert (
        f"must be of this parent, with the digest {scores.about['parent'][:12]}, got those of 000000000000" in printed
    )


def test_rising_numbers_are_shown_as_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert ranges([]) == ""


def test_the_figure_draws_its_tables(finished: RunFolder, scored: Path) -> None:
    scores, model = Scores.load(scored), finished.load_experiment().model
    table, layers = scores_table(scores, model), layers_table(scores, model)
    assert list(table.index) == ["0 M", "1 -", "2 E", "3 -"]
    assert list(table.columns[:2]) == ["n_groups", "d_head"]
    assert table.notna().sum(axis=1).tolist() == [4, 1, 3, 1]
    figure = plot_scores(scores, model, "parent")
    heat, profile = figure.axes
    assert [text.get_text() for text in heat.get_yticklabels()] == list(table.index)
    drawn = sorted(text.get_text() for text in heat.texts)
    assert drawn == sorted(f"{100 * value:.0f}" for value in table.stack().dropna())
    (dots,) = profile.lines
    assert list(dots.get_xdata()) == pytest.approx(layers["kl"].tolist())
    assert profile.get_xlabel() == "KL divergence (nats)"


def test_the_figure_survives_empty_tables() -> None:
    import pandas as pd
    from matplotlib.figure import Figure

    left, right = Figure().subplots(1, 2)
    draw_scores(pd.DataFrame(), left)
    draw_layers(pd.DataFrame({"kl": [float("nan"), 0.0]}), right)
    assert [ax.texts[0].get_text() for ax in (left, right)] == ["nothing to show"] * 2


# After a short distillation


@pytest.mark.slow
def test_candidates_are_ranked_again_after_a_short_distillation(
    finished: RunFolder, explore_: Any, scored: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--target", "params_active=12k", "--free", "d_model=16:32:2", "--free", "depth", "--tolerance", "0.1"]
    options += ["--scores", str(scored), "--best", "3", "--distil-tokens", "1280", "--out", str(tmp_path / "best.json")]
    code, printed, _ = explore_("cut", str(finished.path), *options, "--json")
    assert code == 0
    record = json.loads(printed)
    after = [each["distilled"]["val_loss"] for each in record["candidates"]]
    before = [each["val_loss"] for each in record["candidates"]]
    assert after == sorted(after)
    assert record["plan"] == str(tmp_path / "best.json")
    pairs = [(i, j) for i in range(3) for j in range(i)]
    same = sum((before[i] > before[j]) == (after[i] > after[j]) for i, j in pairs)
    assert record["kendall_tau"] == pytest.approx((2 * same - len(pairs)) / len(pairs))
    runs = [RunFolder(Path(each["distilled"]["run"])) for each in record["candidates"]]
    assert {run.path.parent for run in runs} == {finished.path / "candidates"}
    spent = sum(run.result["flops_run"] + run.result["flops_teacher"] for run in runs)  # type: ignore[index]
    scores = Scores.load(scored)
    zero_shot = record["flops"] - spent - float(scores.about["flops"])
    assert zero_shot > 0
    assert Plan.load(record["plan"]).flops == record["flops"]

    import explore.train.loop as loop

    monkeypatch.setattr(loop, "_fit", None)  # nothing is trained a second time
    code, printed, _ = explore_("cut", str(finished.path), *options)
    assert code == 0
    assert (
        f"Kendall's tau between the rankings before and after the distillation: {record['kendall_tau']:.2f}" in printed
    )
    code, _, printed = explore_("cut", str(finished.path), "--distil-tokens", "1k", "--scores", str(scored))
    assert (code, printed) == (2, "error: --distil-tokens: must come with --target\n")
