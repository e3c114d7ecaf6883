"""Recipes of precision: their rules, the formats of a ledger, and published bits."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from pydantic import ValidationError
from torch import nn

from explore.blocks import BLOCKS, BlockKind
from explore.config import explain
from explore.cost import DTYPES, Cost, Dtypes, Ledger, bytes_of, formats_of, in_formats, storage
from explore.cost.formats import COMPONENTS
from explore.model import ModelConfig
from explore.precision import FORMATS, RECIPES, Place, Recipe, Rule, Until, named, read_recipe, unused_setting
from explore.presets import preset
from explore.roofline import Deployment, hardware

SMALL: dict[str, Any] = {
    "d_model": 64,
    "vocab_size": 256,
    "pattern": "ME*-/*",
    "blocks": {
        "M": {"n_heads": 2, "d_head": 32, "d_state": 16, "n_groups": 1, "chunk_size": 16},
        "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 16},
        "-": {"d_ff": 128},
        "E": {"n_experts": 8, "top_k": 2, "d_expert": 32, "d_shared": 64, "d_latent": 32},
    },
}


def ledger(**changes: Any) -> Ledger:
    return ModelConfig.model_validate({**SMALL, **changes}).ledger(32)


def formats(under: Ledger) -> dict[tuple[str, str], list[str]]:
    """Formats of every component, in the order of the layers."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in under:
        if row.entry.params:
            found.setdefault((row.letter, row.entry.component), []).append(row.entry.weight or "")
    return found


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate(fields)


def test_formats_count_their_scales() -> None:
    bits = {name: FORMATS[name].bits_per_element for name in ("nvfp4", "mxfp8", "mxfp4", "fp8", "int8", "bf16", "fp32")}
    assert bits == {"nvfp4": 4.5, "mxfp8": 8.25, "mxfp4": 4.25, "fp8": 8, "int8": 8.25, "bf16": 16, "fp32": 32}
    assert FORMATS["fp8-blocks"].bits_per_element == 8 + 32 / 128**2
    assert bytes_of(1000, "nvfp4") == 562.5


@pytest.mark.parametrize(
    ("name", "bits", "gib", "within"),
    [("ultra-ptq-experts", 5.43, None, None), ("ultra-ptq", 5.03, 330, 0.01), ("fp8-ptq", None, 540, 0.01)],
)
def test_the_published_bits_and_sizes_of_ultra_come_out_of_the_ledger(
    name: str, bits: float | None, gib: float | None, within: float | None
) -> None:
    """Published: 5.43 and 5.03 bits per element, about 330 and about 540 GiB."""
    found = storage(in_formats(preset("nemotron-3-ultra").ledger(1), named(name)))
    assert bits is None or round(found["bits_per_element"], 2) == bits
    assert gib is None or found["weight_bytes"] / 2**30 == pytest.approx(gib, rel=within)


def test_bits_per_element_by_hand() -> None:
    under = in_formats(ledger(pattern="-", mtp=None), recipe(format="nvfp4"))
    matrices, others = 2 * 64 * 128, 2 * 64 * 256 + 2 * 64  # embedding and head, and two norms, stay in bf16
    expected = (4.5 * matrices + 16 * others) / (matrices + others)
    assert storage(under) == {"bits_per_element": expected, "weight_bytes": expected * (matrices + others) / 8}


def test_only_linear_layers_of_layers_are_quantised_without_rules() -> None:
    found = formats(in_formats(ledger(), recipe(format="nvfp4")))
    quantised = {component for (_, component), all_ in found.items() if "nvfp4" in all_}
    assert quantised == {
        "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up", "down", "latent_down", "latent_up",
        "experts", "shared", "eh_proj",
    }  # fmt: skip
    assert all(set(all_) <= {"nvfp4", "bf16"} for all_ in found.values())


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.letter)
def test_every_block_declares_the_widths_that_its_products_sum_over(kind: BlockKind) -> None:
    d_model = 40
    with torch.device("meta"):
        mixer = kind.example.build(d_model)
    experts = [weight for weight in mixer.parameters() if weight.ndim == 3]
    convolutions = [module.weight for module in mixer.modules() if isinstance(module, nn.Conv1d)]
    widths = {module.in_features for module in mixer.modules() if isinstance(module, nn.Linear)}
    widths |= {weight.shape[1] for weight in experts if not any(weight is each for each in convolutions)}
    assert {width for entry in kind.example.entries(d_model, 16) for width in entry.sums_over} == widths


