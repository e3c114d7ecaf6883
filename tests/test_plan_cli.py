"""`explore plan`: output for programs, tables and figures, and one clear line for a mistake."""

from __future__ import annotations

import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
from command_line import run
from matplotlib.figure import Figure
from PIL import Image

from explore.figures import (
    draw_layouts,
    draw_plan_memory,
    layouts_table,
    plan_memory_table,
    plot_plans,
    save_figure,
)
from explore.interop.megatron_layout import plan_arguments
from explore.interop.megatron_read import read_arguments
from explore.plan import Cluster, Layout, Plan, Run, search
from explore.plan.golden import GOLDEN, IN_STAGES, PATTERN, Golden
from explore.plan.published import table_3
from explore.presets import preset

CONTRACT = [
    "plan", "deepseek-v3", "--cluster", "GB200x256", "--seq-len", "4096", "--global-batch", "8192",
    "--micro-batch", "1", "--tp", "1", "--cp", "1", "--pp", "4", "--vpp", "4", "--ep", "64", "--precision", "bf16",
]  # fmt: skip
ARGUMENTS = {
    "--hidden-size": 1024, "--num-attention-heads": 16, "--group-query-attention": True, "--num-query-groups": 8,
    "--hybrid-layer-pattern": IN_STAGES, "--micro-batch-size": 4, "--global-batch-size": 32, "--seq-length": 1024,
    "--tensor-model-parallel-size": 1, "--pipeline-model-parallel-size": 4, "--use-distributed-optimizer": True,
    "--bf16": True, "--attention-backend": "unfused",
}  # fmt: skip
SMALL = ["plan", "MEM*ME-E", "--d-model", "256", "--cluster", "H100x8", "--seq-len", "1024", "--global-batch", "64"]


