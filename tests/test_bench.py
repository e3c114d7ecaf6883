"""Timings: what they measure, and that training here is not slower than transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from explore.bench import (
    SHAPES,
    compare,
    compare_curves,
    compare_decoding,
    compare_precisions,
    families,
    gpu,
    precision,
    time_ops,
    time_text,
    time_trials,
)
from explore.bench.compress import BATCH_SIZE, SEQ_LEN, time_distillation, time_library, time_scores
from explore.bench.text import FORMS
from explore.bench.worker import train_step
from explore.blocks import KINDS
from explore.ops import PATHS
from explore.train import COMPILED, regions


def test_bench_families_match_their_names_and_latent_ones_are_no_larger() -> None:
    for shape in SHAPES.values():
        models = families(shape.d_model)
        assert {name: model.family for name, model in models.items()} == {name: name for name in models}
        standard, latent = (models[name].cost(shape.seq_len) for name in ("hybrid MoE", "hybrid LatentMoE"))
        assert latent.params_total == pytest.approx(standard.params_total, rel=0.1)


def test_every_op_is_timed_on_every_path_that_runs_here() -> None:
    records = list(time_ops(64, 64, 32, repeats=1))
    timed = {(record["op"].partition(",")[0], record["path"]) for record in records}
    left_out = {"recurrent", "mamba_ssm", "compiled", "transposed", "triton", "vectors", "sums"}
    calls = [call for config in KINDS.values() for call in config.default(64).op_calls(64, 2, 32, torch.float32)]
    ops = {"divergence", "linear", "loss", "norm", *(call.partition(",")[0] for call in calls)}
    every = {(op, path.name) for op in ops for path in PATHS[op]}
    assert {path for _, path in every - timed} == left_out
    assert timed <= every
    assert all(record["seconds"] > 0 for record in records)


def test_shapes_and_families_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="shape must be one of tiny, small, large, got 'huge'"):
        next(compare("huge", 1.0, 1e9))
    with pytest.raises(ValueError, match="family must be one of attention"):
        next(compare("tiny", 1.0, 1e9, names=["RNN"]))


def test_emulated_precisions_are_timed_beside_bf16_with_the_regions_that_a_long_run_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks: list[dict[str, Any]] = []

    def measured(**task: Any) -> dict[str, Any]:
        tasks.append(task)
        return {"tokens_per_s": 100.0 / len(tasks), "peak_bytes": 1000 + len(tasks), "first_step_s": 1.0}

    monkeypatch.setattr(precision, "in_a_process", measured)
    monkeypatch.setattr(regions, "has_compiler", lambda: True)
    records = list(compare_precisions("small", 1.0, ["hybrid LatentMoE"]))
    assert [record["precision"] for record in records] == ["bf16", "fp8", "nvfp4"]
    assert [record["step_ratio"] for record in records] == pytest.approx([1, 2, 3])
    assert [record["memory_ratio"] for record in records] == pytest.approx([1, 1002 / 1001, 1003 / 1001])
    assert ["quantize" in task["paths"] for task in tasks] == [False, True, True]


@pytest.mark.slow
def test_a_timed_step_in_emulated_precision_uses_its_recipe() -> None:
    tokens = torch.randint(0, 1024, (4, 129), generator=torch.Generator().manual_seed(0))
    losses = {
        name: [step(tokens[:, :-1], tokens[:, 1:]) for _ in range(2)]
        for name in ("bf16", "fp8", "nvfp4")
        for step in (train_step("attention + MLP", "tiny", "ours", name),)
    }
    assert len({first for first, _ in losses.values()}) == 3
    assert all(second < first for first, second in losses.values())


@pytest.mark.slow
def test_a_trial_is_timed_up_to_its_first_step() -> None:
    (record,) = time_trials("tiny", ["hybrid MoE"])
    assert record["family"] == "hybrid MoE"
    assert 0 < record["set_up_s"] < 60
    assert 0 < record["first_s"] < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kernels", "bound"),
    [
        ("attention + MLP", False, 0.001),
        ("Mamba + MLP", True, 0.001),
        ("hybrid MoE", False, 0.01),
        ("hybrid LatentMoE", True, 0.01),
    ],
)
def test_fast_paths_train_like_the_reference(family: str, kernels: bool, bound: float) -> None:
    """The last bit can change a router's choice of expert, so with routers the losses diverge earlier.

    The first and third family have the paths of short runs, the others those of long runs, which are all kernels.
    """
    for record in compare_curves("tiny", 30, dict.fromkeys(COMPILED, "compiled") if kernels else None, [family]):
        assert record["n_steps"] == 30
        assert 0 < record["mean"] < (bound if record["precision"] == "fp32" else 0.01)


BOUNDS = {"attention + MLP": 1.0, "hybrid LatentMoE": 1.8}
"""Minimum ratio to the tokens per second of transformers. The first family gains least; the second has every kind of
op. The least ratios measured on three kinds of processor were 1.14 and 2.06, before the C++ kernels; other tests run
beside this one."""


@pytest.mark.slow
def test_training_and_decoding_do_not_fall_behind_the_baseline() -> None:
    records = {record["family"]: record for record in compare("small", 2.0, 1e12, names=[*BOUNDS])}
    assert {family: record["ratio"] for family, record in records.items() if record["ratio"] < BOUNDS[family]} == {}
    assert {
        family: record["peak_bytes"] / record["baseline_peak_bytes"]
        for family, record in records.items()
        if record["peak_bytes"] > record["baseline_peak_bytes"]
    } == {}
    record = records["hybrid LatentMoE"]
    assert record["ratio"] == pytest.approx(record["tokens_per_s"] / record["baseline_tokens_per_s"])
    flops = families(192)["hybrid LatentMoE"].cost(512).flops_train
    assert record["gemm_fraction"] == pytest.approx(flops * record["tokens_per_s"] / 1e12)
    assert record["limit"] == pytest.approx(record["ratio"] / record["gemm_fraction"])
    assert record["peak_bytes"] > 0
    assert record["path"].keys() == PATHS.keys()
    (decoded,) = compare_decoding("tiny", 16, ["hybrid LatentMoE"])
    assert decoded["ratio"] > 1.0
    assert math.isfinite(decoded["tokens_per_s"])


@pytest.mark.slow
def test_a_rehearsal_of_the_gpu_benchmark_writes_its_table_and_leaves_out_what_has_no_time(tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--rehearse", "--within", "1", "--seconds", "0.5"]) == 0
    first, *others = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert first["tokens_per_s"] > 0
    assert first["mfu"] > 0
    assert len(others) == 2 * 4 * 2 - 1  # shapes, families and sides
    assert {each.get("error") for each in others} == {"left out: no time was left"}
    written = (tmp_path / "training.md").read_text()
    assert f"| {first['family']} | {first['d_model']} |" in written
    assert "hybrid LatentMoE, d128, transformers: left out" in written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_without_a_gpu_says_how_to_rehearse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main([str(tmp_path / "none")]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_text_of_every_form_is_timed_beside_the_tokenizer() -> None:
    records = list(time_text(300_000))
    assert [record["form"] for record in records] == list(FORMS)
    for record in records:
        assert 250_000 < record["n_bytes"] <= 300_000
        assert 0 < record["split_s"] < record["seconds"]
        assert record["ratio"] == record["seconds"] / record["tokenizer_s"] > 1
        assert 0 < record["start_bytes"] <= record["peak_bytes"]


@pytest.mark.slow
@pytest.mark.alone
def test_text_is_cached_at_the_speed_of_the_tokenizer_and_in_bounded_memory() -> None:
    for record in time_text(10**7):
        slowest = 2.0 if ".xz" in record["form"] else 1.6  # decompressing .xz takes half the time of the tokenizer
        assert record["ratio"] < slowest, record["form"]
        assert record["peak_bytes"] - record["start_bytes"] < 1 << 28, record["form"]


@pytest.mark.slow
def test_scores_and_distillation_are_timed_on_a_parent_of_three_million_parameters() -> None:
    scored = time_scores(2 * BATCH_SIZE * SEQ_LEN)
    assert scored["params"] == pytest.approx(3e6, rel=0.1)
    assert scored["seconds"] > 0
    found = time_distillation(0.1)
    assert found["distil_s"] > found["teacher_s"] > 0
    assert found["ratio"] == pytest.approx((found["distil_s"] - found["teacher_s"]) / found["own_s"])


@pytest.mark.slow
def test_a_library_is_timed_beside_its_parent() -> None:
    found = time_library(0.1)
    assert found["n_parts"] == 5 * 7 + 5 * 3 + 3  # of Mamba, MLP and attention
    assert found["ratio"] == pytest.approx(found["library_s"] / found["own_s"])
