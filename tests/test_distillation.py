"""Distillation: the objective, refusals, costs, and interrupted runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_runs import EXPERTS, STEPS, TOKENS, kill_after_a_checkpoint, result, tiny, train, write_corpus
from torch import Tensor

from explore.data import TextSource
from explore.experiment import Experiment
from explore.files import read_json, write_json
from explore.interop import save_model_folder
from explore.model import LanguageModel
from explore.objective import Distillation
from explore.ops import forced_paths, path_of
from explore.runs import RunFolder
from explore.table import load_runs
from explore.train import LitLanguageModel, load_model
from explore.train.distillation import Teacher
from explore.train.objectives import Objective, build_objective
from explore.train.start import starting_model

RUN = "experiment.json"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def parent(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tiny(corpus, "*-*-", name="parent"), tmp_path_factory.mktemp("parents"))


def student(corpus: Path, parent: RunFolder | Path, pattern: str = "*-", **changes: Any) -> Experiment:
    """A student; changes named `objective__...` apply to its objective."""
    path = str(parent.path if isinstance(parent, RunFolder) else parent)
    record = {"kind": "distillation", "teacher": path}
    record |= {name.removeprefix("objective__"): changes.pop(name) for name in [*changes] if "objective__" in name}
    return tiny(corpus, pattern, train__objective=record, **changes)


def first_batch(one: Experiment) -> tuple[Tensor, Tensor]:
    batch = one.data.open(one.seed).batch(0, one.train.batch_size)
    return batch.inputs, batch.targets


def objective_of(one: Experiment) -> Objective:
    return build_objective(one.train)


# The objective


@pytest.mark.parametrize(
    ("temperature", "kl", "ce", "hidden"), [(1.0, 1.0, 0.0, 0.0), (2.0, 0.7, 0.3, 0.0), (1.0, 0.0, 0.5, 2.0)]
)
def test_terms_and_gradients_are_those_of_whole_logits_in_double(
    corpus: Path, parent: RunFolder, temperature: float, kl: float, ce: float, hidden: float
) -> None:
    weights = {"objective__kl_weight": kl, "objective__ce_weight": ce, "objective__hidden_weight": hidden}
    layers = {"objective__hidden_layers": [[0, 2], [1, 3]] if hidden else []}
    one = student(corpus, parent, objective__temperature=temperature, **weights, **layers)
    model, (tokens, targets) = starting_model(one), first_batch(one)
    targets[0, ::2] = -100
    found = objective_of(one)(model, tokens, targets)
    total = sum((term.weight * term.value for term in found.terms.values()), start=torch.zeros(()))
    total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}

    double, teacher = starting_model(one).double(), load_model(parent).double()
    ours: dict[int, Tensor] = {}
    theirs: dict[int, Tensor] = {}
    for outputs, each in ((ours, double), (theirs, teacher)):
        x = each.embedding(tokens)
        for i, layer in enumerate(each.layers):
            x = outputs[i] = layer(x)[0]
        outputs[-1] = each.head(each.norm(x))
    kept = targets != -100
    log_p, log_q = ((x[-1][kept].detach() if x is theirs else x[-1][kept]) / temperature for x in (theirs, ours))
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    truth = {
        "kl_loss": temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "loss": torch.nn.functional.cross_entropy(ours[-1][kept], targets[kept]),
        "hidden_loss": torch.stack(
            [1 - torch.cosine_similarity(ours[i], theirs[j].detach(), dim=-1).mean() for i, j in ((0, 2), (1, 3))]
        ).mean(),
    }
    assert found.terms.keys() == truth.keys() - ({"hidden_loss"} if not hidden else set())
    for name, term in found.terms.items():
        assert float(term.value.detach()) == pytest.approx(float(truth[name].detach()), rel=1e-5)
    (kl * truth["kl_loss"] + ce * truth["loss"] + hidden * truth["hidden_loss"]).backward()
    for name, weight in double.named_parameters():
        gradient = gradients[name]
        assert gradient is not None
        assert weight.grad is not None
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-4, atol=1e-7)


def test_routers_and_multi_token_prediction_keep_their_terms(corpus: Path, parent: RunFolder) -> None:
    one = student(corpus, parent, "E/*-", train__mtp_weight=0.7)
    model, batch = starting_model(one), first_batch(one)
    found, plain = objective_of(one)(model, *batch), model.loss(*batch, mtp=True)
    assert found.terms.keys() == {"loss", "kl_loss", "aux_loss", "mtp_loss"}
    assert plain.mtp is not None
    assert (found.terms["aux_loss"].value, found.terms["mtp_loss"]) == (plain.aux_loss, (plain.mtp.mean(), 0.7, False))
    assert found.terms["loss"].weight == 0
    assert float(found.terms["loss"].value) == pytest.approx(float(plain.cross_entropy.detach()), rel=1e-6)
    assert found.stats.keys() == plain.stats.keys()


def test_the_teacher_is_not_part_of_the_student_and_keeps_its_precision(corpus: Path, parent: RunFolder) -> None:
    one = student(corpus, parent, objective__teacher_precision="bf16")
    objective = one.train.objective
    assert isinstance(objective, Distillation)
    tokens, _ = first_batch(one)
    output, _ = Teacher(objective)(tokens)
    assert output.hidden.dtype == output.weight.dtype == torch.bfloat16
    assert not output.hidden.requires_grad
    exact, _ = Teacher(objective.model_copy(update={"teacher_precision": "fp32"}))(tokens)
    with torch.autocast("cpu", torch.bfloat16):  # the student's
        inside, _ = Teacher(objective.model_copy(update={"teacher_precision": "fp32"}))(tokens)
    assert torch.equal(exact.hidden, inside.hidden)
    torch.testing.assert_close(exact.hidden, load_model(parent).hidden(tokens)[0].detach())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = load_model(parent).hidden(tokens)[0].bfloat16()
    assert torch.equal(output.hidden, half)
    assert not torch.equal(output.hidden, exact.hidden.bfloat16())
    module = LitLanguageModel(one, starting_model(one), build_objective(one.train))
    assert {name.removeprefix("model.") for name in module.state_dict()} == starting_model(one).state_dict().keys()


def test_the_teacher_keeps_its_paths_of_ops(corpus: Path, parent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops compiled for the shapes of the student must not be compiled again for the teacher."""
    taken = []
    hidden = LanguageModel.hidden

    def watched(self: LanguageModel, *args: Any) -> Any:
        taken.append(path_of("norm"))
        return hidden(self, *args)

    one = student(corpus, parent)
    objective, usual = objective_of(one), path_of("norm")
    monkeypatch.setattr(LanguageModel, "hidden", watched)
    with forced_paths(norm="eager"):
        objective(starting_model(one), *first_batch(one))
    assert taken == [usual, "eager"]


