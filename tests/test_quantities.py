"""Every declared quantity is tested as the column, the objective and the axis that it declares."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import pandas as pd
import pytest
from rich.console import Console
from small_runs import TOKENS, tiny, train, write_corpus
from small_sweeps import write_sweep

from explore.cli import main
from explore.cost import CONVENTIONS, Cost
from explore.experiment import Experiment
from explore.figures import frontier_table, plot_frontier
from explore.files import write_json
from explore.frontier import arms_table, compare, hypervolume, hypervolume_interval, pareto_front, seed_bands
from explore.interop.card import model_card
from explore.quantities import (
    METRICS,
    QUANTITIES,
    Family,
    Quantity,
    budgets,
    choose,
    columns,
    headlines,
    objectives,
    quantity,
    read,
)
from explore.runs import RunFolder
from explore.study import load_sweep
from explore.study.dashboard import trial_note
from explore.study.live import SweepTable
from explore.study.mirroring import frontier_axes, runs_pages
from explore.table import expected_row, load_runs, tabulate
from explore.train.merging import Shape

SCORES = {
    "bpb": {"mars": 2.5, "val": 9.0},
    "pairs": {"blimp": {"a": 0.5, "b": 0.75}},
    "acceptance_length": {"greedy": 1.5, "temperature 1": 1.25},
    "ngram": {"order": 3, "val_bpb": 2.2, "test_bpb": 2.3},
}
MEMBERS = {"mars_bpb", "blimp_accuracy"}
QUANTIZED = {
    "quantized_from", "kl", "kl_decoded", "scales", "kv_format", "state_format", "state_rounding",
    "flops_fwd_quantized", "flops_train_quantized",
}  # fmt: skip
ABSENT = QUANTIZED | {
    "parent", "teacher", "flops_teacher", "flops_before", "recall", "recall_over_steps", "steps_to_90", "d_latent",
    "reason", "stopped_val_bpb", "whole_val_bpb", "whole_test_bpb", "test_documents",
}  # fmt: skip
"""What a finished run on text without a latent, a parent and a teacher, which is not quantised, does not have."""
NUMBERS = [each.name for each in columns(MEMBERS) if each.is_number]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with all measurements."""
    folder = tmp_path_factory.mktemp("quantities")
    run = train(tiny(write_corpus(folder), "ME", train__val_every=5), folder / "runs")
    averages = {shape: {"val_bpb": 2.0, "test_bpb": 2.1} for shape in get_args(Shape)}
    trial = {"tuned": True, "lr_sensitivity": 0.01, "residuals": {"params_active": -0.02, "flops_train": 0.01}}
    for name, content in (("evals", SCORES), ("merged", averages), ("trial", trial)):
        write_json(run.path / f"{name}.json", content)
    return run


@pytest.fixture(scope="module")
def runs(run: RunFolder) -> pd.DataFrame:
    """The table of two runs: the real one, and one with all values doubled."""
    row = run.row()
    double = {name: 2 * value if name in NUMBERS and value is not None else value for name, value in row.items()}
    return tabulate([row, double | {"run": "double"}])


def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["explore", *args])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out + captured.err


# The table of runs


def test_every_quantity_is_read_from_a_run_or_missing(runs: pd.DataFrame) -> None:
    assert [name for name in runs if runs[name].isna().any()] == [name for name in runs if name in ABSENT]
    assert list(runs) == [each.name for each in columns(MEMBERS)]
    assert {name: str(runs[name].dtype) for name in runs} == {each.name: each.dtype for each in columns(MEMBERS)}


def test_scores_of_any_run_are_columns_and_hide_no_other_column(run: RunFolder, runs: pd.DataFrame) -> None:
    assert runs["mars_bpb"][0] == 2.5
    assert runs["blimp_accuracy"][0] == 0.625
    assert runs["val_bpb"][0] == (run.result or {})["val_bpb"] < 9  # and not the one of a corpus called val
    assert not MEMBERS & set(tabulate([{"run": "bare"}]))
    mixed = tabulate([{"run": "bare"}, run.row()])
    assert mixed["mars_bpb"].isna().tolist() == [True, False]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Cost) if "dtype" not in field.name])
def test_every_total_of_a_cost_is_a_column(run: RunFolder, runs: pd.DataFrame, name: str) -> None:
    experiment = Experiment.load(run.path / "experiment.json")
    assert runs[name][0] == getattr(experiment.model.cost(experiment.data.seq_len), name)


