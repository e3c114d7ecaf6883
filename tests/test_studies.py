"""The sweep files that make claims: each declares a gate, and the arms of the new ones are what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from optuna.trial import FixedTrial

from explore import MoEConfig, TextData
from explore.figures import draw_comparisons, draw_floor, stacked
from explore.frontier.gate import Condition, GateReport, gate_report
from explore.study import RejectedError, Sweep, load_sweep

SWEEPS = Path(__file__).parent.parent / "sweeps"
GATED = (
    "attention_share", "bits", "latent_gated", "latent_or_not", "merge_or_decay", "mtp_auxiliary", "placement",
    "precision", "recall",
)  # fmt: skip
NEW = ("latent_gated", "placement")


@pytest.fixture(scope="module")
def sweeps() -> dict[str, Sweep]:
    return {name: load_sweep(SWEEPS / f"{name}.py") for name in GATED}


def arm_of(sweep: Sweep, arm: str, d_model: int) -> Any:
    return sweep.experiment(FixedTrial({"arm": arm, "d_model": d_model}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GATED)
def test_a_study_that_makes_claims_declares_a_gate_of_its_own_arms(name: str, sweeps: dict[str, Sweep]) -> None:
    gate, grid = sweeps[name].gate, sweeps[name].grid
    assert gate is not None
    assert grid is not None
    assert set(gate.arms) <= {*grid["arm"], "dense"}  # `latent_or_not` has no dense arm, and so fails
    assert gate.n_sizes == len(grid.get("d_model", [0])) or name == "latent_or_not"
    assert not set(gate.worse) & set(gate.trivial)
    assert re.search("Primary comparisons?, fixed in advance: ", sweeps[name].question.replace("\n", " "))


@pytest.mark.parametrize("name", ["attention_share", "latent_or_not", "merge_or_decay", "mtp_auxiliary"])
def test_an_old_study_fails_its_gate_and_says_why(name: str, sweeps: dict[str, Sweep]) -> None:
    sweep = sweeps[name]
    assert sweep.gate is not None
    report = gate_report(sweep.gate, sweep.seeds, SWEEPS / "records" / f"{name}.parquet")
    failed = report.table().query("verdict == 'failed'")["condition"].tolist()
    assert f"{sweep.gate.baseline} beats the floor" in failed
    assert "optimizer steps" in failed
    assert "units of the score" in failed


def test_recall_needs_its_control_to_recall_and_no_attention_to_overflow(sweeps: dict[str, Sweep]) -> None:
    sweep = sweeps["recall"]
    assert sweep.gate is not None

    def report(control: float, hardest: float) -> dict[str, str]:
        rows = [
            {"run": f"{arm}-{seed}", "status": "finished", "arm": arm, "d_model": 64, "seed": seed, "corpus": None,
             "recall": recall + 0.001 * seed * (1 if arm == "none" else -1), "recall_32_pairs": hard,
             "tokens": 1_000_000 * (seed + 1), "n_steps": 2000, "decay": 0.2, "tuned": True,
             "params_active_no_embeddings": 100_000}
            for arm, recall, hard in (("all-rope-conv", control, control), ("none", 0.6, hardest))
            for seed in range(5)
        ]  # fmt: skip
        found = sweep.gate.check(pd.DataFrame(rows), pd.DataFrame(), sweep.seeds).table()  # type: ignore[union-attr]
        return found.query("verdict == 'failed'").set_index("condition")["found"].to_dict()

    assert report(0.99, 0.3) == {}
    assert list(report(0.85, 0.3)) == ["all-rope-conv beats the floor"]
    assert report(0.99, 0.95) == {"recall accuracy of 32 pairs of none": "0.950"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NEW, "bits"])
def test_new_studies_train_and_score_as_their_gate_asks(name: str, sweeps: dict[str, Sweep]) -> None:
    sweep = sweeps[name]
    assert sweep.gate is not None
    assert sweep.grid is not None
    steps: dict[int, set[int]] = {}
    for d_model in sweep.grid["d_model"]:
        for arm in sweep.grid["arm"]:
            try:
                one = arm_of(sweep, str(arm), int(d_model))
            except RejectedError:
                assert d_model > min(sweep.grid["d_model"])
                continue
            layers = one.model.cost(one.data.seq_len).params_active_no_embeddings
            assert one.n_steps * one.batch_tokens >= sweep.gate.min_tokens * layers
            assert one.n_steps >= sweep.gate.min_steps
            assert one.train.evaluation == "whole"
            steps.setdefault(int(d_model), set()).add(one.n_steps)
    assert all(len(each) == 1 for each in steps.values())


def test_latent_arms_keep_the_parameters_of_the_standard_mixture_and_the_ratios_of_the_paper(
    sweeps: dict[str, Sweep],
) -> None:
    sweep = sweeps["latent_gated"]
    for d_model in (96, 128):
        costs, blocks = {}, {}
        for arm in ("moe", "acc4", "eff4"):
            one = arm_of(sweep, arm, d_model)
            costs[arm], blocks[arm] = one.model.cost(128), one.model.blocks["E"]
        assert all(isinstance(each, MoEConfig) for each in blocks.values())
        assert {arm: (each.n_experts, each.top_k, each.d_latent) for arm, each in blocks.items()} == {
            "moe": (64, 6, None),
            "acc4": (256, 22, d_model // 4),
            "eff4": (256, 6, d_model // 4),
        }
        routed = {arm: each.n_experts * (each.d_latent or d_model) * each.d_expert for arm, each in blocks.items()}
        assert len(set(routed.values())) == 1
        assert costs["acc4"].params_active_no_router == pytest.approx(costs["moe"].params_active_no_router, rel=0.01)
        assert costs["eff4"].params_active < 0.95 * costs["moe"].params_active
    dense, squeezed, moe = (arm_of(sweep, arm, 96).model.cost(128) for arm in ("dense", "squeezed4", "moe"))
    assert dense.params_active_no_router == pytest.approx(moe.params_active_no_router, rel=0.01)
    assert squeezed.params_total < 0.8 * moe.params_total
    assert arm_of(sweep, "acc4-norm", 96).model.blocks["E"].latent_norm == "combined"


@pytest.mark.slow
def test_arms_of_placement_have_the_mixers_of_recall_at_equal_flops(sweeps: dict[str, Sweep]) -> None:
    arms = runpy.run_path(str(SWEEPS / "recall.py"))["ARMS"]
    sweep = sweeps["placement"]
    assert sweep.grid is not None
    assert set(arms) < set(sweep.grid["arm"])
    flops = arm_of(sweep, "none", 64).flops_run
    for arm, (mixers, options) in arms.items():
        model = arm_of(sweep, arm, 64).model
        assert model.pattern == "".join(f"{mixer}-" for mixer in mixers)
        assert arm_of(sweep, arm, 64).flops_run == pytest.approx(flops, rel=0.01)
        attention = [each for letter, each in model.blocks.items() if letter == "*"]
        assert all(getattr(each, name) == value for each in attention for name, value in options.items())
    assert arm_of(sweep, "blind", 64).model.pattern == "----"
    assert arm_of(sweep, "thin", 64).flops_run < 0.9 * flops


def records(sweep: Sweep, widths: dict[int, tuple[str, ...]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs of these arms and their documents, the second arm better than the first by 0.05."""
    rng, rows, documents = np.random.default_rng(0), [], []
    for width, arms in widths.items():
        for i, arm in enumerate(arms):
            for seed in range(sweep.seeds):
                bits = 2.0 - 0.05 * (i == 1) + 0.001 * rng.standard_normal(6)
                name = f"{arm}-d{width}"
                rows.append(
                    {"run": f"{name}-{seed}", "name": name, "status": "finished", "d_model": width, "seed": seed,
                     "test_bpb": bits.mean(), "val_bpb": 2.0, "ngram_test_bpb": 2.1, "flops_run": 1e13 * width,
                     "flops_fwd": 10.0, "params_active": 90 + i, "params_total": 100, "tokens": 10, "n_steps": 5,
                     "lr": 0.01, "tuned": True, "lr_sensitivity": 0.1}
                )  # fmt: skip
                scores = {"run": f"{name}-{seed}", "document": range(6), "nats": bits * 100 * np.log(2), "n_bytes": 100}
                documents.append(pd.DataFrame(scores))
    return pd.DataFrame(rows), pd.concat(documents)


