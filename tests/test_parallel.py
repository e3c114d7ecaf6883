"""Training with two processes compared with training with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pandas as pd
import pytest
import torch
from small_runs import EXPERTS, STEPS, TOKENS, write_corpus

from explore.experiment import Experiment, TrainConfig
from explore.runs import RunFolder
from explore.train import LitLanguageModel, fit, load_model, read_weights

PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from explore.data.batches import Batch, TextSource
from explore.experiment import Experiment
from explore.model import LanguageModel
from explore.train import LitLanguageModel, fit

options = json.loads(sys.argv[2])
stop, broken = options.pop("stop", -1), options.pop("broken", -1)
read, step, loss = TextSource.batch, LitLanguageModel.training_step, LanguageModel.loss
n_losses = 0

def uneven(self, number, batch_size):  # the second of two processes has fewer targets than the first
    batch = read(self, number, batch_size)
    batch.targets[1, :20] = -100
    return batch

def stopping(self, batch, batch_idx):
    if self.global_step == stop:
        raise RuntimeError("stopped")
    return step(self, batch, batch_idx)

def breaking(self, *args, **kwargs):
    global n_losses
    n_losses += 1
    found = loss(self, *args, **kwargs)
    if n_losses > broken >= 0 and os.environ.get("LOCAL_RANK") == "1":
        found = found._replace(cross_entropy=found.cross_entropy * float("nan"))
    return found

TextSource.batch, LitLanguageModel.training_step, LanguageModel.loss = uneven, stopping, breaking
folder = fit(Experiment.load(Path(sys.argv[1])), options.pop("runs"), accelerator="cpu", **options)
print(folder.result["status"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    (folder / "experiment.json").write_text(experiment(folder).model_dump_json())
    (folder / "program.py").write_text(PROGRAM)
    return folder


def experiment(folder: Path, **train: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "model": {"d_model": 64, "vocab_size": 257, "pattern": "ME-*", "blocks": {"E": EXPERTS}},
            "data": {"kind": "text", "corpus": str(folder / "corpus"), "tokenizer": "bytes", "seq_len": 32},
            "train": {"tokens": STEPS * TOKENS, "batch_size": 4, "val_every": 10, **train},
        }
    )


def run(folder: Path, name: str, expected: int | None = 0, **options: Any) -> tuple[RunFolder, str]:
    """Trains in a separate process, which starts the others."""
    given = {"runs": str(folder / name), "checkpoint_every": 6, "keep_every": 10, **options}
    command = [sys.executable, str(folder / "program.py"), str(folder / "experiment.json"), json.dumps(given)]
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    environment = kept | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert expected is None or done.returncode == expected, done.stderr
    (path,) = (folder / name).iterdir()
    return RunFolder(path), done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(folder: Path) -> RunFolder:
    return run(folder, "alone")[0]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    ours, theirs = (run.metrics.drop(columns="tokens_per_s") for run in (one, other))
    pd.testing.assert_frame_equal(ours, theirs, rtol=2e-5, atol=1e-7)
    pd.testing.assert_series_equal(ours["max_violation"], theirs["max_violation"])
    for name in ("last.ckpt", f"step-{STEPS // 2:06d}.ckpt"):
        found, expected = (read_weights(run.path / "checkpoints" / name) for run in (one, other))
        assert found.keys() == expected.keys()
        for weight, value in expected.items():
            exact = weight.endswith("expert_bias")
            torch.testing.assert_close(found[weight], value, rtol=0, atol=0 if exact else 1e-4)
    assert one.result is not None
    assert other.result is not None
    for score in ("val_loss", "val_bpb", "test_loss", "test_bpb", "max_violation"):
        assert one.result[score] == pytest.approx(other.result[score], rel=1e-5)


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_the_same_model_as_one(folder: Path, alone: RunFolder, strategy: str) -> None:
    both, output = run(folder, strategy, devices=2, strategy=strategy)
    assert output.count("finished") == 2
    assert_same_run(both, alone)
    assert both.key == alone.key
    assert both.environment["devices"] == 2
    files = {path.relative_to(both.path) for path in both.path.rglob("*")}
    assert files == {path.relative_to(alone.path) for path in alone.path.rglob("*")}
    (moe,) = load_model(both).moe_layers().values()
    assert moe.expert_bias.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_quantise_like_one(folder: Path, tmp_path: Path, strategy: str) -> None:
    """Compares the first step. Later, AdamW makes full steps from gradients that are zero in only one of the sums."""
    (tmp_path / "experiment.json").write_text(experiment(folder, precision="nvfp4").model_dump_json())
    (tmp_path / "program.py").write_text(PROGRAM)
    both, _ = run(tmp_path, "both", devices=2, strategy=strategy)
    alone, _ = run(tmp_path, "alone")
    for metric, within in (("loss", 1e-6), ("grad_norm", 1e-5)):
        assert both.metrics[metric].iloc[0] == pytest.approx(alone.metrics[metric].iloc[0], rel=within)
    lost, expected = (each.lost.query("step == 1") for each in (both, alone))
    names = ["component", "operand"]
    assert lost[names].equals(expected[names])
    for share in ("flushed", "saturated", "zero"):
        assert lost[share].to_list() == pytest.approx(expected[share].to_list(), abs=1e-3, nan_ok=True)
    assert both.result is not None
    assert alone.result is not None
    assert both.result["val_loss"] == pytest.approx(alone.result["val_loss"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "recompute"),
    [("fsdp", "fsdp", True), ("fsdp", "auto", False), ("auto", "fsdp", False), ("ddp", "ddp", True)],
)
def test_a_stopped_run_resumes_under_any_strategy(
    folder: Path, alone: RunFolder, first: str, then: str, recompute: bool
) -> None:
    name = f"{first}-{then}"
    _, output = run(folder, name, None, stop=15, devices=1 if first == "auto" else 2, strategy=first)
    assert "stopped" in output
    resumed, _ = run(folder, name, devices=1 if then == "auto" else 2, strategy=then, recompute=recompute)
    assert_same_run(resumed, alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_breaks_in_one_process_stops_both(folder: Path, strategy: str) -> None:
    both, output = run(folder, f"broken-{strategy}", broken=3, devices=2, strategy=strategy)
    assert output.count("diverged") == 2
    assert both.result is not None
    assert (both.result["status"], both.result["step"]) == ("diverged", 3)


@pytest.mark.slow
def test_the_command_trains_with_two_processes_and_prints_once(folder: Path) -> None:
    command = [sys.executable, str(Path(sys.executable).with_name("explore")), "train"]
    arguments = [str(folder / "experiment.json"), "--runs", str(folder / "cli"), "--devices", "2", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    assert json.loads(done.stdout)["status"] == "finished"
    assert done.stderr == ""


# Refusals, and settings without an effect


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns off the type checks, which only tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("options", "train", "message"),
    [
        ({"devices": 3}, {}, r"train\.batch_size must be a multiple of 3, the number of devices, got 4"),
        ({"devices": 0}, {}, r"devices must be at least 1, got 0"),
        ({"strategy": "deepspeed"}, {}, r"strategy must be auto, ddp or fsdp, got 'deepspeed'"),
        ({"strategy": "fsdp"}, {"optimizer": "muon"}, r"train\.optimizer must be 'adamw' with fsdp, got 'muon'"),
        ({"keep_every": 0}, {}, r"keep_every: must be at least 1, got 0"),
    ],
)
def test_an_invalid_parallel_run_is_refused_and_writes_nothing(
    folder: Path, tmp_path: Path, unchecked: None, options: Any, train: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(experiment(folder, **train), tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_recomputation_gives_the_same_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    step = LitLanguageModel.training_step

    def watched(self: LitLanguageModel, *args: Any) -> torch.Tensor:
        used.append(self.model.recompute)
        return step(self, *args)

    monkeypatch.setattr(LitLanguageModel, "training_step", watched)
    one = experiment(folder)
    kept = fit(one, tmp_path / "kept", accelerator="cpu")
    again = fit(one, tmp_path / "again", accelerator="cpu", recompute=True)
    assert used == [False] * STEPS + [True] * STEPS
    assert kept.path.name == again.path.name
    ours, theirs = (run.metrics.drop(columns="tokens_per_s") for run in (again, kept))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-6)


def test_the_key_does_not_depend_on_how_a_run_is_executed() -> None:
    assert not {"devices", "strategy", "recompute", "keep_every"} & TrainConfig.model_fields.keys()
