"""Findings: tables and figures made again from records alone, and what drifts from them said in a line."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from optuna.trial import FixedTrial
from small_runs import write_corpus
from test_cli import run as run_command

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import draw_search, stacked
from explore.findings import Finding, fill, find_findings, load_finding, ungated_claims
from explore.frontier import pairs_table
from explore.frontier.gate import Condition, GateReport
from explore.runs import FILES
from explore.study import load_sweep
from explore.table import load_pairs, load_runs

SWEEP = '''"""Does an arm pay?"""

import pandas as pd
from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import draw_comparisons, draw_levels, stacked
from explore.frontier import arms_table, compare

objectives = {"val_bpb": "minimize"}


def experiment(trial):
    model = ModelConfig(d_model=32, vocab_size=257, pattern="-", blocks={"-": {"d_ff": 64}})
    return Experiment(name="s", model=model, data=TextData(tokenizer="bytes"), train=TrainConfig(tokens=512))


def tables(runs, pairs):
    runs = runs.assign(arm=runs["name"])
    return {"differences": compare(runs, "arm", "base"), "arms": arms_table(runs, "arm", "base"), "pairs": pairs}


def figure(tables):
    drawn, (above, below) = stacked([1.5, 1.5], "Does an arm pay?")
    draw_comparisons(above, tables["differences"], {"wide": "wider", "deep": "deeper"}, "Bits per byte less base")
    levels = tables["differences"].assign(x=[1, 2], series="s", estimate=tables["differences"]["difference"])
    draw_levels(below, levels, {"s": "arms"}, "Number", "Difference")
    return drawn
'''
SHIFTS = {"base": 0.0, "wide": -0.2, "deep": 0.001}


def record(arm: str, seed: int) -> dict[str, Any]:
    """The files of a run as a row of a table of records, with made-up scores."""
    bpb = 2.0 + SHIFTS[arm] + 0.01 * seed + 0.01 * ((seed + list(SHIFTS).index(arm)) ** 2 % 3)
    experiment = {"name": arm, "seed": seed, "model": {"pattern": "-", "d_model": 32}, "train": {"lr": 0.01}}
    cost = {"params_total": 100, "params_active": 90 + len(arm), "flops_fwd": 10.0}
    result = {"status": "finished", "tokens": 10, "val_bpb": bpb, "test_bpb": bpb, "flops_run": 300.0}
    texts = {
        "experiment.json": {"key": f"{arm}{seed}" * 10, "experiment": experiment},
        "cost.json": cost,
        "environment.json": {"commit": "abc", "data": {"train": "f00d"}, "device": f"CPU {seed % 2}"},
        "trial.json": {"tuned": True, "lr_sensitivity": 0.1},
        "evals.json": {"pairs": {"blimp": {"agreement": 0.5, "binding": 0.75}}},
        "result.json": result,
    }
    return {"run": f"{arm}-{seed}", **{name: json.dumps(text) for name, text in texts.items()}}


@pytest.fixture
def sweeps(tmp_path: Path) -> Path:
    folder = tmp_path / "sweeps"
    (folder / "records").mkdir(parents=True)
    (folder / "pays.py").write_text(SWEEP)
    (folder / "other.py").write_text(SWEEP)  # has no records, so it is no finding yet
    rows = [record(arm, seed) for arm in SHIFTS for seed in range(3)]
    pd.DataFrame(rows, columns=["run", *FILES]).to_parquet(folder / "records" / "pays.parquet")
    return folder


@pytest.fixture
def finding(sweeps: Path) -> Finding:
    (found,) = find_findings(sweeps)
    return found


def test_what_was_written_has_not_drifted(finding: Finding, tmp_path: Path) -> None:
    paths = finding.write(tmp_path / "out")
    names = {"pays.pdf", "pays.svg", "pays.png", "pays.differences.csv", "pays.arms.csv", "pays.pairs.csv"}
    assert {path.name for path in paths} == names
    assert finding.drift(tmp_path / "out") == []


def test_a_finding_is_written_twice_with_the_same_bytes(sweeps: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        load_finding(sweeps / "pays.py").write(tmp_path / place)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / place).iterdir()} for place in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".png"])
def test_every_file_names_its_runs_commit_data_and_convention(finding: Finding, tmp_path: Path, suffix: str) -> None:
    finding.write(tmp_path)
    content = (tmp_path / f"pays{suffix}").read_bytes()
    for words in (b"base-0", b"deep-2", b"commits abc", b"data f00d", b"exact", b"tables sha256:"):
        assert words in content


def test_a_table_that_differs_from_the_records_is_named_by_its_cell(finding: Finding, tmp_path: Path) -> None:
    finding.write(tmp_path)
    path = tmp_path / "pays.differences.csv"
    table = pd.read_csv(path)
    table.loc[1, "difference"] += 1e-4
    table.to_csv(path, index=False)
    (line,) = finding.drift(tmp_path)
    assert line.startswith(f"{path}: row 2, difference: is ")
    table.drop(columns="p").to_csv(path, index=False)
    assert "2 rows of arm, n_pairs" in finding.drift(tmp_path)[0]
    path.unlink()
    assert finding.drift(tmp_path) == [f"{path}: is missing"]


def test_a_figure_of_other_tables_has_drifted(finding: Finding, tmp_path: Path) -> None:
    finding.write(tmp_path)
    svg = tmp_path / "pays.svg"
    svg.write_text(svg.read_text().replace("tables sha256:", "tables sha256:0"))
    (tmp_path / "pays.pdf").unlink()
    assert finding.drift(tmp_path) == [
        f"{tmp_path / 'pays.pdf'}: is missing",
        f"{svg}: was drawn from other tables than those beside it",
    ]


def test_the_figure_draws_the_tables(finding: Finding) -> None:
    drawn = finding.figure()
    above, below = drawn.axes
    assert [label.get_text() for label in above.get_yticklabels()] == ["wider", "deeper"]
    centers = [
        line.get_xdata()[0]
        for line in above.lines
        if line.get_marker() in ("o", "s", "D") and len(line.get_xdata()) == 1
    ]
    differences = finding.tables["differences"].set_index("arm")["difference"]
    assert centers == [differences["wide"], differences["deep"]]
    assert finding.tables["differences"].set_index("arm")["verdict"].to_dict() == {
        "wide": "better",
        "deep": "not resolved",
    }
    assert below.get_ylabel() == "Difference"
    assert drawn.runs == tuple(finding.runs["run"])


def test_a_text_takes_its_numbers_from_cells(finding: Finding) -> None:
    text = "{{pays.differences[arm=wide].difference:+.2f}} with {{pays.arms[arm=base].n_seeds}} seeds"
    assert fill(text, [finding]) == "-0.20 with 3 seeds"
    assert fill("{{studies.runs[study=all].runs}} on {{studies.runs[study=pays].devices}}", [finding]) == (
        "9 on CPU 0, CPU 1"
    )
    for wrong, words in {
        "{{pays.differences[].p}}": "names 2 rows, and one is needed",
        "{{pays.differences[arm=none].p}}": "names 0 rows",
        "{{pays.absent[arm=wide].p}}": "there is no 'absent'",
        "{{pays.arms[arm=wide].absent}}": "there is no 'absent'",
        "{{absent.arms[arm=wide].p}}": "there is no 'absent'",
    }.items():
        with pytest.raises(ValueError, match=words):
            fill(wrong, [finding])


def test_a_study_without_records_or_tables_is_refused_by_name(sweeps: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"records/other\.parquet: is missing"):
        load_finding(sweeps / "other.py")
    (sweeps / "pays.py").write_text(SWEEP.replace("def tables", "def shown"))
    with pytest.raises(ValueError, match="a function tables is missing"):
        load_finding(sweeps / "pays.py")
    with pytest.raises(ValueError, match=r"has no records/\*\.parquet"):
        find_findings(tmp_path)


def test_how_results_are_told_may_change_under_a_study(sweeps: Path) -> None:
    path = sweeps / "pays.py"
    before = load_sweep(path).code
    path.write_text(SWEEP.replace("Does an arm pay?", "Does it?").replace("1.5, 1.5", "2, 2"))
    assert load_sweep(path).code == before
    path.write_text(SWEEP.replace("tokens=512", "tokens=513"))
    assert load_sweep(path).code != before


def test_the_command_writes_checks_and_ends_with_one_where_something_drifted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sweeps: Path, tmp_path: Path
) -> None:
    out = tmp_path / "docs"
    out.mkdir()
    (out / "FINDINGS.template.md").write_text("# It pays {{pays.differences[arm=wide].difference:.2f}}\n")
    args = ("figures", "--sweeps", str(sweeps), "--out", str(out))
    assert run_command(capsys, monkeypatch, *args)[0] == 0
    assert (tmp_path / "FINDINGS.md").read_text() == "# It pays -0.20\n"
    code, said, _ = run_command(capsys, monkeypatch, *args, "--check")
    assert (code, said) == (0, "1 findings are what their records give: 9 runs\n")
    (tmp_path / "FINDINGS.md").write_text("# It pays -0.30\n")
    code, _, said = run_command(capsys, monkeypatch, *args, "--check")
    assert (code, "FINDINGS.md: line 1 is not what" in said) == (1, True)
    assert run_command(capsys, monkeypatch, *args)[0] == 0
    studies = out / "studies.runs.csv"
    columns = "study,runs,seeds,sizes,gate,devices\n"
    assert studies.read_text() == f'{columns}pays,9,3,,ungated,"CPU 0, CPU 1"\nall,9,3,,,"CPU 0, CPU 1"\n'
    studies.write_text(studies.read_text().replace("pays,9", "pays,8"))
    code, _, said = run_command(capsys, monkeypatch, *args, "--check")
    assert (code, "studies.runs.csv: row 1, runs: is 8, and the records give 9" in said) == (1, True)
    code, _, said = run_command(capsys, monkeypatch, *args, "absent")
    assert (code, "NAMES: absent is no study with records; there are pays" in said) == (2, True)


CLAIM = """# Findings

