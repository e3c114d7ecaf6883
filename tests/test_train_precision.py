"""Runs in low precision: their keys, refusals, and resuming bit for bit."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_runs import STEPS, TOKENS, kill_after_a_checkpoint, result, tiny, train, write_corpus

from explore.blocks import BLOCKS, BlockKind
from explore.cli import main
from explore.config import explain
from explore.cost import in_formats, storage
from explore.experiment import Experiment, TrainConfig
from explore.model import ModelConfig, quantizable_parts
from explore.precision import TRAINED, Recipe, named, products_of
from explore.quantities import read
from explore.runs import RunFolder
from explore.train import LitLanguageModel, cost_record, read_weights
from explore.train.low_precision import COLUMNS, FILE, LostElements

SWEEPS = Path(__file__).resolve().parents[1] / "sweeps"
COST = ("weight_bytes", "bits_per_element", "flops_fwd_quantized", "flops_train_quantized")
LATENT = {"n_experts": 4, "top_k": 2, "d_expert": 16, "d_shared": 16, "d_latent": 32}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def experiment(corpus: Path, precision: Any, pattern: str = "ME-*", **changes: Any) -> Experiment:
    return tiny(corpus, pattern, train__precision=precision, model__blocks={"E": LATENT}, **changes)


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return read_weights(folder.path / "checkpoints" / "last.ckpt")


# Keys


def test_the_key_depends_on_the_content_of_a_recipe(corpus: Path) -> None:
    key = experiment(corpus, "nvfp4").key()
    assert experiment(corpus, {"base": "nvfp4"}).key() == key
    assert experiment(corpus, named("nvfp4").model_dump(mode="json")).train.precision == "nvfp4"
    others = ["fp32", "bf16", "fp8", {"base": "nvfp4", "forward": False}, {"base": "nvfp4", "until": 0.82}]
    others += [{"base": "nvfp4", "rules": [{"format": "bf16", "last": 0.25}]}]
    assert len({experiment(corpus, other).key() for other in others} | {key}) == len(others) + 1


def test_the_fingerprint_names_fp32_and_bf16_and_spells_out_recipes() -> None:
    assert [TrainConfig(tokens=1, precision=word).fingerprint()["precision"] for word in ("fp32", "bf16")] == [
        "fp32",
        "bf16",
    ]
    assert TrainConfig(tokens=1, precision="nvfp4").fingerprint()["precision"]["format"] == "nvfp4"


def test_a_recipe_in_a_record_is_read_again(corpus: Path) -> None:
    one = experiment(corpus, {"base": "nvfp4", "weight_gradient": False})
    record = json.loads(one.model_dump_json())
    assert record["train"]["precision"]["weight_gradient"] is False
    assert "forward" not in record["train"]["precision"]  # as by default
    assert Experiment.model_validate(record) == one


def test_the_stable_phase_of_a_recipe_with_a_switch_depends_on_the_number_of_steps(corpus: Path) -> None:
    longer = {"train__tokens": 2 * 20 * 128, "train__warmup": 0}
    for precision, same in (("nvfp4", True), ({"base": "nvfp4", "until": 0.5}, False)):
        one, other = experiment(corpus, precision, train__warmup=0), experiment(corpus, precision, **longer)
        assert (one.stable_key() == other.stable_key()) == same


# Bad input


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("nvpf4", "train.precision: it must be one of fp32, .*, got 'nvpf4'; did you mean 'nvfp4'?"),
        ("ultra-ptq", "train.precision: it must be one of .*, got 'ultra-ptq'"),
        (4, "train.precision: must be the name of a recipe, or a recipe, got 4"),
        ({"base": "nvfp4", "formwat": 1}, "train.precision.formwat: unknown field"),
        ({"format": "nvfp4", "rules": [{"format": "e3m0", "last": 1}]}, "train.precision.rules.0.format: input should"),
        ({"format": "fp16"}, "train.precision: formats must not be fp16"),
        (
            {"format": "nvfp4", "rules": [{"format": "bf16", "components": ["in_porj"]}]},
            "train.precision.rules.0.components must be components of the model, got 'in_porj'; did you mean 'in_proj'",
        ),
        (
            {"format": "nvfp4", "rules": [{"format": "bf16", "letters": "L"}]},
            "train.precision.rules.0 must match a component of the model, got letters 'L'",
        ),
        ({"base": 3}, "train.precision: base must be one of fp32, .*, got 3$"),
        ({"base": "ultra-ptq"}, 'train.precision.kv: must be null in training, .*`explore quantize`.*, got "fp8"'),
        ({"base": "nvfp4", "state": "int8"}, 'train.precision.state: must be null in training, .*, got "int8"'),
        ({"base": "nvfp4", "kv_rounding": "stochastic"}, 'train.precision.kv_rounding: must be "nearest" in training'),
        ({"base": "nvfp4", "state_rounding": "stochastic"}, 'train.precision.state_rounding: must be "nearest" in '),
        ({"base": "fp8", "square_weights": True}, "train.precision.square_weights: must be false, since no product in"),
        ({"stochastic": ["dy", "dy"]}, "train.precision.stochastic: must not contain a value twice, got dy, dy"),
        (
            {"base": "nvfp4", "rules": [{"format": "fp32", "components": ["norm"]}]},
            "train.precision: norm must be in bf16 in training, where rules apply only to linear layers and .*'fp32'$",
        ),
        (
            {"format": "fp32", "rules": [{"format": "bf16", "components": ["conv1d", "in_proj"]}]},
            "train.precision: conv1d must be in fp32 in training, .*, got 'bf16'$",
        ),
        (
            {"base": "nvfp4", "rules": [{"format": "fp32", "components": ["embedding"]}]},
            "train.precision: embedding must be in bf16 in training, .*, got 'fp32'$",
        ),
        (
            "fp8-blocks",
            "train.precision: fp8-blocks needs widths that are multiples of 128, got 64 in in_proj of layer 0 .M.; 128",
        ),
    ],
    ids=str,
)
def test_bad_precision_is_refused_by_the_path_of_the_field(corpus: Path, precision: Any, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        experiment(corpus, precision)
    assert re.match(message, explain(error.value)), explain(error.value)
    assert len(explain(error.value)) < 400


def test_a_rule_cannot_give_the_shared_head_another_format_in_multi_token_prediction_only(corpus: Path) -> None:
    rule = {"format": "nvfp4", "components": ["head"]}
    with pytest.raises(ValidationError, match=r"head must be in bf16 in multi-token prediction too, .*, got 'nvfp4'"):
        experiment(corpus, {"rules": [{**rule, "letters": "/"}]}, "M/*")
    assert experiment(corpus, {"rules": [rule]}, "M/*").train.quantizes


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.letter)
def test_training_quantises_every_component_that_is_not_refused(kind: BlockKind) -> None:
    """A rule on a component without products to quantise is refused, so all others must have a module."""
    blocks = {each.letter: each.example for each in BLOCKS if each.letter in (kind.letter, "*")}
    config = ModelConfig.model_validate(
        {"d_model": 40, "vocab_size": 64, "pattern": f"{kind.letter}*/{kind.letter}", "blocks": blocks}
    )
    rows = [(row.layer, row.letter, row.entry.component) for row in config.ledger(16) if row.entry.sums_over]
    with torch.device("meta"):
        modules = {(part.layer, part.letter, part.component) for part in quantizable_parts(config.build())}
    assert set(rows) == modules | {(None, "/", "head")}  # the same module as the head of the model


@pytest.mark.parametrize("name", TRAINED)
def test_named_recipes_stay_valid_as_a_base(name: str) -> None:
    assert TrainConfig(tokens=1, precision={"base": name}).precision == name


def test_recipes_of_sweeps_stay_valid() -> None:
    bits, whole = (runpy.run_path(str(SWEEPS / f"{name}.py"))["ARMS"].values() for name in ("bits", "precision"))
    recipes = [*whole, *({**arm, "since": 0.8} for arm in bits)]
    assert len({TrainConfig(tokens=1, precision=each).recipe for each in recipes}) == len(recipes)


def test_the_command_line_takes_a_recipe_and_refuses_in_one_line(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "experiment.json"
    path.write_text(experiment(corpus, "bf16", "-", train__tokens=2 * 128).model_dump_json())
    given = ["explore", "train", str(path), "--runs", str(tmp_path / "runs"), "--json"]
    monkeypatch.setattr(sys, "argv", [*given, "--set", "train.precision=nvpf4"])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert "did you mean 'nvfp4'?" in err
    monkeypatch.setattr(sys, "argv", [*given, "--set", 'train.precision={"base": "nvfp4", "stochastic": ["w"]}'])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert not stop.value.code
    assert json.loads(out)["status"] == "finished"
    assert "train.precision: stochastic rounding of weights diverges in published runs" in err


# Training


@pytest.fixture(scope="module")
def through(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(experiment(corpus, "nvfp4"), tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_a_run_in_low_precision_learns_and_records_lost_elements(corpus: Path, through: RunFolder) -> None:
    assert result(through)["status"] == "finished"
    row = through.row()
    assert row["precision"] == "nvfp4"
    expected = cost_record(experiment(corpus, "nvfp4"))
    assert {name: row[name] for name in COST} == {name: expected[name] for name in COST}
    losses = through.metrics["loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0] - 0.1
    lost = through.lost
    assert set(lost["step"]) == set(range(1, STEPS + 1))
    assert set(lost["component"]) == {
        "in_proj", "out_proj", "latent_down", "latent_up", "experts", "shared", "up", "down", "q_proj", "k_proj",
        "v_proj", "o_proj",
    }  # fmt: skip
    operands = {"x forward", "w forward", "dy input_gradient", "x weight_gradient", "dy weight_gradient", "dw"}
    assert set(lost["operand"]) == operands
    quantised, gradients = lost[lost["operand"] != "dw"], lost[lost["operand"] == "dw"]
    assert quantised["flushed"].between(0.001, 0.9).mean() > 0.9
    assert quantised["saturated"].between(0, 0.2).all()
    assert quantised["zero"].isna().all()
    assert gradients["zero"].between(0, 1).all()
    assert gradients["flushed"].isna().all()


@pytest.mark.slow
def test_scores_are_those_of_quantised_forward_products(corpus: Path, through: RunFolder, tmp_path: Path) -> None:
    backward = train(experiment(corpus, {"base": "nvfp4", "forward": False}), tmp_path)
    assert result(backward)["val_loss"] != result(through)["val_loss"]
    assert math.isfinite(result(backward)["val_loss"])
    assert set(backward.lost["operand"]) == {
        "dy input_gradient", "w input_gradient", "x weight_gradient", "dy weight_gradient", "dw"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "forward", "products"),
    [
        ({}, 1, 3),
        ({"until": {"backward": 0.5}}, 1, 2),
        ({"until": 0.5}, 0, 1.5),
        ({"since": 0.5}, 1, 1.5),
        ({"since": 0.25, "until": {"backward": 0.5}}, 1, 1.25),
        ({"forward": False}, 0, 2),
    ],
)
def test_the_cost_of_a_run_counts_its_formats_and_the_flops_in_each(
    corpus: Path, changes: dict[str, Any], forward: int, products: float
) -> None:
    one = experiment(corpus, {"base": "nvfp4", **changes})
    cost, plain = cost_record(one), cost_record(experiment(corpus, "bf16"))
    ledger = in_formats(one.model.ledger(32), named("nvfp4"))
    flops = sum(row.entry.flops_seq for row in ledger if row.entry.weight == "nvfp4") / 32
    assert (cost["flops_fwd_quantized"], cost["flops_train_quantized"]) == (forward * flops, products * flops)
    assert {name for name in plain if name.endswith("quantized")} == set()
    stored = storage(ledger)
    bits = stored["bits_per_element"] if forward else 16
    assert 4.5 < stored["bits_per_element"] < 16
    assert read({"cost": cost})["bits_per_element"] == bits
    assert cost["weight_bytes"] == plain["weight_bytes"] * bits / 16
    assert cost["weight_bytes"] == sum(line["weight_bytes"] for line in cost["ledger"])
    same = ("params_total", "flops_train", "kv_bytes", "ssm_state_bytes")
    assert {name: cost[name] for name in same} == {name: plain[name] for name in same}


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("step", [7])
def test_a_resumed_run_rounds_like_an_uninterrupted_one(
    corpus: Path, through: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = LitLanguageModel.training_step

    def stopping(self: LitLanguageModel, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise Stop
        return whole(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitLanguageModel, "training_step", stopping)
        with pytest.raises(Stop):
            train(experiment(corpus, "nvfp4"), tmp_path, checkpoint_every=5)
    resumed = train(experiment(corpus, "nvfp4"), tmp_path, checkpoint_every=5)
    for name, weight in weights(through).items():
        assert torch.equal(weights(resumed)[name], weight), name
    assert resumed.lost.equals(through.lost)
    assert result(resumed)["val_bpb"] == result(through)["val_bpb"]


@pytest.mark.slow
def test_a_killed_run_rounds_like_an_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    one = experiment(corpus, "nvfp4", "ME", train__tokens=100 * TOKENS)
    through = train(one, tmp_path / "through", checkpoint_every=5)
    kill_after_a_checkpoint(one, tmp_path / "killed")
    resumed = train(one, tmp_path / "killed", checkpoint_every=5)
    assert any(how.stochastic for operands in products_of(one.train.recipe, "nvfp4").values() for how in operands)
    for name, weight in weights(through).items():
        assert torch.equal(weights(resumed)[name], weight), name
    assert resumed.lost.equals(through.lost)
    assert result(resumed)["val_bpb"] == result(through)["val_bpb"]


def test_a_rule_keeps_the_last_layers_in_bf16(corpus: Path, tmp_path: Path) -> None:
    recipe = {"base": "nvfp4", "rules": [{"format": "bf16", "last": 0.5}], "until": {"backward": 0.5}}
    run = train(experiment(corpus, recipe, train__tokens=4 * 128), tmp_path)
    assert json.loads(run.row()["precision"])["until"] == {"backward": 0.5}
    assert tuple(run.lost) == COLUMNS
    assert set(run.lost["component"]) == {"in_proj", "out_proj", "latent_down", "latent_up", "experts", "shared"}
    by_step = run.lost.groupby("step")["operand"].agg(set)
    assert "dy weight_gradient" in by_step[2]
    assert by_step[3] == {"x forward", "w forward", "dw"}
    assert isinstance(run.load_experiment().train.precision, Recipe)


def test_every_column_of_the_lost_elements_is_documented() -> None:
    docs = Path(__file__).parent.parent / "docs"
    page = (docs / "concepts" / "precision.md").read_text(encoding="utf-8")
    _, _, section = page.partition("### What a run records")
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == COLUMNS
    assert {name for name in COLUMNS if f"`{name}`" not in (LostElements.__doc__ or "")} == set()
    assert f"`{FILE}`" in (docs / "how-to" / "read-an-old-run.md").read_text(encoding="utf-8")
