"""Checkpoints: damage is detected, another run's checkpoint is refused, and metrics are restored."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from small_runs import result, tiny, train, write_corpus

from explore.archive import DamagedError, check_whole, load_checkpoint
from explore.checkpoints import LAST, PREVIOUS
from explore.experiment import Experiment
from explore.machine import is_passing
from explore.runs import RunFolder
from explore.table import load_runs
from explore.train import LitLanguageModel, load_model, merge_window
from explore.train.saving import WholeCheckpointIO


class Stop(Exception):
    pass


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = LitLanguageModel.training_step

    def training_step(self: LitLanguageModel, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.global_step == step:
            raise Stop
        return original(self, batch, batch_idx)

    patch.setattr(LitLanguageModel, "training_step", training_step)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return tiny(write_corpus(tmp_path_factory.mktemp("corpus")), "E", train__val_every=5)


@pytest.fixture(scope="module")
def through(one: Experiment, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(one, tmp_path_factory.mktemp("through"), checkpoint_every=5, keep_every=4)


@pytest.fixture(scope="module")
def killed(one: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one killed after 13 steps; its checkpoints are those of steps 10 and 5."""
    runs = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 13)
        with pytest.raises(Stop):
            train(one, runs, checkpoint_every=5)
    return runs


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> RunFolder:
    (folder,) = shutil.copytree(killed, tmp_path / "runs").iterdir()
    return RunFolder(folder)


def assert_ends_as(through: RunFolder, stopped: RunFolder, one: Experiment, console: Console | None = None) -> None:
    again = train(one, stopped.path.parent, checkpoint_every=5, console=console)
    assert again.path == stopped.path
    ours, theirs = (run.metrics.drop(columns="tokens_per_s") for run in (again, through))
    pd.testing.assert_frame_equal(ours, theirs)
    made = {"train_s", "tokens_per_s", "finished_at"}
    for name in result(through).keys() - made:
        assert result(again)[name] == result(through)[name], name
    assert {path.name for path in (again.path / "checkpoints").iterdir()} == {LAST}


def flip(path: Path, n_bits: int = 1, seed: int = 0) -> None:
    raw, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(n_bits):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def zero(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 : len(raw) // 2] = bytes(len(raw) // 2 - len(raw) // 3)
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-4000]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros inside": zero,
    "garbled": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "64 flipped bits": lambda path: flip(path, 64),
}
damaged = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def test_every_flipped_bit_is_found_or_harmless(killed: Path, tmp_path: Path) -> None:
    (path,) = killed.glob(f"*/checkpoints/{LAST}")
    expected, n_found = load_checkpoint(path)["state_dict"], 0
    for seed in range(200):
        flip(Path(shutil.copy(path, tmp_path)), seed=seed)
        try:
            check_whole(tmp_path / LAST)
        except DamagedError:
            n_found += 1
            continue
        found = load_checkpoint(tmp_path / LAST)["state_dict"]
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert n_found > 150


@damaged
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    one: Experiment, through: RunFolder, stopped: RunFolder, damage: Callable[[Path], Any]
) -> None:
    damage(stopped.path / "checkpoints" / LAST)
    console = Console(file=(stopped.path.parent.parent / "output").open("w"))
    assert_ends_as(through, stopped, one, console)
    console.file.close()
    output = (stopped.path.parent.parent / "output").read_text()
    assert f"{LAST}: is damaged (" in output
    assert "the run resumes from the previous checkpoint" in output


def test_an_earlier_checkpoint_is_enough_to_resume(one: Experiment, through: RunFolder, stopped: RunFolder) -> None:
    (stopped.path / "checkpoints" / LAST).unlink()
    assert_ends_as(through, stopped, one)


@damaged
def test_an_error_without_an_intact_checkpoint_suggests_a_fix_in_one_line(
    one: Experiment, through: RunFolder, stopped: RunFolder, damage: Callable[[Path], Any]
) -> None:
    checkpoints = stopped.path / "checkpoints"
    for name in (LAST, PREVIOUS):
        damage(checkpoints / name)
    with pytest.raises(DamagedError, match=f"and there is no other; delete {checkpoints} to train from") as caught:
        train(one, stopped.path.parent)
    assert str(caught.value).startswith(f"{checkpoints / LAST}: is damaged (")
    with pytest.raises(DamagedError, match=r"; delete it and result.json, and train the run again"):
        load_model(stopped)
    shutil.rmtree(checkpoints)
    assert_ends_as(through, stopped, one)


def test_a_damaged_checkpoint_is_not_merged(through: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(through.path, tmp_path / "run"))
    assert merge_window(folder, 2).steps == (12, 16)
    flip(folder.path / "checkpoints" / "step-000012.ckpt", 64)
    with pytest.raises(DamagedError, match=r"step-000012.ckpt: is damaged .*; merge fewer, or train the run again"):
        merge_window(folder, 2)
    assert merge_window(folder, 1).steps == (16,)