## Does an arm pay?

**Design.** `sweeps/pays.py`.

**Answer.** {answer}{gate}

## Another question

**Answer.** Yes, of another study.
"""
GATE = """
from explore.frontier.gate import Gate

gate = Gate(baseline="base", worse=("deep",), trivial=("wide",), effect=1.0, source="print", arm="name")
sampler = "grid"
grid = {"d_model": [32, 64]}
"""


def test_a_claim_of_a_study_that_passes_no_gate_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sweeps: Path, tmp_path: Path
) -> None:
    out = tmp_path / "docs"
    out.mkdir()
    template, args = out / "FINDINGS.template.md", ("figures", "--sweeps", str(sweeps), "--out", str(out))

    def said(answer: str, gate: str = "") -> str:
        template.write_text(CLAIM.format(answer=answer, gate=gate))
        assert run_command(capsys, monkeypatch, *args)[0] == 0
        code, _, words = run_command(capsys, monkeypatch, *args, "--check")
        assert code == bool(words)
        return words

    assert "'Does an arm pay?': pays passes no gate, as its file declares none; its answer must begin" in said("Yes.")
    assert said("Cannot be answered at these sizes.") == ""
    (sweeps / "pays.py").write_text(SWEEP + GATE)
    words = said("Cannot be answered at these sizes.")
    assert "must show the gate of its study as {{pays.gate}}" in words
    assert said("Cannot be answered at these sizes.", "\n\n{{pays.gate}}") == ""
    assert "| control deep |" in (tmp_path / "FINDINGS.md").read_text()
    words = said("Yes.", "\n\n{{pays.gate}}")
    assert "pays passes no gate, at d_model 32: base beats the floor" in words
    assert pd.read_csv(out / "pays.differences.csv")["gate"].unique().tolist() == ["ungated"]
    assert pd.read_csv(out / "studies.runs.csv")["sizes"][0] == "1 of 2"
    assert b"ungated" in (out / "pays.svg").read_bytes()


def test_a_study_that_passes_its_gate_may_answer(sweeps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = GateReport("d_model 32", (Condition("all", "well", "well", passed=True),))
    monkeypatch.setattr("explore.findings.gate_report", lambda *args: passed)
    (sweeps / "pays.py").write_text(SWEEP + GATE)
    (finding,) = find_findings(sweeps)
    assert ungated_claims(CLAIM.format(answer="Yes. ", gate="{{pays.gate}}"), [finding]) == []
    assert "gate" not in finding.tables["differences"]
    assert finding.figure().get_suptitle() == ""


def test_evaluations_are_kept_with_a_run_and_added_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from small_runs import tiny, train

    folder = train(tiny(write_corpus(tmp_path), "-", train__tokens=256), tmp_path / "runs")
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Another text, {i}." for i in range(300)))
    pairs = tmp_path / "suite.jsonl"
    pairs.write_text('{"uid": "a", "good": "it is.", "bad": "it are."}\n{"uid": "b", "good": "x", "bad": "x"}\n')
    for option in (("--pairs", str(pairs)), ("--corpus", str(other))):
        assert run_command(capsys, monkeypatch, "eval", str(folder.path), *option, "--save")[0] == 0
    assert folder.evals["pairs"]["suite"]["b"] == 0.5
    assert 0 < folder.evals["bpb"][str(other)] < 20


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


# The studies of `sweeps/`, on made-up records


SWEEPS = Path(__file__).parent.parent / "sweeps"


def pack(path: Path, rows: list[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Writes a table of records, and reads what a study makes its tables of."""
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
            "status": "finished", "tokens": 10, "val_bpb": bpb, "test_bpb": bpb, "flops_run": 3e11 * len(name)
        },
        **files,
    }  # fmt: skip


