"""Many models and runs at once: `explore compare` and `explore cost --patterns`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from command_line import run
from small_runs import tiny, write_corpus
from written_runs import RESULT, make_run

from explore import Experiment, ModelConfig, preset
from explore.files import write_json
from explore.roofline import Deployment, costs_table, hardware

PATTERNS = ("MEM*E", "*-*-*-")


def model(pattern: str) -> ModelConfig:
    return ModelConfig(d_model=256, vocab_size=2048, pattern=pattern)


def test_a_table_of_costs_has_the_totals_of_every_model() -> None:
    models = {pattern: model(pattern) for pattern in PATTERNS}
    table = costs_table(models, 1024, hardware="H100").set_index("model")
    for name, each in models.items():
        cost, deployed = each.cost(1024), Deployment(each, hardware("H100"))
        assert {field: table.loc[name, field] for field in cost.to_dict()} == cost.to_dict()
        assert table.loc[name, "state_bytes"] == cost.state_bytes
        largest = deployed.largest_batch(1024)
        assert table.loc[name, "largest_batch"] == largest
        assert table.loc[name, "tokens_per_s"] == largest / deployed.decode_s(1024, largest)
    assert costs_table({"one": preset("deepseek-v3")}, hardware="H100")["largest_batch"].tolist() == [0]


def test_a_file_of_patterns_gives_one_row_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "patterns.txt"
    monkeypatch.chdir(tmp_path)
    one = Path("one.json")
    one.write_text(tiny(write_corpus(tmp_path), "M*").model_dump_json())
    file.write_text(f"# two patterns, a preset and an experiment\nMEM*E\n\n*-*-*-\nnemotron-3-nano\n{one}\n")
    printed = json.loads(run(capsys, monkeypatch, "cost", "--patterns", file, "--json")[1])
    assert [each["model"] for each in printed] == [*PATTERNS, "nemotron-3-nano", str(one)]
    expected = [model("MEM*E"), model("*-*-*-"), preset("nemotron-3-nano"), Experiment.load(one).model]
    assert [each["flops_train"] for each in printed] == [each.cost(4096).flops_train for each in expected]
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text()))
    rows = list(csv.DictReader(io.StringIO(run(capsys, monkeypatch, "cost", "--patterns", "-", "--csv")[1])))
    assert [int(row["params_total"]) for row in rows] == [each["params_total"] for each in printed]
    code, out, _ = run(capsys, monkeypatch, "cost", "--patterns", file)
    assert (code, max(map(len, out.splitlines())) <= 80) == (0, True)


@pytest.mark.parametrize("place", ["file", "standard input"])
def test_a_byte_order_mark_before_the_first_pattern_is_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    file = tmp_path / "patterns.txt"
    file.write_text("\ufeffMEM*E\n*-*-*-\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text(encoding="utf-8")))
    code, out, _ = run(capsys, monkeypatch, "cost", "--patterns", file if place == "file" else "-", "--json")
    assert code == 0
    assert [each["model"] for each in json.loads(out)] == [*PATTERNS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MEM*E\nMZ\n", "line 2: pattern: unknown letter 'Z' at position 2 of 'MZ'"),
        ("\n# nothing\n", "must have a pattern, a preset, a run or a path on each line, got none"),
        (None, "--patterns must be a file of patterns, or - for standard input, got 'nowhere'"),
    ],
)
def test_a_line_without_a_valid_model_is_named(
    text: str | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if text is not None:
        (tmp_path / "patterns.txt").write_text(text)
    place = "nowhere" if text is None else tmp_path / "patterns.txt"
    code, out, err = run(capsys, monkeypatch, "cost", "--patterns", place)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_models_are_compared_side_by_side_with_ratios_to_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, monkeypatch, "compare", *PATTERNS, "nemotron-3-nano", "--figure", tmp_path / "a.png")
    table = out[out.index("at 4,096") :]
    assert (code, max(map(len, table.splitlines()[:-2])) <= 80, "…" in table) == (0, True, False)
    costs = [model(pattern).cost(4096) for pattern in PATTERNS]
    (line,) = [each.split() for each in table.splitlines() if each.startswith("decode ")]
    assert line[3] == f"{costs[1].flops_decode / costs[0].flops_decode:.3g}x"
    assert (tmp_path / "a.png").stat().st_size > 10_000
    record = json.loads(run(capsys, monkeypatch, "compare", *PATTERNS, "--json")[1])
    assert [each["flops_decode"] for each in record["models"]] == [each.flops_decode for each in costs]
    assert "runs" not in record
    code, _, err = run(capsys, monkeypatch, "compare", "MEM*E")
    assert (code, "at least two different models" in err) == (2, True)


def test_runs_are_compared_by_different_settings_and_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    worse = RESULT | {"val_bpb": 2.36}
    for folder in (
        make_run(tmp_path / "runs", "one", "aaaa" * 16),
        make_run(tmp_path / "runs", "two", "bbbb" * 16, worse, lr=2e-3),
    ):
        record = json.loads((folder / "experiment.json").read_text())
        record["experiment"]["model"] = model("ME").model_dump(mode="json")
        write_json(folder / "experiment.json", record)
    record = json.loads(run(capsys, monkeypatch, "compare", "aaaa", "bbbb", "--json")[1])
    assert record["settings"] == {"train.lr": {"one-aaaaaaaa": 1e-3, "two-bbbbbbbb": 2e-3}}
    assert [each["val_bpb"] for each in record["runs"]] == [2.31, 2.36]
    code, out, _ = run(capsys, monkeypatch, "compare", "aaaa", "bbbb", "--figure", "curves.svg")
    assert code == 0
    assert "+0.0500" in out
    assert "one-aaaaaaaa" in Path("curves.svg").read_text()
    code, _, err = run(capsys, monkeypatch, "compare", "aaaa", "runs/one-aaaaaaaa")
    assert (code, "got the same run twice" in err) == (2, True)