@pytest.fixture
def explore(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return partial(run, capsys, monkeypatch)


def test_choices_of_the_command_are_those_of_the_library() -> None:
    from explore.cli import plan as command
    from explore.plan import PrecisionName
    from explore.plan.run import AllToAll
    from explore.plan.search import Objective

    for of_command, of_library in (
        (command.Precision, PrecisionName), (command.AllToAll, AllToAll), (command.Objective, Objective),
    ):  # fmt: skip
        assert get_args(of_command) == get_args(of_library)


def test_one_layout_as_json_keeps_the_contract(explore: Any) -> None:
    code, out, _ = explore(*CONTRACT, "--json")
    plan = json.loads(out)
    assert code == 0
    assert {
        "fits", "ranks", "tflops_ceiling", "tflops_estimate", "tokens_per_s_gpu", "binds", "bubble", "all_to_all_s",
        "layout",
    } <= plan.keys()  # fmt: skip
    assert [list(rank) for rank in plan["ranks"]] == [["weights", "grads", "optimizer", "activations", "total"]] * 4
    for rank in plan["ranks"]:
        assert rank["total"] == pytest.approx(sum(size for kind, size in rank.items() if kind != "total"))
    assert plan["fits"] == (max(rank["total"] for rank in plan["ranks"]) <= plan["capacity_gib"])
    assert plan["tflops_estimate"] < plan["tflops_ceiling"]
    assert plan["layout"] | {"pipeline": ""} == {
        "tp": 1, "cp": 1, "pp": 4, "vpp": 4, "ep": 64, "etp": 1, "micro_batch": 1, "dp": 64, "edp": 1, "pipeline": "",
    }  # fmt: skip
    kinds = {row["kind"]: row for row in plan["traffic"]}
    assert kinds["all-to-all in domains"]["seconds"] == pytest.approx(plan["all_to_all_s"])
    assert kinds["all-to-all in domains"]["link"] == "domain"
    assert kinds["pipeline traffic"]["link"] == "network"
    # The fullest rank of table 3 of arXiv 2603.07685: 36.4 + 32.1 + 131.0 GiB.
    assert plan["ranks"][2]["total"] == pytest.approx(199.5, rel=0.015)


def test_a_layout_string_of_megatron_is_costed_and_printed_again(explore: Any) -> None:
    layout = "Et*4|(tttt|)*14tmL"
    without = CONTRACT.index("--vpp")
    fixed = CONTRACT[:without] + CONTRACT[without + 2 :]
    code, out, _ = explore(*fixed, "--pipeline-layout", layout, "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["layout"]["vpp"], plan["layout"]["pipeline"]) == (4, layout)


def test_without_a_layout_the_best_is_printed_with_alternatives_and_limits(explore: Any) -> None:
    code, out, _ = explore(*SMALL, "--json", "--tokens", "2B", "--top", "3")
    plan = json.loads(out)
    assert code == 0
    assert plan["fits"]
    assert len(plan["alternatives"]) == 2
    assert all(other["fits"] for other in plan["alternatives"])
    assert {"degree", "value", "relative", "wall", "detail"} <= plan["walls"][0].keys()
    assert plan["tokens"] == 2e9
    assert plan["days"] == pytest.approx(2e9 / (8 * plan["tokens_per_s_gpu"]) / 86_400)
    assert plan["gpu_hours"] == pytest.approx(plan["days"] * 24 * 8)


def test_layouts_as_csv(explore: Any) -> None:
    code, out, _ = explore(*SMALL, "--csv", "--top", "4")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert len(rows) == 4
    assert rows[0]["model"] == "MEM*ME-E"
    assert all(float(row["tflops_estimate"]) < float(row["tflops_ceiling"]) for row in rows)


def test_tables_fit_a_hundred_columns(explore: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for args in (SMALL, [*SMALL, "MEM*"], CONTRACT, ["plan", "--published"]):
        code, out, _ = explore(*args)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 100


def test_models_side_by_side(explore: Any) -> None:
    code, out, _ = explore(*SMALL, "MEM*", "--json")
    plans = json.loads(out)["plans"]
    assert code == 0
    assert [plan["model"] for plan in plans] == ["MEM*ME-E", "MEM*"]
    code, out, _ = explore(*SMALL, "MEM*")
    _, _, table = out.partition("side by side\n")
    header, *rows = table.splitlines()
    assert header.split() == ["MEM*ME-E", "MEM*"]
    (speeds,) = (row for row in rows if row.startswith("tokens per s gpu "))
    assert speeds.split()[-2:] == [f"{plan['tokens_per_s_gpu']:,.0f}" for plan in plans]


def test_a_run_that_does_not_fit_gets_suggestions(explore: Any) -> None:
    code, out, _ = explore(*(word if word != "GB200x256" else "H100x256" for word in CONTRACT))
    assert code == 0
    assert "does not fit, " in out
    assert "GiB over" in out
    assert "makes it fit" in out or "fits with" in out


@pytest.mark.slow
def test_published_numbers_are_shown_with_their_differences(explore: Any) -> None:
    code, out, _ = explore("plan", "--published", "--json")
    rows = json.loads(out)
    assert code == 0
    assert len(rows) > 200
    assert {row["section"] for row in rows} == {
        "memory", "golden", "flops", "all-to-all", "layouts", "throughput",
    }  # fmt: skip
    for row in rows:
        assert row["difference"] == pytest.approx(row["computed"] / row["published"] - 1)
    code, out, _ = explore("plan", "--published", "--csv")
    assert code == 0
    assert [row["name"] for row in csv.DictReader(io.StringIO(out))] == [row["name"] for row in rows]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_the_golden_cases_are_read_from_their_arguments(case: Golden) -> None:
    """The arguments in `model_config.yaml` of each case."""
    given = ARGUMENTS | {
        "--hybrid-layer-pattern": case.layout.get("pipeline", PATTERN),
        "--tensor-model-parallel-size": case.layout.get("tp", 1),
        "--context-parallel-size": case.layout.get("cp", 1),
        "--pipeline-model-parallel-size": case.layout.get("pp", 1),
        "--attention-backend": "fused" if case.fused else "unfused",
    }
    assert read_arguments({"MODEL_ARGS": given}, 8).ranks() == case.plan().ranks()


def test_arguments_of_a_transformer_with_latent_attention_and_dense_layers_are_read() -> None:
    given = {
        "num-layers": 61, "hidden-size": 7168, "ffn-hidden-size": 18432, "num-attention-heads": 128,
        "multi-latent-attention": True, "q-lora-rank": 1536, "kv-lora-rank": 512, "swiglu": True,
        "num-experts": 256, "moe-layer-freq": "([0]*3+[1]*58)", "moe-ffn-hidden-size": 2048, "moe-router-topk": 8,
        "moe-shared-expert-intermediate-size": 2048, "mtp-num-layers": 1, "vocab-size": 129280,
        "untie-embeddings-and-output-weights": True, "hidden-dropout": 0.0, "seq-length": 4096,
        "global-batch-size": 8192, "pipeline-model-parallel-size": 4, "expert-model-parallel-size": 64,
        "pipeline-model-parallel-layout": "Et*4|(tttt|)*14tmL", "bf16": True, "use-distributed-optimizer": True,
    }  # fmt: skip
    plan = read_arguments(given, 256, "GB200")
    same = table_3(memory_efficient_permutation=True)
    assert [list(rank.values()) for rank in plan.ranks()] == [
        pytest.approx(list(rank.values()), rel=1e-6) for rank in same.ranks()
    ]
    assert plan.run.all_to_all == "naive"
    for name, value, message in (
        ("moe-layer-freq", "[0]*3", "a list of 61 layers"),
        ("decoder-first-pipeline-num-layers", 4, "is not supported"),
        ("data-parallel-sharding-strategy", "all", "must be one of no_shard"),
    ):
        with pytest.raises(ValueError, match=message):
            read_arguments(given | {"use-megatron-fsdp": True, name: value}, 256)


def test_stages_without_a_layout_have_as_many_layers_each() -> None:
    given = {
        "num-layers": 8, "hidden-size": 64, "num-attention-heads": 4, "hidden-dropout": 0.0, "seq-length": 512,
        "global-batch-size": 16, "pipeline-model-parallel-size": 2, "vocab-size": 256,
    }  # fmt: skip
    assert read_arguments(given, 2).pipeline() == "Et*4|t*4L"
    twice = given | {"num-virtual-stages-per-pipeline-rank": 2}
    assert read_arguments(twice, 2).pipeline() == "Ett|(tt|)*2ttL"
    assert read_arguments(given | {"num-layers-per-virtual-pipeline-stage": 2}, 2) == read_arguments(twice, 2)
    with pytest.raises(ValueError, match="must be divisible by the 6 stages"):
        read_arguments(given | {"num-virtual-stages-per-pipeline-rank": 3}, 2)


def test_arguments_of_megatron_are_read(explore: Any, tmp_path: Path) -> None:
    case, path = GOLDEN[3], tmp_path / "golden.json"
    path.write_text(json.dumps({"MODEL_ARGS": ARGUMENTS}))
    code, out, _ = explore("plan", "--megatron-args", str(path), "--world-size", "8", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["ranks"] == case.plan().ranks()
    path.write_text(json.dumps({name[2:].replace("-", "_"): value for name, value in ARGUMENTS.items()}))
    assert json.loads(explore("plan", "--megatron-args", str(path), "--world-size", "8", "--json")[1]) == plan
    path.write_text(json.dumps({"--hidden-size": 1024}))
    code, out, err = explore("plan", "--megatron-args", str(path), "--world-size", "8")
    assert (code, out) == (2, "")
    assert "--num-attention-heads is required" in err


def test_arguments_of_megatron_are_written_and_read_again(explore: Any) -> None:
    code, out, _ = explore(*SMALL, "--tp", "2", "--pp", "2", "--megatron")
    assert code == 0
    assert "--tensor-model-parallel-size 2" in out
    model = preset("nemotron-3-nano")
    run = Run(
        seq_len=8192, global_batch=256, precision="mxfp8", recompute=("moe_act",), moments="bfloat16",
        grads="bfloat16", offload_optimizer=True, memory_efficient_permutation=True,
    )  # fmt: skip
    plan = Plan.of(model, run, Layout(tp=2, pp=4, ep=16, micro_batch=2), Cluster.named("H100x64"))
    arguments, _ = plan_arguments(plan)
    read = read_arguments({name: " ".join(values) or True for name, *values in arguments}, 64)
    assert (read.layout.model_copy(update={"pipeline": None}), read.run) == (plan.layout, plan.run)
    assert read.ranks() == plan.ranks()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["batch", "context", "model"])
def test_the_largest_size_as_json(explore: Any, what: str) -> None:
    at = SMALL.index("--seq-len")
    args = [*SMALL[:at], *SMALL[at + 2 :]] if what == "context" else SMALL  # its own result is the context
    code, out, _ = explore(*args, "--largest", what, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["fits"]
    assert plan["largest"]


def test_a_custom_gpu(explore: Any, tmp_path: Path) -> None:
    device = tmp_path / "mine.json"
    table = json.loads((Path(__file__).parents[1] / "explore" / "roofline" / "gpus.json").read_text())
    device.write_text(json.dumps({**table["H100"], "name": "mine"}))
    args = [word if word != "H100x8" else f"{device}x8" for word in SMALL]
    code, out, err = explore(*args, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["cluster"] == "minex8"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tp", "3"], "3"),
        (["--tp", "8"], "must divide n_heads=4, got 8; 1, 2, 4 do"),
        (["--tp", "4", "--cp", "4"], "at most the 8 GPUs"),
        (["--cluster", "H10x8"], "H100"),
        (["--cluster", "H100"], "DEVICExNUMBER"),
        (["--cluster", "H100x0"], "at least 1, got 0"),
        (["--cp", "8", "--seq-len", "1020"], "seq_len"),
        (["--expert-groups", "8"], "GROUPS:CHOSEN"),
        (["--tokens", "-1"], "at least 1, got -1"),
        (["--tokens", "many"], "many"),
        (["--recompute", "everything"], "everything"),
        (["--pipeline-layout", "Et|x", "--pp", "2"], "x"),
        (["--offload-activations", "2"], "below 1"),
        (["--megatron-args", "missing.json"], "MODEL: must not be combined with --megatron-args"),
        (["--global-batch", "3", "--micro-batch", "2"], "3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(explore: Any, args: list[str], message: str) -> None:
    code, out, err = explore(*SMALL, *args)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_a_model_that_fits_nowhere_gets_the_missing_memory_and_suggestions(explore: Any) -> None:
    code, out, err = explore("plan", "deepseek-v3", "--cluster", "A100x8", "--global-batch", "64")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert "GiB above the" in err
    assert "may make it fit" in err


@pytest.mark.slow
def test_figures_draw_the_table_exactly(tmp_path: Path) -> None:
    found = search(preset("nemotron-3-nano"), Cluster.named("H100x16"), Run(global_batch=64), {"etp": 1})
    fixed = Plan.of(preset("nemotron-3-nano"), Run(global_batch=64), Layout(pp=4, ep=4), Cluster.named("H100x16"))
    plans, searches = {"best": found.plans[0], "PP4": fixed}, {"best": found}
    table = plan_memory_table(plans)
    ax = Figure().add_subplot()
    draw_plan_memory(table, ax)
    bars = [patch.get_height() for patch in ax.patches]
    assert sorted(bars) == pytest.approx(sorted(table["gib"]))
    assert sum(bars) == pytest.approx(sum(rank["total"] for plan in plans.values() for rank in plan.ranks()))
    lines = {float(line.get_ydata()[0]) for line in ax.lines}
    assert lines == {fixed.capacity / 2**30}
    tops = {patch.get_x(): patch.get_y() + patch.get_height() for patch in ax.patches}
    totals = [rank["total"] for plan in plans.values() for rank in plan.ranks()]
    assert [tops[x] for x in sorted(tops)] == pytest.approx(totals)

    layouts = layouts_table(searches)
    ax = Figure().add_subplot()
    draw_layouts(layouts, ax)
    drawn = sorted(float(y) for line in ax.lines for y in line.get_ydata())
    assert drawn == pytest.approx(sorted(layouts["tokens_per_s_gpu"]))
    assert max(drawn) == pytest.approx(found.tokens_per_s_gpu)
    for path in save_figure(plot_plans(plans, searches, title="Plans"), tmp_path / "plans"):
        assert path.stat().st_size > 10_000
    with Image.open(tmp_path / "plans.png") as picture:
        assert picture.size == (1950, 1680)


def test_figures_survive_an_empty_table() -> None:
    for draw in (draw_plan_memory, draw_layouts):
        ax = Figure().add_subplot()
        empty: pd.DataFrame = plan_memory_table({}) if draw is draw_plan_memory else layouts_table({})
        draw(empty, ax)
        assert [text.get_text() for text in ax.texts] == ["nothing to show"]
    assert plot_plans({}).runs == ()


def test_the_command_writes_figures(explore: Any, tmp_path: Path) -> None:
    code, _, _ = explore(*SMALL, "--figure", str(tmp_path / "plan.png"))
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"plan.png", "plan.svg"}
