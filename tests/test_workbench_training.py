"""The Train tab of the workbench, without a browser: it shows the plan of the library without delay."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import pytest

from explore.plan import Cluster, Layout, Plan, Run, cheapest_relief
from explore.presets import preset
from explore.workbench import Workbench


def state_of(bench: Workbench, **training: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(bench.view["state"]))  # as it comes from a browser
    state["tab"] = "training"
    state["training"] |= training
    return state


def edit(bench: Workbench, state: dict[str, Any], **more: Any) -> None:
    bench.edit = {"n": bench.view["n"] + 1, "state": state, **more}
    json.dumps(bench.view)


def test_the_tab_shows_the_plan_of_the_library() -> None:
    bench = Workbench("nemotron-3-super")
    assert bench.view["plan"] == {}
    edit(bench, state_of(bench, gpu="H100", n_gpus=64, tp=2, pp=2, ep=16, precision="fp8", seq_len=8192))
    shown = bench.view["plan"]
    run = Run(seq_len=8192, precision="fp8", memory_efficient_permutation=True)
    plan = Plan.of(preset("nemotron-3-super"), run, Layout(tp=2, pp=2, ep=16), Cluster.named("H100x64"))
    assert not plan.fits
    found = cheapest_relief(plan)
    assert found is not None
    assert (shown["fits"], shown["relief"]) == (True, str(found[1]))
    assert shown["needed_bytes"] == found[0].needed <= shown["capacity_bytes"]
    assert max(sum(rank.values()) for rank in shown["ranks"]) == pytest.approx(shown["needed_bytes"])
    assert shown["tokens_per_s_gpu"] == found[0].tokens_per_s_gpu
    assert shown["binds"] == found[0].binds
    assert sum(shown["seconds"].values()) == pytest.approx(shown["step_s"])
    assert set(shown["ranks"][0]) <= bench.offers["memory"].keys()
    assert set(shown["seconds"]) <= bench.offers["parts"].keys()


def test_an_impossible_layout_shows_the_reason_and_the_workbench_continues() -> None:
    bench = Workbench("MEM*E", d_model=256)
    edit(bench, state_of(bench, n_gpus=8, tp=16))
    assert bench.view["error"] == ""
    assert bench.view["plan"] == {"error": "tp * cp * pp must be at most the 8 GPUs of GB200x8, got 16"}
    edit(bench, state_of(bench, tp=1))
    assert bench.view["plan"]["error"] == ""


def test_sliders_of_training_replace_those_of_decoding() -> None:
    bench = Workbench("MEM*E", d_model=256)
    decoding = {".".join(slider["path"]) for slider in bench.view["sliders"]}
    edit(bench, state_of(bench, micro_batch=3))
    sliders = {".".join(slider["path"]): slider for slider in bench.view["sliders"]}
    assert {"seq_len", "batch_size"} <= decoding - sliders.keys()
    assert {"training.n_gpus", "training.tp", "training.ep", "training.seq_len"} <= sliders.keys() - decoding
    for name, slider in sliders.items():
        assert slider["value"] in slider["values"], name
    assert 3 in sliders["training.micro_batch"]["values"]


def test_a_button_sets_the_best_layout() -> None:
    bench = Workbench("nemotron-3-nano")
    edit(bench, state_of(bench, gpu="H100", n_gpus=16, global_batch=64), best=True)
    assert bench.view["error"] == ""
    assert bench.view["plan"]["fits"]
    assert bench.view["state"]["training"]["ep"] > 1
    edit(bench, state_of(bench, gpu="A10G", n_gpus=1), best=True)
    assert "no layout fits" in bench.view["error"]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"gpu": "H10"}, "training.gpu: must be one of "),
        ({"n_gpus": 0}, "training.n_gpus: must be above 0, got 0"),
        ({"gpus": 4}, "training.gpus: unknown field"),
    ],
)
def test_a_wrong_run_is_refused_in_one_line(training: dict[str, Any], message: str) -> None:
    bench = Workbench("M")
    edit(bench, state_of(bench, **training))
    assert message in bench.view["error"]
    assert "\n" not in bench.view["error"]


def test_a_change_is_answered_within_a_tenth_of_a_second() -> None:
    bench, times = Workbench("nemotron-3-super"), []
    state = state_of(bench, gpu="GB200", n_gpus=256, pp=2, ep=32)
    edit(bench, state)
    for i in range(12):
        state["training"] |= {"seq_len": 4096 + 1024 * i, "tp": 1 + i % 2}
        began = time.process_time()
        edit(bench, json.loads(json.dumps(state)))
        times.append(time.process_time() - began)
        assert bench.view["plan"]["error"] == ""
    print(f"\na change takes {1e3 * statistics.median(times):.1f} ms in Python")
    assert statistics.median(times) < 0.1
