"""Runs on the command line: named by the first characters of their keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run
from small_runs import result, tiny, train, write_corpus
from typer.main import get_command

from explore.cli import app
from explore.runs import RunFolder

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
WITH_RUN = {
    "score": (), "cut": ("--keep", "d_model=32", "--show"), "quantize": ("--precision", "fp8"), "merge": (),
    "generate": ("--prompt", "It", "--max-new-tokens", "2"), "eval": ("--ngram", "2"), "export": ("--to", "megatron"),
    "cost": (), "roofline": (), "train": (),
}  # fmt: skip
"""Commands that take a run, and arguments with which they do something quick with it."""


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
    assert code == 0 or (command == "merge" and f"checkpoints that {trained.path} kept" in err)


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
        assert err == (
            f"error: run '{key[:5]}' stands for 2 runs: runs/one, runs/other-0123abcd; give more characters\n"
        )


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


def test_a_finished_run_says_that_it_is_finished_already_and_what_it_reached(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: RunFolder
) -> None:
    code, out, _ = run(capsys, monkeypatch, "train", str(trained.key)[:8])
    assert code == 0
    assert out.startswith(f"{trained.path}: already finished: val_bpb {result(trained)['val_bpb']:.4f}")