def test_the_first_rule_that_matches_decides() -> None:
    rules = [
        {"format": "fp8", "components": ["out_proj"]},
        {"format": "bf16", "letters": "M/"},
        {"format": "mxfp8", "letters": "E", "components": ["experts", "router"]},
    ]
    found = formats(in_formats(ledger(), recipe(format="nvfp4", rules=rules)))
    assert found["M", "out_proj"] == ["fp8"]
    assert found["M", "in_proj"] == ["bf16"]
    assert found["E", "experts"] == ["mxfp8"]
    assert found["E", "router"] == ["mxfp8"]  # since the rule names it
    assert found["E", "shared"] == ["nvfp4"]
    assert found["*", "q_proj"] == ["nvfp4"]
    assert found["/", "q_proj"] == ["bf16"]


@pytest.mark.parametrize(
    ("conditions", "layers"),
    [
        ({"layers": [0, -1, 3]}, [0, 3, 9]),
        ({"first": 0.2}, [0, 1]),
        ({"last": 0.26}, [7, 8, 9]),
        ({"first": 0.1, "last": 0.1, "layers": [4]}, [0, 4, 9]),
        ({"last": 0.04}, []),
        ({"first": 1}, list(range(10))),
    ],
)
def test_rules_place_layers_by_index_and_by_share(conditions: dict[str, Any], layers: list[int]) -> None:
    rule = Rule.model_validate({"format": "bf16", **conditions})
    assert [i for i in range(10) if rule.matches(Place(i, 10, "M", "in_proj", True))] == layers
    assert not rule.matches(Place(None, 10, "/", "in_proj", True))


def test_layers_of_one_letter_can_differ_and_every_other_number_stays() -> None:
    plain = ledger(pattern="MEM*M-M/*")
    under = in_formats(plain, recipe(format="nvfp4", rules=[{"format": "bf16", "last": 0.5}]))
    assert formats(under)["M", "in_proj"] == ["nvfp4", "nvfp4", "bf16", "bf16"]
    assert [row.letter for row in under] == [row.letter for row in plain]
    changed = {"weight_bytes", "decode_bytes", "format", "flops_fwd_quantized", "flops_train_quantized"}
    for before, after in zip(plain.to_records(), under.to_records(), strict=True):
        assert before.items() - {(name, before[name]) for name in changed if name in before} <= after.items()
        assert set(after) - set(before) == {"format", "flops_fwd_quantized", "flops_train_quantized"}
    a, b = Cost.of(plain).to_dict(), Cost.of(under).to_dict()
    assert {name for name in a if a[name] != b[name]} == {"weight_bytes", "decode_bytes"}
    assert in_formats(plain, named("bf16")).weight_bytes() == plain.weight_bytes()
    assert in_formats(plain, named("fp32")).weight_bytes() == 2 * plain.weight_bytes()


def test_decoding_and_folded_tables_count_the_formats() -> None:
    plain = ledger(pattern="--", mtp=None)
    under = in_formats(plain, recipe(rules=[{"format": "nvfp4", "layers": [1]}]))
    saved = 2 * 64 * 128 * (16 - 4.5) / 8
    assert plain.decode_bytes(DTYPES) - under.decode_bytes(DTYPES) == saved
    (before,), (after,) = ([row for row in each.fold("letter") if row["letter"] == "-"] for each in (plain, under))
    assert before["weight_bytes"] - after["weight_bytes"] == saved
    assert after["flops_train_quantized"] == 6 * 2 * 64 * 128


