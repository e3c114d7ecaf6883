"""Training: schedule, optimizers, and a run folder that does not depend on interruptions."""

from __future__ import annotations

import fcntl
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import EXPERTS, STEPS, TOKENS, kill_after_a_checkpoint, result, tiny, train, write_corpus
from torch import nn
from torch.optim import Muon
from torch.optim.lr_scheduler import LambdaLR

from explore.blocks import MoE
from explore.data import Batch
from explore.evals import bits_per_byte
from explore.experiment import Experiment, TrainConfig
from explore.model import LanguageModel, ModelConfig
from explore.runs import RunFolder
from explore.train import (
    JointOptimizer,
    LitLanguageModel,
    build_optimizer,
    environment,
    fit,
    load_model,
    slow_precision,
    wsd,
)
from explore.train.optimizer import Float32Muon


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def experiment(corpus: Path, pattern: str = "ME-", **changes: Any) -> Experiment:
    return tiny(corpus, pattern, **changes)


def metrics(folder: RunFolder) -> pd.DataFrame:
    """The rows of `metrics.csv` without the speed."""
    return pd.read_csv(folder.path / "metrics.csv").drop(columns="tokens_per_s")


def model(pattern: str) -> LanguageModel:
    torch.manual_seed(0)
    blocks = {"E": EXPERTS} if "E" in pattern else {}
    record = {"d_model": 64, "vocab_size": 64, "pattern": pattern, "blocks": blocks}
    return ModelConfig.model_validate(record).build()


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(experiment(corpus, train__val_every=5), tmp_path_factory.mktemp("runs"), checkpoint_every=7)


# Schedule


@pytest.mark.parametrize("shape", ["linear", "minus_sqrt"])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("n_steps", [5, 20, 333])
def test_the_last_step_has_exactly_the_final_ratio(shape: Any, ratio: float, n_steps: int) -> None:
    config = TrainConfig(tokens=1, decay_shape=shape, final_lr_ratio=ratio)
    assert wsd(n_steps - 1, n_steps, config) == ratio


@pytest.mark.parametrize(
    ("shape", "fall"), [("linear", [0.25, 0.5, 0.75, 1]), ("minus_sqrt", [math.sqrt(i / 4) for i in range(1, 5)])]
)
def test_the_schedule_rises_stays_and_falls(shape: Any, fall: list[float]) -> None:
    config = TrainConfig(tokens=1, warmup=0.2, decay=0.2, decay_shape=shape, final_lr_ratio=0.1)
    expected = [0.25, 0.5, 0.75, 1.0, *[1.0] * 12, *[1 - 0.9 * part for part in fall]]
    assert [wsd(step, 20, config) for step in range(20)] == pytest.approx(expected)


def test_without_decay_the_rate_is_constant() -> None:
    assert [wsd(step, 9, TrainConfig(tokens=1, warmup=0, decay=0)) for step in range(9)] == [1.0] * 9


# Optimizers


def loss(lm: LanguageModel, seed: int) -> torch.Tensor:
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(seed))
    found = lm.loss(tokens[:, :-1], tokens[:, 1:])
    return found.cross_entropy + found.aux_loss