def test_a_checkpoint_of_another_experiment_is_refused(one: Experiment, through: RunFolder, stopped: RunFolder) -> None:
    other = one.model_copy(update={"seed": 1})
    folder = train(other, stopped.path.parent, checkpoint_every=5, keep_every=4)
    for source, name in ((LAST, LAST), ("step-000012.ckpt",) * 2):
        shutil.copy(folder.path / "checkpoints" / source, stopped.path / "checkpoints" / name)
    line = f"must be of the experiment {one.key()[:8]}, got a checkpoint of {other.key()[:8]}"
    for use in (load_model, lambda run: train(one, run.path.parent), lambda run: merge_window(run, 1)):
        with pytest.raises(ValueError, match=line):
            use(stopped)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:70]),
        lambda path: path.write_bytes(path.read_bytes()[:200] + bytes(300)),
        lambda path: path.write_bytes(b"\xff" + path.read_bytes()[5:]),
    ],
    ids=["missing", "empty", "cut", "zeros", "no text"],
)
def test_metrics_are_restored_from_the_checkpoint(
    one: Experiment, through: RunFolder, stopped: RunFolder, damage: Callable[[Path], Any]
) -> None:
    damage(stopped.path / "metrics.csv")
    assert_ends_as(through, stopped, one)


def test_a_checkpoint_of_an_earlier_version_can_be_resumed(
    one: Experiment, through: RunFolder, stopped: RunFolder
) -> None:
    path = stopped.path / "checkpoints" / LAST
    content = load_checkpoint(path, mmap=False)
    assert {"key", "files", "max_violation"} <= content.keys()
    torch.save({name: part for name, part in content.items() if name not in ("key", "files")}, path)
    assert_ends_as(through, stopped, one)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": 5}, "must be a checkpoint, with tensors in state_dict"),
        ({"state_dict": {"model.x": 5}}, "must be a checkpoint, with tensors in state_dict"),
        (
            {"state_dict": {"model.x": torch.ones(2)}},
            r"the shape of the weight embedding\.weight must be \(257, \d+\), got none$",
        ),
    ],
)
def test_a_whole_file_with_other_content_than_a_checkpoint_is_refused(
    one: Experiment, stopped: RunFolder, content: dict[str, Any], message: str
) -> None:
    path = stopped.path / "checkpoints" / LAST
    torch.save(load_checkpoint(path, mmap=False) | content, path)
    for use in (lambda: load_model(stopped), lambda: train(one, stopped.path.parent)):
        with pytest.raises(ValueError, match=rf"last\.ckpt: {message}"):
            use()


def test_a_checkpoint_with_weights_alone_cannot_be_resumed(one: Experiment, stopped: RunFolder) -> None:
    path = stopped.path / "checkpoints" / LAST
    content = load_checkpoint(path, mmap=False)
    torch.save({**content, "global_step": "x"}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt: must be a checkpoint, with the number of optimizer steps in"):
        train(one, stopped.path.parent)
    torch.save({"state_dict": content["state_dict"], "global_step": 10}, path)
    load_model(stopped)
    with pytest.raises(ValueError, match=r"last\.ckpt: must have all .*, but optimizer_states is missing"):
        train(one, stopped.path.parent)


def test_a_fifo_in_a_run_folder_is_not_waited_for(one: Experiment, through: RunFolder, stopped: RunFolder) -> None:
    for name in ("metrics.csv", f"checkpoints/{LAST}"):
        path = stopped.path / name
        path.unlink()
        os.mkfifo(path)
    os.mkfifo(stopped.path / "result.json")
    assert load_runs(stopped.path.parent).empty
    with pytest.raises(ValueError, match=r"last\.ckpt: must be a file, got a FIFO"):
        load_model(stopped)
    with pytest.raises(ValueError, match=r"last\.ckpt: must be a file, got a FIFO"):
        train(one, stopped.path.parent)


def test_a_damaged_rung_is_not_used(one: Experiment, tmp_path: Path) -> None:
    train(one, tmp_path, rungs=(0.25, 0.5))
    shorter = one.model_copy(update={"train": one.train.model_copy(update={"tokens": 15 * one.batch_tokens})})
    flip(tmp_path / "rungs" / f"{shorter.rung_key(10)}.ckpt", 64)
    assert result(train(shorter, tmp_path))["branched_from"]["step"] == 5


def test_checkpoints_are_written_beside_their_target(
    one: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "full"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))  # where nothing can be written
    assert result(train(one, tmp_path / "runs"))["status"] == "finished"


def test_a_full_disk_is_reported_and_leaves_the_existing_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = WholeCheckpointIO()
    io.save_checkpoint({"state_dict": {"model.x": torch.ones(3)}, "global_step": 1}, tmp_path / LAST)
    before = (tmp_path / LAST).read_bytes()
    open_ = Path.open
    content = {"state_dict": {"model.x": torch.ones(100_000)}, "global_step": 2}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *mode: open_(Path("/dev/full"), *mode))
        with pytest.raises(OSError, match=r"No space left on device: .*last\.ckpt") as caught:
            io.save_checkpoint(content, tmp_path / LAST)
    assert is_passing(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert (tmp_path / LAST).read_bytes() == before