def learning(runs: pd.DataFrame) -> pd.DataFrame:
    """Curves of 3,000 steps; the loss of `middle` and `acc4` falls behind by 0.2 in equal parts per window."""
    steps = np.arange(1, 3001)
    behind = 0.2 * ((steps - 1) // 200) / 14
    return pd.concat(
        pd.DataFrame({"run": run.run, "step": steps, "flops_run": run.flops_run * steps / 3000,
                      "loss": 3.0 + run.seed + behind * run.name.startswith(("middle", "acc4"))})
        for run in runs.itertuples()
    )  # fmt: skip


def seed_dots(ax: Any) -> list[float]:
    return sorted(value for line in ax.get_lines() if line.get_alpha() == 0.6 for value in line.get_xdata())


def differences_of(runs: pd.DataFrame, width: int, baseline: str) -> list[float]:
    """Differences of all runs of a width from the baseline's run with the same seed."""
    rows = runs[runs["d_model"] == width]
    own = rows[rows["name"] == f"{baseline}-d{width}"].set_index("seed")["test_bpb"]
    others = rows[rows["name"] != f"{baseline}-d{width}"]
    return sorted(others["test_bpb"] - others["seed"].map(own))


def test_the_named_comparisons_are_drawn_by_seed_and_along_training(sweeps: dict[str, Sweep]) -> None:
    latent = sweeps["latent_gated"]
    runs, documents = records(latent, {96: ("moe", "acc4", "eff4", "squeezed4", "dense"), 128: ("moe", "acc4", "eff4")})
    assert latent.tables is not None
    assert latent.figure is not None
    tables = latent.tables(runs, pd.DataFrame(), documents=documents, curves=learning(runs))
    above, middle, steps, flops, below = latent.figure(tables).axes
    primary = runs[runs["name"].str.startswith(("moe", "acc4", "eff4"))]
    scores = sorted(value for line in above.get_lines() if line.get_alpha() == 0.6 for value in line.get_ydata())
    assert scores == sorted(primary["test_bpb"])
    assert len(seed_dots(middle)) == 2 * latent.seeds
    assert sum(seed_dots(middle)[: latent.seeds]) / latent.seeds == pytest.approx(
        tables["averages"].set_index("arm").loc["acc4", "difference"]
    )
    assert seed_dots(below) == pytest.approx(differences_of(runs, 96, "moe"))
    for ax, last in ((steps, 3000), (flops, 96e13)):
        lines = {line.get_label(): line for line in ax.get_lines()[1:]}
        assert list(lines) == ["acc, 4x, d 96", "acc, 4x, d 128", "eff, 4x, d 96", "eff, 4x, d 128"]
        np.testing.assert_allclose(lines["acc, 4x, d 96"].get_ydata(), np.linspace(0, 0.2, 15))
        np.testing.assert_allclose(lines["eff, 4x, d 96"].get_ydata(), 0, atol=1e-12)
        assert lines["acc, 4x, d 96"].get_xdata()[-1] == pytest.approx(last)


def test_the_primary_claims_are_means_over_both_widths_with_documents(
    sweeps: dict[str, Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    latent, placement = (sweeps[name] for name in NEW)
    runs, documents = records(latent, {96: ("moe", "acc4", "eff4", "squeezed4", "dense"), 128: ("moe", "acc4", "eff4")})
    assert latent.tables is not None
    assert latent.figure is not None
    tables = latent.tables(runs, pd.DataFrame(), documents=documents)
    averages = tables["averages"].set_index("arm")
    assert averages["verdict"].to_dict() == {"acc4": "better", "eff4": "equivalent"}
    assert set(averages["n_documents"]) == {6}
    assert averages.loc["acc4", "n_pairs"] == 2 * latent.seeds
    assert set(tables["seeds"].groupby("d_model").size()) == {5 * latent.seeds, 3 * latent.seeds}
    assert [ax.texts[0].get_text() for ax in latent.figure(tables).axes[2:4]] == ["no learning curves"] * 2
    recall = pd.DataFrame({"arm": ["none", "middle"], "n_seeds": 5, "successes": [0, 5], "recall": [0.5, 0.99],
                           "recall_32_pairs": [0.3, 0.98], "solved": [0.0, 1.0], "solved_low": [0.0, 0.57],
                           "solved_high": [0.43, 1.0]})  # fmt: skip
    monkeypatch.setitem(placement.experiment.__globals__, "recalled", lambda: recall)
    runs, documents = records(placement, dict.fromkeys((64, 96), ("none", "middle", "half", "all-rope-conv")))
    assert placement.tables is not None
    assert placement.figure is not None
    tables = placement.tables(runs, pd.DataFrame(), documents=documents, curves=learning(runs))
    (primary,) = tables["averages"].query("primary").to_dict("records")
    assert (primary["arm"], primary["verdict"], primary["n_documents"]) == ("middle", "better", 6)
    assert tables["both"].set_index("arm")["on_front"].to_dict() == {"none": False, "middle": True}
    drawn = placement.figure(tables).axes
    assert [ax.get_xlabel() for ax in drawn[2:4]] == ["Optimizer steps", "Training FLOPs"]
    for ax, end in zip(drawn[2:4], (3000, 64e13), strict=True):
        _, small, _ = ax.get_lines()  # zero, and a line of each width
        np.testing.assert_allclose(small.get_ydata(), np.linspace(0, 0.2, 15))
        assert small.get_xdata()[-1] == pytest.approx(end)
    assert seed_dots(drawn[4]) == pytest.approx(differences_of(runs, 64, "none"))
    dots = {line.get_xydata()[0].tolist()[0]: line for line in drawn[0].get_lines() if len(line.get_xydata()) == 1}
    for row in tables["both"].itertuples():  # no dot is shifted, and both intervals are drawn
        assert dots[row.test_bpb].get_ydata()[0] == row.solved
        ends = [each.tolist() for lines in drawn[0].collections for each in lines.get_segments()]
        assert [[row.low, row.solved], [row.high, row.solved]] in ends
        assert [[row.test_bpb, row.solved_low], [row.test_bpb, row.solved_high]] in ends
    assert [line.get_xdata()[0] for line in drawn[0].get_lines() if line.get_label() == "trigram"] == [2.1]


def test_placement_reads_recall_only_if_it_is_complete_and_passes_its_gate(
    sweeps: dict[str, Sweep], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = sweeps["placement"].experiment.__globals__
    monkeypatch.setitem(names, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"recall\.parquet: is missing; `explore sweep"):
        names["recalled"]()
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "recall.parquet").touch()
    arms = list(names["RECALL"]["ARMS"])
    scores = dict.fromkeys(("recall", *names["RECALL"]["BY_PAIRS"]), 0.95)
    columns = {"status": "finished", "pattern": "M", "lr": 0.1, "tuned": True, "params_active_no_embeddings": 1,
               "state_bytes": 1, "flops_fwd": 1, "step": 5, "steps_to_90": 4, "recall_over_steps": 0.5}  # fmt: skip
    runs = pd.DataFrame([{"name": arm, "seed": seed, **columns, **scores} for arm in arms for seed in range(5)])
    monkeypatch.setitem(names, "load_runs", lambda _: runs[runs["name"] != "middle"])
    with pytest.raises(ValueError, match=r"must have 5 ended runs of every arm, not of \['middle'\]"):
        names["recalled"]()
    monkeypatch.setitem(names, "load_runs", lambda _: runs)
    failed = GateReport("d_model 64", (Condition("control none", "equal", "worse", passed=False),))
    reports = [failed, GateReport("d_model 64", ())]
    monkeypatch.setitem(names, "gate_report", lambda *_: reports.pop(0))
    with pytest.raises(ValueError, match=r"the gate of recall\.py fails at d_model 64: control none: equal"):
        names["recalled"]()
    found = names["recalled"]().set_index("arm")
    assert set(found.index) == set(arms)
    assert (found["solved"] == 1).all()
    assert (found["solved_low"] > 0.4).all()


def test_the_arms_of_a_gate_run_before_the_others(sweeps: dict[str, Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextData, "fingerprint", lambda self: {})  # of a corpus that need not be here
    assert [each["arm"] for each in sweeps["recall"].first] == ["all-rope-conv", "none"]
    assert not sweeps["recall"].baselines
    assert [each["arm"] for each in sweeps["bits"].first] == ["bf16", "stochastic", "plain"]


def test_arms_of_bits_are_the_whole_recipe_without_one_ingredient_or_for_one_product(sweeps: dict[str, Sweep]) -> None:
    def recipe(arm: str) -> dict[str, Any]:
        return dict(arm_of(sweeps["bits"], arm, 64).train.recipe)

    whole = recipe("nvfp4")
    for arm, ingredient in (
        ("no-rotation", "hadamard"),
        ("no-stochastic", "stochastic"),
        ("no-squares", "square_weights"),
    ):
        own = recipe(arm)
        assert whole[ingredient]
        assert not own[ingredient]
        assert {name for name in whole if own[name] != whole[name]} == {ingredient}
    products = ("forward", "input_gradient", "weight_gradient")
    for arm, kept in (
        ("forward", "forward"),
        ("input-gradient", "input_gradient"),
        ("weight-gradient", "weight_gradient"),
    ):
        own = recipe(f"nvfp4-{arm}")
        assert [name for name in products if own[name]] == [kept]
    assert (recipe("plain")["format"], recipe("plain")["hadamard"], recipe("plain")["stochastic"]) == ("mxfp4", (), ())


def test_tables_of_bits_leave_out_an_arm_of_which_a_run_diverged(sweeps: dict[str, Sweep]) -> None:
    sweep = sweeps["bits"]
    assert sweep.tables is not None
    assert sweep.grid is not None
    runs, documents = records(sweep, {64: tuple(map(str, sweep.grid["arm"]))})
    broken = (runs["name"] == "stochastic-d64") & (runs["seed"] < 2)
    runs.loc[broken, ["status", "test_bpb"]] = ["diverged", float("nan")]
    tables = sweep.tables(runs, pd.DataFrame(), documents=documents[~documents["run"].isin(runs.loc[broken, "run"])])
    assert tables["diverged"].to_dict("records") == [{"arm": "stochastic", "n_diverged": 2}]
    assert set(tables["differences"]["arm"]) == set(sweep.grid["arm"]) - {"bf16", "stochastic"}
    assert set(tables["differences"]["n_documents"]) == {6}


def test_figures_say_that_verdicts_are_corrected_and_leave_out_floors_that_are_missing() -> None:
    table = pd.DataFrame({"arm": ["a", "b"], "difference": [0.1, 0.2], "low": [0.05, 0.1], "high": [0.2, 0.3],
                          "verdict": ["not resolved", "exploratory"]})  # fmt: skip
    _, (above, middle, below) = stacked([1.0, 1.0, 1.0], "A study")
    draw_comparisons(above, table, {"a": "A", "b": "B"}, "Difference")
    assert above.get_xlabel() == "Difference\n(verdicts are corrected, intervals are not)"
    draw_comparisons(middle, table, {"b": "B"}, "Difference")
    assert middle.get_xlabel() == "Difference"
    floors = pd.DataFrame({"flops_run": [1.0, 2.0, 3.0], "ngram_test_bpb": [2.5, float("nan"), float("nan")]})
    draw_floor(below, floors)
    draw_floor(below, floors.iloc[1:])
    draw_floor(below, floors[["flops_run"]])
    (label,) = below.texts
    assert label.xy == (1.0, 2.5)
