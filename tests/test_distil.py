"""A child cut from a trained parent by a plan: its first weights, its key, and the command that distils it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from small_runs import STEPS, TOKENS, result, tiny, train, write_corpus

from explore.checkpoints import load_model
from explore.compress import LayerCut, Plan
from explore.experiment import Experiment, ParentWeights
from explore.files import read_json, write_json
from explore.objective import Distillation
from explore.records import pack_runs, unpack_runs
from explore.runs import RunFolder
from explore.train import child_experiment
from explore.train.objectives import build_objective
from explore.train.start import starting_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def parent(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tiny(corpus, "*-*-", name="parent", train__lr=1e-3), tmp_path_factory.mktemp("runs"))


def halved(parent: RunFolder, **changes: Any) -> Plan:
    """A plan that keeps half of the channels and half of the first MLP, and drops the third layer."""
    layers = (LayerCut(), LayerCut(keep={"d_ff": tuple(range(0, 128, 2))}), LayerCut(drop=True), LayerCut())
    return Plan.keep_all(parent).model_copy(update={"d_model": tuple(range(32, 64)), "layers": layers, **changes})


@pytest.fixture
def plan(parent: RunFolder, tmp_path: Path) -> Path:
    halved(parent).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_child_starts_with_the_weights_kept_by_its_plan(parent: RunFolder, plan: Path) -> None:
    one = child_experiment(plan, 100 * TOKENS, runs=parent.path.parent)
    assert one.model == halved(parent).model()
    assert (one.model.n_layers, one.model.d_model) == (3, 32)
    expected = halved(parent).apply(load_model(parent).state_dict())
    assert all(torch.equal(weight, expected[name]) for name, weight in starting_model(one).state_dict().items())


def test_a_child_has_the_training_of_its_parent_at_a_fifth_of_the_learning_rate(parent: RunFolder, plan: Path) -> None:
    one, was = child_experiment(plan, 640, runs=parent.path.parent), parent.load_experiment()
    objective = one.train.objective
    assert isinstance(objective, Distillation)
    assert isinstance(one.start, ParentWeights)
    assert objective.teacher == one.start.parent
    assert (one.data, one.seed, one.train.batch_size) == (was.data, was.seed, was.train.batch_size)
    assert (one.train.tokens, one.train.lr) == (640, pytest.approx(2e-4))
    overrides = ["train.lr=0.5", "train.objective.temperature=2", "seed=3"]
    other = child_experiment(plan, 640, parent=parent.path, overrides=overrides)
    assert isinstance(other.train.objective, Distillation)
    assert (other.train.lr, other.train.objective.temperature, other.seed) == (0.5, 2, 3)


def test_hidden_states_of_a_narrower_child_are_compared_on_the_channels_that_it_keeps(
    parent: RunFolder, plan: Path
) -> None:
    layers = ["train.objective.hidden_weight=2", "train.objective.hidden_layers=[[0, 0], [2, 3]]"]
    one = child_experiment(plan, 640, parent=parent.path, overrides=layers)
    assert isinstance(one.train.objective, Distillation)
    assert one.train.objective.hidden_channels == tuple(range(32, 64)) == halved(parent).d_model
    batch = one.data.open(one.seed).batch(0, one.train.batch_size)
    child, teacher = starting_model(one), load_model(parent)
    term = build_objective(one.train)(child, batch.inputs, batch.targets).terms["hidden_loss"]
    x, y = child.embedding(batch.inputs), teacher.embedding(batch.inputs)
    ours = [x := layer(x)[0] for layer in child.layers]
    theirs = [y := layer(y)[0] for layer in teacher.layers]
    cosines = [torch.cosine_similarity(ours[i], theirs[j][..., 32:], dim=-1).mean() for i, j in ((0, 0), (2, 3))]
    assert float(term.value.detach()) == pytest.approx(float(1 - torch.stack(cosines).mean().detach()), rel=1e-5)
    assert (term.weight, term.value.requires_grad) == (2, True)


def test_channels_are_named_only_where_the_hidden_states_of_the_parent_are_compared(
    parent: RunFolder, plan: Path
) -> None:
    plain = child_experiment(plan, 640, parent=parent.path)
    assert "hidden_channels" not in plain.model_dump(mode="json")["train"]["objective"]
    other = plan.parent / "other"
    shutil.copytree(parent.path, other)  # its channels could be any
    layers = ["train.objective.hidden_weight=1", "train.objective.hidden_layers=[[0, 0]]"]
    with pytest.raises(ValueError, match=r"hidden_channels: must be 32 channels of the teacher's 64, .* got None"):
        child_experiment(plan, 640, parent=parent.path, teacher=other, overrides=layers)
    named = [*layers, f"train.objective.hidden_channels={list(range(32, 64))}"]
    found = child_experiment(plan, 640, parent=parent.path, teacher=other, overrides=named).train.objective
    assert found == child_experiment(plan, 640, parent=parent.path, overrides=layers).train.objective.replace(
        teacher=str(other)
    )


def test_the_key_depends_on_the_kept_indices_and_the_record_has_the_plan(
    corpus: Path, parent: RunFolder, plan: Path, tmp_path: Path
) -> None:
    def started(plan: Any) -> Experiment:
        start = {"kind": "parent", "parent": str(parent.path), "plan": plan}
        return tiny(corpus, "*-", model=halved(parent).model().model_dump(mode="json"), start=start)

    one = started(str(plan))
    assert started(read_json(plan)) == one
    assert hash(started(read_json(plan))) == hash(one)
    assert started({**read_json(plan), "origin": {"run": "elsewhere"}}).key() == one.key()
    other = halved(parent, d_model=tuple(range(32)))
    assert other.model() == halved(parent).model()
    assert started(other.model_dump(mode="json")).key() != one.key()
    text = one.model_dump_json()
    plan.unlink()
    assert Experiment.model_validate_json(text) == one
    assert json.loads(text)["start"]["plan"]["layers"][2]["drop"] is True


def test_a_table_of_records_holds_the_plan_of_a_child(parent: RunFolder, plan: Path, tmp_path: Path) -> None:
    child = train(child_experiment(plan, 256, parent=parent.path), tmp_path / "runs")
    assert pack_runs(tmp_path / "records.parquet", tmp_path / "runs") == 1
    unpack_runs(tmp_path / "records.parquet", tmp_path / "again")
    (again,) = (tmp_path / "again").iterdir()
    start = RunFolder(again).load_experiment().start
    assert start == child.load_experiment().start
    assert Plan.model_validate(start.plan).key() == Plan.load(plan).key()  # type: ignore[union-attr]


@pytest.mark.parametrize("n_model", [64, 48])
def test_a_model_other_than_that_of_the_plan_is_refused(parent: RunFolder, plan: Path, n_model: int) -> None:
    one = child_experiment(plan, 640, parent=parent.path)
    other = one.model_copy(update={"model": one.model.model_copy(update={"d_model": n_model})})
    with pytest.raises(
        ValueError, match=r"^start\.parent: .*: the shape of the weight \S+ must be \(.*got \("
    ) as caught:
        train(other, plan.parent / "runs")
    assert len(str(caught.value)) < 400
    assert not (plan.parent / "runs").exists()


def test_a_plan_of_another_parent_is_refused(corpus: Path, parent: RunFolder, plan: Path) -> None:
    other = train(tiny(corpus, "*-*-", seed=1, train__tokens=TOKENS), plan.parent / "others")
    one = child_experiment(plan, 640, parent=other.path)
    with pytest.raises(
        ValueError, match=r"^start\.plan: the weights of the parent must have the digest \w{8}, got \w{8}"
    ):
        train(one, plan.parent / "runs")
    assert not (plan.parent / "runs").exists()


def test_distil_trains_a_child_and_prints_its_cost(
    parent: RunFolder, plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(parent.path.parent, plan.parent / "runs"))
    halved(parent, origin={"flops": 12345.0}).save(plan)  # those of scoring the parent
    code, out, err = run(capsys, monkeypatch, "distil", plan, "--tokens", "2.56k", "--runs", root, "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    child = RunFolder(Path(printed.pop("run")))
    assert child.path.parent == root
    assert printed == child.result
    assert printed["flops_teacher"] == STEPS * TOKENS * load_model(parent).config.cost(32).flops_fwd
    assert printed["flops_before"] == result(parent)["flops_run"] + 12345
    code, out, _ = run(
        capsys, monkeypatch, "distil", plan, "--tokens", "2560", "--runs", root, "--teacher", parent.path
    )
    assert (code, child.path.name in out) == (0, True)  # the same run, which is not trained again
    code, out, _ = run(capsys, monkeypatch, "plot", root, "--count-parent", "--out", root / "whole.png")
    assert (code, (root / "whole.png").exists()) == (0, True)
    assert "with those of parent" in (root / "whole.svg").read_text()
    code, _, err = run(capsys, monkeypatch, "plot", root, "--count-parent", "--x", "params_active")
    assert (code, "--count-parent: must not be combined" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--tokens", "many"], "must be a whole number"),
        (["--tokens", "1k", "--runs", "nowhere"], "a run below nowhere must have the parent's weights (digest "),
        (["--tokens", "1k", "--parent", "nowhere"], "run must be a run folder"),
        (
            ["--tokens", "1k", "--parent", "PARENT", "--teacher", "nowhere"],
            "run must be a run folder, the start of its name",
        ),
        (["--tokens", "1k", "--parent", "PARENT", "--set", "train.lrr=1"], "train.lrr: unknown field"),
    ],
)
def test_distil_reports_mistakes_in_one_line(
    parent: RunFolder,
    plan: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plan.parent)
    code, out, err = run(
        capsys, monkeypatch, "distil", plan, *(str(parent.path) if a == "PARENT" else a for a in arguments)
    )
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (plan.parent / "runs").exists()


@pytest.mark.parametrize("status", ["diverged", "pruned"])
def test_a_parent_that_did_not_finish_is_refused(
    parent: RunFolder, plan: Path, status: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(parent.path, plan.parent / "bad"))
    write_json(folder / "result.json", {"status": status})
    code, _, err = run(capsys, monkeypatch, "distil", plan, "--tokens", "1k", "--parent", folder)
    assert code == 2
    assert f"must be a run that has finished, got '{folder}', which is {status}" in err