def test_quantities_computed_from_records_equal_those_of_the_experiment(run: RunFolder, tmp_path: Path) -> None:
    experiment = Experiment.load(run.path / "experiment.json")
    cost = experiment.model.cost(experiment.data.seq_len)
    for budget in ({"tokens": 5 * TOKENS}, {"flops": 7.4 * TOKENS * cost.flops_train}, {"tokens": 1}):
        train = experiment.train.model_copy(update={"tokens": None, "flops": None, **budget})
        one = experiment.model_copy(update={"train": train})
        assert expected_row(one)["n_steps"] == one.n_steps
    row = run.row()
    assert row["state_bytes"] == cost.state_bytes
    assert row["n_layers"] == experiment.model.n_layers
    assert row["residual"] == 0.02
    known = {each.name for each in columns() if each.is_known and each.role == "cost"} - QUANTIZED
    assert {name: expected_row(experiment)[name] for name in known} == {name: row[name] for name in known}


def test_records_that_are_damaged_give_missing_values() -> None:
    for broken in ("text", [1], None, 3, {"x": "y"}):
        records: dict[str, Any] = dict.fromkeys(
            ("folder", "experiment", "cost", "environment", "trial", "evals", "merged", "result"), broken
        )
        assert all(value is None for value in read(records).values())
    odd = {"evals": {"pairs": {"blimp": {"a": None}}, "bpb": {"mars": "much"}}, "trial": {"residuals": {"a": "b"}}}
    table = tabulate([read(odd)])
    assert table[["blimp_accuracy", "mars_bpb", "residual"]].isna().all(axis=None)


# Declarations


def test_declarations_are_complete() -> None:
    everything = [each.template if isinstance(each, Family) else each for each in QUANTITIES.values()]
    labels = [each.axis_label for each in everything if each.is_number]
    assert len(set(labels)) == len(labels)
    for each in everything:
        assert each.label
        assert each.unit.lower() in each.axis_label.lower()
        assert not each.tied_to or each.tied_to in budgets()
    assert set(METRICS) <= QUANTITIES.keys()
    averages = {each.name for each in everything if each.source[:1] == ("merged",)}
    assert averages == {f"{name}_bpb_{shape}" for name in ("val", "test") for shape in get_args(Shape)}


def test_a_name_is_found_with_its_words_in_any_order_or_the_nearest_is_suggested() -> None:
    assert choose("decode_flops", NUMBERS, "--x") == choose("flops_decode", NUMBERS, "--x") == "flops_decode"
    with pytest.raises(
        ValueError, match=r"^--x must be a quantity with numbers, got 'flops_decod'; did you mean 'flop"
    ):
        choose("flops_decod", NUMBERS, "--x")


def test_columns_of_other_modules_have_labels_too() -> None:
    for convention in CONVENTIONS:
        assert quantity(f"flops_run_{convention}").log
    assert quantity("decode_bytes_4096").axis_label == "Decoding step at 4096 tokens moves (bytes)"
    assert (quantity("own").axis_label, quantity("own").better) == ("own", None)


@pytest.mark.parametrize("name", objectives())
def test_every_objective_is_allowed_in_a_sweep(tmp_path: Path, name: str) -> None:
    direction = "maximize" if objectives()[name].better == "higher" else "minimize"
    path = write_sweep(tmp_path, replaced={'"flops_run": "minimize"': f'"{name}": "{direction}"'})
    assert load_sweep(path).objectives[name] == direction


@pytest.mark.parametrize("name", ["family", "seed", "loss", "mars_bpb", "acceptance_length", "flop_run", "run_flops"])
def test_quantities_without_a_final_value_cannot_be_objectives(tmp_path: Path, name: str) -> None:
    path = write_sweep(tmp_path, replaced={'"flops_run"': f'"{name}"'})
    with pytest.raises(ValueError, match=f"objectives must be a quantity with numbers, got '{name}'"):
        load_sweep(path)


