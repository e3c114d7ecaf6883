"""The tables that the studies make from their records."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from optuna.trial import FixedTrial

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import draw_search, stacked
from explore.frontier import pairs_table
from explore.runs import FILES
from explore.study import load_sweep
from explore.table import load_pairs, load_runs

SWEEPS = Path(__file__).parent.parent / "sweeps"


FLOORS = {32: 1.5, 48: 1.4}
"""Bits per byte of the n-gram model, by width."""


def pack(path: Path, rows: list[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Writes a table of records, and reads the inputs of a study's tables."""
    texts = [{name: text if name == "run" else json.dumps(text) for name, text in row.items()} for row in rows]
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame(texts, columns=["run", *FILES]).to_parquet(path)
    return load_runs(path), load_pairs(path)


def run_of(name: str, seed: int, bpb: float, d_model: int = 48, **files: Any) -> dict[str, Any]:
    experiment = {"name": name, "seed": seed, "model": {"pattern": "ME", "d_model": d_model}, "train": {"lr": 0.01}}
    return {
        "run": f"{name}-{seed}",
        "experiment.json": {"key": f"{name}{seed}" * 10, "experiment": experiment},
        "cost.json": {"params_total": 100, "params_active": 90, "flops_fwd": 10.0},
        "trial.json": {"tuned": True, "lr_sensitivity": 0.1},
        "result.json": {
            "status": "finished", "tokens": 10, "val_bpb": bpb, "test_bpb": bpb, "flops_run": 6e9 * d_model * len(name)
        },
        "evals.json": {"ngram": {"order": 3, "val_bpb": 1.4, "test_bpb": FLOORS[d_model]}},
        **files,
    }  # fmt: skip


def wobble(*cause: int) -> float:
    """Reproducible noise."""
    return 0.002 * (hash(cause) % 7 - 3)


def dots(axes: Any) -> list[float]:
    """Values of the dots of single seeds, on the axis of the score."""
    lines = [line for line in axes.lines if line.get_alpha() == 0.6]
    along = "get_xdata" if labels(axes)[:1] and not labels(axes)[0][:1].isdigit() else "get_ydata"
    return sorted(value for line in lines for value in getattr(line, along)())


def floors(axes: Any) -> list[float]:
    """Scores of the n-gram models that are drawn, each once; their label lies inside the axes."""
    axes.figure.draw_without_rendering()
    for text in axes.texts:
        assert axes.get_window_extent().y0 < text.get_window_extent().y0
    return sorted({value for line in axes.lines if line.get_marker() == "_" for value in line.get_ydata()})