@pytest.mark.parametrize(
    ("switches", "forward", "n_products"),
    [({}, 1, 3), ({"forward": False}, 0, 2), ({"input_gradient": False, "weight_gradient": False}, 1, 1)],
)
def test_switches_say_how_many_products_are_quantised(switches: dict[str, bool], forward: int, n_products: int) -> None:
    under = in_formats(ledger(pattern="-", mtp=None), recipe(format="fp8", **switches))
    flops = 2 * 2 * 64 * 128
    expected = {"flops_fwd_quantized": forward * flops, "flops_train_quantized": n_products * flops}
    assert under.flops_quantized(under) == expected


def test_published_recipes_after_training_have_the_published_formats() -> None:
    nano, larger = (preset(f"nemotron-3-{size}").ledger(4096) for size in ("nano", "super"))
    pattern = nano.pattern
    kept = {
        (row.layer, row.letter)
        for row in in_formats(nano, named("nano-ptq"))
        if row.entry.component in ("in_proj", "q_proj") and row.entry.weight == "bf16"
    }
    attention = [i for i, letter in enumerate(pattern) if letter == "*"]
    assert len(attention) == 6
    assert kept == {(i - j, pattern[i - j]) for i in attention for j in (0, 1)}
    found = {
        (row["component"], row["format"])
        for row in formats_of(in_formats(larger, named("super-ptq")))
        if row["format"] != "bf16"
    }
    fp8 = {("shared", "fp8"), ("in_proj", "fp8"), ("out_proj", "fp8")}
    assert found == fp8 | {("experts", "nvfp4")}


def test_nano_ptq_keeps_the_mamba_layers_before_attention_of_any_pattern() -> None:
    under = in_formats(ledger(pattern="M*MEMM*M-M/M*"), named("nano-ptq"))
    assert formats(under)["M", "in_proj"] == ["bf16", "fp8", "fp8", "bf16", "fp8", "fp8"]
    assert formats(under)["/", "in_proj"] == ["bf16"]


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_are_data(name: str) -> None:
    entry = RECIPES[name]
    assert entry.source
    assert Recipe.model_validate_json(entry.recipe.model_dump_json()) == entry.recipe
    assert hash(entry.recipe) == hash(entry.recipe.model_copy())
    for model in ("nemotron-h-8b", "nemotron-3-super", "deepseek-v3"):
        in_formats(preset(model).ledger(1), entry.recipe)


def test_the_recipe_of_nemotron_3_on_super() -> None:
    model = preset("nemotron-3-super")
    under = in_formats(model.ledger(1), named("nemotron-3-nvfp4"))
    found = formats(under)
    assert found["M", "in_proj"] == ["nvfp4"] * 34 + ["bf16"] * 6  # of 74 layers, and of the last 14
    assert found["M", "out_proj"] == ["mxfp8"] * 34 + ["bf16"] * 6
    assert found["E", "experts"] == ["nvfp4"] * 33 + ["bf16"] * 7
    for high in (("*", "q_proj"), ("*", "o_proj"), ("E", "latent_up"), ("/", "experts"), ("", "head"), ("E", "router")):
        assert set(found[high]) == {"bf16"}
    last = [record["layers"] for record in formats_of(under) if record["component"] == "out_proj"][1]
    assert last == [i for i, letter in enumerate(model.pattern) if letter == "M" and i >= 74]


