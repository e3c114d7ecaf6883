"""Sweeps: nothing lost, nothing trained twice, mistakes found before anything is created."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState
from rich.console import Console

from explore import train
from explore.runs import load_runs
from explore.study import Sweep, load_sweep, run_sweep
from explore.train import fitting

SWEEP = '''"""Does width help?"""

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.study import RejectedError

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
baselines = ({"d_model": 32, "n_layers": 2, "lr": 0.004},)


def experiment(trial):
    d_model = trial.suggest_int("d_model", 32, 96, step=32)
    n_layers = trial.suggest_int("n_layers", 1, 3)
    lr = trial.suggest_float("lr", 1e-3, 1e-2, log=True)
    if d_model * n_layers > 200:
        raise RejectedError("too large")
    model = ModelConfig(d_model=d_model, vocab_size=257, pattern="-" * n_layers, blocks={"-": {"d_ff": 64}})
    data = TextData(corpus=CORPUS, tokenizer="bytes", seq_len=32)
    train = TrainConfig(tokens=TOKENS, batch_size=4, lr=lr, eval_tokens=128)
    return Experiment(name="s", model=model, data=data, train=train)
'''


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    path = tmp_path / "width.py"
    path.write_text(SWEEP.replace("CORPUS", repr(str(corpus))).replace("TOKENS", "512"))
    return path


def quiet() -> Console:
    return Console(quiet=True)


def trials_of(sweep: Sweep, runs: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(runs / "study.journal")))
    return optuna.load_study(study_name=sweep.name, storage=storage).trials


def test_a_sweep_ends_with_the_trials_it_was_asked_for_and_repeating_it_does_nothing(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = load_sweep(sweep_file), tmp_path / "runs"
    assert run_sweep(sweep, 3, runs, console=quiet()).complete == 3
    assert trials_of(sweep, runs)[0].params == {"d_model": 32, "n_layers": 2, "lr": 0.004}
    monkeypatch.setattr(train, "fit", None)
    assert run_sweep(sweep, 3, runs, console=quiet()).complete == 3


def test_what_a_trial_samples_depends_on_its_number_and_not_on_interruptions(sweep_file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file)
    run_sweep(sweep, 4, tmp_path / "whole", console=quiet())
    for n_trials in (1, 2, 4):
        run_sweep(sweep, n_trials, tmp_path / "pieces", console=quiet())
    whole, pieces = (trials_of(sweep, tmp_path / name) for name in ("whole", "pieces"))
    assert [(t.params, t.values) for t in whole] == [(t.params, t.values) for t in pieces]


def test_a_failed_trial_is_recorded_with_its_reason_and_the_sweep_goes_on(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs, real, calls = load_sweep(sweep_file), tmp_path / "runs", train.fit, []

    def fit(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "fit", fit)
    summary = run_sweep(sweep, 3, runs, console=quiet())
    assert (summary.complete, summary.failed) == (2, 1)
    failed = [trial for trial in trials_of(sweep, runs) if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["reason"] for trial in failed] == ["RuntimeError: out of memory"]


def test_an_experiment_that_is_finished_elsewhere_is_not_trained_again(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = load_sweep(sweep_file), tmp_path / "runs"
    run_sweep(sweep, 2, runs, console=quiet())
    (runs / "study.journal").unlink()
    monkeypatch.setattr(fitting, "_train", None)
    assert run_sweep(sweep, 2, runs, console=quiet()).complete == 2


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"""Does width help?"""', "", "docstring"),
        ('"val_bpb"', '"val_bbp"', "val_bbp"),
        ("def experiment", "def experimnt", "experiment(trial)"),
        ("n_layers > 200", "n_layer > 200", "line 14: NameError: name 'n_layer' is not defined"),
        ("batch_size=4", "batchsize=4", "batchsize: unknown field"),
        ("def experiment(trial):", "def experiment(trial:", "line 10"),
        ("n_layers > 200", "n_layers > 0", "baseline 0 is rejected: too large"),
    ],
)
def test_a_mistake_in_a_sweep_file_is_found_before_anything_is_created(
    sweep_file: Path, old: str, new: str, says: str
) -> None:
    sweep_file.write_text(sweep_file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r".+") as refusal:
        load_sweep(sweep_file)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in sweep_file.parent.iterdir() if path.suffix) == ["corpus.txt", "width.py"]


@pytest.mark.slow
def test_killed_sweeps_lose_no_trial_and_train_none_twice(sweep_file: Path, tmp_path: Path) -> None:
    sweep_file.write_text(sweep_file.read_text().replace("tokens=512", "tokens=40_000"))
    runs = tmp_path / "runs"
    command = [sys.executable, "-c", "from explore.cli import main; main()", "sweep", str(sweep_file)]
    command += ["--trials", "5", "--runs", str(runs), "--checkpoint-every", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for seconds in (6, 8, 7):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    sweep = load_sweep(sweep_file)
    undisturbed = tmp_path / "undisturbed"
    run_sweep(sweep, 5, undisturbed, console=quiet())
    table = load_runs(runs)
    done = [trial for trial in trials_of(sweep, runs) if trial.state == TrialState.COMPLETE]
    assert len(done) == len({trial.user_attrs["key"] for trial in done}) == 5
    assert set(table["key"]) >= {trial.user_attrs["key"] for trial in done}
    baseline = done[0]
    alone = load_runs(undisturbed).set_index("key")["val_bpb"]
    assert baseline.values[0] == pytest.approx(alone[baseline.user_attrs["key"]], abs=1e-6)
