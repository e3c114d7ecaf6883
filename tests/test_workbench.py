"""The workbench: its numbers and its sliders, without a browser."""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explore import Experiment, ModelConfig, preset
from explore.blocks import BLOCKS, AttentionConfig, MoEConfig
from explore.cost import HARDWARE, SEQ_LEN, VOCAB_SIZE
from explore.figures.cost import group_colors, receipts_table
from explore.files import write_json
from explore.presets import PRESETS
from explore.roofline import Deployment, hardware
from explore.runs import RunFolder
from explore.workbench import Workbench, evaluate

LETTERS = "".join(kind.letter for kind in BLOCKS)
PATTERNS = [*LETTERS, "MEM*E", "M-L*E/*E/*E", "nemotron-3-nano", "nemotron-3-super", "llama-nemotron-super-49b"]


def state_of(bench: Workbench) -> dict[str, Any]:
    return json.loads(json.dumps(bench.view["state"]))  # as it comes from a browser


def moved(bench: Workbench, slider: dict[str, Any], value: int | None) -> dict[str, Any]:
    """The state after a slider is moved."""
    state = state_of(bench)
    *path, last = slider["path"]
    owner = state
    for part in path:
        owner = owner.setdefault(part, {})
    owner[last] = value
    return state


def edit(bench: Workbench, state: dict[str, Any], **more: Any) -> None:
    bench.edit = {"n": bench.view["n"] + 1, "state": state, **more}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_stops_of_every_slider_are_models_that_have_that_value(pattern: str) -> None:
    bench = Workbench(pattern)
    for slider in bench.view["sliders"]:
        assert slider["value"] in slider["values"]
        stops = slider["values"]
        for value in {*stops[:2], stops[len(stops) // 2], *stops[-2:]}:
            edit(bench, moved(bench, slider, value))
            assert bench.view["error"] == ""
            (now,) = [other for other in bench.view["sliders"] if other["path"] == slider["path"]]
            assert now["value"] == value
        edit(bench, moved(bench, slider, slider["value"]))


@pytest.mark.slow
@settings(max_examples=30)
@given(st.text(LETTERS, min_size=1, max_size=8), st.data())
def test_sliders_moved_one_after_another_always_give_models(pattern: str, data: st.DataObject) -> None:
    bench = Workbench(pattern)
    for _ in range(6):
        slider = data.draw(st.sampled_from(bench.view["sliders"]))
        edit(bench, moved(bench, slider, data.draw(st.sampled_from(slider["values"]))))
        assert bench.view["error"] == ""


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_readout_equals_the_numbers_of_the_library(pattern: str, batch_size: int) -> None:
    bench = Workbench(pattern, seq_len=3000, batch_size=batch_size, hardware="A100")
    shown, model = evaluate(state_of(bench)), bench.config
    assert shown == bench.readout
    cost = model.cost(3000).to_dict()
    assert {name: cost[name] for name in shown.keys() & cost.keys()} == {
        name: shown[name] for name in shown.keys() & cost.keys()
    }
    assert {"params_total", "params_active", "flops_fwd", "kv_bytes_per_token"} <= shown.keys() & cost.keys()
    table = receipts_table({"": model}, 3000, ("flops_fwd",))
    parts = {group: value for group, value in zip(table["group"], table["value"], strict=True) if value}
    assert shown["flops_by_group"] == pytest.approx(parts)
    assert list(shown["flops_by_group"]) == [group for group in group_colors() if group in parts]
    deployed = Deployment(model, hardware("A100"))
    assert shown["decode_s"] == deployed.decode_s(3000, batch_size)
    assert sum(shown["decode_by_bound"].values()) == pytest.approx(shown["decode_s"])
    assert shown["tokens_per_s"] == pytest.approx(batch_size / shown["decode_s"])
    assert shown["cache_bytes"] == batch_size * (cost["kv_bytes"] + cost["ssm_state_bytes"] + cost["conv_state_bytes"])


def test_a_batch_fits_if_it_fits_in_the_roofline() -> None:
    model = preset("nemotron-3-nano")
    largest = Deployment(model, hardware(HARDWARE)).largest_batch(SEQ_LEN)
    for batch_size, fits in ((largest, True), (largest + 1, False)):
        assert Workbench.from_config(model, batch_size=batch_size).readout["fits"] is fits


def test_products_limit_large_batches_and_keys_and_values_limit_long_contexts() -> None:
    def longest(**use: int) -> str:
        parts = Workbench("*-*-", d_model=1024, **use).readout["decode_by_bound"]
        return max(parts, key=parts.__getitem__)

    assert longest(batch_size=1, seq_len=64) == "weights"
    assert longest(batch_size=1024, seq_len=64) == "flops"
    assert longest(batch_size=8, seq_len=2**20) == "kv"


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_is_returned_unchanged(name: str) -> None:
    model = preset(name)
    for bench in (Workbench(name), Workbench.from_config(model)):
        assert bench.config == model
        assert ModelConfig.model_validate_json(bench.view["json"]) == model
        assert eval(bench.view["code"], {"ModelConfig": ModelConfig}) == model


def test_sizes_that_are_not_given_follow_the_width_and_those_of_a_config_stay() -> None:
    follows = Workbench("M*", d_model=256)
    stays = Workbench.from_config(follows.config)
    for bench in (follows, stays):
        state = state_of(bench)
        state["model"]["d_model"] = 512
        edit(bench, state)
    assert follows.config == ModelConfig(d_model=512, vocab_size=VOCAB_SIZE, pattern="M*", blocks={})
    assert stays.config.blocks == Workbench("M*", d_model=256).config.blocks


def test_requested_sizes_return_when_they_fit_again() -> None:
    bench = Workbench("E*", d_model=256, blocks={"E": {"n_experts": 16, "top_k": 8}, "*": {"n_kv_heads": 4}})
    before, state = bench.config, state_of(bench)
    state["model"]["blocks"]["E"]["n_experts"] = 4
    edit(bench, state)
    assert bench.config.blocks["E"].top_k == 4
    state["model"]["blocks"]["E"]["n_experts"] = 16
    edit(bench, state)
    assert bench.config == before


def test_a_slider_of_a_divisor_stops_only_at_divisors() -> None:
    bench = Workbench("*", d_model=96, blocks={"*": {"n_heads": 3, "n_kv_heads": 3, "d_head": 32}})
    assert AttentionConfig.default(96).n_kv_heads == 2
    (stops,) = [slider["values"] for slider in bench.view["sliders"] if slider["label"] == "n_kv_heads"]
    assert stops == [1, 3]


def test_blocks_and_multi_token_prediction_may_be_configs() -> None:
    experts = MoEConfig(n_experts=4, top_k=2, d_expert=32, n_shared=0)
    bench = Workbench("ME", blocks={"E": experts}, mtp={"pattern": "M", "n_depths": 2, "shared": False})
    assert bench.config.blocks["E"] == experts
    assert bench.view["strip"] == "ME/M/M"
    state = state_of(bench)
    state["model"]["pattern"] = "ME"
    edit(bench, state)
    assert bench.config.mtp is None
    edit(bench, {**state, "model": {**state["model"], "pattern": "ME/M"}})
    assert bench.config.mtp is not None
    assert not bench.config.mtp.shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "MEX"}, "pattern: unknown letter 'X' at position 3 of 'MEX'; known are "),
        ({"pattern": ""}, "pattern: '' has no layer"),
        ({"pattern": "M/E/-"}, "pattern: all depths after '/' must be alike, got 'E' and '-'"),
        ({"d_model": 100}, "d_model: must be a multiple of 16"),
        ({"d_modle": 64}, "d_modle: unknown field"),
        ({"vocab_size": 0}, "vocab_size: must be above 0, got 0"),
    ],
)
def test_an_invalid_state_gives_one_line_and_keeps_the_last_readout(change: dict[str, Any], message: str) -> None:
    bench = Workbench("MEM*E", d_model=256)
    config, shown, state = bench.config, bench.readout, state_of(bench)
    state["model"] |= change
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        evaluate(state)
    edit(bench, state)
    assert bench.view["error"] == str(caught.value)
    assert "\n" not in bench.view["error"]
    assert bench.view["state"] == state
    assert (bench.config, bench.readout) == (config, shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 0}, "seq_len: must be above 0, got 0"),
        ({"batch_size": 1.5}, "batch_size: input should be a valid integer"),
        ({"hardware": "H20"}, "hardware must be one of .*, got 'H20'; the nearest are H200"),
        ({"contxt": 3}, "contxt: unknown field"),
    ],
)
def test_an_invalid_use_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate({**state_of(Workbench("M")), **change})


