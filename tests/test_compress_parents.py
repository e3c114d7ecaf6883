"""Imported parents, depth cut layer by layer, and children exported to other systems."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from damage import DAMAGE
from small_runs import tiny, train, write_corpus

import explore.compress.depth as depth
from explore.checkpoints import load_model
from explore.compress import Cutter, Plan, score
from explore.compress.depth import one_by_one
from explore.compress.observing import Observer
from explore.compress.parent import open_parent
from explore.data import train_bpe
from explore.files import read_json
from explore.model import ModelConfig
from explore.runs import RunFolder
from explore.weights import TrainedModel

VOCAB_SIZE = 300
BLOCKS = {
    "M": {"n_heads": 4, "d_head": 16, "d_state": 8, "n_groups": 2, "chunk_size": 16},
    "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 16},
    "-": {"d_ff": 64},
}


@pytest.fixture
def explore_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(run, capsys, monkeypatch)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tiny(corpus, "M-*-M-", model__blocks=BLOCKS), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([(corpus / "train.txt").read_text()], VOCAB_SIZE).save(str(path))
    return path


@pytest.fixture(scope="module")
def experiment(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and training for an imported parent; the model in it is not used."""
    path = tmp_path_factory.mktemp("data") / "experiment.json"
    changes = {"model__vocab_size": VOCAB_SIZE, "data__tokenizer": str(tokenizer), "train__tokens": 4 * 128}
    path.write_text(tiny(corpus, "*-", **changes).model_dump_json())
    return path