def steps(lm: LanguageModel, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss(lm, seed).backward()
        optimizer.step()


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    lm = model("M*E-")
    optimizer = build_optimizer(lm, TrainConfig(tokens=1, optimizer="muon"))
    assert isinstance(optimizer, JointOptimizer)
    names = {weight: name for name, weight in lm.named_parameters()}
    held = {
        member: {names[weight] for group in optimizer.members[member].param_groups for weight in group["params"]}
        for member in ("muon", "adamw")
    }
    assert held["muon"] | held["adamw"] == set(names.values())
    assert not held["muon"] & held["adamw"]
    assert held["muon"] == {name for w, name in names.items() if w.ndim == 2 and name.startswith("layers.")}
    assert {"embedding.weight", "head.weight", "layers.2.mixer.up", "layers.2.mixer.down"} <= held["adamw"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_weights_of_two_or_more_dimensions_decay(name: Any) -> None:
    optimizer = build_optimizer(model("M*E-"), TrainConfig(tokens=1, optimizer=name, weight_decay=0.3))
    for group in optimizer.param_groups:
        for weight in group["params"]:
            assert group["weight_decay"] == (0.3 if weight.ndim >= 2 else 0.0)


def test_a_learning_rate_set_on_the_joint_optimizer_reaches_its_members() -> None:
    optimizer = build_optimizer(model("*E"), TrainConfig(tokens=1, lr=0.5, optimizer="muon"))
    assert isinstance(optimizer, JointOptimizer)
    schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    schedule.step()
    assert [group["lr"] for member in optimizer.members.values() for group in member.param_groups] == [0.25] * 3


def test_a_joint_step_is_a_step_of_each_member(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.train.optimizer.multiplies_bf16", lambda: True)
    config = TrainConfig(tokens=1, optimizer="muon")
    joint_model, plain_model = model("*-"), model("*-")
    steps(joint_model, build_optimizer(joint_model, config), range(3))
    adamw = build_optimizer(plain_model, config.model_copy(update={"optimizer": "adamw"}))
    matrices = [w for name, w in plain_model.named_parameters() if name.startswith("layers.") and w.ndim == 2]
    for group in adamw.param_groups:
        group["params"] = [w for w in group["params"] if all(w is not matrix for matrix in matrices)]
    muon = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        plain_model.zero_grad()
        loss(plain_model, seed).backward()
        adamw.step()
        muon.step()
    for ours, theirs in zip(joint_model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_muon_in_fp32_takes_the_steps_of_muon_up_to_the_rounding_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.train.optimizer.multiplies_bf16", lambda: False)
    weights = [torch.randn(each, generator=torch.Generator().manual_seed(0)) for each in ((6, 40), (40, 6), (16, 16))]
    ours, theirs = ([nn.Parameter(each.clone()) for each in weights] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Float32Muon(ours, **options), Muon(theirs, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(ours, theirs, weights, strict=True):
        assert (one - other).norm() < 0.01 * (one - start).norm()
    for i in range(len(weights)):
        assert torch.equal(*(each.state[each.param_groups[0]["params"][i]]["momentum_buffer"] for each in optimizers))
    lm = model("*-")
    built = build_optimizer(lm, TrainConfig(tokens=1, optimizer="muon"))
    assert isinstance(built, JointOptimizer)
    assert type(built.members["muon"]) is Float32Muon


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_resumes_from_its_state_unchanged(name: Any, tmp_path: Path) -> None:
    config = TrainConfig(tokens=1, optimizer=name)
    through, stopped = model("M*E-"), model("M*E-")
    steps(through, build_optimizer(through, config), range(6))
    optimizer = build_optimizer(stopped, config)
    steps(stopped, optimizer, range(3))
    torch.save([stopped.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = model("M*E-")
    resumed.load_state_dict(weights)
    optimizer = build_optimizer(resumed, config)
    optimizer.load_state_dict(state)
    steps(resumed, optimizer, range(3, 6))
    for ours, theirs in zip(resumed.parameters(), through.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# The record


def test_a_run_ends_at_the_final_learning_rate_and_logs_every_step(finished: RunFolder, corpus: Path) -> None:
    rows = metrics(finished).dropna(subset="loss")
    config = experiment(corpus).train
    assert rows["step"].tolist() == list(range(1, STEPS + 1))
    assert rows["tokens"].tolist() == [TOKENS * step for step in range(1, STEPS + 1)]
    assert rows["lr"].tolist() == pytest.approx([config.lr * wsd(step, STEPS, config) for step in range(STEPS)])
    assert rows["lr"].iloc[-1] == pytest.approx(config.lr * config.final_lr_ratio)


def test_validation_is_logged_at_its_steps_and_the_last_is_the_result(finished: RunFolder) -> None:
    rows = metrics(finished).dropna(subset="val_bpb")
    assert rows["step"].tolist() == [5, 10, 15, 20]
    assert rows["val_bpb"].iloc[-1] == pytest.approx(result(finished)["val_bpb"], rel=1e-6)
    assert rows["val_loss"].iloc[-1] == pytest.approx(result(finished)["val_loss"], rel=1e-6)


def test_training_lowers_the_loss(finished: RunFolder) -> None:
    losses = metrics(finished)["loss"].dropna()
    assert losses.iloc[0] == pytest.approx(math.log(257), rel=0.2)
    assert losses.iloc[-1] < losses.iloc[0] - 0.5


def test_the_checkpoint_is_the_model_that_was_scored(finished: RunFolder, corpus: Path) -> None:
    checkpoint = torch.load(finished.path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    one = experiment(corpus)
    for split in ("val", "test"):
        score = bits_per_byte(load_model(finished), one.data.open(0).eval_batches(split, 8))  # type: ignore[arg-type]
        assert result(finished)[f"{split}_loss"] == pytest.approx(score.loss, rel=1e-5)
        assert result(finished)[f"{split}_bpb"] == pytest.approx(score.bits_per_byte, rel=1e-5)


def test_the_bias_of_the_experts_moves_by_its_rate(finished: RunFolder) -> None:
    (moe,) = load_model(finished).moe_layers().values()
    assert isinstance(moe, MoE)
    moved = moe.expert_bias / moe.config.bias_update_rate
    assert moved.abs().max() > 0
    torch.testing.assert_close(moved, moved.round(), atol=1e-2, rtol=0)
    assert moved.abs().max() <= STEPS + 1e-2
    assert metrics(finished)["max_violation"].dropna().iloc[-1] == pytest.approx(result(finished)["max_violation"])


def test_the_folder_holds_the_whole_record_and_nothing_unfinished(finished: RunFolder, corpus: Path) -> None:
    files = {str(path.relative_to(finished.path)) for path in finished.path.rglob("*") if path.is_file()}
    records = {f"{name}.json" for name in ("experiment", "cost", "environment", "result")}
    assert files == records | {"metrics.csv", "lock", "checkpoints/last.ckpt"}
    one = experiment(corpus, train__val_every=5)
    assert finished.load_experiment() == one
    assert finished.experiment["key"] == one.key()
    found = result(finished)
    assert (found["status"], found["reason"], found["step"]) == ("finished", None, STEPS)
    assert found["tokens"] == STEPS * TOKENS
    assert found["flops_run"] == pytest.approx(one.flops_run)
    assert finished.cost["params_total"] == sum(weight.numel() for weight in one.model.build().parameters())


def test_the_environment_names_versions_and_the_content_of_the_data(finished: RunFolder, corpus: Path) -> None:
    environment = finished.environment
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0] or (
        environment["versions"]["torch"] == torch.__version__
    )
    assert {"lightning", "numpy", "tokenizers"} <= environment["versions"].keys()
    assert environment["data"] == experiment(corpus).data.fingerprint()
    assert environment["threads"] == 1


def test_a_finished_experiment_is_returned_without_training(
    finished: RunFolder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[fit.__module__], "train_run", lambda *_: pytest.fail("trained again"))
    again = experiment(corpus, name="another name", train__val_every=5)
    assert train(again, finished.path.parent).path == finished.path


def test_the_same_experiment_gives_the_same_run(finished: RunFolder, corpus: Path, tmp_path: Path) -> None:
    again = train(experiment(corpus, train__val_every=5), tmp_path)
    pd.testing.assert_frame_equal(metrics(again), metrics(finished))


def test_the_gradient_is_clipped_after_its_norm_is_logged(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    step = LitLanguageModel.configure_gradient_clipping

    def watched(self: LitLanguageModel, *args: Any, **kwargs: Any) -> None:
        before = torch.cat([w.grad.flatten() for w in self.parameters() if w.grad is not None]).norm()
        step(self, *args, **kwargs)
        after = torch.cat([w.grad.flatten() for w in self.parameters() if w.grad is not None]).norm()
        norms.append((float(before), float(after)))

    monkeypatch.setattr(LitLanguageModel, "configure_gradient_clipping", watched)
    folder = train(experiment(corpus, "-", train__clip=0.25, train__tokens=5 * TOKENS), tmp_path)
    before, after = np.array(norms).T
    assert len(before) == 5
    assert before.min() > 0.25
    np.testing.assert_allclose(after, 0.25, rtol=1e-4)
    np.testing.assert_allclose(metrics(folder)["grad_norm"], before, rtol=1e-5)


def test_bf16_training_is_close_to_fp32(finished: RunFolder, corpus: Path, tmp_path: Path) -> None:
    folder = train(experiment(corpus, train__precision="bf16", train__val_every=5), tmp_path)
    assert result(folder)["val_loss"] == pytest.approx(result(finished)["val_loss"], rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in load_model(folder).parameters())


@pytest.mark.parametrize(
    ("precision", "instructions", "noted"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_a_precision_without_cpu_instructions_is_noted(
    precision: str, instructions: bool, noted: bool, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "multiplies_bf16", lambda: instructions)
    note = slow_precision(experiment(corpus, train__precision=precision))
    assert (note is not None) == noted
    assert note is None or note.startswith("train.precision: bf16 has no instructions on this ")


def test_recall_data_gives_recall_and_no_bits_per_byte(corpus: Path, tmp_path: Path) -> None:
    data = {"kind": "recall", "seq_len": 32, "n_pairs": 2, "vocab_size": 32, "n_eval": 16}
    one = experiment(corpus, "M*", data=data, train__tokens=5 * TOKENS)
    found = result(train(one, tmp_path))
    assert 0 <= found["recall"] <= 1
    assert found["recall"] * 16 * 2 == round(found["recall"] * 16 * 2)
    assert found["val_bpb"] is found["test_bpb"] is None


# Interruptions


class Stop(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = LitLanguageModel.training_step

    def training_step(self: LitLanguageModel, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.global_step == step:
            raise Stop
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LitLanguageModel, "training_step", training_step)


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    assert result(one)["val_loss"] == pytest.approx(result(other)["val_loss"], abs=1e-6)
    assert result(one)["test_loss"] == pytest.approx(result(other)["test_loss"], abs=1e-6)
    pd.testing.assert_frame_equal(metrics(one), metrics(other), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stops", [(3,), (13,), (8, 19)], ids=str)
def test_a_stopped_run_resumes_to_the_same_result(
    corpus: Path, tmp_path: Path, optimizer: str, stops: tuple[int, ...]
) -> None:
    one = experiment(corpus, "MEM*", train__optimizer=optimizer, train__val_every=4)
    through = train(one, tmp_path / "through", checkpoint_every=5)
    for step in stops:
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stop):
                train(one, tmp_path / "stopped", checkpoint_every=5)
    resumed = train(one, tmp_path / "stopped", checkpoint_every=5)
    assert_same_run(resumed, through)
    assert not list(resumed.path.rglob("*.tmp*"))


@pytest.mark.parametrize("every", [5, 7])
def test_a_run_stopped_before_its_result_is_only_scored(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    one = experiment(corpus, "ME", train__val_every=5)
    folder = train(one, tmp_path, checkpoint_every=every)
    rows, found = metrics(folder), result(folder)
    (folder.path / "result.json").unlink()
    monkeypatch.setattr(LitLanguageModel, "training_step", lambda *_: pytest.fail("trained again"))
    again = train(one, tmp_path, checkpoint_every=every)
    assert again.path == folder.path
    assert result(again)["val_loss"] == found["val_loss"]
    assert result(again)["step"] == STEPS
    pd.testing.assert_frame_equal(metrics(again), rows)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_to_the_same_result(corpus: Path, tmp_path: Path, optimizer: str) -> None:
    one = experiment(corpus, "MEM*", train__optimizer=optimizer, train__tokens=120 * TOKENS)
    through = train(one, tmp_path / "through", checkpoint_every=5)
    runs = tmp_path / "killed"
    kill_after_a_checkpoint(one, runs)
    assert_same_run(train(one, runs, checkpoint_every=5), through)


def test_a_diverged_run_is_recorded_and_not_repeated(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LanguageModel.loss
    calls = []

    def broken(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = original(self, *args, **kwargs)
        return found._replace(cross_entropy=found.cross_entropy * (math.nan if len(calls) > 3 else 1))

    monkeypatch.setattr(LanguageModel, "loss", broken)
    folder = train(experiment(corpus, "-"), tmp_path)
    found = json.loads((folder.path / "result.json").read_text())
    assert found["status"] == "diverged"
    assert "nan at step 3" in found["reason"]
    assert (found["step"], found["tokens"]) == (3, 3 * TOKENS)
    assert metrics(folder)["step"].tolist() == [1, 2, 3]
    assert train(experiment(corpus, "-"), tmp_path).path == folder.path
    assert len(calls) == 4


def test_a_model_that_becomes_nan_in_its_last_step_has_diverged(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    balance = LitLanguageModel._balance

    def broken(self: LitLanguageModel) -> None:
        balance(self)
        if self.global_step == STEPS - 1:
            self.model.head.weight.data.fill_(math.nan)

    monkeypatch.setattr(LitLanguageModel, "_balance", broken)
    found = result(train(experiment(corpus, "-"), tmp_path))
    assert found["status"] == "diverged"
    assert "val_loss is nan" in found["reason"]
    assert found["step"] == STEPS


def test_a_vocabulary_that_is_too_small_is_refused_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size: must be at least 257, .*, got 256"):
        train(experiment(corpus, "-", model__vocab_size=256), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_experiment_that_is_being_trained_is_refused(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, "-", train__tokens=TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 0)
        with pytest.raises(Stop):
            train(one, tmp_path)
    (lock,) = tmp_path.glob("*/lock")
    before = {path: path.read_bytes() for path in lock.parent.rglob("*") if path.is_file()}
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match="another process is training this experiment"):
            train(one, tmp_path)
        assert {path: path.read_bytes() for path in lock.parent.rglob("*") if path.is_file()} == before
    assert result(train(one, tmp_path))["status"] == "finished"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_offline_keeps_the_config_under_the_folder(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, "-", train__tokens=3 * TOKENS)
    folder = train(one, tmp_path, wandb="offline")
    (mirror,) = (folder.path / "wandb").glob("offline-run-*")
    (log,) = mirror.glob("*.wandb")
    assert one.key().encode() in log.read_bytes()
    assert not list(tmp_path.glob("wandb"))


def test_the_source_is_read_in_the_order_of_the_steps(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batch] = []
    original = LanguageModel.loss

    def watched(self: LanguageModel, tokens: torch.Tensor, targets: torch.Tensor, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(Batch(tokens, targets))
        return original(self, tokens, targets, **kwargs)

    monkeypatch.setattr(LanguageModel, "loss", watched)
    one = experiment(corpus, "-", train__tokens=6 * TOKENS, seed=4)
    train(one, tmp_path)
    source = one.data.open(4)
    assert len(seen) == 6
    for step, batch in enumerate(seen):
        assert torch.equal(batch.inputs, source.batch(step, 4).inputs)
        assert torch.equal(batch.targets, source.batch(step, 4).targets)
