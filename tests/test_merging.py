"""Merging: weights that imitate a decay, and a merged model that equals the average."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from small_runs import EXPERTS, write_corpus
from torch import Tensor

import explore.cli.merge  # noqa: F401  (adds its command)
from explore.cli import main
from explore.evals import bits_per_byte
from explore.experiment import Experiment, TrainConfig
from explore.records import pack_runs, unpack_runs
from explore.runs import RunFolder, find_runs
from explore.table import load_runs
from explore.train import (
    LitLanguageModel,
    decay_weights,
    fit,
    merge_weights,
    merge_window,
    read_weights,
    score_merge,
    stable_steps,
    wsd,
)

STEPS, TOKENS = 40, 4 * 32
FACTORS = {"flat": lambda p: 1 - p, "minus_sqrt": lambda p: 1 - math.sqrt(p)}


def experiment(corpus: Path, **train: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "model": {"d_model": 64, "vocab_size": 257, "pattern": "*E", "blocks": {"E": EXPERTS}},
            "data": {"kind": "text", "corpus": str(corpus), "tokenizer": "bytes", "seq_len": 32},
            "train": {"tokens": STEPS * TOKENS, "batch_size": 4, "warmup": 0.1, "decay": 0.25, **train},
        }
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return fit(experiment(corpus), tmp_path_factory.mktemp("runs"), keep_every=3, accelerator="cpu")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns off the type checks, which only tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def kept(folder: RunFolder, step: int) -> dict[str, Tensor]:
    return read_weights(folder.path / "checkpoints" / f"step-{step:06d}.ckpt")


# Weights


@pytest.mark.parametrize("shape", ["flat", "minus_sqrt"])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_the_average_equals_steps_scaled_as_in_the_decay(shape: Any, n: int) -> None:
    points = torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    decayed = points[0].clone()
    for i in range(1, n):
        decayed += FACTORS[shape](i / n) * (points[i] - points[i - 1])
    weights = decay_weights(n, shape)
    assert sum(weights) == pytest.approx(1)
    torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64) @ points, decayed)


def test_flat_is_the_mean_and_minus_sqrt_weighs_early_checkpoints_more() -> None:
    assert decay_weights(4, "flat") == (0.25,) * 4
    assert decay_weights(4, "minus_sqrt") == pytest.approx(
        (0.5, (math.sqrt(2) - 1) / 2, (math.sqrt(3) - math.sqrt(2)) / 2, 1 - math.sqrt(3) / 2)
    )


def save(path: Path, **state: Any) -> Path:
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, path)
    return path


def test_floats_are_averaged_in_fp32_and_integers_are_the_last(tmp_path: Path) -> None:
    exact = [1.0, 1.0 + 2**-7, 1.0 + 2**-6]  # all of them exist in bfloat16
    paths = [
        save(
            tmp_path / f"{i}.ckpt",
            half=torch.tensor([value]).bfloat16(),
            full=torch.tensor([value]),
            count=torch.tensor(i),
        )
        for i, value in enumerate(exact)
    ]
    weights = (0.5, 0.25, 0.25)
    merged = merge_weights(paths, weights)
    mean = sum(weight * value for weight, value in zip(weights, exact, strict=True))
    assert merged["full"].item() == mean
    assert merged["half"].dtype == torch.bfloat16
    assert merged["half"].item() == torch.tensor(mean).bfloat16().item()
    assert merged["count"].item() == 2


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.ckpt"
    torch.save({"state_dict": {"model.x": Path("a stranger's object")}}, path)
    with pytest.raises(ValueError, match=r"0\.ckpt: must hold tensors and plain values only"):
        merge_weights([path], [1.0])


# Kept checkpoints


@pytest.mark.parametrize("n_steps", [7, 40, 333])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0.1, 0.25), (0.02, 0.2), (0.5, 0.25)])
def test_the_stable_phase_ends_before_the_first_decayed_step(n_steps: int, warmup: float, decay: float) -> None:
    config = TrainConfig(tokens=1, warmup=warmup, decay=decay)
    rates = [wsd(step, n_steps, config) for step in range(n_steps)]
    peak = round(warmup * n_steps)
    expected = [done for done in range(peak, n_steps + 1) if all(rate == 1 for rate in rates[peak:done])]
    assert [*stable_steps(n_steps, config)] == expected


@pytest.mark.slow
def test_keeping_checkpoints_does_not_change_the_run(finished: RunFolder, corpus: Path, tmp_path: Path) -> None:
    names = {path.name for path in (finished.path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", *(f"step-{step:06d}.ckpt" for step in range(3, STEPS + 1, 3))}
    plain = fit(experiment(corpus), tmp_path, accelerator="cpu")
    assert plain.path.name == finished.path.name
    assert plain.result is not None
    assert finished.result is not None
    assert plain.result["val_loss"] == finished.result["val_loss"]


@pytest.mark.slow
def test_a_kept_checkpoint_holds_the_model_of_its_step_also_after_a_stop(
    finished: RunFolder, corpus: Path, tmp_path: Path
) -> None:
    step = LitLanguageModel.training_step

    def stopping(self: LitLanguageModel, *args: Any) -> Tensor:
        if self.global_step == 17:
            raise RuntimeError("stopped")
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitLanguageModel, "training_step", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            fit(experiment(corpus), tmp_path, keep_every=15, checkpoint_every=15, accelerator="cpu")
    (path,) = tmp_path.iterdir()
    last, fifteenth = read_weights(path / "checkpoints" / "last.ckpt"), kept(RunFolder(path), 15)
    assert all(torch.equal(last[name], weight) for name, weight in fifteenth.items())
    resumed = fit(experiment(corpus), tmp_path, keep_every=15, accelerator="cpu")
    for at in (15, 30):
        for name, weight in kept(finished, at).items():
            torch.testing.assert_close(kept(resumed, at)[name], weight, rtol=0, atol=1e-6)


# The merged model


def merged(folder: RunFolder, last: int, shape: Any = "minus_sqrt") -> dict[str, Tensor]:
    window = merge_window(folder, last, shape)
    return merge_weights(window.paths, window.weights)


@pytest.mark.parametrize("shape", ["flat", "minus_sqrt"])
def test_a_merged_model_is_the_average_of_the_last_stable_checkpoints(finished: RunFolder, shape: Any) -> None:
    window = merge_window(finished, 4, shape)
    assert window.steps == (21, 24, 27, 30)  # the decay begins with the step after the 30th
    average = merged(finished, 4, shape)
    states = [kept(finished, step) for step in window.steps]
    assert average.keys() == states[0].keys()
    for name, weight in average.items():
        mean = sum(w * state[name].double() for w, state in zip(window.weights, states, strict=True))
        torch.testing.assert_close(weight.double(), mean, rtol=1e-5, atol=1e-7)
    bias = "layers.1.mixer.expert_bias"
    assert not torch.equal(average[bias], states[-1][bias])


def test_one_checkpoint_merged_is_itself(finished: RunFolder) -> None:
    average = merged(finished, 1)
    assert all(torch.equal(average[name], weight) for name, weight in kept(finished, 30).items())


def test_the_record_has_the_merged_checkpoints_and_their_scores(finished: RunFolder, corpus: Path) -> None:
    record = score_merge(finished, 3, "flat", save=True)
    assert record == finished.merged["flat"]
    assert (record["shape"], record["steps"]) == ("flat", [24, 27, 30])
    assert record["weights"] == [1 / 3] * 3
    source = experiment(corpus).data.open(0)
    for split in ("val", "test"):
        for scores, weights in ((record, merged(finished, 3, "flat")), (record["last"], merged(finished, 1))):
            model = experiment(corpus).model.build()
            model.load_state_dict(weights)
            truth = bits_per_byte(model.eval(), source.eval_batches(split, 4))  # type: ignore[arg-type]
            assert scores[f"{split}_bpb"] == pytest.approx(truth.bits_per_byte, rel=1e-6)
    saved = read_weights(finished.path / "checkpoints" / "merged.ckpt")
    for name, weight in merged(finished, 3, "flat").items():
        assert torch.equal(saved[name], weight)


def test_averages_of_both_shapes_are_in_the_table_of_runs_and_in_records(finished: RunFolder, tmp_path: Path) -> None:
    scores = {shape: score_merge(finished, 4, shape) for shape in ("flat", "minus_sqrt")}  # type: ignore[arg-type]
    pack_runs(tmp_path / "s.parquet", finished.path.parent)
    for runs in (load_runs(finished.path.parent), load_runs(tmp_path / "s.parquet")):
        (row,) = runs.to_dict("records")
        for shape, record in scores.items():
            assert (row[f"val_bpb_{shape}"], row[f"test_bpb_{shape}"]) == (record["val_bpb"], record["test_bpb"])
    unpack_runs(tmp_path / "s.parquet", tmp_path / "again")
    (again,) = find_runs(tmp_path / "again")
    assert again.merged == finished.merged


def test_the_last_checkpoint_has_the_scores_of_the_run_if_it_is_its_last_step(corpus: Path, tmp_path: Path) -> None:
    folder = fit(experiment(corpus, decay=0.0, tokens=8 * TOKENS), tmp_path, keep_every=4, accelerator="cpu")
    record = score_merge(folder, 1)
    assert (record["steps"], record["val_bpb"]) == ([8], pytest.approx(record["last"]["val_bpb"], rel=1e-6))
    assert folder.result is not None
    assert record["last"] == {name: folder.result[name] for name in record["last"]}


@pytest.mark.parametrize(
    ("last", "shape", "message"),
    [
        (10, "flat", r"last must be at most 9, the checkpoints .* steps 4 to 30, got 10"),
        (0, "flat", r"last must be at least 1 checkpoint, got 0"),
        (3, "cosine", r"shape must be flat or minus_sqrt, got 'cosine'"),
    ],
)
def test_an_invalid_merge_is_refused(finished: RunFolder, unchecked: None, last: int, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_window(finished, last, shape)


def test_unevenly_spaced_checkpoints_are_refused(finished: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished.path, copy := tmp_path / "copy")
    (copy / "checkpoints" / merge_window(finished, 3).paths[1].name).unlink()
    with pytest.raises(ValueError, match=r"last: the last 3 checkpoints of .* are not equally far apart: steps \("):
        merge_window(RunFolder(copy), 3)


def test_an_error_without_kept_checkpoints_names_keep_every(corpus: Path, tmp_path: Path) -> None:
    folder = fit(experiment(corpus, tokens=3 * TOKENS), tmp_path, accelerator="cpu")
    with pytest.raises(ValueError, match=r"last must be at most 0, the checkpoints .*, got 5; train with keep_every"):
        merge_window(folder)


def test_the_command_shows_the_merge_beside_the_checkpoint_and_the_run(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["explore", "merge", str(finished.path), *options])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, printed, _ = run("--last", "4", "--json")
    record = json.loads(printed)
    assert code == 0
    assert record == finished.merged["minus_sqrt"]
    assert record["shape"] == "minus_sqrt"
    code, printed, _ = run("--last", "4")
    lines = printed.splitlines()
    assert finished.result is not None
    own = f"step {STEPS}, the run's own"
    for row, scores in (("step 30", record["last"]), ("4 merged, minus_sqrt", record), (own, finished.result)):
        (line,) = (line for line in lines if line.startswith(row))
        assert line.removeprefix(row).split()[:2] == [f"{scores['val_bpb']:.4f}", f"{scores['test_bpb']:.4f}"]
    code, _, err = run("--last", "99")
    assert code == 2
    assert err.startswith("error: last must be at most 9, the checkpoints")