@pytest.mark.parametrize("budget", budgets())
def test_a_tied_budget_cannot_be_an_objective(tmp_path: Path, budget: str) -> None:
    fixed = {each.name for each in objectives().values() if budget in (each.name, each.tied_to)}
    tie = (
        f'from explore.study import Budgets\nbudgets = Budgets({{"{budget}": 1e6}}, ["d_model"], 32)\n\ndef experiment'
    )
    for name in fixed:
        changes = {'"flops_run": "minimize"': f'"{name}": "minimize"', "def experiment": tie}
        with pytest.raises(ValueError, match=f"objectives: '{name}' is tied by budgets.{budget}"):
            load_sweep(write_sweep(tmp_path, replaced=changes))
    also = {"flops_train": {"flops_fwd", "flops_run"}, "kv_bytes": {"kv_bytes_per_token"}}
    assert fixed == {budget} | also.get(budget, set())


# Figures


@pytest.mark.parametrize(("x", "y"), [*zip(NUMBERS, [*NUMBERS[7:], *NUMBERS[:7]], strict=True)])
def test_any_quantity_can_be_drawn_against_any_other(runs: pd.DataFrame, x: str, y: str) -> None:
    (ax,) = plot_frontier(runs, x, y).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == (quantity(x).axis_label, quantity(y).axis_label)
    known = runs[[x, y]].astype("float64").dropna()
    points = sorted(tuple(point) for drawn in ax.collections for point in drawn.get_offsets().tolist())
    assert points == sorted(map(tuple, known.to_numpy().tolist()))
    if not known.empty:
        for scale, name in ((ax.get_xscale(), x), (ax.get_yscale(), y)):
            assert scale == ("log" if quantity(name).log and (known[name] > 0).all() else "linear")