def wobble(*cause: int) -> float:
    """Noise that is always the same."""
    return 0.002 * (hash(cause) % 7 - 3)


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


def test_the_longer_baseline_has_the_flops_of_multi_token_prediction_and_no_run_too_few_tokens() -> None:
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


def test_averages_of_the_same_runs_are_compared_with_the_decay_one_by_one(tmp_path: Path) -> None:
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
    # Of two arms, not of all that share their noise, and of each width by itself.
    assert differences.loc["minus_sqrt", "dof"].tolist() == pytest.approx([4, 4])
    assert set(differences.loc[["flat", "constant"], "verdict"]) == {"exploratory"}
    gap = differences.loc["constant", "difference"] - differences.loc["minus_sqrt", "difference"]
    assert gap.tolist() == pytest.approx([0.25, 0.25])
    noisy = tables_where(flat=0.5)["differences"].set_index(["arm", "d_model"])
    pd.testing.assert_frame_equal(noisy.loc[["minus_sqrt"]], differences.loc[["minus_sqrt"]])
    assert (noisy.loc["flat", "sd"] > 2 * differences.loc["flat", "sd"]).all()
    assert sweep.figure is not None
    _, below = sweep.figure(tables).axes
    assert labels(below) == ["minus sqrt (d 32)", "minus sqrt (d 48)", "flat (d 32)", "flat (d 48)"]