def labels(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_multi_token_prediction_is_compared_at_equal_tokens_and_at_equal_flops(tmp_path: Path) -> None:
    sweep = load_sweep(SWEEPS / "mtp_auxiliary.py")
    effects = {"none": 0.1, "longer": -0.1, "mtp": 0.0, "heavy": 0.2}
    rows = [
        run_of(f"{arm}-d{width}", seed, 2 + effect + 0.01 * seed + wobble(i, width, seed), width)
        for i, (arm, effect) in enumerate(effects.items())
        for width in (32, 48)
        for seed in range(3)
    ]
    assert sweep.tables is not None
    tables = sweep.tables(*pack(tmp_path / "records" / "s.parquet", rows))
    differences = tables["differences"].set_index(["d_model", "arm"])
    bpb = {row["run"]: row["result.json"]["test_bpb"] for row in rows}
    paired = [bpb[f"none-d32-{seed}"] - bpb[f"mtp-d32-{seed}"] for seed in range(3)]
    assert differences.loc[(32, "none"), "difference"] == pytest.approx(sum(paired) / 3)
    assert differences["verdict"].to_dict() == {
        **{(width, "none"): "worse" for width in (32, 48)},
        **{(width, "longer"): "better" for width in (32, 48)},
        **{(width, "heavy"): "exploratory" for width in (32, 48)},
    }
    assert sweep.figure is not None
    above, below = sweep.figure(tables).axes
    assert labels(below)[:3] == ["none, equal tokens (d 32)", "none, equal tokens (d 48)", "none, equal FLOPs (d 32)"]
    assert above.get_xlabel() == "Training FLOPs (billions)"
    assert floors(above) == pytest.approx(sorted(FLOORS.values()))
    assert dots(above) == sorted(bpb.values())
    gaps = [bpb[run] - bpb[f"mtp-{run.split('-', 1)[1]}"] for run in bpb if not run.startswith("mtp")]
    assert dots(below) == pytest.approx(sorted(gaps))


def test_longer_has_the_flops_of_mtp_and_every_run_has_enough_tokens() -> None:
    sweep = load_sweep(SWEEPS / "mtp_auxiliary.py")
    for width in (32, 48):
        arms = {
            arm: sweep.experiment(FixedTrial({"arm": arm, "d_model": width}))  # type: ignore[arg-type]
            for arm in ("none", "longer", "mtp", "heavy")
        }
        assert arms["longer"].flops_run == pytest.approx(arms["mtp"].flops_run, rel=0.01)
        assert arms["none"].n_steps == arms["mtp"].n_steps == arms["heavy"].n_steps < arms["longer"].n_steps
        assert (arms["mtp"].train.mtp_weight, arms["heavy"].train.mtp_weight) == (0.1, 0.3)
        assert arms["mtp"].model.mtp is not None
        assert arms["none"].model == arms["longer"].model == arms["mtp"].model.model_copy(update={"mtp": None})
        layers = arms["none"].model.cost(128).params_active - 2 * 2048 * width
        assert arms["none"].n_steps * arms["none"].batch_tokens >= 5 * layers


def averages(flat: float, minus_sqrt: float) -> dict[str, Any]:
    scores = {"flat": flat, "minus_sqrt": minus_sqrt}
    return {shape: {"val_bpb": score, "test_bpb": score} for shape, score in scores.items()}


def test_each_average_of_checkpoints_is_compared_with_the_decay_alone(tmp_path: Path) -> None:
    sweep = load_sweep(SWEEPS / "merge_or_decay.py")
    assert sweep.tables is not None

    def tables_where(flat: float) -> Any:
        rows = []
        for width, seed in ((width, seed) for width in (32, 48) for seed in range(5)):
            decayed, constant = (2 + wobble(arm, width, seed) for arm in range(2))
            merged = averages(constant + flat * seed, constant + 0.05)
            rows.append(run_of(f"decayed-d{width}", seed, decayed, width))
            rows.append(run_of(f"constant-d{width}", seed, constant + 0.3, width, **{"merged.json": merged}))
        assert sweep.tables is not None
        return sweep.tables(*pack(tmp_path / "records" / "s.parquet", rows))

    tables = tables_where(flat=0.0)
    differences = tables["differences"].set_index(["arm", "d_model"])
    assert differences.loc["minus_sqrt", "verdict"].tolist() == ["worse", "worse"]
    # The noise is that of the two compared arms at one width, not pooled over all arms.
    assert differences.loc["minus_sqrt", "dof"].tolist() == pytest.approx([4, 4])
    assert set(differences.loc[["flat", "constant"], "verdict"]) == {"exploratory"}
    gap = differences.loc["constant", "difference"] - differences.loc["minus_sqrt", "difference"]
    assert gap.tolist() == pytest.approx([0.25, 0.25])
    noisy = tables_where(flat=0.5)["differences"].set_index(["arm", "d_model"])
    pd.testing.assert_frame_equal(noisy.loc[["minus_sqrt"]], differences.loc[["minus_sqrt"]])
    assert (noisy.loc["flat", "sd"] > 2 * differences.loc["flat", "sd"]).all()
    assert sweep.figure is not None
    above, below = sweep.figure(tables).axes
    assert floors(above) == pytest.approx(sorted(FLOORS.values()))
    assert dots(above) == sorted(tables["seeds"]["test_bpb"])
    shown = tables["seeds"][tables["seeds"]["arm"].isin(["minus_sqrt", "flat"])]
    assert dots(below) == sorted(shown["difference"])
    assert labels(below) == ["minus sqrt (d 32)", "minus sqrt (d 48)", "flat (d 32)", "flat (d 48)"]


def test_only_runs_of_constant_rate_are_merged_over_the_steps_of_the_decay() -> None:
    sweep = load_sweep(SWEEPS / "merge_or_decay.py")
    assert sweep.merging is not None
    for width in (32, 48):
        decayed, constant = (
            sweep.experiment(FixedTrial({"arm": arm, "d_model": width}))  # type: ignore[arg-type]
            for arm in ("decayed", "constant")
        )
        every = sweep.merging.keep_every(constant)
        assert sweep.merging.keep_every(decayed) is None
        assert every is not None
        assert sweep.merging.last * every == round(decayed.train.decay * decayed.n_steps)
        assert constant.n_steps % every == 0  # the last checkpoint is that of the last step
        layers = constant.model.cost(128).params_active - 2 * 2048 * width
        assert constant.n_steps * constant.batch_tokens >= 6 * layers


FOUND = {"M-*E-E": (1.7, 3, 2), "MEM*EME": (1.9, 5, 4), "M*-E": (2.5, 4, 1), "M-M-M-*-": (2.2, 0, 0)}
"""Patterns that a search found: bits per byte, and the logarithm of the experts with how many of them are active."""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two studies of the search and of its winners, with artificial results of the search."""
    folder = tmp_path_factory.mktemp("search")
    for name in ("searched_frontier.py", "searched_winners.py"):
        shutil.copy(SWEEPS / name, folder)
    search = runpy.run_path(str(folder / "searched_frontier.py"))  # to load it as a sweep would solve for its budgets
    patterns = search["patterns"]
    trials = [(1.8 + 0.1 * i, dict(params)) for i, params in enumerate(reversed(search["baselines"]))]
    for pattern, (bpb, n_experts_log2, top_k) in FOUND.items():
        experts = {"n_experts_log2": n_experts_log2, "top_k": top_k, "compression_log2": 1}
        trials.append((bpb, patterns.params(pattern) | (experts if "E" in pattern else {})))
    rows = []
    for i, (bpb, params) in enumerate(trials):
        row = run_of(f"{i}", 0, bpb)
        row["experiment.json"]["experiment"] = Experiment(
            name=f"{i}",
            model=ModelConfig.model_validate(search["content"](patterns.read(params), params)),
            data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048"),
            train=TrainConfig(tokens=1000, lr=0.001 * (i + 1)),
        ).model_dump(mode="json")
        row["trial.json"] |= {"trial": i, "params": params}
        row["result.json"] |= {"finished_at": f"2026-01-01T00:00:{i:02d}"}
        rows.append(row)
    pack(folder / "records" / "searched_frontier.parquet", rows)
    return folder


def test_the_table_of_a_search_marks_hand_made_models_and_ranks_all(searched: Path) -> None:
    records = searched / "records" / "searched_frontier.parquet"
    sweep = runpy.run_path(str(searched / "searched_frontier.py"))
    tables = sweep["tables"](load_runs(records), load_pairs(records))
    search = tables["search"]
    assert search["kind"].tolist() == ["hand"] * 6 + ["found"] * 4
    assert search.set_index("rank").loc[1, "pattern"] == "M-*E-E"
    assert search.sort_values("rank")["val_bpb"].is_monotonic_increasing
    (ax,) = sweep["figure"](tables).axes
    hand, found = (line for line in ax.lines if line.get_linestyle() == "None")
    assert [*hand.get_xdata(), *found.get_xdata()] == [*range(1, 11)]
    assert [*hand.get_ydata(), *found.get_ydata()] == search["val_bpb"].tolist()
    (best,) = (line for line in ax.lines if line.get_linestyle() != "None")
    assert best.get_ydata()[-1] == search["val_bpb"].min()


def test_winners_are_the_best_of_the_search_on_fresh_seeds(searched: Path) -> None:
    sweep = load_sweep(searched / "searched_winners.py")
    hand, found = (sweep.experiment(FixedTrial({"arm": arm})) for arm in ("hand1", "found1"))  # type: ignore[arg-type]
    assert (found.name, found.model.pattern, found.model.blocks["E"].n_experts) == ("found1", "M-*E-E", 8)  # type: ignore[union-attr]
    assert (hand.name, hand.model.pattern) == ("hand1", "*-*-*-")
    assert (hand.seed, found.seed, sweep.seeds) == (100, 100, 3)
    assert (hand.train.lr, found.train.lr) == (0.001, 0.007)
    second = sweep.experiment(FixedTrial({"arm": "found2"}))  # type: ignore[arg-type]
    assert (second.model.pattern, second.model.blocks["E"].top_k) == ("MEM*EME", 4)  # type: ignore[union-attr]


def test_the_best_found_is_compared_with_the_best_hand_made(searched: Path, tmp_path: Path) -> None:
    sweep = load_sweep(searched / "searched_winners.py")
    effects = {"hand1": 0.0, "hand2": 0.1, "found1": -0.1, "found2": 0.001, "found3": 0.2}
    rows = [
        run_of(arm, 100 + seed, 2 + effect + wobble(i, seed), **{"trial.json": {"tuned": False}})
        for i, (arm, effect) in enumerate(effects.items())
        for seed in range(3)
    ]
    assert sweep.tables is not None
    tables = sweep.tables(*pack(tmp_path / "records" / "s.parquet", rows))
    differences, arms = (tables[name].set_index("arm") for name in ("differences", "arms"))
    assert differences["primary"].to_dict() == {arm: arm == "found1" for arm in effects if arm != "hand1"}
    assert differences.loc["found1", "verdict"] == "better"
    assert arms["tuned"].all()  # in the search, whose rates these are
    assert arms.loc["found1", "search_val_bpb"] == 1.7
    assert sweep.figure is not None
    (ax,) = sweep.figure(tables).axes
    assert len(labels(ax)) == 4


def test_winners_of_a_search_without_records_are_refused_in_one_line(searched: Path, tmp_path: Path) -> None:
    for name in ("searched_frontier.py", "searched_winners.py"):
        shutil.copy(searched / name, tmp_path)
    with pytest.raises(
        ValueError, match=r"records/searched_frontier\.parquet: is missing; `explore sweep .*` makes it$"
    ):
        load_sweep(tmp_path / "searched_winners.py")


@pytest.mark.parametrize("bpb", [[], [2.0], [2.0, float("nan"), 1.5]])
def test_searches_with_no_trial_one_trial_or_a_missing_score_are_drawn(bpb: list[float]) -> None:
    drawn, (ax,) = stacked([2.0], "A search")
    draw_search(ax, pd.DataFrame({"kind": ["hand"] * len(bpb), "val_bpb": bpb}), {"hand": "hand-made"}, "Trials")
    drawn.draw_without_rendering()
    assert len(ax.lines) == (2 if bpb else 0)


def test_minimal_pairs_are_compared_by_paradigm_and_sotu_is_a_column(tmp_path: Path) -> None:
    shares = {"base": [0.5, 0.6, 0.7, 0.8, 0.9, 0.6], "new": [0.6, 0.7, 0.8, 0.9, 1.0, 0.7]}
    rows = [
        run_of(
            arm, seed, 2.0, **{"evals.json": {"pairs": {"blimp": dict(zip("abcdef", accuracy, strict=True))}, **bits}}
        )
        for arm, accuracy in shares.items()
        for seed, bits in enumerate(({"bpb": {"sotu": 2.5}}, {}))
    ]
    runs, pairs = pack(tmp_path / "records" / "s.parquet", [*rows, run_of("unmeasured", 0, 2.0)])
    assert sorted(runs["sotu_bpb"].dropna()) == [2.5, 2.5]
    table = pairs_table(runs.assign(arm=runs["name"]), pairs, "arm", "base").set_index("arm")
    assert table["n_runs"].to_dict() == {"base": 2, "new": 2}
    assert table["n_paradigms"].tolist() == [6, 6]
    assert table.loc["base", "accuracy"] == pytest.approx(4.1 / 6)
    assert table.loc["base", "low"] < table.loc["base", "accuracy"] < table.loc["base", "high"]
    found = table.loc["new", ["difference_low", "difference", "difference_high"]]
    assert found.tolist() == pytest.approx([0.1, 0.1, 0.1])  # the same for every paradigm, so without spread
    assert table.loc["base", ["difference", "difference_low"]].isna().all()
    assert pairs_table(runs.assign(arm=runs["name"]), pairs.iloc[:0], "arm", "base").empty