@pytest.fixture(scope="module")
def imported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written by transformers, as read by `explore import`."""
    transformers = pytest.importorskip("transformers")
    from explore.interop import from_hf, save_model_folder

    folder = tmp_path_factory.mktemp("theirs")
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16}
    mlp = {"intermediate_size": 96, "mlp_hidden_act": "relu2"}
    config = transformers.NemotronHConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        hybrid_override_pattern="M-*-M-",
        num_hidden_layers=6,
        **attention,
        **mamba,
        **mlp,
    )
    torch.manual_seed(0)
    transformers.NemotronHForCausalLM(config).save_pretrained(folder / "checkpoint")
    save_model_folder(from_hf(folder / "checkpoint"), folder / "parent", tokenizer.read_text())
    return folder / "parent"


def test_an_imported_checkpoint_is_scored_cut_and_distilled(
    imported: Path, experiment: Path, explore_: Any, tmp_path: Path
) -> None:
    code, printed, _ = explore_("score", imported, "--data", experiment, "--tokens", "512", "--json")
    assert code == 0
    scores = Path(json.loads(printed)["scores"])
    assert scores.parent == imported
    options = ["--keep", "d_model=48", "--keep", "d_ff=64", "--drop-layers", "2", "--scores", scores]
    code, printed, _ = explore_("cut", imported, "--data", experiment, *options, "--json")
    assert code == 0
    plan = Plan.load(json.loads(printed)["plan"])
    child = plan.model()
    assert (child.d_model, child.n_layers) == (48, 4)
    assert plan.parent == TrainedModel.model_validate(imported).digest
    distil = ("distil", json.loads(printed)["plan"], "--tokens", "512", "--parent", imported, "--data", experiment)
    code, printed, err = explore_(*distil, "--runs", tmp_path, "--json")
    assert code == 0, err
    found = RunFolder(Path(json.loads(printed)["run"])).load_experiment()
    assert found.model == child
    assert found.train.objective.kind == "distillation"


def test_a_child_of_one_width_loads_in_transformers(trained: RunFolder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from explore.interop import megatron_arguments, save_hf

    cutter = Cutter.of(trained, by="magnitude", norm_scales=False)
    child = cutter.child(cutter.plan({"d_model": 48, "d_ff": 32, "M.n_heads": 2}, [3]))
    save_hf(child, tmp_path / "child")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "child").eval()
    tokens = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = child(tokens)
        assert torch.allclose(theirs(tokens).logits, ours, atol=1e-4)
    arguments, _ = megatron_arguments(child.config)
    assert ("--hidden-size", "48") in arguments


def test_a_child_of_several_widths_is_refused_by_name(trained: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from explore.interop import megatron_arguments, save_hf

    cutter = Cutter.of(trained, by="magnitude", norm_scales=False)
    child = cutter.child(cutter.plan({"1.d_ff": 32}))
    with pytest.raises(ValueError, match="d_ff"):
        save_hf(child, tmp_path / "child")
    assert not (tmp_path / "child").exists()
    with pytest.raises(ValueError, match="d_ff"):
        megatron_arguments(child.config)


def test_a_child_with_a_linear_map_in_place_of_a_layer_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from explore.interop import megatron_arguments, save_hf

    model = {"d_model": 32, "vocab_size": 64, "pattern": "MP-", "blocks": {"-": {"d_ff": 48}}}
    child = ModelConfig.model_validate(model).build()
    for write in (lambda: save_hf(child, tmp_path / "child"), lambda: megatron_arguments(child.config)):
        with pytest.raises(ValueError, match=r"'P'|linear_map|\bP\b"):
            write()
    assert not (tmp_path / "child").exists()


def test_an_imported_checkpoint_needs_data_and_a_run_has_its_own(
    imported: Path, trained: RunFolder, experiment: Path, explore_: Any
) -> None:
    for arguments, message in (
        (("score", imported), f"{imported}: is an imported checkpoint without data; name a run or an experiment"),
        (("score", trained.path, "--data", experiment), f"data: {trained.path} is a run and has data of its own"),
        (("cut", imported, "--data", trained.path / "nowhere"), "run must be a run folder, the start of its name"),
    ):
        code, _, err = explore_(*arguments)
        assert (code, len(err.splitlines())) == (2, 1)
        assert err.startswith(f"error: {message}")


def test_data_of_another_tokenizer_is_refused(imported: Path, experiment: Path, tmp_path: Path) -> None:
    content = read_json(experiment)
    content["data"]["tokenizer"] = "bytes"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data: the tokenizer must be that of .*, got another one, bytes; use "):
        open_parent(imported, tmp_path / "other.json")


def test_data_with_more_tokens_than_the_checkpoint_is_refused(trained: RunFolder, tmp_path: Path) -> None:
    from explore.interop import save_model_folder

    save_model_folder(load_model(trained), tmp_path / "parent")
    content = trained.load_experiment().model_dump(mode="json")
    content["model"]["vocab_size"] = 2048
    content["data"]["tokenizer"] = "austen-bpe-2048"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data: must have at most the 257 tokens of .*, got 2,048"):
        open_parent(tmp_path / "parent", tmp_path / "other.json")


# Removal of layers one by one


def effects_without(trained: RunFolder, gone: list[int], effect: str) -> dict[int, float]:
    """Computed from a plan and its child, independently of the tested code."""
    cutter = Cutter.of(trained, by="magnitude", norm_scales=False)
    child = cutter.child(cutter.plan({}, gone))
    source = trained.load_experiment().data.open(0)
    observer = Observer(child)
    for step in range(2):
        observer.observe(source.batch(step, 4))
    left = [i for i in range(cutter.model.n_layers) if i not in gone]
    return dict(zip(left, observer.effect(effect), strict=True))


@pytest.mark.parametrize("effect", ["mse", "loss"])
def test_each_round_removes_the_least_important_remaining_layer(trained: RunFolder, effect: str) -> None:
    order = one_by_one(trained, 3, effect=effect, tokens=2 * 4 * 32, batch_size=4)
    gone: list[int] = []
    for layer, value in zip(order.layers, order.effects, strict=True):
        found = effects_without(trained, gone, effect)
        assert min(found, key=lambda i: found[i]) == layer
        assert value == pytest.approx(found[layer], rel=1e-5)
        gone.append(layer)
    assert order.flops > 0


def test_rounds_are_saved_and_can_be_continued(trained: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"tokens": 128, "batch_size": 4, "seed": 7}
    whole = one_by_one(trained, 3, **how)
    (path,) = [each for each in trained.path.glob("depth-*.json") if read_json(each)["about"]["seed"] == 7]
    content = read_json(path)
    del content["sha256"]  # which older versions did not write
    path.write_text(json.dumps({**content, "rounds": content["rounds"][:1]}))  # as a kill after one round leaves it
    assert one_by_one(trained, 3, **how) == whole
    monkeypatch.setattr(depth, "_shorter", None)  # nothing is measured again
    assert one_by_one(trained, 2, **how).layers == whole.layers[:2]


@pytest.mark.parametrize("damage", ["cut", "zeroed", "no rounds", "no effect", "a layer twice", "digit", "other key"])
def test_damaged_rounds_are_measured_again(trained: RunFolder, damage: str) -> None:
    how: dict[str, Any] = {"tokens": 128, "batch_size": 4, "seed": 8}
    whole = one_by_one(trained, 2, **how)
    (path,) = [each for each in trained.path.glob("depth-*.json") if read_json(each)["about"]["seed"] == 8]
    text, content = path.read_text(), read_json(path)
    first, second = content["rounds"]
    rewritten: dict[str, Any] = {
        "no rounds": {name: value for name, value in content.items() if name != "rounds"},
        "no effect": {"key": content["key"], "rounds": [{"layer": 0, "flops": 1.0}]},
        "a layer twice": {"key": content["key"], "rounds": [first, first]},
        "digit": {**content, "rounds": [first, {**second, "effect": 2 * second["effect"]}]},
        "other key": {"key": "0" * 64, "rounds": [second, first]},
    }
    raw = DAMAGE[damage](text.encode()) if damage in DAMAGE else json.dumps(rewritten[damage]).encode()
    path.write_bytes(raw)
    assert one_by_one(trained, 2, **how) == whole
    assert path.read_text() == text


def test_a_view_with_fewer_layers_shares_weights_and_keeps_the_parent(trained: RunFolder) -> None:
    model = load_model(trained)
    view = depth._shorter(model, [0, 5])
    assert (len(view.layers), len(model.layers), view.config.pattern) == (2, 6, "M-")
    assert view.embedding is model.embedding


@pytest.mark.slow
def test_the_command_cuts_one_layer_after_another(trained: RunFolder, explore_: Any) -> None:
    options = ("--drop-layers", "2", "--one-by-one", "--by", "magnitude", "--no-norm-scales", "--json")
    code, printed, _ = explore_("cut", trained.path, *options)
    assert code == 0
    plan, order = Plan.load(json.loads(printed)["plan"]), one_by_one(trained, 2)
    assert [i for i, layer in enumerate(plan.layers) if layer.drop] == sorted(order.layers)
    assert plan.origin["order"] == tuple(map(str, order.layers))
    assert plan.flops == order.flops
    code, _, err = explore_("cut", trained.path, "--one-by-one")
    assert (code, err) == (2, "error: --one-by-one: must come with --drop-layers\n")


def test_scores_of_an_imported_checkpoint_are_those_of_the_same_weights(trained: RunFolder, tmp_path: Path) -> None:
    from explore.interop import save_model_folder

    save_model_folder(load_model(trained), tmp_path / "copy")
    ours, _ = score(trained, tokens=512, seed=3)
    theirs, _ = score(tmp_path / "copy", tokens=512, seed=3, data=trained.path)
    assert ours.key == theirs.key
    assert ours.table.equals(theirs.table)


@pytest.mark.slow
def test_scores_after_a_sigkill_equal_those_of_an_uninterrupted_run(trained: RunFolder, tmp_path: Path) -> None:
    run_folder = Path(shutil.copytree(trained.path, tmp_path / trained.path.name))
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import explore.compress.scores as scores; scores.SAVE_EVERY_S = 0\n"
        "scores.score(sys.argv[1], tokens=65536, batch_size=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(run_folder)], stderr=subprocess.DEVNULL)
    try:
        while not list(run_folder.glob("*.partial")):
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(run_folder.glob("scores-*.parquet"))
    ours, _ = score(run_folder, tokens=65536, batch_size=2)
    theirs, _ = score(trained, tokens=65536, batch_size=2)
    assert not list(run_folder.glob("*.partial"))
    assert ours.key == theirs.key
    assert ours.table["score"].to_list() == pytest.approx(theirs.table["score"].to_list(), rel=1e-9)
