"""Recipes of precision as Megatron-LM and Model-Optimizer read them."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from small_runs import tiny, write_corpus

from explore.cost import in_formats
from explore.files import write_json
from explore.interop import model_optimizer_names, te_quant
from explore.interop.precision import MODULES
from explore.model import ModelConfig
from explore.precision import Recipe, named
from explore.presets import preset

SMALL = ModelConfig.model_validate(
    {
        "d_model": 64,
        "vocab_size": 256,
        "pattern": "ME*-ME",
        "blocks": {"E": {"n_experts": 4, "top_k": 2, "d_expert": 32, "d_shared": 64, "d_latent": 32}},
    }
)


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate(fields)


def chosen(content: dict[str, Any], path: str) -> str:
    """The config of a module, found as Megatron-LM does."""
    configs = (each["config"] for each in content["matchers"].values() if fnmatch(path, each["pattern"]))
    return str(next(configs))


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (preset("nemotron-3-super"), named("nemotron-3-nvfp4")),
        (preset("nemotron-h-8b"), named("nemotron-h-fp8")),
        (SMALL, named("nvfp4")),
        (SMALL, recipe(base="mxfp8", rules=[{"format": "bf16", "layers": [1], "components": ["experts"]}])),
    ],
    ids=["super", "nemotron-h", "small", "one layer"],
)
def test_the_matchers_give_every_module_the_format_of_the_ledger(model: ModelConfig, how: Recipe) -> None:
    content = te_quant(model, how)
    assert set(content["configs"]) >= {each["config"] for each in content["matchers"].values()}
    n_checked = 0
    for row in in_formats(model.ledger(1), how):
        if row.layer is not None and row.entry.sums_over:
            modules = MODULES[type(model.blocks[row.letter])].get(row.entry.component, ())
            for module in modules:
                assert chosen(content, f"decoder.layers.{row.layer}.{module}") == row.entry.weight
                n_checked += 1
    assert n_checked >= 2 * model.n_layers
    assert chosen(content, "output_layer") == "bf16"
    assert chosen(content, "mtp.layers.0.eh_proj") == "bf16"
    recipes = {name: each["training_recipe"] for name, each in content["configs"].items()}
    assert recipes["bf16"] == {}
    for name, key, engine in (("nvfp4", "fp4", "nvfp4"), ("mxfp8", "fp8", "mxfp8"), ("fp8", "fp8", "tensorwise")):
        if name in recipes:
            assert recipes[name][f"{key}_quantization_recipe"] == engine
            assert recipes[name]["override_nonquantized_autocast"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "mxfp4"}, "precision of in_proj: 'mxfp4' cannot be written for Megatron-LM; only bf16, fp8, fp8-bl"),
        ({"base": "nvfp4", "forward": False}, "precision.forward: False cannot be written for Megatron-LM; only True"),
        (
            {"base": "nvfp4", "until": 0.8},
            "precision.until: {'forward': 0.8, .* cannot .*; only {'forward': 1",
        ),
        ({"base": "nvfp4", "stochastic": []}, r"precision.stochastic: \(\) cannot .*; only \('dy',\) can"),
        ({"base": "nvfp4", "hadamard_size": 128}, "precision.hadamard_size: 128 cannot .*; only 16 can"),
        ({"base": "nvfp4", "square_weights": False}, "precision.square_weights: False cannot .*; only True can"),
        ({"base": "nvfp4", "kv": "fp8"}, "precision.kv: 'fp8' cannot be written for Megatron-LM; only None can"),
        (
            {"base": "nvfp4", "rules": [{"format": "fp8", "components": ["head"]}]},
            "precision of head: 'fp8' cannot be written for Megatron-LM; only bf16 can",
        ),
        (
            {"base": "nvfp4", "rules": [{"format": "bf16", "components": ["k_proj"]}]},
            "precision of k_proj in layer 2: 'bf16' cannot be .*; only 'nvfp4', as of all that is in self_att",
        ),
        (
            {"base": "nvfp4", "rules": [{"format": "nvfp4", "components": ["embedding"]}]},
            "precision of embedding: 'nvfp4' cannot be written for Megatron-LM; only bf16 can",
        ),
        (
            {"base": "nvfp4", "rules": [{"format": "fp32", "components": ["conv1d"]}]},
            "precision of conv1d: 'fp32' cannot be written for Megatron-LM; only bf16 can",
        ),
        (
            {"base": "nvfp4", "rules": [{"format": "fp16", "components": ["input norm"]}]},
            "precision of input norm: 'fp16' cannot be written for Megatron-LM; only bf16 can",
        ),
        (
            {"base": "nvfp4", "rules": [{"format": "fp32", "components": ["head"]}]},
            "precision of head: 'fp32' cannot be written for Megatron-LM; only bf16 can",
        ),
    ],
    ids=lambda each: str(each)[:40],
)
def test_features_that_megatron_lacks_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        te_quant(SMALL, recipe(**fields))


def test_routers_in_fp32_and_blocks_without_modules_in_bf16_are_written() -> None:
    router = {"format": "fp32", "components": ["router"]}
    assert te_quant(SMALL, recipe(base="nvfp4", rules=[router])) == te_quant(SMALL, named("nvfp4"))
    delta = ModelConfig.model_validate({"d_model": 64, "vocab_size": 256, "pattern": "GM"})
    rule = {"format": "bf16", "letters": "G"}
    matchers = te_quant(delta, recipe(base="nvfp4", rules=[rule]))["matchers"]
    assert set(matchers) == {"mixer.in_proj", "mixer.out_proj", "others"}


def test_one_format_for_all_linear_layers_has_a_name_in_model_optimizer() -> None:
    assert model_optimizer_names(recipe(format="nvfp4")) == ("NVFP4_DEFAULT_CFG",)
    assert model_optimizer_names(recipe(format="fp8", kv="fp8")) == ("FP8_DEFAULT_CFG", "FP8_KV_CFG")
    router = {"format": "fp32", "components": ["router"]}
    assert model_optimizer_names(recipe(format="mxfp8", rules=[router])) == ("MXFP8_DEFAULT_CFG",)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (named("ultra-ptq"), "precision.format: 'bf16' cannot be written for Model-Optimizer; only fp8, mxfp8"),
        (named("nemotron-h-fp8"), "precision.rules.0: .* cannot be written for Model-Optimizer; only one format for"),
        (recipe(format="nvfp4", four_over_six=["w"]), r"precision.four_over_six: \('w',\) cannot .*; only \(\) can"),
        (recipe(format="nvfp4", state="fp8"), "precision.state: 'fp8' cannot .*; only None can"),
        (recipe(format="nvfp4", kv="int8"), "precision.kv: 'int8' cannot .*; only fp8, nvfp4 can"),
        (
            recipe(format="fp8", rules=[{"format": "fp16", "components": ["head"]}]),
            "precision.rules.0: .*'fp16'.* cannot be written for Model-Optimizer",
        ),
        (
            recipe(format="fp8", rules=[{"format": "fp32", "components": ["router", "head"]}]),
            "precision.rules.0: .*'fp32'.* cannot be written for Model-Optimizer",
        ),
    ],
    ids=lambda each: str(each)[:20],
)
def test_recipes_that_model_optimizer_has_no_name_for_are_refused(how: Recipe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_optimizer_names(how)


def test_export_prints_the_recipe_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tiny(write_corpus(tmp_path), "M-", train__precision="nvfp4")
    write_json(tmp_path / "experiment.json", {"key": one.key(), "experiment": one.model_dump(mode="json")})

    export = partial(run, capsys, monkeypatch, "export", tmp_path, "--to")
    code, out, _ = export("te-quant")
    assert (code, json.loads(out)) == (0, te_quant(one.model, named("nvfp4")))
    code, out, err = export("model-optimizer")
    assert (code, out) == (2, "")
    assert err.startswith("error: precision.stochastic: ('dy',) cannot be written for Model-Optimizer")


def test_export_prints_the_formats_of_a_quantised_child_and_not_those_of_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tiny(write_corpus(tmp_path), "M-", train__precision="bf16")
    write_json(tmp_path / "experiment.json", {"key": one.key(), "experiment": one.model_dump(mode="json")})
    write_json(tmp_path / "quantized.json", {"recipe": named("fp8").model_dump(mode="json")})
    export = partial(run, capsys, monkeypatch, "export", tmp_path, "--to")
    code, out, _ = export("te-quant")
    assert (code, json.loads(out)) == (0, te_quant(one.model, named("fp8")))
    code, out, _ = export("model-optimizer")
    assert (code, out.split()) == (0, list(model_optimizer_names(named("fp8"))))

    write_json(tmp_path / "quantized.json", {"recipe": named("fp8").model_dump(mode="json"), "scales": "mse"})
    for to, system in (("te-quant", "Megatron-LM"), ("model-optimizer", "Model-Optimizer")):
        code, out, err = export(to)
        assert (code, out) == (2, "")
        assert err == f"error: scales: 'mse' cannot be written for {system}; only 'max' can\n"
