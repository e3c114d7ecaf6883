"""`explore puzzle`: its output, files and figures, and the mistakes that it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command_line import run
from matplotlib.figure import Figure
from small_runs import tiny, train, write_corpus

import explore.cli.puzzle  # noqa: F401  (adds its command)
from explore.compress import Plan, puzzle
from explore.compress.replacing import Measured
from explore.figures import draw_divergences, draw_quality, plot_tradeoff
from explore.runs import RunFolder

BLOCKS = {
    "M": {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 16},
    "-": {"d_ff": 24},
    "E": {"n_experts": 6, "top_k": 2, "d_expert": 6, "d_shared": 16},
}
SMALL = ("--tokens", "512", "--val-tokens", "256", "--shares", "0.5", "--vary", "d_ff", "--vary", "n_experts")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    model = {"model__d_model": 32, "model__blocks": BLOCKS, "train__tokens": 3 * 128, "train__eval_tokens": 320}
    return train(tiny(corpus, "M-E-", **model), tmp_path_factory.mktemp("runs"))


@pytest.fixture
def explore_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(run, capsys, monkeypatch)


def test_puzzle_writes_the_plan_of_the_best_child_and_prints_its_scores(finished: RunFolder, explore_: Any) -> None:
    options = ("--max", "params_active=85%", "--max", "state_bytes=1.5k", "--baselines", "--solutions", "2", *SMALL)
    code, printed, _ = explore_("puzzle", finished.path, *options, "--json")
    assert code == 0
    record = json.loads(printed)
    plan = Plan.load(record["plan"])
    assert record["config"] == plan.model().model_dump(mode="json")
    cost = plan.model().cost(32)
    assert (record["cost"]["params_active"], record["cost"]["state_bytes"]) == (cost.params_active, cost.state_bytes)
    assert cost.params_active <= 0.85 * record["parent_cost"]["params_active"]
    assert "Optimal" in record["status"]
    assert record["gap"] == 0
    assert record["measured"]["kl"] > 0
    assert record["measured"].keys() == record["parent"].keys() == {"kl", "val_loss", "val_bpb", "recall"}
    assert record["parent"]["kl"] == pytest.approx(0, abs=1e-6)
    assert len(record["layers"]) == 4
    assert [row["method"] for row in record["baselines"]] == [
        "greedy",
        "random",
        "most parameters",
        "whole layers only",
    ]
    assert len({row["plan"] for row in record["solutions"]}) == 2
    assert plan.flops == record["flops"]
    assert Path(record["library"]).exists()

    again, choice = puzzle(finished, record["max"])  # from the library that is kept
    assert (again.key(), choice.predicted) == (plan.key(), record["predicted"])
    code, printed, _ = explore_("puzzle", finished.path, *options)
    assert code == 0
    assert "whole layers only" in printed
    assert str(record["plan"]) in printed.replace("\n", "")
    assert all(len(line) <= 80 for line in printed.splitlines()[:-1])


@pytest.mark.slow
def test_a_sweep_prints_and_draws_a_row_of_budgets(finished: RunFolder, explore_: Any, tmp_path: Path) -> None:
    options = ("--sweep", "params_active=70%:100%:4", *SMALL, "--figure", str(tmp_path / "one.png"))
    code, printed, _ = explore_("puzzle", finished.path, *options, "--json")
    assert code == 0
    points = pd.DataFrame(json.loads(printed)["points"])
    assert (points["params_active"] <= points["budget"]).all()
    assert points["predicted"].is_monotonic_decreasing
    assert points["budget"].iloc[-1] == pytest.approx(json.loads(printed)["parent_cost"])
    assert points[["predicted", "kl"]].iloc[-1].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert (tmp_path / "one.svg").stat().st_size > 1000
    code, printed, _ = explore_("puzzle", finished.path, *options)
    assert code == 0
    assert "parent" in printed
    assert "one.svg" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--max: at least one of --max, --sweep and --drop is required, such as --max params_active=1M"),
        (
            "--max params_active",
            "--max must be of the form BUDGET=VALUE, such as params_active=1.5M or 50%, got 'params_active'",
        ),
        ("--max params_active=x", "--max must be of the form BUDGET=VALUE, such as params_active=1.5M or 50%, got"),
        ("--max params_activ=1M", "--max: 'params_activ' is unknown; did you mean 'params_active'?"),
        ("--max params_active=1M", "params_active: must be above 0 and at most the parent's"),
        ("--max params_active=1k", "params_active: must be at least 16,896, got 1,000"),
        ("--drop 4", "drop: must be from 0 to 3 of 4 layers, got 4"),
        ("--drop 1 --replacements cut", "drop: must be 0 if replacements do not include none, got 1"),
        ("--drop 1 --baselines", "--baselines: must not be combined with --drop"),
        ("--drop 1 --shares 1.5", "offer.shares.0: must be below 1, got '1.5'"),
        ("--drop 1 --vary d_gg", "vary must be a size of this parent, got 'd_gg'; choose from M.n_groups"),
        (
            "--drop 1 --replacements half",
            "offer.replacements.0: input should be 'cut', 'pooled', 'linear' or 'none', got 'half'",
        ),
        ("--drop 1 --by weight", "by must be one of activation, frequency, magnitude, random, reverse, got 'weight'"),
        ("--drop 1 --solutions 9 --differ 4", "solutions must be at most"),
        ("--drop 1 --figure a.png", "--figure: must come with --sweep"),
        ("--sweep state_bytes=1:2", "--sweep must be of the form BUDGET=LOW:HIGH:N"),
        ("--sweep state_bytes=90%:20%:3", "--sweep state_bytes=90%:20%:3: LOW must be above 0 and below HIGH"),
        ("--sweep state_bytes=20%:90%:3 --rounds 2", "--sweep: must not be combined with"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    finished: RunFolder, explore_: Any, options: str, message: str
) -> None:
    before = sorted(finished.path.rglob("*"))
    code, _, printed = explore_("puzzle", finished.path, *options.split())
    assert (code, len(printed.splitlines())) == (2, 1), printed
    assert printed.startswith(f"error: {message}")
    assert len(printed) < 400
    assert sorted(finished.path.rglob("*")) == before


def test_a_run_without_a_library_is_named(finished: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no library; explore puzzle makes one"):
        puzzle(tmp_path, {"params_active": 1e3})


def test_the_figure_draws_its_table() -> None:
    table = pd.DataFrame(
        {
            "budget": [1e3, 2e3],
            "state_bytes": [900, 2000],
            "predicted": [0.4, 0.01],
            "kl": [0.5, 0.02],
            "val_bpb": [3, 2],
        }
    )
    figure = plot_tradeoff(table, "state_bytes", Measured(0.0, 1.4, 1.9), 4000, "parent")
    left, right = figure.axes
    predicted, measured = left.lines
    assert list(predicted.get_ydata()) == [0.4, 0.01]
    assert list(measured.get_xdata()) == [900, 2000]
    assert left.get_ylabel() == "KL divergence (nats per token)"
    assert list(right.lines[0].get_ydata()) == [3, 2]
    assert right.get_ylabel() == "Validation bits per byte"
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["children, not trained further", "parent"]


def test_the_figure_survives_an_empty_table_and_missing_numbers() -> None:
    left, right = Figure().subplots(1, 2)
    empty = pd.DataFrame({"state_bytes": [], "predicted": [], "kl": [], "val_bpb": []})
    draw_divergences(empty, "state_bytes", left)
    draw_quality(empty, "state_bytes", "val_bpb", (1.0, 2.0), right)
    assert [ax.texts[0].get_text() for ax in (left, right)] == ["nothing to show"] * 2
    one = pd.DataFrame({"state_bytes": [5], "predicted": [0.0], "kl": [float("nan")], "val_loss": [float("nan")]})
    plot_tradeoff(one, "state_bytes", Measured(0.0, 1.4, None), 5, "parent").draw_without_rendering()
