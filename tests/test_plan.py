"""Plans of large training runs: published numbers, measured memory, layouts, and mistakes in one line."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest

from explore.cost import saved_bytes
from explore.model import ModelConfig
from explore.plan import RELIEFS, Cluster, Layout, Plan, Run, balanced, cheapest_relief, largest, read, search
from explore.plan.golden import GOLDEN
from explore.plan.layout import DEGREES, check
from explore.plan.memory import WORKSPACE_BYTES
from explore.plan.plans import GIB
from explore.plan.profile import profile
from explore.plan.published import Held, published, table_3
from explore.plan.runs import fit, predicted_tokens_per_s, printed_runs
from explore.plan.stages import in_flight, unit_of
from explore.plan.throughput import EFFICIENCY, PASSES, ceiling_s
from explore.plan.traffic import copies, copies_sent
from explore.presets import preset

SMALL = ModelConfig.model_validate(
    {
        "d_model": 64,
        "vocab_size": 256,
        "pattern": "MEM*ME-E",
        "blocks": {
            "M": {"n_heads": 8, "d_head": 16, "d_state": 16, "n_groups": 4},
            "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 16},
            "-": {"d_ff": 128},
            "E": {"n_experts": 16, "top_k": 2, "d_expert": 48, "d_shared": 96, "d_latent": 32},
        },
    }
)
ON_8 = Cluster.named("H100x8")


@pytest.fixture(scope="module")
def held() -> list[Held]:
    return published()


def of(held: list[Held], section: str) -> list[Held]:
    return [row for row in held if row.section == section]


def test_published_memory_is_reproduced_within_one_and_a_half_percent(held: list[Held]) -> None:
    rows = {row.name: row for row in of(held, "memory")}
    for name in ("weights and gradients", "main weights and optimizer", "activations", "total"):
        assert abs(rows[name].difference) < 0.006
    for name, row in rows.items():
        if name == "FP8 activations save":
            assert row.ok is None
        elif name == "bf16 moments save":
            assert 10 < row.computed < 12
        else:
            assert abs(row.difference) < 0.015, name


def test_bytes_per_token_and_layer_equal_the_closed_form() -> None:
    model, seq_len = preset("deepseek-v3"), 4096
    kept = {letter: model.blocks[letter].saved(model.d_model, seq_len) for letter in "LE"}
    settings = {"fused_attention", "no_dropout"}
    bytes_of_token = sum(saved_bytes(tensors, settings) / seq_len + 2 * model.d_model for tensors in kept.values())
    assert bytes_of_token == 572_032


def test_measured_memory_of_hybrids_is_reproduced(held: list[Held]) -> None:
    rows = of(held, "golden")
    assert len(rows) == 10
    assert max(abs(row.difference) for row in rows if row.name.endswith("steady")) < 0.03
    assert max(abs(row.difference) for row in rows if row.name.endswith("peak")) < 0.15
    constants = [
        case.steady_gib - (case.plan().ranks()[-1]["total"] - case.plan().ranks()[-1]["activations"]) for case in GOLDEN
    ]
    assert np.mean(constants) == pytest.approx(WORKSPACE_BYTES / GIB, abs=0.005)


def test_published_flops_are_reproduced_with_their_counting_and_rounding(held: list[Held]) -> None:
    rows = of(held, "flops")
    assert all(row.ok for row in rows)
    # One row needs the rounding: 1,664 tokens/s are 13 sequences a second of 64 GPUs.
    assert [row.name for row in rows if abs(row.difference) > 0.015] == ["llama-3.1-70b, H100x64, fp8"]
    old = [row for row in rows if "until 26.04" in row.note]
    assert {row.name for row in old} == {
        f"gpt-oss-120b, {gpus}x64, bf16" for gpus in ("B200", "B300", "GB200", "GB300", "H100")
    }
    assert max(abs(row.difference) for row in old) < 0.005


def test_the_printed_pair_of_a_run_implies_flops_within_its_rounding() -> None:
    run = next(run for run in printed_runs() if run.model == "llama-3.1-70b" and run.cluster.name == "H100x64")
    low, high = run.implied_flops
    assert low == pytest.approx(730.5e12 / (1664 + 64))
    assert high == pytest.approx(731.5e12 / (1664 - 64))


def test_a_device_that_reads_transposed_fp8_keeps_one_copy_of_the_weights() -> None:
    def weights(precision: str, transposes: bool) -> float:
        cluster = Cluster.named("GB200x64")
        cluster = replace(cluster, device=cluster.device.model_copy(update={"transposes_fp8": transposes}))
        run, layout = Run(global_batch=64, precision=precision), Layout(tp=4, pp=4)
        return Plan.of(preset("llama-3.1-70b"), run, layout, cluster).ranks()[1]["weights"]

    assert weights("fp8", True) == pytest.approx(weights("fp8", False) / 2, rel=0.001)
    assert weights("mxfp8", True) == weights("mxfp8", False)


def test_all_to_all_times_are_reproduced_with_one_efficiency_per_link(held: list[Held]) -> None:
    rows = [row for row in of(held, "all-to-all") if row.ok is not None]
    assert len(rows) == 16
    assert max(abs(row.difference) for row in rows) < 0.15
    naive = [row for row in of(held, "all-to-all") if row.ok is None]
    assert len(naive) == 8
    assert max(abs(row.difference) for row in naive) < 0.25


def test_all_published_layouts_except_one_are_legal_and_fit(held: list[Held]) -> None:
    *ran, refused = of(held, "layouts")
    missed = {row.name: row for row in ran if not row.ok}
    # Its source names no recomputation or offload, and no recipe with its micro-batch is published.
    assert set(missed) == {"qwen3-235b-a22b, GB200x256, mxfp8, PP4 VPP6 EP64 MBS3"}
    assert all(row.computed < 1.3 and "fits here only with" in row.note for row in missed.values())
    assert all(row.ok == (row.computed <= 1) for row in ran)
    assert refused.ok
    assert refused.computed > 1
    assert not replace(table_3(), cluster=Cluster.named("H100x256")).fits


def test_no_printed_run_is_above_its_ceiling_and_the_estimate_is_below_it() -> None:
    for run in printed_runs():
        ceiling = run.tokens / float(ceiling_s(run.batch())[0])
        assert ceiling > run.tokens_per_s
        assert ceiling > predicted_tokens_per_s(run)


def test_efficiencies_fitted_to_half_of_the_runs_predict_the_other_half() -> None:
    runs = printed_runs()
    fitted, passes = fit([run for run in runs if run.fitted])
    assert fitted == pytest.approx(dict(EFFICIENCY), abs=0.0051)
    assert passes == pytest.approx(PASSES, abs=0.051)
    others = [abs(predicted_tokens_per_s(run) / run.tokens_per_s - 1) for run in runs if not run.fitted]
    assert len(others) > 20
    assert np.mean(others) < 0.2
    assert np.median(others) < 0.2


def test_layout_strings_of_megatron_are_read_and_written() -> None:
    model = preset("deepseek-v3")
    for text, pp in (("Et*4|(tttt|)*14tmL", 4), ("Et*3|(tt|)*29m|L", 8)):
        assert read(text, model, pp).megatron() == text
    assert read("Ettt,t|(tttt|)*14,tmL", model, 4) == read("Et*4|(tttt|)*14tmL", model, 4)
    hybrid = preset("nemotron-3-super")
    stages = balanced(hybrid, profile(hybrid, 8192).costs(1), 4, 2)
    assert read(stages.hybrid(hybrid), hybrid, 4) == stages
    assert unit_of(model) == 2
    assert unit_of(hybrid) == 1


@pytest.mark.parametrize(
    ("text", "pp", "message"),
    [
        ("Et*4|(tttt|)*13tmL", 4, "61 't'"),
        ("Et*4|(tttt|)*14tL", 4, "1 'm' and L"),
        ("Etx|L", 2, "got 'x'"),
        ("Et*61|mL", 4, "pp must divide the 2 stages"),
    ],
)
def test_a_layout_string_that_does_not_fit_the_model_is_refused(text: str, pp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(text, preset("deepseek-v3"), pp)


def test_stages_are_balanced_and_none_is_empty() -> None:
    model = preset("nemotron-3-nano")
    costs = profile(model, 8192).costs(1)
    for pp, vpp in ((1, 1), (2, 1), (4, 2), (8, 3), (2, 12)):
        stages = balanced(model, costs, pp, vpp)
        assert len(stages.items) == pp * vpp
        assert all(stages.items)
        assert "".join(stages.items) == "E" + "t" * model.n_layers + "L"
        ends = np.cumsum([len(items) for items in stages.items])
        parts = [sum(costs[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        assert max(parts) <= sum(costs) / len(parts) + max(costs)


def schedule(pp: int, vpp: int, m: int, rank: int) -> int:
    """The maximum number of pairs of micro-batch and stage in flight, by simulating the schedule."""
    warm = min(m * vpp, 2 * (pp - rank - 1) + (vpp - 1) * pp + 1) if vpp > 1 else min(m, pp - rank)
    return max(min(warm + ended, m * vpp) - ended for ended in range(m * vpp))


@pytest.mark.parametrize(("pp", "vpp", "m"), [(4, 4, 32), (4, 1, 8), (8, 2, 16), (2, 3, 2), (1, 1, 5), (4, 1, 2)])
def test_micro_batches_in_flight_follow_the_schedule(pp: int, vpp: int, m: int) -> None:
    counts = in_flight(pp, vpp, m)
    assert counts.min() >= 0
    for rank in range(pp):
        assert counts[rank].sum(axis=-1).max() == schedule(pp, vpp, m, rank)
    assert counts[-1, :, -1].max() <= 1 + (pp - 1) * (vpp > 1)


def test_the_number_of_destinations_of_a_token_has_its_expected_value() -> None:
    rng = random.Random(0)
    for places, groups in ((8, None), (8, (8, 4)), (4, (8, 4)), (16, (8, 4))):
        found = 0
        for _ in range(20_000):
            n, chosen = groups or (1, 1)
            pool = [e for g in rng.sample(range(n), chosen) for e in range(g * 256 // n, (g + 1) * 256 // n)]
            found += len({e * places // 256 for e in rng.choices(pool, k=8)})
        assert copies(places, 8, groups) == pytest.approx(found / 20_000, rel=0.01)


@pytest.mark.parametrize(("domain", "ep"), [(8, 8), (8, 64), (64, 16)])
def test_fewer_copies_cross_the_network_when_a_domain_passes_them_on(domain: int, ep: int) -> None:
    naive, rank, node = (copies_sent(domain, ep, 1, 8, mode) for mode in ("naive", "rank", "node"))
    assert sum(naive) == pytest.approx(8 * (1 - 1 / ep))
    assert sum(rank) == pytest.approx(copies(ep, 8) * (1 - 1 / ep))
    assert naive[0] > rank[0]
    assert node[0] >= rank[0]
    assert naive[1] >= rank[1] >= node[1]
    if ep <= domain:
        assert (naive[1], rank, node[1]) == (0, node, 0)
    else:
        assert node[1] == pytest.approx(copies(ep // domain, 8) * (1 - domain / ep))
        assert node[1] < rank[1]


def test_a_latent_divides_the_all_to_all() -> None:
    run, layout = Run(seq_len=512, global_batch=64), Layout(ep=8)
    wide = SMALL.blocks["E"].model_copy(update={"d_latent": None})
    whole = ModelConfig.model_validate(SMALL.model_dump() | {"blocks": dict(SMALL.blocks) | {"E": wide}})
    latent, full = (
        {row["kind"]: row["gb"] for row in Plan.of(model, run, layout, ON_8).traffic()} for model in (SMALL, whole)
    )
    assert full["all-to-all in domains"] == pytest.approx(2 * latent["all-to-all in domains"])
    assert set(full) == set(latent) == {
        "all-to-all in domains", "data-parallel traffic, dense",
    }  # fmt: skip


def test_every_depth_of_multi_token_prediction_is_in_one_stage() -> None:
    model = ModelConfig.model_validate(SMALL.model_dump() | {"mtp": {"pattern": "E", "n_depths": 2, "shared": False}})
    stages = read("Etttt|ttttmmL", model, 2)
    assert stages.megatron() == "Et*4|t*4mmL"
    assert profile(model, 512).counts(stages)[:, :, -2].tolist() == [[0], [1]]
    assert balanced(model, profile(model, 512).costs(1), 2, 1).items[-1].endswith("mmL")
    with pytest.raises(ValueError, match="must have all 2 'm' in one stage"):
        read("Etttttttt|m|mL", model, 3)


def test_memory_falls_as_ranks_divide_it() -> None:
    run = Run(seq_len=512, global_batch=64)

    def held_by(**degrees: int) -> dict[str, float]:
        plan = Plan.of(SMALL, run, Layout.model_validate(degrees), ON_8)
        return {name: float(size.max()) for name, size in plan.memory._asdict().items()}

    alone, tensor = held_by(), held_by(tp=4)
    experts, context = held_by(ep=8), held_by(cp=4)
    assert alone["weights"] / 4 < tensor["weights"] < alone["weights"]
    assert context["weights"] == alone["weights"]
    assert context["activations"] == pytest.approx(alone["activations"] / 4)
    of_experts = 16 * 2 * 32 * 48 * 3  # in three layers
    assert alone["weights"] - experts["weights"] == pytest.approx(2 * of_experts * 7 / 8)
    assert experts["activations"] == pytest.approx(alone["activations"])
    whole = float(SMALL.cost(512).params_total)
    assert alone["weights"] == pytest.approx(2 * whole)
    assert alone["grads"] == pytest.approx(4 * whole)
    assert alone["optimizer"] == pytest.approx(12 * whole / 8)


@pytest.mark.parametrize(
    ("zero", "weights", "grads", "optimizer"), [(0, 2, 4, 12), (1, 2, 4, 12 / 8), (2, 2, 0.5, 1.5)]
)
def test_each_zero_stage_shards_its_states(zero: int, weights: float, grads: float, optimizer: float) -> None:
    run = Run.model_validate({"seq_len": 512, "global_batch": 64, "zero": zero})
    plan, params = Plan.of(SMALL, run, Layout(), ON_8), SMALL.cost(512).params_total
    found = [float(size[0, 0]) / params for size in plan.memory[:3]]
    assert found == pytest.approx([weights, grads, optimizer])
    assert Plan.of(SMALL, run.model_copy(update={"zero": 3}), Layout(), ON_8).memory.weights[0, 0] <= 2 * params


def test_offload_recompute_and_moments_save_memory_and_cost_time() -> None:
    model, on = preset("deepseek-v3"), Cluster.named("GB200x256")
    layout = Layout(pp=4, vpp=4, ep=64)

    def plan(**fields: object) -> Plan:
        return Plan.of(model, Run.model_validate({"global_batch": 8192, **fields}), layout, on)

    base = plan()
    for fields in (
        {"recompute": ("mla_up_proj",)},
        {"recompute": ("full",)},
        {"offload_optimizer": True},
        {"offload_activations": 0.5},
    ):
        assert plan(**fields).needed < base.needed
        assert plan(**fields).step_s >= base.step_s
    assert plan(moments="bfloat16").needed < base.needed
    full = plan(recompute=("full",))
    assert 1.2 < full.step_s / base.step_s < 1.4  # a third forward pass
    assert plan(precision="mxfp8").step_s < base.step_s


def test_a_search_equals_trying_each_layout() -> None:
    run, on = Run(seq_len=512, global_batch=64, reserve=0.0), Cluster.named("H100x8")
    found = search(SMALL, on, run, {"vpp": 1, "etp": 1}, n=10_000)
    assert found.n_legal == found.n_fitting == len(found.plans)
    best: list[float] = []
    for tp in (1, 2, 4, 8):
        for cp in (1, 2, 4, 8):
            for pp in (1, 2, 4, 8):
                for ep in (1, 2, 4, 8):
                    for micro_batch in (1, 2, 4):
                        layout = Layout(tp=tp, cp=cp, pp=pp, ep=ep, micro_batch=micro_batch)
                        try:
                            check(SMALL, run, layout, on)
                        except ValueError:
                            continue
                        if cp == 1 or 512 // cp >= 512:
                            best.append(Plan.of(SMALL, run, layout, on).tokens_per_s_gpu)
    assert found.n_legal == len(best)
    assert max(plan.tokens_per_s_gpu for plan in found.plans) == pytest.approx(max(best))


def test_a_search_names_the_limits_of_the_other_layouts() -> None:
    model, on = preset("deepseek-v3"), Cluster.named("H100x64")
    found = search(model, on, Run(), {"etp": 1, "pp": 8})
    assert all(plan.fits for plan in found.plans)
    walls = {(wall.degree, wall.value): wall for wall in found.walls}
    assert walls["ep", 1].wall == "memory"
    assert "GiB are needed" in walls["ep", 1].detail
    assert walls["vpp", 9].wall == "pipeline"
    assert {wall.degree for wall in found.walls} <= set(DEGREES) - {"etp", "pp"}
    assert max(wall.relative for wall in found.walls) == 1
    rates = [plan.tokens_per_s_gpu for plan in found.plans]
    assert rates[0] >= 0.99 * max(rates)


@pytest.mark.slow
def test_the_best_layout_depends_on_the_objective() -> None:
    model, on, run = preset("nemotron-3-nano"), Cluster.named("H100x64"), Run(seq_len=8192, global_batch=512)
    fast, small = (search(model, on, run, objective=objective).plans[0] for objective in ("tokens_per_s", "memory"))
    few = search(model, on, run, objective="gpus").plans[0]
    assert small.needed < fast.needed
    assert fast.tokens_per_s_gpu > small.tokens_per_s_gpu
    assert few.cluster.n_gpus < 64
    half = search(model, Cluster(on.device, few.cluster.n_gpus // 2), run)
    assert not half.plans
    assert "no layout fits: the smallest needs" in half.refusal()


def test_the_cheapest_relief_makes_a_plan_fit() -> None:
    plan = replace(table_3(), cluster=Cluster.named("H200x256"))
    assert not plan.fits
    found = cheapest_relief(plan)
    assert found is not None
    other, relief = found
    assert other.fits
    assert relief in RELIEFS
    assert str(relief)
    tiny = Plan.of(preset("deepseek-v3"), Run(global_batch=8), Layout(), Cluster.named("A10Gx8"))
    assert cheapest_relief(tiny) is None


@pytest.mark.parametrize("what", ["batch", "context", pytest.param("model", marks=pytest.mark.slow)])
def test_the_largest_size_fits_and_the_next_does_not(what: str) -> None:
    fixed = dict.fromkeys(DEGREES, 1)
    run = Run(seq_len=2048, global_batch=2**20)
    model = preset("llama-3.1-8b")
    found = largest(what, model, Cluster.named("H100x16"), run, fixed, free=("d_ff",))
    assert found.plan.fits
    if what == "context":
        longer = found.plan.run.model_copy(update={"seq_len": 2 * found.plan.run.seq_len})
        more = replace(found.plan, run=longer)
    elif what == "batch":
        more = replace(found.plan, layout=Layout(micro_batch=2 * int(found.value)))
    else:
        assert found.value > model.cost(1).params_total
        return
    relief = cheapest_relief(more)
    assert not more.fits
    assert relief is None


def test_a_plan_is_plain_json_and_its_parts_add_up() -> None:
    plan = table_3()
    record = json.loads(json.dumps(plan.to_dict(14.8e12)))
    for name in ("fits", "ranks", "tflops_ceiling", "tflops_estimate", "tokens_per_s_gpu", "binds", "bubble",
                 "all_to_all_s", "layout", "days", "gpu_hours"):  # fmt: skip
        assert name in record
    assert len(record["ranks"]) == 4
    for rank in record["ranks"]:
        assert rank["total"] == pytest.approx(sum(rank[n] for n in ("weights", "grads", "optimizer", "activations")))
    assert sum(record["seconds"].values()) == pytest.approx(record["step_s"])
    assert record["gpu_hours"] == pytest.approx(record["days"] * 24 * 256)
    assert record["bubble"] == pytest.approx(3 / (4 * 128))


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 3}, r"tp \* cp \* pp must divide the 8 GPUs of H100x8, got 3; 2 and 4 do"),
        ({"tp": 16}, r"tp \* cp \* pp must be at most the 8 GPUs of H100x8, got 16"),
        ({"ep": 8, "pp": 2}, r"etp \* ep \* pp must be at most"),
        ({"tp": 8}, r"tp must divide n_heads=4, got 8; 1, 2, 4 do \(blocks\.\*\)"),
        ({"pp": 8, "vpp": 2}, r"pp \* vpp must be at most 10"),
        ({"micro_batch": 3}, r"micro_batch \* dp must divide global_batch=64, got 3 \* 8; a global batch of 72"),
        ({"vpp": 2}, "vpp must be 1 if pp is 1"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_a_suggestion(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.of(SMALL, Run(seq_len=512, global_batch=64), Layout.model_validate(degrees), ON_8)


def test_contexts_that_ranks_cannot_split_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 \* cp must divide seq_len=500, got cp=8"):
        Plan.of(SMALL, Run(seq_len=500, global_batch=64), Layout(cp=8), ON_8)


def test_a_cluster_is_a_device_and_a_number() -> None:
    assert Cluster.named("gb200x256").name == "GB200x256"
    for text, message in (("GB200", "DEVICExNUMBER"), ("GB20x8", "nearest are GB200"), ("H100x0", "at least 1")):
        with pytest.raises(ValueError, match=message):
            Cluster.named(text)


@pytest.mark.slow
def test_thousands_of_layouts_are_searched_in_seconds() -> None:
    model, on = preset("nemotron-3-super"), Cluster.named("H100x1024")
    began = time.process_time()
    found = search(model, on, Run(seq_len=8192, global_batch=3072))
    assert time.process_time() - began < 12  # about 1 s without checks of every call's types
    assert found.n_legal > 10_000
