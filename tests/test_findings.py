"""Findings: tables and figures made from records alone, and drift reported in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_runs import write_corpus
from test_cli import run as run_command

from explore.findings import Finding, fill, find_findings, load_finding, ungated_claims
from explore.frontier.gate import Condition, GateReport
from explore.runs import FILES
from explore.study import load_sweep

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
    """The files of a run as a row of a table of records, with artificial scores."""
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


def test_a_finding_just_written_has_not_drifted(finding: Finding, tmp_path: Path) -> None:
    paths = finding.write(tmp_path / "out")
    names = {"pays.pdf", "pays.svg", "pays.png", "pays.differences.csv", "pays.arms.csv", "pays.pairs.csv"}
    assert {path.name for path in paths} == names
    assert finding.drift(tmp_path / "out") == []


def test_a_script_without_experiments_is_a_finding_too(sweeps: Path) -> None:
    path = sweeps / "pays.py"
    start, end = SWEEP.index("objectives ="), SWEEP.index("def tables")
    path.write_text(SWEEP[:start] + SWEEP[end:])
    assert set(load_finding(path).tables) == {"differences", "arms", "pairs"}
    with pytest.raises(ValueError, match=r"if it is a script, run it with python .*pays\.py$"):
        load_sweep(path)


@pytest.mark.slow
def test_a_finding_is_written_twice_with_the_same_bytes(sweeps: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        load_finding(sweeps / "pays.py").write(tmp_path / place)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / place).iterdir()} for place in ("one", "two"))
    assert one == two


@pytest.mark.slow
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
        f"{svg}: was not drawn from the tables beside it",
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
        "{{pays.differences[].p}}": "must select exactly one row, got 2",
        "{{pays.differences[arm=none].p}}": "must select exactly one row, got 0",
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
    with pytest.raises(ValueError, match="must define a function tables"):
        load_finding(sweeps / "pays.py")
    with pytest.raises(ValueError, match=r"has no records/\*\.parquet"):
        find_findings(tmp_path)


def test_reporting_functions_may_change_during_a_study(sweeps: Path) -> None:
    path = sweeps / "pays.py"
    before = load_sweep(path).code
    path.write_text(SWEEP.replace("Does an arm pay?", "Does it?").replace("1.5, 1.5", "2, 2"))
    assert load_sweep(path).code == before
    path.write_text(SWEEP.replace("tokens=512", "tokens=513"))
    assert load_sweep(path).code != before


@pytest.mark.slow
def test_the_command_writes_and_checks_and_exits_with_1_after_a_drift(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sweeps: Path, tmp_path: Path
) -> None:
    out = tmp_path / "docs"
    out.mkdir()
    (out / "FINDINGS.template.md").write_text("# It pays {{pays.differences[arm=wide].difference:.2f}}\n")
    args = ("figures", "--sweeps", str(sweeps), "--out", str(out))
    assert run_command(capsys, monkeypatch, *args)[0] == 0
    assert (tmp_path / "FINDINGS.md").read_text() == "# It pays -0.20\n"
    code, output, _ = run_command(capsys, monkeypatch, *args, "--check")
    assert (code, output) == (0, "1 findings match their records: 9 runs\n")
    (tmp_path / "FINDINGS.md").write_text("# It pays -0.30\n")
    code, _, output = run_command(capsys, monkeypatch, *args, "--check")
    assert (code, "FINDINGS.md: line 1 differs from" in output) == (1, True)
    assert run_command(capsys, monkeypatch, *args)[0] == 0
    studies = out / "studies.runs.csv"
    columns = "study,runs,seeds,sizes,gate,devices\n"
    assert studies.read_text() == f'{columns}pays,9,3,,ungated,"CPU 0, CPU 1"\nall,9,3,,,"CPU 0, CPU 1"\n'
    studies.write_text(studies.read_text().replace("pays,9", "pays,8"))
    code, _, output = run_command(capsys, monkeypatch, *args, "--check")
    assert (code, "studies.runs.csv: row 1, runs: is 8, and the records give 9" in output) == (1, True)
    code, _, output = run_command(capsys, monkeypatch, *args, "absent")
    assert (code, "NAMES must be studies with records (pays), got absent" in output) == (2, True)


CLAIM = """# Findings

## Does an arm pay?

**Design.** `sweeps/pays.py`.

**Answer.** {answer}{gate}
"""
GATE = """
from explore.frontier.gate import Gate

gate = Gate(baseline="base", worse=("deep",), trivial=("wide",), effect=1.0, source="print", arm="name")
sampler = "grid"
grid = {"d_model": [32, 64]}
"""


@pytest.mark.slow
def test_a_claim_of_a_study_without_a_passed_gate_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sweeps: Path, tmp_path: Path
) -> None:
    out = tmp_path / "docs"
    out.mkdir()
    template, args = out / "FINDINGS.template.md", ("figures", "--sweeps", str(sweeps), "--out", str(out))

    def check(answer: str, gate: str = "") -> str:
        template.write_text(CLAIM.format(answer=answer, gate=gate))
        assert run_command(capsys, monkeypatch, *args)[0] == 0
        code, _, errors = run_command(capsys, monkeypatch, *args, "--check")
        assert code == bool(errors)
        return errors

    assert "'Does an arm pay?': pays passes no gate, as its file declares none; its answer must begin" in check("Yes.")
    assert check("Cannot be answered at these sizes.") == ""
    (sweeps / "pays.py").write_text(SWEEP + GATE)
    errors = check("Cannot be answered at these sizes.")
    assert "must show the gate of its study as {{pays.gate}}" in errors
    assert check("Cannot be answered at these sizes.", "\n\n{{pays.gate}}") == ""
    assert "| control deep |" in (tmp_path / "FINDINGS.md").read_text()
    errors = check("Yes.", "\n\n{{pays.gate}}")
    assert "pays passes no gate, at d_model 32: base beats the floor" in errors
    assert pd.read_csv(out / "pays.differences.csv")["gate"].unique().tolist() == ["ungated"]
    assert pd.read_csv(out / "studies.runs.csv")["sizes"][0] == "1 of 2"
    assert b"ungated" in (out / "pays.svg").read_bytes()


def test_a_study_that_passes_its_gate_may_make_claims(sweeps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = GateReport("d_model 32", (Condition("all", "well", "well", passed=True),))
    monkeypatch.setattr("explore.findings.gate_report", lambda *args: passed)
    (sweeps / "pays.py").write_text(SWEEP + GATE)
    (finding,) = find_findings(sweeps)
    assert ungated_claims(CLAIM.format(answer="Yes. ", gate="{{pays.gate}}"), [finding]) == []
    nameless = CLAIM.format(answer="Yes. ", gate="").replace("sweeps/pays.py", "sweeps/unknown.py")
    (line,) = ungated_claims(nameless, [finding])
    assert line == "'Does an arm pay?': its answer must name a study with records, as sweeps/NAME.py"
    quoting = nameless.replace("Yes. ", "Yes, {{pays.arms[arm=wide].test_bpb}}. ")
    assert ungated_claims(quoting, [finding]) == [
        "'Does an arm pay?': must show the gate of its study as {{pays.gate}}"
    ]
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