def test_only_the_constant_rate_is_merged_over_the_steps_of_the_decay_of_the_other() -> None:
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
    """The study that searches and the one that trains its winners, and what the first may have found."""
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


def test_the_table_of_a_search_tells_hand_made_from_found_and_ranks_them(searched: Path) -> None:
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


def test_winners_are_what_the_search_found_best_on_seeds_that_it_had_not(searched: Path) -> None:
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


def test_winners_of_a_search_that_has_no_records_are_refused_in_one_line(searched: Path, tmp_path: Path) -> None:
    for name in ("searched_frontier.py", "searched_winners.py"):
        shutil.copy(searched / name, tmp_path)
    with pytest.raises(
        ValueError, match=r"records/searched_frontier\.parquet: is missing; `explore sweep .*` makes it$"
    ):
        load_sweep(tmp_path / "searched_winners.py")


@pytest.mark.parametrize("bpb", [[], [2.0], [2.0, float("nan"), 1.5]])
def test_a_search_of_no_trial_of_one_or_with_a_missing_score_is_drawn(bpb: list[float]) -> None:
    drawn, (ax,) = stacked([2.0], "A search")
    draw_search(ax, pd.DataFrame({"kind": ["hand"] * len(bpb), "val_bpb": bpb}), {"hand": "hand-made"}, "Trials")
    drawn.draw_without_rendering()
    assert len(ax.lines) == (2 if bpb else 0)
