"""Parameters of a sweep file: declared in it, changed by `--set`, and part of its study."""

from __future__ import annotations

import json
import re
from pathlib import Path

import optuna
import pytest
from command_line import run
from small_runs import write_corpus

from explore.runs import find_runs
from explore.study import load_sweep
from explore.study.identity import open_study
from explore.study.parameters import read_parameters

FILE = '''"""Does the width matter?"""

from explore import Experiment, ModelConfig, TextData, TrainConfig

parameters = {{"tokens": 4096, "lr": 1e-3, "corpus": "{corpus}", "tie": False, "widths": [32, 64], "pair": (1, 2)}}
TOKENS = parameters["tokens"]
objectives = {{"val_bpb": "minimize"}}


def experiment(trial):
    width = trial.suggest_categorical("d_model", parameters["widths"])
    model = ModelConfig(d_model=width, vocab_size=257, pattern="*-", tie_embeddings=parameters["tie"])
    data = TextData(corpus=parameters["corpus"], tokenizer="bytes", seq_len=32)
    train = TrainConfig(tokens=TOKENS, batch_size=4, lr=parameters["lr"])
    return Experiment(name="tiny", model=model, data=data, train=train)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "widths.py"
    path.write_text(FILE.format(corpus=write_corpus(tmp_path)))
    return path


def test_parameters_have_the_values_of_the_file_unless_others_are_set(file: Path) -> None:
    given = read_parameters(file, ["tokens=8k", "lr=2e-3", "tie=true", "widths=[96]", "pair=[3, 4]"])
    assert given == {"tokens": 8000, "lr": 2e-3, "tie": True, "widths": [96], "pair": (3, 4)}
    (own,), (other,) = load_sweep(file).examples, load_sweep(file, given).examples
    assert (own.train.tokens, own.train.lr, own.model.tie_embeddings) == (4096, 1e-3, False)
    assert (other.train.tokens, other.train.lr, other.model.tie_embeddings) == (8000, 2e-3, True)
    assert other.model.d_model == 96


def test_other_parameter_values_make_another_study(file: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    open_study(load_sweep(file), storage)
    open_study(load_sweep(file, {"tokens": 4096}), storage)
    with pytest.raises(ValueError, match=r"changed since the study 'widths' began: .*4096.* is now .*8192"):
        open_study(load_sweep(file, {"tokens": 8192}), storage)
    assert open_study(load_sweep(file, {"tokens": 8192}), storage, new=True).study_name == "widths-2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens", "--set must be NAME=VALUE, such as tokens=2M, got 'tokens'"),
        ("token=1", "--set must be a parameter of .*, got 'token'; did you mean 'tokens'?"),
        ("tokens=many", "--set: tokens must be a whole number, got 'many'"),
        ("tokens=1.5", "--set: tokens must be a whole number, got '1.5'"),
        ("tie=3", "--set: tie must be of the kind of false, got '3'"),
        ("pair=3", r"--set: pair must be of the kind of \[1, 2\], got '3'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(file: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_parameters(file, [text])


def test_a_file_without_plain_parameters_is_refused(file: Path) -> None:
    file.write_text(file.read_text().replace("4096", "2**12"))
    with pytest.raises(ValueError, match="line 5: parameters must be a mapping of plain values"):
        read_parameters(file, ["tokens=1"])
    file.write_text('"""A question."""\n')
    with pytest.raises(ValueError, match="declares no parameters"):
        read_parameters(file, ["tokens=1"])


def test_the_command_searches_with_the_values_that_are_set(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("--set", "tokens=512", "--set", "widths=[64]", "--trials", "1", "--runs", tmp_path / "runs", "--json")
    code, out, err = run(capsys, monkeypatch, "sweep", file, *options, "--workers", "1", "--no-notes")
    assert (code, json.loads(out)["complete"]) == (0, 1), err
    (one,) = find_runs(tmp_path / "runs")
    assert one.load_experiment() == load_sweep(file, {"tokens": 512, "widths": [64]}).examples[0]
    assert (one.load_experiment().train.tokens, one.load_experiment().model.d_model) == (512, 64)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"def experiment(trial:", r"line 2: '\(' was never closed"),
        (b"tokens = 1\0", "source code string cannot contain null bytes"),
        (b"tokens = " + b"[" * 100_000, "too many nested parentheses"),
        (b"tokens = " + b"-" * 100_000 + b"1", "must be Python code"),
        (b"tokens = '\xff'", "utf-8"),
        (b"parameters = {[]: 1}", "line 2: parameters must be a mapping of plain values"),
        (b"parameters = {'tokens': {1, 2}}", r"--set: tokens must be of the kind of \"{1, 2}\", got '3'"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--set", "tokens=3"]])
def test_a_broken_sweep_file_is_one_line_with_and_without_parameters(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: bytes,
    message: str,
    options: list[str],
) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(b'"""Why?"""\n' + code + b"\n")
    exit_code, _, error = run(capsys, monkeypatch, "sweep", path, *options, "--runs", tmp_path / "runs")
    assert (exit_code, error.count("\n")) == (2, 1), error
    if options or b"parameters" not in code:
        assert re.search(message, error), error
