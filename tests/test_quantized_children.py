"""Trained models in the formats of a recipe: weights as in training, refusals, and children in other commands."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command_line import run
from pydantic import ValidationError
from small_runs import TOKENS, tiny, train, write_corpus

from explore.cli.models import load_model
from explore.compress.parent import open_parent
from explore.experiment import NUMERICS_VERSION, Experiment
from explore.figures import plot_bits
from explore.files import write_json
from explore.model import LanguageModel, ModelConfig, QuantizedModel, calibrate, check_after_training, quantize_products
from explore.ops import quantize
from explore.precision import Recipe, named
from explore.quantizing import Quantization, quantize_run
from explore.runs import RunFolder

MAMBA = {"kind": "mamba2", "n_heads": 4, "d_head": 16, "d_state": 16, "n_groups": 1, "chunk_size": 32}
BLOCKS = {
    "M": MAMBA,
    "-": {"kind": "mlp", "d_ff": 256},
    "*": {"kind": "attention", "n_heads": 4, "n_kv_heads": 1, "d_head": 16},
}


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate(fields)


def built(pattern: str, d_model: int = 64) -> LanguageModel:
    torch.manual_seed(0)
    content = {"d_model": d_model, "vocab_size": 48, "pattern": pattern, "init_std": 0.2}
    content["blocks"] = {letter: BLOCKS[letter] for letter in BLOCKS if letter in pattern}
    return ModelConfig.model_validate(content).build().eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 48, (2, 33), generator=torch.Generator().manual_seed(1))


# Weights


@pytest.mark.parametrize(
    "how",
    [
        recipe(format="fp32", rules=[{"format": "fp8-blocks", "components": ["up"]}]),
        recipe(format="fp32", rules=[{"format": "nvfp4", "components": ["up"]}], square_weights=True),
        recipe(format="fp32", rules=[{"format": "mxfp8", "components": ["up"]}], square_weights=True),
    ],
    ids=["fp8-blocks", "nvfp4", "mxfp8"],
)
def test_weights_share_scales_as_in_training(how: Recipe) -> None:
    model, text = built("-", d_model=256), tokens()
    other, trained = copy.deepcopy(model), copy.deepcopy(model)
    quantize_products(other, how)
    # Scales of activations are calibrated on the text itself, so they are those of training.
    QuantizedModel(model, amax=calibrate(model, [(text[:, :-1], text[:, 1:])])).apply(how)
    with torch.inference_mode():
        torch.testing.assert_close(model(text[:, :-1]), other(text[:, :-1]), atol=2e-5, rtol=1e-4)
        assert not torch.equal(model(text[:, :-1]), trained(text[:, :-1]))


def test_blocks_of_128_are_squares_and_mxfp8_after_nvfp4_is_not() -> None:
    model = built("-", d_model=256)
    up = model.layers[0].mixer.up.weight.detach().clone()
    quantized = QuantizedModel(model)
    quantized.put(next(each for each in quantized.components if each.name == "up"), "fp8-blocks")
    assert torch.equal(model.layers[0].mixer.up.weight, quantize(up, "fp8-blocks", square=True))

    nemotron = built("M" * 6)
    weights = {name: weight.detach().clone() for name, weight in nemotron.layers[0].mixer.named_parameters()}
    QuantizedModel(nemotron).apply(named("nemotron-3-nvfp4"))
    mixer = nemotron.layers[0].mixer
    assert torch.equal(mixer.out_proj.weight, quantize(weights["out_proj.weight"], "mxfp8"))
    assert torch.equal(mixer.in_proj.weight, quantize(weights["in_proj.weight"], "nvfp4", square=True))


def test_stochastic_weights_are_those_of_the_recipes_format_and_of_four_bits() -> None:
    model = built("M")
    before = copy.deepcopy(model.layers[0].mixer)
    QuantizedModel(model).apply(
        recipe(format="nvfp4", stochastic=["w"], rules=[{"format": "fp8", "components": ["out_proj"]}])
    )
    mixer = model.layers[0].mixer
    assert torch.equal(mixer.out_proj.weight, quantize(before.out_proj.weight, "fp8"))
    assert not torch.equal(mixer.in_proj.weight, quantize(before.in_proj.weight, "nvfp4"))


@pytest.mark.parametrize(
    ("component", "parameters"),
    [
        ("conv1d", ["layers.0.mixer.conv1d.weight", "layers.0.mixer.conv1d.bias", "mtp.0.layers.0.mixer.conv1d.bias"]),
        ("A_log, D, dt_bias", ["layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.dt_bias"]),
        ("input norm", ["layers.0.norm.weight", "layers.1.norm.weight", "mtp.0.layers.0.norm.weight"]),
        ("norm", ["layers.0.mixer.norm.weight", "norm.weight", "mtp.0.norm.weight"]),
        ("embedding norm, hidden norm", ["mtp.0.embedding_norm.weight", "mtp.0.hidden_norm.weight"]),
    ],
)  # fmt: skip
def test_a_rule_sets_the_wide_format_of_weights_outside_linear_layers(component: str, parameters: list[str]) -> None:
    model = built("M-/M")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    QuantizedModel(model).apply(recipe(rules=[{"format": "fp32", "components": [component]}]))
    after = dict(model.named_parameters())
    kept = {name for name, weight in before.items() if torch.equal(after[name], weight)}
    assert kept >= set(parameters)
    others = before.keys() - kept
    assert all(torch.equal(after[name], before[name].bfloat16().float()) for name in others)
    words = {part.replace(" ", "_") for part in component.split(", ")}
    assert all(words & {*name.split("."), "input_norm"} for name in kept)


# Requests


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "nvfp4", "four_over_six": ["x"]}, "precision.four_over_six must be w for a trained model, got 'x'"),
        (
            {"format": "nvfp4", "stochastic": ["w"], "scale_rounding": "up"},
            "precision.scale_rounding must be nearest .* round stochastically, got 'up'",
        ),
        ({"base": "nvfp4", "since": 0.7}, "precision.since must be 0 for a trained model, got 0.7"),
        ({"base": "nvfp4", "until": 0.8}, "precision.until.forward must be 1 for a trained model, got 0.8"),
        (
            {"base": "nvfp4", "until": {"backward": 0.5}},
            "precision.until.backward must be 1 for a trained model, got 0.5",
        ),
    ],
    ids=["four_over_six", "scale_rounding", "since", "until", "until.backward"],
)
def test_fields_without_an_effect_after_training_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_after_training(recipe(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": recipe(format="fp8"), "scales": "four_over_six"}, "scales must be max or mse if no format"),
        ({"recipe": named("ultra-ptq"), "scales": "mse"}, "scales must be four_over_six if precision.four_over_six"),
        ({"recipe": recipe(format="nvfp4"), "bits": 6}, "recipe.format must be one of bf16, fp16, fp32 with bits"),
    ],
    ids=["scales without nvfp4", "scales of the recipe", "bits"],
)  # fmt: skip
def test_settings_that_contradict_the_recipe_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Quantization.model_validate(fields)


def hashed(**content: Any) -> str:
    """A key of earlier versions."""
    text = json.dumps(content | {"numerics": NUMERICS_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def test_requests_whose_weights_share_scales_differently_share_no_measurements() -> None:
    def key(formats: tuple[str, ...] = ("nvfp4", "fp8"), **fields: Any) -> str:
        asked = {"recipe": recipe(**fields), "bits": 6, "formats": formats, "scales": "mse"}
        return Quantization.model_validate(asked).sensitivity_key("digest")

    # Square blocks were not always part of the key.
    assert key() == hashed(digest="digest", scales="mse", calibration_tokens=8192, calibration_seed=0)
    assert key(("fp8",)) == key(kv="fp8") == key(state="fp16") == key()
    assert len({key(), key(square_weights=True), key(("fp8-blocks",))}) == 3


def test_children_whose_weights_changed_have_new_keys() -> None:
    def is_unchanged(**fields: Any) -> bool:
        asked = Quantization.model_validate({"recipe": recipe(**fields)})
        return asked.key("key", "digest") == hashed(parent="key", digest="digest", quantization=asked.fingerprint())

    assert is_unchanged(format="nvfp4", square_weights=True)
    assert is_unchanged(base="fp8-ptq")
    assert not is_unchanged(rules=[{"format": "fp8-blocks", "letters": "M"}])
    assert not is_unchanged(rules=[{"format": "fp32", "components": ["conv1d"]}])
    assert not is_unchanged(base="nemotron-3-nvfp4")
    assert not is_unchanged(format="fp8", stochastic=["w"])


# The command


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def experiment(corpus: Path, pattern: str) -> Experiment:
    blocks = {letter: BLOCKS[letter] for letter in BLOCKS if letter in pattern}
    return tiny(corpus, pattern, model__blocks=blocks, train__tokens=2 * TOKENS)


@pytest.fixture(scope="module")
def child(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    parent = train(experiment(corpus, "M"), tmp_path_factory.mktemp("runs"))
    return quantize_run(parent, Quantization(recipe=recipe(format="fp8", state="fp16"), calibration_tokens=128))


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("M", ["--bits", "6", "--state-rounding", "stochastic"], "--state-rounding: must come with --state"),
        ("M", ["--bits", "6", "--kv-rounding", "stochastic"], "--kv-rounding: must come with --kv"),
        ("M", ["--precision", "fp8", "--formats", "nvfp4"], "--formats: must come with --bits"),
        ("M", ["--bits", "6", "--kv", "fp8"], "--kv: must come with a model that has attention, got fp8"),
        ("*", ["--bits", "6", "--state", "fp16"], "--state: must come with a model that has recurrent layers, got"),
        ("M", ["--precision", "fp8", "--scales", "four_over_six"], "scales must be max or mse if no format is nvfp4"),
        ("M", ["--bits", "9", "--formats", "fp8", "--scales", "four_over_six"], "scales must be max or mse"),
        ("M", ["--precision", "six.json"], "precision.four_over_six must be w for a trained model, got 'x'"),
    ],
)  # fmt: skip
def test_options_without_an_effect_are_refused(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("six.json").write_text(json.dumps({"format": "nvfp4", "four_over_six": ["x"]}))
    folder = train(experiment(corpus, pattern), tmp_path).path if "six.json" in options else tmp_path
    if folder == tmp_path:
        one = experiment(corpus, pattern)
        write_json(tmp_path / "experiment.json", {"key": one.key(), "experiment": one.model_dump(mode="json")})
    code, out, err = run(capsys, monkeypatch, "quantize", folder, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_rounding_may_change_that_of_a_recipe_with_state(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(corpus, "M")
    write_json(tmp_path / "experiment.json", {"key": one.key(), "experiment": one.model_dump(mode="json")})
    options = ("--precision", "fp8-ptq", "--state-rounding", "stochastic", "--kv-rounding", "stochastic")
    _, _, err = run(capsys, monkeypatch, "quantize", tmp_path, *options)
    assert "must be a finished run, got one that is unfinished" in err


# Children in other commands


def test_counts_of_a_child_come_with_a_note_of_its_size(child: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_model(str(child.path)) == child.load_experiment().model
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert f"is quantised, to {child.cost['bits_per_element']:.3f} bits per parameter" in printed.err
    load_model(str(child.path.parent / child.quantized["parent"]["run"]))
    assert capsys.readouterr().err == ""


def test_commands_that_need_weights_refuse_a_child_and_name_its_parent(
    child: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = child.quantized["parent"]["run"]
    with pytest.raises(ValueError, match=f"must be a trained run, got a quantised one, .* name its parent, {parent}"):
        open_parent(child)
    commands = (
        ("score", child.path),
        ("cut", child.path, "--drop-layers", "1"),
        ("puzzle", child.path, "--max", "params_total=50%"),
        ("export", child.path, tmp_path / "exported"),
    )
    for command in commands:
        code, out, err = run(capsys, monkeypatch, *command)
        assert (code, out, err.count("\n")) == (2, "", 1), command
        assert "must be a trained run" in err
        assert parent in err
    assert not (tmp_path / "exported").exists()


def test_the_figure_of_a_recall_run_draws_recall() -> None:
    runs = pd.DataFrame(
        {
            "run": ["parent", "child", "other"], "status": "finished", "family": "M", "pattern": "M",
            "quantized_from": [None, "parent", None], "scales": [None, "mse", None],
            "bits_per_element": [16.0, 5.0, 16.0], "test_bpb": [None, None, 2.0], "recall": [0.9, 0.8, None],
        }
    )  # fmt: skip
    axes = plot_bits(runs, "parent").axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["scales by mse"] == [[5.0, 0.8]]
    assert drawn["before quantisation"][0][1] == 0.9
    assert axes.get_ylabel() == "Recall accuracy"