def test_json_may_start_from_a_named_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"base": "nvfp4", "forward": False, "until": 0.82}))
    expected = named("nvfp4").model_copy(update={"forward": False, "until": Until(forward=0.82, backward=0.82)})
    assert read_recipe(str(path)) == expected
    assert read_recipe("nvfp4") == named("nvfp4")
    assert recipe(until={"forward": 0.82}).until == Until(forward=0.82, backward=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "nvfp5"}, "format: input should be 'fp32', .* or 'nvfp4', got 'nvfp5'"),
        ({"base": "nvpf4"}, "base must be one of .*, got 'nvpf4'; did you mean 'nvfp4'?"),
        ({"base": 3}, "^base must be one of fp32, .*, got 3$"),
        ({"base": ["nvfp4"]}, r"^base must be one of fp32, .*, got \['nvfp4'\]$"),
        ({"base": None}, "^base must be one of fp32, .*, got None$"),
        ({"base": {}}, "^base must be one of fp32, .*, got {}$"),
        ({"rules": [{"format": "bf16"}]}, "rules.0: layers, first, last, letters, before or components must be given"),
        ({"rules": [{"format": "bf16", "last": 2}]}, "rules.0.last: must be at most 1, got 2"),
        ({"stochastic": ["dw"]}, "stochastic.0: input should be 'x', 'w' or 'dy', got 'dw'"),
        ({"stochastic": ["dy", "dy"]}, "^stochastic: must not contain a value twice, got dy, dy$"),
        (
            {"base": "nvfp4", "forward": False, "input_gradient": False, "weight_gradient": False},
            "^forward: must be true if input_gradient and weight_gradient are false, got false$",
        ),
        ({"until": 1.5}, "until.forward: must be at most 1, got 1.5"),
        ({"since": 1}, "since: must be below 1, got 1"),
        ({"since": 0.6, "until": {"backward": 0.6}}, "since: must be below until, 0.6, got 0.6"),
    ],
)
def test_bad_recipes_are_refused_by_the_path_of_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        recipe(**fields)
    assert re.search(message, explain(error.value))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"components": ["in_porj"]},
            "precision.rules.0.components must be .*, got 'in_porj'; did you mean 'in_proj'?",
        ),
        (
            {"letters": "L"},
            "precision.rules.0 must match a component of the model, got letters 'L'; it has layers 0 to 3",
        ),
        ({"layers": [7]}, r"precision.rules.0 must match a component of the model, got layers \[7\]"),
        (
            {"components": ["conv1d"]},
            "precision.rules.0.format must be one of bf16, fp16, fp32 for conv1d, .* got 'fp8'",
        ),
    ],
)
def test_rules_that_no_model_can_satisfy_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_formats(ledger(), recipe(format="nvfp4", rules=[{"format": "fp8", **rules}]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"layers": [0, 99]}], "precision.rules.0.layers must all match a component .*, got 99; it has layers 0 to 3"),
        ([{"layers": [0, -5]}], "precision.rules.0.layers must all match a component of the model, got -5"),
        ([{"layers": [3, 9], "last": 0.5}], "precision.rules.0.layers must all match a component of the model, got 9"),
        ([{"letters": "Mm"}], "precision.rules.0.letters must all match .*, got 'm'; it has .* and letters ME"),
        ([{"letters": "M", "before": "E*"}], "precision.rules.0.before must all match a component .*, got '[*]'"),
        (
            [{"letters": "M", "components": ["in_proj", "experts"]}],
            "precision.rules.0.components must all match a component of the model, got 'experts'",
        ),
        (
            [{"letters": "M*"}, {"letters": "E"}, {"layers": [0], "components": ["in_proj"]}],
            r"precision.rules.2 must match a component that no earlier rule matches, or be optional, got layers \[0\]",
        ),
    ],
)
def test_rules_that_decide_nothing_are_refused_unless_optional(rules: list[dict[str, Any]], message: str) -> None:
    given = [{"format": "fp8", **rule} for rule in rules]
    with pytest.raises(ValueError, match=message):
        in_formats(ledger(), recipe(rules=given))
    in_formats(ledger(), recipe(rules=[*given[:-1], {**given[-1], "optional": True}]))


def test_an_optional_rule_may_match_nothing() -> None:
    rule = {"format": "fp8", "letters": "L", "components": ["kv_up"], "optional": True}
    assert formats(in_formats(ledger(), recipe(rules=[rule]))) == formats(in_formats(ledger(), named("bf16")))
    message = "precision.rules.0.components must be components of some block, got 'in_porj'; did you mean 'in_proj'?"
    with pytest.raises(ValueError, match=re.escape(message)):
        in_formats(ledger(), recipe(rules=[{**rule, "components": ["in_porj"]}]))


