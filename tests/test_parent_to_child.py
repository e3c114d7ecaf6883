"""The chain from a parent to its children: its commands, the arms of its table, and what a failure stops."""

from __future__ import annotations

import json
import subprocess
import threading
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from small_runs import result, tiny, train, write_corpus

from explore.compress import LayerCut, Plan
from explore.experiment import Experiment
from explore.runs import RunFolder
from explore.train import child_experiment


@pytest.fixture(scope="module")
def chain() -> ModuleType:
    spec = spec_from_file_location("parent_to_child", Path(__file__).parent.parent / "sweeps" / "parent_to_child.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return train(tiny(corpus, "*-*-", name="parent", train__tokens=384), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def child(parent: RunFolder) -> RunFolder:
    plan = Plan.keep_all(parent, flops=1e9).model_copy(
        update={"layers": (LayerCut(), LayerCut(), LayerCut(drop=True), LayerCut(drop=True))}
    )
    plan.save(parent.path / "plan.json")
    return train(child_experiment(parent.path / "plan.json", 384, parent=parent.path), parent.path.parent)


def test_the_arm_of_equal_flops_costs_what_the_child_cost_after_its_parent(
    chain: ModuleType, parent: RunFolder, child: RunFolder, tmp_path: Path
) -> None:
    spent = chain.flops_after(parent, child)
    assert spent == result(child)["flops_run"] + result(child)["flops_teacher"] + 1e9
    equal = Experiment.load(chain.from_scratch(child, 0.01, tmp_path, "equal", {"tokens": None, "flops": spent}))
    step = equal.batch_tokens * equal.model.cost(32).flops_train
    assert equal.flops_run == pytest.approx(spent, abs=step / 2)
    same = Experiment.load(chain.from_scratch(child, 0.01, tmp_path, "same", {}))
    for one in (equal, same):
        assert (one.model, one.data) == (child.load_experiment().model, child.load_experiment().data)
        assert (one.start.kind, one.train.objective.kind, one.train.lr) == ("fresh", "next_token", 0.01)
    assert same.train.tokens == child.load_experiment().train.tokens


@pytest.mark.parametrize("workers", [1, 2])
def test_every_arm_is_cut_distilled_and_trained_from_scratch(
    chain: ModuleType,
    parent: RunFolder,
    child: RunFolder,
    tmp_path: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[int, tuple[str, ...]]] = []
    both = threading.Barrier(2)

    def explore(self: Any, *arguments: object) -> dict[str, Any]:
        words = tuple(map(str, arguments))
        called.append((threading.get_ident(), words))
        if words[0] == "distil" and workers == 2 and words[-1] != "name=depth":
            both.wait(10)  # the first two arms run at the same time
        runs = {"train": parent.path if words[1] == str(chain.PARENT) else child.path, "distil": child.path}
        return {"run": str(runs.get(words[0])), "plan": str(tmp_path / f"{words[0]}.json")}

    monkeypatch.setattr(chain.Commands, "__call__", explore)
    table = chain.study(tmp_path, None, 384, workers=workers, equal_flops=True)
    assert table["arm"].to_list() == [
        "parent",
        *(f"{arm}, {what}" for arm in ("width", "depth", "puzzle") for what in ("distilled", "from scratch")),
        "puzzle, from scratch, equal FLOPs",
    ]
    assert [words[0] for _, words in called].count("train") == 5
    assert len({thread for thread, words in called if words[0] == "distil"}) == workers
    assert called[0][1][:2] == ("train", str(chain.PARENT))
    assert called[1][1] == ("score", str(parent.path))


def test_commands_beside_others_have_one_thread_and_none_begins_after_a_failure(
    chain: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        given.append(options)
        bad = "bad" in command
        return SimpleNamespace(returncode=2 * bad, stdout=json.dumps({"words": command[3:]}), stderr="error: bad\n")

    monkeypatch.setattr(subprocess, "run", run)
    alone, beside = chain.Commands(), chain.Commands(beside=True)
    assert alone("good", 3) == {"words": ["good", "3", "--json"]}
    assert (given[0]["env"], given[0]["stderr"]) == (None, None)
    assert beside("good") == {"words": ["good", "--json"]}
    assert (given[1]["env"]["OMP_NUM_THREADS"], given[1]["stderr"]) == ("1", subprocess.PIPE)
    with pytest.raises(SystemExit) as stop:
        beside("bad")
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        beside("good")
    assert len(given) == 3
    assert "error: bad" in capsys.readouterr().err
