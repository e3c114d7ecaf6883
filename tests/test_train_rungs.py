"""Rungs, from which runs branch bit for bit, and judges, which stop a run on its learning curve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_runs import STEPS, TOKENS, result, tiny, train, write_corpus

from explore.experiment import Experiment, TrainConfig
from explore.frontier import pareto_front
from explore.runs import RunFolder
from explore.table import load_runs
from explore.train import LitLanguageModel, read_weights, stable_steps
from explore.train.saving import WholeCheckpointIO

LATER = {"tokens", "flops", "warmup", "decay", "decay_shape", "final_lr_ratio", "val_every", "eval_tokens"}
LATER |= {"evaluation"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def experiment(corpus: Path, pattern: str = "-", **changes: Any) -> Experiment:
    return tiny(corpus, pattern, **{"train__warmup": 0.1, **changes})


def sibling(one: Experiment, n_steps: int) -> Experiment:
    """The experiment with another budget and the same number of warm-up steps."""
    budget = {"tokens": n_steps * TOKENS, "warmup": one.warmup_steps / n_steps}
    return one.model_copy(update={"train": one.train.model_copy(update=budget)})


def metrics(folder: RunFolder, after: int = 0) -> pd.DataFrame:
    rows = pd.read_csv(folder.path / "metrics.csv").drop(columns="tokens_per_s")
    return rows[rows["step"] > after].reset_index(drop=True)


def assert_same_end(one: RunFolder, other: RunFolder) -> None:
    """Checks that scores and all tensors of the last checkpoint are equal bit for bit."""
    for score in ("status", "step", "val_loss", "val_bpb", "test_loss", "test_bpb"):
        assert result(one)[score] == result(other)[score]
    ours, theirs = (read_weights(run.path / "checkpoints" / "last.ckpt") for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Stop(Exception):
    pass


def stop_in(patch: pytest.MonkeyPatch, hook: str, step: int) -> None:
    original = getattr(LitLanguageModel, hook)

    def stopping(self: LitLanguageModel, *args: Any) -> Any:
        if self.global_step == step:
            raise Stop
        return original(self, *args)

    patch.setattr(LitLanguageModel, hook, stopping)


class Recorder:
    """A judge that records every validation and stops a run at a fraction of its steps."""

    def __init__(self, until: float = 2.0) -> None:
        self.until, self.values = until, dict[float, float]()

    def __call__(self, fraction: float, value: float) -> str | None:
        self.values[fraction] = value
        return f"stopped at {fraction:g}" if fraction >= self.until else None


# Keys


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 999 * TOKENS, "warmup": 2 / 999},
        {"tokens": None, "flops": 1e12},
        {"decay": 0.4},
        {"decay_shape": "linear"},
        {"final_lr_ratio": 0.5},
        {"val_every": 3},
        {"eval_tokens": 64},
        {"evaluation": "whole"},
        {"batch_size": 8},
        {"lr": 1e-3},
        {"optimizer": "muon"},
        {"betas": (0.9, 0.99)},
        {"weight_decay": 0.0},
        {"warmup": 0.2},
        {"clip": 2.0},
        {"mtp_weight": 0.1},
        {"precision": "bf16"},
    ],
    ids="-".join,
)
def test_a_rung_is_shared_by_experiments_that_differ_only_after_it(corpus: Path, change: dict[str, Any]) -> None:
    one = experiment(corpus)
    record = one.model_dump(mode="json")
    record["train"] |= change
    if "flops" in change:
        n_steps = Experiment.model_validate(record).n_steps
        record["train"]["warmup"] = 2 / n_steps
    other = Experiment.model_validate(record)
    assert other.key() != one.key()
    shares_warmup = round(other.train.warmup * other.n_steps) == round(one.train.warmup * one.n_steps)
    assert (other.rung_key(4) == one.rung_key(4)) == (change.keys() <= LATER and shares_warmup)
    assert one.rung_key(5) != one.rung_key(4)


def test_every_field_of_training_is_known_to_act_before_or_after_a_rung() -> None:
    before = {"batch_size", "lr", "optimizer", "betas", "weight_decay", "clip", "mtp_weight", "precision", "objective"}
    before |= {"stop_recall"}
    assert TrainConfig.model_fields.keys() == before | LATER


def test_model_data_and_seed_count_in_the_key_of_a_rung_and_the_name_does_not(corpus: Path) -> None:
    key = experiment(corpus).rung_key(4)
    assert experiment(corpus, name="other").rung_key(4) == key
    others = [experiment(corpus, seed=1), experiment(corpus, "*"), experiment(corpus, data__seq_len=64)]
    assert key not in {other.rung_key(4) for other in others}


# Branching


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "changes"),
    [("MEM*", {}), ("ME", {"train__optimizer": "muon"}), ("*E/*-", {"train__precision": "bf16"})],
    ids=["adamw", "muon", "bf16-mtp"],
)
def test_a_run_branched_from_a_rung_equals_a_run_from_scratch(
    corpus: Path, tmp_path: Path, pattern: str, changes: dict[str, Any]
) -> None:
    long = experiment(corpus, pattern, **changes)
    short = sibling(long, 8)  # its stable phase ends after 6 steps, so it cannot use the rung at 8
    train(long, tmp_path / "runs", rungs=(0.2, 0.3, 0.4))
    branched, alone = train(short, tmp_path / "runs"), train(short, tmp_path / "alone")
    assert_same_end(branched, alone)
    pd.testing.assert_frame_equal(metrics(branched), metrics(alone, after=6))
    found = result(branched)
    assert found["branched_from"] == {"key": long.rung_key(6), "step": 6}
    assert found["flops_run"] == result(alone)["flops_run"] == result(alone)["flops_spent"]
    assert found["flops_spent"] == pytest.approx(found["flops_run"] * 2 / 8)
    assert result(alone)["branched_from"] is None


@pytest.mark.slow
def test_a_longer_run_branches_from_the_last_step_before_a_decay(corpus: Path, tmp_path: Path) -> None:
    short = experiment(corpus, "E", train__val_every=4)
    long = sibling(short, 30)
    assert stable_steps(short.n_steps, short.train)[-1] == 16
    train(short, tmp_path / "runs", rungs=(0.8,))
    branched, alone = train(long, tmp_path / "runs"), train(long, tmp_path / "alone")
    assert result(branched)["branched_from"] == {"key": short.rung_key(16), "step": 16}
    assert_same_end(branched, alone)
    pd.testing.assert_frame_equal(metrics(branched), metrics(alone, after=16))


def test_a_run_with_another_history_does_not_branch(corpus: Path, tmp_path: Path) -> None:
    long = experiment(corpus)
    train(long, tmp_path, rungs=(0.3,))
    for other in (experiment(corpus, train__tokens=8 * TOKENS), experiment(corpus, seed=1)):
        assert result(train(other, tmp_path))["branched_from"] is None  # warmed up in 1 step; of another seed


def test_a_stopped_run_still_records_its_branch(corpus: Path, tmp_path: Path) -> None:
    long = experiment(corpus, "E")
    short = sibling(long, 10)
    train(long, tmp_path / "runs", rungs=(0.3,))
    for step in (6, 8):
        with pytest.MonkeyPatch.context() as patch:
            stop_in(patch, "training_step", step)
            with pytest.raises(Stop):
                train(short, tmp_path / "runs", checkpoint_every=1)
    branched = train(short, tmp_path / "runs")
    assert result(branched)["branched_from"] == {"key": long.rung_key(6), "step": 6}
    assert_same_end(branched, train(short, tmp_path / "alone"))


def test_a_rung_is_written_once_and_whole(corpus: Path, tmp_path: Path) -> None:
    long = experiment(corpus)
    train(long, tmp_path, rungs=(0.3,))
    (path,) = (tmp_path / "rungs").iterdir()
    assert path.stem == long.rung_key(6)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops"} <= torch.load(path, weights_only=True).keys()
    before = path.stat()
    train(experiment(corpus, train__decay=0.4), tmp_path, rungs=(0.3, 0.5))
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert len(list((tmp_path / "rungs").iterdir())) == 2


@pytest.mark.slow
def test_rungs_do_not_change_a_run(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, "ME", train__val_every=5)
    with_rungs, without = train(one, tmp_path / "with", rungs=(0.35, 0.5)), train(one, tmp_path / "without")
    assert_same_end(with_rungs, without)
    rows = metrics(with_rungs)
    assert rows.dropna(subset="val_bpb")["step"].tolist() == [5, 7, 10, 15, 20]
    extra = (rows["step"] == 7) & rows["val_bpb"].notna()
    pd.testing.assert_frame_equal(rows[~extra].reset_index(drop=True), metrics(without))


@pytest.mark.parametrize("rung", [0.0, 0.05, 0.85, 1.0])
def test_a_rung_outside_of_the_stable_phase_is_refused(corpus: Path, tmp_path: Path, rung: float) -> None:
    with pytest.raises(
        ValueError, match=rf"rungs must be from 0\.1 to .*, in the stable phase, got {rung}, which is step .* of 20"
    ):
        train(experiment(corpus), tmp_path / "runs", rungs=(rung,))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "stops"),
    [
        (1, ("training_step", 5)),
        (5, ("training_step", 10)),
        (5, ("validation_step", 5)),
        (8, ("validation_step", 10)),
        (7, ("on_validation_epoch_end", 8)),
    ],
    ids=str,
)
def test_a_run_with_rungs_stopped_anywhere_resumes_to_the_same_result(
    corpus: Path, tmp_path: Path, every: int, stops: tuple[str, int]
) -> None:
    one = experiment(corpus, "E", train__val_every=5)
    options: dict[str, Any] = {"rungs": (0.4, 0.5), "checkpoint_every": every}
    through = train(one, tmp_path / "through", **options)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, *stops)
        with pytest.raises(Stop):
            train(one, tmp_path / "stopped", **options)
    stopped = train(one, tmp_path / "stopped", **options)
    assert_same_end(stopped, through)
    pd.testing.assert_frame_equal(metrics(stopped), metrics(through))
    assert result(stopped)["branched_from"] is None
    assert result(stopped)["flops_spent"] == result(through)["flops_spent"]
    names = [{path.name for path in (tmp_path / name / "rungs").iterdir()} for name in ("stopped", "through")]
    assert names[0] == names[1] == {f"{one.rung_key(step)}.ckpt" for step in (8, 10)}


@pytest.mark.parametrize("step", [5, 8, 10, 20])
def test_a_run_stopped_right_after_a_checkpoint_has_all_metrics(corpus: Path, tmp_path: Path, step: int) -> None:
    one = experiment(corpus, "E", train__val_every=4)
    options: dict[str, Any] = {"rungs": (0.4,), "checkpoint_every": 5}
    through = train(one, tmp_path / "through", **options)
    save = WholeCheckpointIO.save_checkpoint

    def save_and_stop(self: WholeCheckpointIO, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        save(self, checkpoint, *args, **kwargs)
        if checkpoint["global_step"] == step:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeCheckpointIO, "save_checkpoint", save_and_stop)
        with pytest.raises(Stop):
            train(one, tmp_path / "stopped", **options)
    stopped = train(one, tmp_path / "stopped", **options)
    pd.testing.assert_frame_equal(metrics(stopped), metrics(through))
    assert_same_end(stopped, through)


def test_a_metric_without_a_column_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LitLanguageModel, "on_train_batch_start", lambda self, *_: self.log("surprise", 1.0))
    with pytest.raises(ValueError, match="surprise"):
        train(experiment(corpus), tmp_path)


# Judges


def test_a_judge_receives_every_validation(corpus: Path, tmp_path: Path) -> None:
    judge = Recorder(until=1.0)  # too late to save anything
    folder = train(experiment(corpus, train__val_every=5), tmp_path, rungs=(0.35,), judge=judge)
    rows = metrics(folder).dropna(subset="val_bpb")
    assert judge.values == dict(zip(rows["step"] / STEPS, rows["val_bpb"], strict=True))
    assert list(judge.values) == [0.25, 0.35, 0.5, 0.75, 1.0]
    assert result(folder)["status"] == "finished"


@pytest.mark.parametrize("every", [1, 4, 5])
def test_a_run_that_a_judge_stops_is_recorded_as_pruned(corpus: Path, tmp_path: Path, every: int) -> None:
    one, judge = experiment(corpus, train__val_every=5), Recorder(until=0.5)
    folder = train(one, tmp_path, judge=judge, checkpoint_every=every)
    found = result(folder)
    assert (found["status"], found["reason"], found["step"]) == ("pruned", "stopped at 0.5", 10)
    assert found["tokens"] == 10 * TOKENS
    assert found["flops_run"] == found["flops_spent"] == pytest.approx(one.flops_run / 2)
    assert found["val_bpb"] is found["test_bpb"] is None
    assert found["stopped_val_bpb"] == judge.values[0.5] == metrics(folder)["val_bpb"].dropna().iloc[-1]
    assert metrics(folder)["step"].max() == 10
    assert not folder.is_finished
    table = load_runs(tmp_path)
    assert table["status"].tolist() == ["pruned"]
    assert not pareto_front(table).any()


@pytest.mark.slow
def test_a_pruned_run_stays_pruned_with_a_judge_and_resumes_without_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(corpus, "ME", train__val_every=5)
    first = Recorder(until=0.5)
    pruned = train(one, tmp_path / "pruned", judge=first)
    record = (pruned.path / "result.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(LitLanguageModel, "training_step", lambda *_: pytest.fail("trained again"))
        again = Recorder()
        assert train(one, tmp_path / "pruned", judge=again).path == pruned.path
    assert (pruned.path / "result.json").read_bytes() == record
    assert again.values == first.values
    through = train(one, tmp_path / "through")
    assert_same_end(train(one, tmp_path / "pruned"), through)
    pd.testing.assert_frame_equal(metrics(pruned), metrics(through))


def test_a_pruned_run_can_be_finished_by_a_decay_from_its_rung(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, "E")
    pruned = train(one, tmp_path / "runs", rungs=(0.5,), judge=Recorder(until=0.5))
    assert result(pruned)["step"] == 10
    short = sibling(one, 13)
    branched = train(short, tmp_path / "runs")
    assert result(branched)["branched_from"]["step"] == 10
    assert_same_end(branched, train(short, tmp_path / "alone"))


def test_a_stopped_run_reports_its_whole_curve_to_the_judge(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, train__val_every=4)
    whole, first, second = Recorder(), Recorder(), Recorder()
    train(one, tmp_path / "through", judge=whole)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, "training_step", 14)
        with pytest.raises(Stop):
            train(one, tmp_path / "stopped", judge=first, checkpoint_every=5)
    assert list(first.values) == [0.2, 0.4, 0.6]
    folder = train(one, tmp_path / "stopped", judge=second, checkpoint_every=5)
    assert second.values == whole.values
    (folder.path / "result.json").unlink()
    third, fourth = Recorder(until=0.4), Recorder()
    assert result(train(one, tmp_path / "stopped", judge=third))["status"] == "finished"  # it had been trained whole
    train(one, tmp_path / "stopped", judge=fourth)
    assert third.values == fourth.values == whole.values


def test_a_resumed_run_is_pruned_without_further_training(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, train__val_every=4)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, "training_step", 14)
        with pytest.raises(Stop):
            train(one, tmp_path, judge=Recorder(), checkpoint_every=5)
        patch.setattr(LitLanguageModel, "training_step", lambda *_: pytest.fail("trained on"))
        found = result(train(one, tmp_path, judge=Recorder(until=0.4), checkpoint_every=5))
    assert (found["status"], found["reason"], found["step"]) == ("pruned", "stopped at 0.4", 10)


@pytest.mark.parametrize("changes", [{}, {"data": {"kind": "recall", "seq_len": 32, "n_pairs": 2, "vocab_size": 32}}])
def test_a_judge_without_validations_is_refused(corpus: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="judge: "):
        train(experiment(corpus, **changes), tmp_path / "runs", judge=Recorder())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("pattern", "optimizer"), [("M*E-", "adamw"), ("*-", "muon")])
def test_a_learning_rate_of_ten_is_recorded_as_diverged_with_a_judge(
    corpus: Path, tmp_path: Path, pattern: str, optimizer: str
) -> None:
    one = experiment(corpus, pattern, train__lr=10.0, train__optimizer=optimizer, train__val_every=5)
    found = result(train(one, tmp_path, judge=Recorder()))
    assert found["status"] == "diverged"
    assert "the run diverged; a lower learning rate may help" in found["reason"]
    assert found["step"] < STEPS
    assert found["flops_run"] == pytest.approx(one.flops_run * found["step"] / STEPS)


# Processes


@pytest.mark.slow
def test_a_killed_run_with_a_judge_resumes_to_the_same_result(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, "MEM*", train__tokens=120 * TOKENS, train__val_every=6)
    options: dict[str, Any] = {"rungs": (0.3, 0.5, 0.7), "checkpoint_every": 5}
    whole, again = Recorder(until=0.85), Recorder(until=0.85)
    through = train(one, tmp_path / "through", judge=whole, **options)
    (tmp_path / "experiment.json").write_text(one.model_dump_json())
    program = (
        "import sys, pathlib, torch; torch.set_num_threads(1)\n"
        "from explore.experiment import Experiment; from explore.train import fit\n"
        "fit(Experiment.load(pathlib.Path(sys.argv[1])), sys.argv[2], rungs=(0.3, 0.5, 0.7), checkpoint_every=5,\n"
        "    accelerator='cpu', judge=lambda fraction, value: None)\n"
    )
    runs = tmp_path / "killed"
    command = [sys.executable, "-c", program, str(tmp_path / "experiment.json"), str(runs)]
    for n_rungs in (0, 1, 2):
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            while not list(runs.glob("*/checkpoints/last.ckpt")) or len(list(runs.glob("rungs/[!.]*"))) < n_rungs:
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not list(runs.glob("*/result.json"))
    killed = train(one, runs, judge=again, **options)
    for score in ("status", "reason", "step", "flops_run", "flops_spent", "stopped_val_bpb", "branched_from"):
        assert result(killed)[score] == result(through)[score]
    assert again.values == whole.values
    pd.testing.assert_frame_equal(metrics(killed), metrics(through))
    rungs = {path.name for path in runs.glob("rungs/[!.]*")}  # a kill may leave a hidden half of one
    assert rungs == {f"{one.rung_key(step)}.ckpt" for step in (36, 60, 84)}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_stop_together_at_the_step_of_the_writer(corpus: Path, tmp_path: Path, strategy: str) -> None:
    one = experiment(corpus, "E-", train__val_every=5)
    alone = train(one, tmp_path / "alone", judge=Recorder(until=0.5), rungs=(0.4,))
    (tmp_path / "experiment.json").write_text(one.model_dump_json())
    (tmp_path / "program.py").write_text(
        "import os, sys, pathlib, torch; torch.set_num_threads(1)\n"
        "from explore.experiment import Experiment; from explore.train import fit\n"
        "def judge(fraction, value):\n"
        "    assert os.environ.get('LOCAL_RANK', '0') == '0', 'asked beside the writer'\n"
        "    return 'stopped at 0.5' if fraction >= 0.5 else None\n"
        "folder = fit(Experiment.load(pathlib.Path(sys.argv[1])), sys.argv[2], rungs=(0.4,), judge=judge,\n"
        "             accelerator='cpu', devices=2, strategy=sys.argv[3])\n"
        "print(folder.result['status'])\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    paths = [str(tmp_path / name) for name in ("program.py", "experiment.json", "both")]
    done = subprocess.run(
        [sys.executable, *paths, strategy],
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.count("pruned") == 2, done.stderr
    (both,) = (RunFolder(path) for path in (tmp_path / "both").iterdir() if path.name != "rungs")
    assert (result(both)["step"], result(both)["reason"]) == (10, "stopped at 0.5")
    assert result(both)["stopped_val_bpb"] == pytest.approx(result(alone)["stopped_val_bpb"], rel=1e-5)
    assert (tmp_path / "both" / "rungs" / f"{one.rung_key(8)}.ckpt").exists()


def test_a_run_with_too_many_validations_is_refused(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, train__tokens=10**15, train__val_every=1)
    with pytest.raises(ValueError, match=r"train\.val_every: must be at least \d+ for [\d,]+ steps, got 1"):
        train(one, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