def test_a_run_starts_with_the_weights_of_its_parent(corpus: Path, parent: RunFolder, tmp_path: Path) -> None:
    start = {"kind": "parent", "parent": str(parent.path)}
    one = tiny(corpus, "*-*-", seed=1, train__tokens=TOKENS, start=start)
    (row,) = train(one, tmp_path).metrics.dropna(subset="loss").to_dict("records")
    expected = load_model(parent).loss(*first_batch(one)).cross_entropy
    assert row["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    itself = student(corpus, parent, "*-*-", start=start)
    terms = objective_of(itself)(starting_model(itself), *first_batch(itself)).terms
    assert abs(float(terms["kl_loss"].value.detach())) < 1e-5


# Keys


def test_the_key_depends_on_the_weights_of_parent_and_teacher_and_not_on_their_path(
    corpus: Path, parent: RunFolder, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(parent.path, moved)
    start = {"kind": "parent", "parent": str(parent.path)}
    other = train(tiny(corpus, "*-*-", seed=1), tmp_path / "other").path
    keys = {
        name: (one.key(), one.stable_key())
        for name, one in {
            "plain": tiny(corpus, "*-*-"),
            "taught": student(corpus, parent, "*-*-"),
            "taught, moved": student(corpus, moved, "*-*-"),
            "taught by another": student(corpus, other, "*-*-"),
            "warmer": student(corpus, parent, "*-*-", objective__temperature=2),
            "started": tiny(corpus, "*-*-", start=start),
            "started, moved": tiny(corpus, "*-*-", start={**start, "parent": str(moved)}),
            "started by another": tiny(corpus, "*-*-", start={**start, "parent": str(other)}),
        }.items()
    }
    assert keys.pop("taught, moved") == keys["taught"]
    assert keys.pop("started, moved") == keys["started"]
    for which in (0, 1):
        assert len({key[which] for key in keys.values()}) == len(keys)


def test_a_folder_of_the_same_weights_is_the_same_teacher(corpus: Path, parent: RunFolder, tmp_path: Path) -> None:
    save_model_folder(load_model(parent), tmp_path / "folder", '{"model": {}}')
    one, other = student(corpus, parent), student(corpus, tmp_path / "folder")
    assert one.key() == other.key()
    assert isinstance(other.train.objective, Distillation)
    ours, theirs = (each.state_dict() for each in (load_model(parent), other.train.objective.teacher.load()))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_the_key_of_a_record_does_not_need_the_files_of_the_teacher(
    corpus: Path, parent: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(parent.path, tmp_path / "teacher")
    one = student(corpus, tmp_path / "teacher")
    text = one.model_dump_json()
    shutil.rmtree(tmp_path / "teacher")
    assert Experiment.model_validate_json(text) == one
    assert Experiment.model_validate_json(text).key() == student(corpus, parent).key()


# Costs


def test_the_passes_of_the_teacher_and_all_that_was_trained_before_are_counted_once(
    corpus: Path, parent: RunFolder, tmp_path: Path
) -> None:
    start = {"kind": "parent", "parent": str(parent.path)}
    child = train(student(corpus, parent, "*-*-", start=start, seed=1), tmp_path)
    run_flops, tokens = result(parent)["flops_run"], STEPS * TOKENS
    per_token = load_model(parent).config.cost(32).flops_fwd
    assert result(child)["flops_teacher"] == tokens * per_token
    assert result(child)["flops_before"] == run_flops
    start = {**start, "parent": str(child.path)}
    untaught = train(tiny(corpus, "*-*-", start=start, train__tokens=TOKENS), tmp_path)
    grandchild = train(student(corpus, parent, "*-*-", start=start, train__tokens=TOKENS), tmp_path)
    for each in (untaught, grandchild):
        assert result(each)["flops_before"] == 2 * run_flops + tokens * per_token
    rows = load_runs(tmp_path).set_index("run").loc[grandchild.path.name]
    assert (rows["parent"], rows["teacher"]) == (child.path.name, parent.path.name)
    assert rows["flops_before"] == result(grandchild)["flops_before"]
    parts = ("flops_run", "flops_teacher", "flops_before")
    assert rows["flops_with_parent"] == sum(result(grandchild)[name] for name in parts)
    assert not {"flops_teacher", "flops_before", "before"} & result(parent).keys()


def test_the_training_cost_of_an_imported_model_is_unknown(corpus: Path, parent: RunFolder, tmp_path: Path) -> None:
    save_model_folder(load_model(parent), tmp_path / "folder")
    start = {"kind": "parent", "parent": str(tmp_path / "folder")}
    found = result(train(tiny(corpus, "*-*-", start=start, train__tokens=TOKENS), tmp_path / "runs"))
    assert found["flops_before"] is None
    assert found["flops_teacher"] == 0
    assert load_runs(tmp_path / "runs")["flops_with_parent"].isna().all()


# Refusals


@pytest.fixture
def damaged(parent: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the parent that a test may change."""
    return RunFolder(Path(shutil.copytree(parent.path, tmp_path / "damaged")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 300}, r"model\.vocab_size: must be 257, that of the teacher .*, got 300"),
        (
            {"objective__hidden_weight": 1, "objective__hidden_layers": [[2, 0]]},
            r"train\.objective\.hidden_layers: layers of the student must be 0 to 1, got 2",
        ),
        (
            {"objective__hidden_weight": 1, "objective__hidden_layers": [[0, 4]]},
            r"train\.objective\.hidden_layers: layers of the teacher must be 0 to 3, got 4",
        ),
        (
            {"objective__hidden_weight": 1, "objective__hidden_layers": [[0, 0]], "model__d_model": 128},
            r"train\.objective\.hidden_channels: must be 128 channels of the teacher's 64, .* got None",
        ),
        *(
            (
                {
                    "objective__hidden_weight": 1,
                    "objective__hidden_layers": [[0, 0]],
                    "objective__hidden_channels": channels,
                    "model__d_model": 4,
                    "model__blocks": {"*": {"n_heads": 2, "n_kv_heads": 1, "d_head": 2}, "-": {"d_ff": 8}},
                },
                r"train\.objective\.hidden_channels: must be 4 channels of the teacher's 64, ascending, .* got \(",
            )
            for channels in ([0, 1, 2], [0, 2, 1, 3], [0, 1, 1, 2, 3], [61, 62, 63, 64])
        ),
        ({"objective__hidden_channels": [0]}, r"hidden_channels: must come with hidden_layers, .* got no layers"),
        ({"objective__hidden_weight": 1}, r"hidden_layers: must name layers .* got 0 pairs and hidden_weight=1"),
        ({"objective__kl_weight": 0}, r"one of kl_weight, ce_weight and hidden_weight must be above 0, got 0 for all"),
        ({"objective__temperature": 0}, r"temperature"),
    ],
)
def test_an_incompatible_student_is_refused(
    corpus: Path, parent: RunFolder, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        student(corpus, parent, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__seq_len": 64}, r"data\.seq_len: must be at most 32, that of the teacher .*, got 64"),
        (
            {"data": {"kind": "recall", "seq_len": 32, "n_pairs": 2, "vocab_size": 32}},
            r"data\.kind: must be text, that of the teacher .*, got recall",
        ),
        (
            {"start": {"kind": "parent"}, "model__pattern": "*-*"},
            r"start\.parent: .*: the shape of the weight layers\.3\.\S+ must be absent, got \(",
        ),
    ],
)
def test_a_run_incompatible_with_its_teacher_or_parent_is_refused_and_writes_nothing(
    corpus: Path, parent: RunFolder, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "start" in changes:
        changes = {**changes, "start": {**changes["start"], "parent": str(parent.path)}}
    one = student(corpus, parent, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        train(one, tmp_path / "runs")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_other_than_the_teachers_is_refused(corpus: Path, damaged: RunFolder, tmp_path: Path) -> None:
    record = damaged.environment
    write_json(damaged.path / "environment.json", {**record, "data": {**record["data"], "tokenizer": "ab"}})
    with pytest.raises(ValueError, match=r"data\.tokenizer: must be that of the teacher .*, got another one, bytes"):
        train(student(corpus, damaged), tmp_path / "runs")
    save_model_folder(load_model(damaged), tmp_path / "folder")
    with pytest.raises(ValueError, match=r"train\.objective\.teacher: .* must have a tokenizer\.json to compare"):
        train(student(corpus, tmp_path / "folder"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("status", "message"), [("diverged", "diverged"), ("pruned", "pruned"), (None, "unfinished")], ids=str
)
def test_an_unfinished_teacher_is_refused(corpus: Path, damaged: RunFolder, status: str | None, message: str) -> None:
    (damaged.path / "result.json").unlink()
    if status is not None:
        write_json(damaged.path / "result.json", {"status": status})
    with pytest.raises(ValueError, match=f"must be a run that has finished, got '.*', which is {message}"):
        student(corpus, damaged)


def test_a_missing_teacher_is_refused(corpus: Path, damaged: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"teacher\s+.*must be a run folder, or a folder that `explore import` wrote, got '.*nowhere'"
    ):
        student(corpus, tmp_path / "nowhere")
    checkpoint = damaged.path / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.ckpt: is damaged \("):
        student(corpus, damaged)
    checkpoint.unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt: is missing"):
        student(corpus, damaged)


def test_weights_changed_after_the_experiment_was_written_are_refused(
    corpus: Path, damaged: RunFolder, tmp_path: Path
) -> None:
    one = student(corpus, damaged)
    checkpoint = damaged.path / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]["model.norm.weight"] += 1
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match=r"the digest of the weights must be \w{8}, got \w{8}; they have changed"):
        train(one, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# Interruptions


class Stop(Exception):
    pass


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    """Equal bit for bit."""
    ours, theirs = (run.metrics.drop(columns="tokens_per_s") for run in (one, other))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    scores = [
        {name: value for name, value in result(run).items() if name not in ("train_s", "tokens_per_s", "finished_at")}
        for run in (one, other)
    ]
    assert scores[0] == scores[1]
    weights, others = (load_model(run).state_dict() for run in (one, other))
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def stopping(corpus: Path, parent: RunFolder, **changes: Any) -> Experiment:
    layers = {"objective__hidden_weight": 0.5, "objective__hidden_layers": [[1, 3]]}
    blocks = {"model__blocks": {"E": EXPERTS}}
    return student(corpus, parent, "*E", objective__ce_weight=0.3, train__val_every=4, **layers, **blocks, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 13])
def test_a_stopped_student_resumes_to_the_same_result(
    corpus: Path, parent: RunFolder, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, step = stopping(corpus, parent), LitLanguageModel.training_step

    def until(self: LitLanguageModel, *args: Any) -> Tensor:
        if self.global_step == stop:
            raise Stop
        return step(self, *args)

    through = train(one, tmp_path / "through", checkpoint_every=5)
    with monkeypatch.context() as patch:
        patch.setattr(LitLanguageModel, "training_step", until)
        with pytest.raises(Stop):
            train(one, tmp_path / "stopped", checkpoint_every=5)
    assert_same_run(train(one, tmp_path / "stopped", checkpoint_every=5), through)


@pytest.mark.slow
def test_a_killed_student_resumes_to_the_same_result(corpus: Path, parent: RunFolder, tmp_path: Path) -> None:
    one = stopping(corpus, parent, train__tokens=120 * TOKENS)
    through = train(one, tmp_path / "through", checkpoint_every=5)
    runs = tmp_path / "killed"
    kill_after_a_checkpoint(one, runs)
    assert_same_run(train(one, runs, checkpoint_every=5), through)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_distil_the_same_student_as_one(
    corpus: Path, parent: RunFolder, tmp_path: Path, strategy: str
) -> None:
    one = stopping(corpus, parent)
    alone = train(one, tmp_path / "alone")
    (tmp_path / RUN).write_text(one.model_dump_json())
    (tmp_path / "program.py").write_text("from explore.cli import main\n\nmain()\n")
    command = [sys.executable, str(tmp_path / "program.py"), "train", str(tmp_path / RUN), "--json"]
    options = ["--runs", str(tmp_path / "both"), "--devices", "2", "--strategy", strategy]
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, *options], env=os.environ | here, capture_output=True, text=True, timeout=200, check=True
    )
    both = RunFolder(Path(json.loads(done.stdout)["run"]))
    ours, theirs = (run.metrics.drop(columns="tokens_per_s") for run in (both, alone))
    pd.testing.assert_frame_equal(ours, theirs, rtol=2e-5, atol=1e-7)
    assert both.key == alone.key
    assert result(both)["val_bpb"] == pytest.approx(result(alone)["val_bpb"], rel=1e-5)


def test_a_run_folder_records_enough_of_its_teacher_to_resume(corpus: Path, parent: RunFolder, tmp_path: Path) -> None:
    one = student(corpus, parent, train__tokens=TOKENS)
    folder = train(one, tmp_path)
    objective = read_json(folder.path / RUN)["experiment"]["train"]["objective"]
    assert objective["teacher"]["path"] == str(parent.path)
    assert folder.load_experiment() == one
    assert isinstance(one.data.open(0), TextSource)