def test_a_workbench_refuses_objects_without_a_model() -> None:
    with pytest.raises(ValueError, match="unknown letter 'X' at position 2 of 'MX'"):
        Workbench("MX")
    with pytest.raises(ValueError, match=r"hardware must be one of .*, got 'abacus'"):
        Workbench("M", hardware="abacus")


def test_a_workbench_opens_anything_with_a_model_and_compares_two(tmp_path: Path) -> None:
    model, other = preset("nemotron-3-nano"), ModelConfig(d_model=128, vocab_size=257, pattern="M*-")
    data, train = {"kind": "text", "seq_len": 64}, {"tokens": 1000}
    record = {"name": "mine", "model": other.model_dump(mode="json"), "data": data, "train": train}
    folder = tmp_path / "mine-aaaaaaaa"
    write_json(folder / "experiment.json", {"key": "a" * 64, "experiment": record})
    row = pd.Series({"run": folder.name, "d_model": 128})
    for one in (other, Experiment.model_validate(record), RunFolder(folder), folder, str(folder), row, row.to_dict()):
        assert Workbench(one, runs=tmp_path).config == other
    bench = Workbench(model, against=folder, seq_len=512)
    assert bench.config == model
    assert bench.pinned["readout"] == json.loads(json.dumps(Workbench(other, seq_len=512).readout))
    assert (bench.pinned["label"], bench.pinned["use"]) == ("mine-aaaaaaaa", "1 × 512 tokens on H100")
    assert Workbench("M", against="qwen3-8b").pinned["label"] == "qwen3-8b"
    assert Workbench("M", against="M*" * 50).pinned["label"].startswith("M*M*")
    with pytest.raises(ValueError, match="nowhere: must be a run folder"):
        Workbench(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown letter 'X'"):
        Workbench("M", against="X")


def test_synchronised_traits_are_json() -> None:
    bench = Workbench("nemotron-3-nano")
    assert {"edit", "view", "pinned", "offers", "_esm", "_css"} <= set(bench.keys)
    for name in ("view", "offers"):
        assert json.loads(json.dumps(getattr(bench, name))) == getattr(bench, name)
    assert bench.view["letters"][0]["letter"] == "M"
    assert {entry["letter"] for entry in bench.view["letters"]} == {*LETTERS, "/"}
    assert bench.view["readout"]["flops_by_group"].keys() <= bench.offers["groups"].keys()


def test_a_preset_can_be_chosen_and_a_config_can_be_set() -> None:
    bench = Workbench("MEM*E", d_model=256, batch_size=4)
    edit(bench, state_of(bench), preset="qwen3-8b")
    assert bench.config == preset("qwen3-8b")
    assert bench.view["state"]["batch_size"] == 4
    bench.config = preset("gpt-oss-20b")
    assert bench.view["strip"] == preset("gpt-oss-20b").pattern
    assert {entry["letter"] for entry in bench.view["letters"]} >= {"W", "*", "E"}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("pattern", ["MEM*E", "nemotron-3-nano", "llama-nemotron-ultra-253b"])
def test_a_change_is_evaluated_well_within_a_tenth_of_a_second(pattern: str) -> None:
    bench = Workbench(pattern)
    state, times = state_of(bench), []
    for i in range(1, 31):
        state["model"]["d_model"] += 64  # every block is counted anew
        state["seq_len"] += 1
        began = time.perf_counter()
        edit(bench, json.loads(json.dumps(state)))
        times.append(time.perf_counter() - began)
        assert bench.view["n"] == i
    print(f"\n{pattern}: a change takes {1e3 * statistics.median(times):.2f} ms in Python")
    assert statistics.median(times) < 0.05
