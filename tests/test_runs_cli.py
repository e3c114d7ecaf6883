"""Runs on the command line: named by the first characters of their keys."""

from __future__ import annotations

import fcntl
import io
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from small_runs import result, tiny, train, write_corpus
from typer.main import get_command
from written_runs import make_run

import explore.figures
from explore.cli import app
from explore.figures import RunFigure
from explore.files import write_json
from explore.interop import save_model_folder
from explore.runs import RunFolder, find_runs
from explore.train import load

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
WITH_RUN = {
    "score": (), "cut": ("--keep", "d_model=32", "--show"), "quantize": ("--precision", "fp8"), "merge": (),
    "generate": ("--prompt", "It", "--max-new-tokens", "2"), "eval": ("--ngram", "2"), "export": ("--to", "megatron"),
    "cost": (), "roofline": (), "train": (), "puzzle": ("--drop", "2"),
}  # fmt: skip
"""Commands that take a run, and arguments with which they do something quick with it; parity is slow."""
REFUSED = {"merge": "checkpoints that RUN kept", "puzzle": "drop: must be from 0 to 1 of 2 layers, got 2"}
"""Commands that refuse this run after they have opened it, and their messages."""


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("place")
    return train(tiny(write_corpus(folder), "M-"), folder / "runs")


@pytest.fixture
def trained(short_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run in `runs` below the current folder."""
    monkeypatch.chdir(short_run.path.parent.parent)
    return RunFolder(Path("runs") / short_run.path.name)


def test_every_command_that_takes_a_run_is_tried_below() -> None:
    found = {
        name
        for name, command in COMMANDS.items()
        if any(each.param_type_name == "argument" and each.metavar == "RUN" for each in command.params)
    }
    assert found == {*WITH_RUN, "parity"} - {"cost", "roofline", "train"}


@pytest.mark.parametrize("command", WITH_RUN)
def test_a_command_takes_the_first_characters_of_a_key(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: RunFolder
) -> None:
    code, _, err = run(capsys, monkeypatch, command, str(trained.key)[:8], *WITH_RUN[command])
    if command in REFUSED:
        assert REFUSED[command].replace("RUN", str(trained.path)) in err
    else:
        assert (code, err.startswith("error")) == (0, False)


@pytest.mark.parametrize("command", ["score", "cut", "distil"])
def test_the_data_of_an_imported_model_may_be_those_of_a_run_named_by_its_key(
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trained: RunFolder,
    tmp_path: Path,
) -> None:
    imported, key = tmp_path / "imported", str(trained.key)[:8]
    save_model_folder(load(trained).model, imported)
    given: tuple[Any, ...] = ("score", imported, "--tokens", "256")
    if command != "score":
        given = ("cut", imported, "--keep", "d_ff=64", "--by", "magnitude", "--out", tmp_path / "plan.json")
    if command == "distil":
        assert run(capsys, monkeypatch, *given, "--data", trained.path)[0] == 0
        given = ("distil", tmp_path / "plan.json", "--tokens", "256", "--parent", imported)
        given += ("--teacher", trained.path, "--runs", tmp_path)
    assert run(capsys, monkeypatch, *given, "--data", key)[0] == 0


def test_curves_of_a_run_are_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: RunFolder, tmp_path: Path
) -> None:
    figures: list[RunFigure] = []
    save = explore.figures.save_figure

    def keep(figure: RunFigure, path: Path) -> tuple[Path, ...]:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr("explore.figures.save_figure", keep)
    options = ("--curves", "--x", "tokens", "--y", "loss", "--out", tmp_path / "curves.png")
    code, out, _ = run(capsys, monkeypatch, "plot", str(trained.key)[:8], *options)
    assert (code, out) == (0, "".join(f"wrote {tmp_path}/curves.{suffix}\n" for suffix in ("png", "svg")))
    (line,) = (each for each in figures[0].axes[0].lines if len(each.get_xdata()))
    assert line.get_xydata().tolist() == trained.metrics[["tokens", "loss"]].dropna().to_numpy().tolist()


def test_a_folder_a_name_and_the_first_characters_of_a_key_are_the_same_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: RunFolder
) -> None:
    names = (trained.path, trained.path.name, str(trained.key)[:4], trained.key)
    printed = {run(capsys, monkeypatch, "cost", str(name), "--json") for name in names}
    assert len(printed) == 1
    assert json.loads(printed.pop()[1])["pattern"] == "M-"


def test_a_prefix_of_several_runs_names_them_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: RunFolder, tmp_path: Path
) -> None:
    key = str(trained.key)
    other = tmp_path / "runs" / "other-0123abcd"
    for folder, its in ((tmp_path / "runs" / "one", key), (other, key[:6] + "0" * 58)):
        folder.mkdir(parents=True)
        content = trained.experiment | {"key": its}
        (folder / "experiment.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    for command in ("generate", "cost"):
        code, out, err = run(capsys, monkeypatch, command, key[:5], *WITH_RUN[command])
        assert (code, out) == (2, "")
        assert err == (f"error: run '{key[:5]}' matches 2 runs: runs/one, runs/other-0123abcd; give more characters\n")


def test_a_dry_run_of_training_shows_the_run_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    one = tiny(write_corpus(tmp_path), "M-")
    Path("one.json").write_text(one.model_dump_json())
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, monkeypatch, "train", "one.json", "--dry-run", "--json")
    shown = json.loads(out)
    assert (code, err, sorted(tmp_path.rglob("*"))) == (0, "", before)
    assert (shown["key"], shown["status"], shown["run"]) == (one.key(), "new", f"runs/tiny-{one.key()[:8]}")
    assert (shown["n_steps"], shown["flops_run"], shown["tokens"]) == (one.n_steps, one.flops_run, one.train.tokens)
    assert one.key()[:8] in run(capsys, monkeypatch, "train", "one.json", "--dry-run")[1]


def test_a_finished_run_is_reported_with_its_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: RunFolder
) -> None:
    code, out, _ = run(capsys, monkeypatch, "train", str(trained.key)[:8])
    assert code == 0
    assert out.startswith(f"{trained.path}: already finished: val_bpb {result(trained)['val_bpb']:.4f}")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs that were never trained, in `runs` below the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, key in (("ME-d64", "aaaa0000"), ("ME-d128", "aaaa1111"), ("MaE-d64", "bbbb2222")):
        make_run(tmp_path / "runs" / "study", name, key * 8)
    return tmp_path / "runs" / "study"


def test_runs_are_listed_and_found_by_name_and_by_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, written: Path
) -> None:
    def listed(*args: str) -> list[str]:
        return [Path(each["path"]).name for each in json.loads(run(capsys, monkeypatch, "runs", *args, "--json")[1])]

    assert listed() == ["ME-d128-aaaa1111", "ME-d64-aaaa0000", "MaE-d64-bbbb2222"]
    assert listed("d64") == ["ME-d64-aaaa0000", "MaE-d64-bbbb2222"]
    assert listed("aaaa") == ["ME-d128-aaaa1111", "ME-d64-aaaa0000"]
    out = run(capsys, monkeypatch, "runs")[1]
    assert "3 runs" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, err = run(capsys, monkeypatch, "runs", "nothing")
    assert (code, out) == (2, "")
    assert "of one of 3 runs, got 'nothing'" in err


def test_one_run_is_shown_with_its_settings_results_and_curve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, written: Path
) -> None:
    shown = json.loads(run(capsys, monkeypatch, "runs", "bbbb", "--json")[1])
    assert shown["settings"]["model.blocks.E.n_experts"] == 16
    assert (shown["row"]["val_bpb"], shown["metrics"]["val_bpb"]) == (2.31, [3.0, 2.5])
    out = run(capsys, monkeypatch, "runs", "bbbb")[1]
    assert "model.blocks.E.n_experts" in out
    assert "2.3100" in out
    assert "3.000 █ \n" in out
    assert "2.500 █▁\n" in out


def test_a_run_is_removed_after_a_question(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, written: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run(capsys, monkeypatch, "runs", "bbbb", "--remove")[0] == 1
    assert (written / "MaE-d64-bbbb2222").is_dir()
    assert run(capsys, monkeypatch, "runs", "bbbb", "--remove", "--yes")[0] == 0
    assert [run.path.name for run in find_runs("runs")] == ["ME-d128-aaaa1111", "ME-d64-aaaa0000"]
    code, _, err = run(capsys, monkeypatch, "runs", "aaaa", "--remove", "--yes")
    assert (code, len(find_runs("runs"))) == (2, 2)
    assert "TEXT must match one run with --remove, got 'aaaa', which matches 2" in err


def test_a_run_in_use_is_not_removed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, written: Path
) -> None:
    with (written / "MaE-d64-bbbb2222" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run(capsys, monkeypatch, "runs", "bbbb", "--remove", "--yes")
    assert (code, "another process is training this run" in err) == (2, True)
    child = make_run(written, "child", "cccc" * 16)
    write_json(child / "quantized.json", {"parent": {"run": "MaE-d64-bbbb2222"}})
    code, _, err = run(capsys, monkeypatch, "runs", "bbbb", "--remove", "--yes")
    assert (code, "child-cccccccc may need its weights" in err) == (2, True)
    assert RunFolder(written / "MaE-d64-bbbb2222").is_finished