def test_optional_rules_may_name_the_components_of_all_blocks() -> None:
    rng, found = random.Random(0), {row.entry.component for row in ledger() if row.entry.params}
    for kind in BLOCKS:
        for block in (kind.example, *(kind.config.random_example(rng) for _ in range(64))):
            found |= {entry.component for entry in block.entries(40, 16) if entry.params}
    assert set(COMPONENTS) == found


@pytest.mark.parametrize(
    ("fields", "unused"),
    [
        ({"base": "nvfp4", "format": "bf16"}, 'stochastic: must be [], since no product in bf16 uses it, got ["dy"]'),
        ({"hadamard": ["forward"]}, 'hadamard: must be [], since no product in bf16 uses it, got ["forward"]'),
        ({"forward": False}, "forward: must be true, since no product in bf16 uses it, got false"),
        ({"base": "fp8", "hadamard_size": 128}, "hadamard_size: must be 16, since no product in fp8 uses it, got 128"),
        (
            {"base": "fp8", "square_weights": True},
            "square_weights: must be false, since no product in fp8 uses it, got true",
        ),
        (
            {"base": "mxfp8", "four_over_six": ["w"]},
            'four_over_six: must be [], since no product in mxfp8 uses it, got ["w"]',
        ),
        (
            {"stochastic": ["dy"], "rules": [{"format": "mxfp8", "components": ["out_proj"]}]},
            'stochastic: must be [], since no product in bf16 or mxfp8 uses it, got ["dy"]',
        ),
        (
            {"format": "nvfp4", "scale_rounding": "up"},
            'scale_rounding: must be "nearest", since no product in nvfp4 uses it, got "up"',
        ),
        ({"base": "nvfp4", "hadamard_size": 128, "scale_rounding": "up", "four_over_six": ["x"]}, None),
        ({"base": "nvfp4", "forward": False}, None),
        ({"base": "nvfp4", "input_gradient": False, "weight_gradient": False}, None),
        ({"base": "nvfp4", "format": "bf16", "rules": [{"format": "nvfp4", "components": ["latent_down"]}]}, None),
        ({"format": "fp32", "forward": False, "rules": [{"format": "bf16", "letters": "M"}]}, None),
        ({"since": 0.5}, None),  # a control for branches
        *(({"base": name}, None) for name in RECIPES),
    ],
)
def test_settings_that_no_format_uses_are_found(fields: dict[str, Any], unused: str | None, tmp_path: Path) -> None:
    assert unused_setting(recipe(**fields)) == unused
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(fields))
    if unused is None:
        assert read_recipe(str(path)) == recipe(**fields)
    else:
        with pytest.raises(ValueError, match=re.escape(f"{path}: {unused}")):
            read_recipe(str(path))


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        (
            "nvfp4",
            {"d_model": 72},
            "nvfp4 needs widths that are multiples of 16, got 72 in in_proj of layer 0 .M.; 64 or 80",
        ),
        (
            "mxfp8",
            {"blocks": {**SMALL["blocks"], "-": {"d_ff": 144}}},
            "got 144 in down of layer 3 .-.; 128 or 160 would fit",
        ),
        (
            "fp8-blocks",
            {"pattern": "*", "d_model": 64},
            "multiples of 128, got 64 in q_proj of layer 0 ...; 128 would fit",
        ),
        (
            "mxfp4",
            {"pattern": "-/*", "blocks": {"-": {"d_ff": 64}, "*": {"n_heads": 3, "n_kv_heads": 1, "d_head": 16}}},
            "got 48 in o_proj of MTP",
        ),
    ],
)
def test_a_width_that_a_block_does_not_divide_is_refused(format: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_formats(ledger(**changes), recipe(format=format))


def test_stochastic_rounding_of_weights_is_allowed_with_a_warning() -> None:
    assert recipe(format="nvfp4", stochastic=["dy"]).warnings == ()
    (warning,) = recipe(format="nvfp4", stochastic=["w", "dy"]).warnings
    assert warning.startswith("stochastic rounding of weights diverges in published runs")


def test_roofline_takes_bytes_and_peaks_from_the_recipe() -> None:
    model, device = preset("nemotron-3-nano"), hardware("B200")
    plain = Deployment(model, device)
    nvfp4 = Deployment(model, device, recipe=named("nvfp4"))
    same = Deployment(model, device, recipe=named("bf16"))
    assert same.weight_bytes == plain.weight_bytes
    assert same.decode_s(1024, 8) == plain.decode_s(1024, 8)
    assert same.prefill_s(1024) == plain.prefill_s(1024)
    assert nvfp4.weight_bytes == in_formats(model.ledger(1), named("nvfp4")).weight_bytes()
    assert nvfp4.decode_s(1024, 8) < plain.decode_s(1024, 8)
    assert nvfp4.prefill_s(65_536) < plain.prefill_s(65_536)
    assert device.peak("nvfp4") == device.peak("mxfp4") == device.peak("float4")
    assert device.peak("fp8-blocks") == device.peak("mxfp8") == device.peak("float8")
    assert device.ridge("nvfp4") == device.ridge("float4")
    assert DTYPES.under(named("fp8-ptq")) == Dtypes(kv="fp8", state="fp16")


def test_cost_shows_the_format_of_every_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "cost", "nemotron-3-ultra", "--precision", "ultra-ptq", "--json")
    found = json.loads(out)
    assert code == 0
    assert round(found["bits_per_element"], 2) == 5.03
    assert found["weight_bytes"] == sum(line["weight_bytes"] for line in found["ledger"])
    assert {line["format"] for line in found["ledger"]} == {"nvfp4", "fp8", "bf16", "fp32"}
    assert (found["precision"], found["kv_dtype"], found["state_dtype"]) == ("ultra-ptq", "fp8", "fp16")
    code, out, _ = run(capsys, monkeypatch, "cost", "nemotron-3-ultra", "--precision", "ultra-ptq")
    assert code == 0
    summary = "ultra-ptq: 5.03 bits per element, scales included; 328 GiB of weights, MTP included"
    assert summary in " ".join(out.split())
    assert "quantised" in out