def test_the_command_draws_a_made_up_corpus_against_decoding(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, folder = str(tmp_path / "p.svg"), str(run.path)
    code, text = run_cli(capsys, monkeypatch, "plot", folder, "--x", "decode_flops", "--y", "mars_bpb", "--out", output)
    assert (code, text.count("wrote")) == (0, 2)
    assert "Bits per byte on mars against Decoding (FLOPs/token)" in Path(output).read_text()
    code, text = run_cli(capsys, monkeypatch, "plot", folder, "--y", "mar_bpb")
    assert (code, "got 'mar_bpb'; did you mean 'mars_bpb'?" in text) == (2, True)


# Fronts


def beaten(table: pd.DataFrame, x: str, y: str, higher: tuple[bool, bool]) -> list[bool]:
    """The definition, with a loop over all pairs."""

    def worth(i: int) -> tuple[float, float]:
        point = table[x][i], table[y][i]
        return tuple(value if up else -value for value, up in zip(point, higher, strict=True))  # type: ignore[return-value]

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    return [any(beats(worth(j), worth(i)) for j in range(len(table))) for i in range(len(table))]


AXES = [
    (("flops_run", False), ("val_bpb", False)),
    (("flops_run", False), ("recall", True)),
    (("tokens_per_s", True), ("val_bpb", False)),
    (("tokens_per_s", True), ("zorro_accuracy", True)),
]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_a_front_takes_the_better_values_of_both_axes(axes: tuple[tuple[str, bool], tuple[str, bool]]) -> None:
    (x, x_up), (y, y_up) = axes
    draws = np.random.default_rng(0)
    labels = {"run": [f"r{i}" for i in range(40)], "family": "f", "pattern": "M", "status": "finished"}
    table = pd.DataFrame({**labels, x: draws.integers(1, 9, 40), y: draws.integers(1, 9, 40)})
    expected = [not each for each in beaten(table, x, y, (x_up, y_up))]
    assert pareto_front(table, x, y).tolist() == expected
    drawn = frontier_table(table, x, y)
    front = drawn[drawn["on_front"]]
    assert set(front["run"]) == set(table["run"][expected])
    for column, falls in ((x, x_up), (y, not y_up)):  # from the best cost to the best quality
        steps = front[column].diff().dropna()
        assert (steps <= 0).all() if falls else (steps >= 0).all()
    (ax,) = plot_frontier(table.iloc[:1], x, y).axes
    (dx, dy), *_ = (text.get_position() for text in ax.texts if text.get_text())
    assert (dx > 0, dy > 0) == (x_up, y_up)  # the label is where no run can be


def test_statistics_of_fronts_are_mirrored_if_higher_is_better() -> None:
    draws = np.random.default_rng(1)
    rows = [
        (name, i, 10.0 ** (12 + i), 0.2 * i + draws.normal(0, 0.05)) for i, name in enumerate("abc") for _ in range(3)
    ]
    up = pd.DataFrame(rows, columns=["name", "size", "flops_run", "recall"]).assign(seed=[0, 1, 2] * 3)
    down = up.assign(val_bpb=-up["recall"])
    assert hypervolume(up, (1e15, 0.0), error="recall") == pytest.approx(hypervolume(down, (1e15, 0.0)))
    assert hypervolume(up, (1e15, 0.0), error="recall") > 0
    ours = hypervolume_interval(up, ["name"], (1e15, 0.0), error="recall")
    assert vars(ours) == pytest.approx(vars(hypervolume_interval(down, ["name"], (1e15, 0.0))))
    one, other = seed_bands(up, ["name"], error="recall"), seed_bands(down, ["name"])
    same = ["on_front", "p_front", "p_value", "standing"]
    pd.testing.assert_frame_equal(one[same], other[same])
    assert one["low"].tolist() == pytest.approx((-other["high"]).tolist())
    verdicts = compare(up, "name", "a", value="recall").set_index("name")["verdict"]
    assert verdicts.to_dict() == compare(down, "name", "a", value="val_bpb").set_index("name")["verdict"].to_dict()
    assert verdicts["c"] == "better"
    with pytest.raises(ValueError, match="cost must be a column whose lower values are better, got 'tokens_per_s'"):
        hypervolume(up.assign(tokens_per_s=1.0), (1e15, 0.0), cost="tokens_per_s", error="recall")


# A new quantity


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_new_quantity_is_one_declaration(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = Quantity(
        "kindness", "Kindness", ("result", "kindness"), "score", "smiles", short="kind", better="higher", spec=".1f",
        headline=True,
    )  # fmt: skip
    monkeypatch.setitem(QUANTITIES, "kindness", new)  # type: ignore[index]
    for i, value in enumerate((7.25, 8.5)):
        for name in ("experiment", "cost", "environment"):
            content = json.loads((run.path / f"{name}.json").read_text())
            write_json(tmp_path / f"r{i}" / f"{name}.json", content)
        result = (run.result or {}) | {"kindness": value, "flops_run": 1e12 * (i + 1)}
        write_json(tmp_path / f"r{i}" / "result.json", result)
    table = load_runs(tmp_path)
    assert table["kindness"].tolist() == [7.25, 8.5]
    assert pareto_front(table, error="kindness").all()
    (ax,) = plot_frontier(table, y="kindness").axes
    assert ax.get_ylabel() == "Kindness (smiles)"
    assert arms_table(table.assign(arm=["a", "b"]), "arm", "a")["kindness"].tolist() == [7.25, 8.5]
    code, text = run_cli(capsys, monkeypatch, "table", str(tmp_path), "--sort", "kindness")
    assert (code, " kind" in text, text.index("8.5") < text.index("7.2")) == (0, True, True)
    code, text = run_cli(capsys, monkeypatch, "plot", str(tmp_path), "--y", "kindness")
    assert code == 0
    sweep = load_sweep(write_sweep(tmp_path, replaced={'"val_bpb": "minimize"': '"kindness": "maximize"'}))
    study = optuna.create_study(directions=list(sweep.objectives.values()))  # type: ignore[arg-type]
    study.set_metric_names(list(sweep.objectives))
    trial = study.ask()
    study.tell(trial, [8.5, 1e12])
    assert frontier_axes(study) == ("kindness", ["flops_run", "params_active"])
    screen = io.StringIO()
    Console(file=screen, width=120).print(SweepTable(study, 1, Console()).render())
    assert " kind " in screen.getvalue()
    assert "kindness 8.5" in trial_note(study.trials[0], RunFolder(tmp_path / "r1"), None)
    card = model_card(
        Experiment.load(run.path / "experiment.json").model.build(), None, RunFolder(tmp_path / "r1").row()
    )
    assert "| kindness (smiles) | 8.5 |" in card


def test_pages_name_quantities_by_their_labels(run: RunFolder) -> None:
    labels = runs_pages(run.path)._arguments["labels"]
    assert labels["val_bpb"] == "Validation bits per byte"
    assert {*METRICS, "flops_run", "params_active"} <= labels.keys()


def test_summaries_show_settings_known_before_training_first() -> None:
    known = [each.is_known for each in headlines(MEMBERS)]
    assert known == sorted(known, reverse=True)
    assert {"params_total", "flops_run", "lr", "val_bpb", "mars_bpb"} <= {each.name for each in headlines(MEMBERS)}
    assert all(each.header for each in headlines())