def test_the_table_of_formats_names_all_layers_of_interleaved_formats(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "cost", "nemotron-3-nano", "--precision", "nano-ptq")
    assert code == 0
    rows = [line.split() for line in out[out.index("in formats") :].splitlines()]
    (high,) = (row for row in rows if row[:3] == ["M", "in_proj", "bf16"])
    assert high[3:-1] == ["4", "11", "18", "25", "32", "41"]


def test_mistakes_of_precision_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"base": "nvfp4", "stochastic": ["w"], "rules": [{"format": "bf16", "letters": "E"}]}))
    code, out, err = run(capsys, monkeypatch, "cost", "M-", "--precision", str(path))
    assert (code, out) == (2, "")
    warning, error = err.splitlines()
    assert warning.startswith(
        "warning: precision.stochastic: stochastic rounding of weights diverges in published runs"
    )
    assert error.startswith(
        "error: precision.rules.0 must match a component of the model, got letters 'E'; it has layers"
    )
    for bad in (["--precision", "nvpf4"], ["--precision", "fp8-blocks", "--d-model", "192"]):
        code, out, err = run(capsys, monkeypatch, "cost", "M-", *bad)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: precision")


def test_roofline_prints_ridges_and_takes_a_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(
        capsys, monkeypatch, "roofline", "nemotron-3-super", "--hardware", "B200", "--precision", "nvfp4", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert found["ridges"]["float4"] == 9000e12 / 7700e9
    assert found["weight_bytes"] == in_formats(preset("nemotron-3-super").ledger(1), named("nvfp4")).weight_bytes()
