"""Rooflines: published closed forms, bounds computed by hand, and mistakes in one line."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from explore.cost import Dtypes
from explore.model import ModelConfig
from explore.presets import preset
from explore.roofline import (
    GPUS,
    Deployment,
    Hardware,
    decode_table,
    expert_intensity,
    facts,
    hardware,
    measured,
    speedup_table,
    tokens_at_ridge,
)

TOY = Hardware(
    name="toy",
    flops_per_s={"bfloat16": 1e6, "float32": 5e5},
    memory_bytes=4e6,
    bandwidth=1e4,
    link=1e3,
    source="made up",
)
DENSE = ModelConfig.model_validate(
    {
        "d_model": 16,
        "vocab_size": 32,
        "pattern": "*-",
        "blocks": {"*": {"n_heads": 2, "n_kv_heads": 1, "d_head": 8}, "-": {"d_ff": 24}},
    }
)
SPARSE = ModelConfig.model_validate(
    {
        "d_model": 16,
        "vocab_size": 32,
        "pattern": "E",
        "blocks": {"E": {"n_experts": 8, "top_k": 2, "d_expert": 4, "n_shared": 0, "d_shared": None, "d_latent": 8}},
    }
)


def test_published_facts_follow_from_closed_forms() -> None:
    found = {fact["fact"]: fact for fact in facts()}
    ridge, tokens, intensity, ratio, room, needed = found.values()
    assert ridge["computed"] == intensity["computed"] == 1250
    assert math.floor(tokens["computed"]) == tokens["published"] == 1418
    assert round(ratio["computed"]) == ratio["published"] == 9
    assert round(room["computed"], 2) == room["published"] == 19.66
    assert needed["computed"] < needed["published"]


def test_intensity_reaches_the_ridge_at_the_stated_number_of_tokens() -> None:
    tokens = tokens_at_ridge(100.0, 512, 384)
    assert expert_intensity(tokens, 512, 384) == pytest.approx(100.0)
    assert tokens_at_ridge(1e6, 512, 384) == math.inf


def test_a_step_takes_the_longer_of_products_and_traffic_of_every_component() -> None:
    context, batch = 10, 3
    deployed = Deployment(DENSE, TOY)
    d, d_q, d_kv, d_ff, vocab = 16, 16, 8, 24, 32
    kv = 2 * d_kv * context * 2  # bytes of a sequence in bf16
    matrices = [d * d_q, d * d_kv, d * d_kv, d_q * d, d * d_ff, d_ff * d, d * vocab]
    seconds = sum(max(batch * 2 * numel / 1e6, 2 * numel / 1e4) for numel in matrices)
    seconds += max(batch * 4 * d_q * context / 1e6, batch * kv / 1e4)
    rows = vocab * d * (1 - (1 - 1 / vocab) ** batch)  # of the embedding
    seconds += (3 * 2 * d + 2 * rows) / 1e4  # and the norms
    assert deployed.decode_s(context, batch) == pytest.approx(seconds)


def test_prefill_is_bound_by_products_when_long_and_grows_with_the_square_of_attention() -> None:
    deployed = Deployment(DENSE, TOY)
    cost = DENSE.cost(4096)
    assert deployed.prefill_s(4096) == pytest.approx(cost.flops_prefill / 1e6, rel=0.02)
    assert deployed.prefill_s(8192) > 2.5 * deployed.prefill_s(4096)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    deployed = Deployment(DENSE, TOY)
    largest = deployed.largest_batch(100)
    filled = deployed.weight_bytes + largest * deployed.state_bytes(100)
    assert filled <= deployed.memory_bytes < filled + deployed.state_bytes(100)
    assert deployed.weight_bytes == DENSE.cost(100).weight_bytes
    assert deployed.state_bytes(100) == DENSE.cost(100).kv_bytes
    table = decode_table({"dense": DENSE}, "H100", 100, (1, 2), dtypes=Dtypes(weight="float8"))
    assert list(table.fits) == [True, True]
    assert list(table.columns) == ["model", "batch_size", "context", "step_s", "tokens_per_s", "fits"]


def test_a_model_that_does_not_fit_reports_the_missing_memory() -> None:
    deployed = Deployment(preset("llama-3.1-70b"), hardware("H100"))
    with pytest.raises(ValueError, match=r"memory: 132\.67 GiB are needed .* H100 has 70\.78 GiB .*: 61\.89 GiB too"):
        deployed.largest_batch(4096)
    assert Deployment(deployed.model, deployed.device, tensor_parallel=2).largest_batch(4096) > 0


def test_tensor_parallel_devices_share_everything() -> None:
    one, four = (Deployment(DENSE, TOY, tensor_parallel=n) for n in (1, 4))
    assert one.decode_s(64, 8) == pytest.approx(4 * four.decode_s(64, 8))
    assert one.throughput(64, 64, 8) == pytest.approx(four.throughput(64, 64, 8))


def test_expert_parallel_devices_share_experts_and_communicate() -> None:
    alone, shared = (Deployment(SPARSE, TOY, expert_parallel=n) for n in (1, 4))
    expert = 2 * 8 * 4
    assert alone.weight_bytes - shared.weight_bytes == 2 * (8 * expert) * (1 - 1 / 4)
    # Three of four experts are elsewhere: two of eight numbers in bf16 there and back.
    assert shared.all_to_all_s(5) == pytest.approx(5 * 2 * (2 * 8) * 2 * (3 / 4) / 1e3)
    assert alone.all_to_all_s(5) == 0


def test_a_batch_reads_more_experts_until_it_reads_all() -> None:
    deployed = Deployment(SPARSE, TOY)
    steps = [deployed.decode_s(8, batch) for batch in (1, 2, 4, 8)]
    assert all(later / earlier < 2 for earlier, later in pairwise(steps))


@pytest.mark.slow
def test_a_request_is_its_prefill_and_its_steps() -> None:
    deployed = Deployment(DENSE, TOY)
    steps = sum(deployed.decode_s(100 + i, 4) for i in range(1, 6401))
    assert deployed.request_s(100, 6400, 4) == pytest.approx(deployed.prefill_s(100, 4) + steps, rel=1e-3)


def test_published_speed_ups_are_predicted_in_direction_with_a_reason_for_each_gap() -> None:
    rows = speedup_table()
    assert [row["published"] for row in rows] == [3.0, 3.0, 6.0, 3.3, 2.2, 2.2]
    for row in rows:
        assert 1.5 < row["predicted"] < 2 * row["published"]
        assert row["why"]
        assert row["predicted_at_its_batch"] <= row["predicted"] * 1.001


def test_every_device_has_a_source_and_unknown_narrow_rates_fall_back_to_wider_dtypes() -> None:
    assert list(GPUS) == ["A10G", "A100", "H100", "H200", "B200", "GB200", "B300", "GB300", "MI300X"]
    assert all(gpu.source for gpu in GPUS.values())
    assert hardware("a100").peak("float8") == hardware("A100").peak("bfloat16")
    assert hardware("b200").peak("float4") == 2 * hardware("b200").peak("float8")
    with pytest.raises(ValueError, match=r"hardware must be one of .*, got 'H10'; the nearest are H100"):
        hardware("H10")


def test_a_custom_device_is_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(TOY.model_dump_json())
    assert hardware(str(path)) == TOY
    assert all(Hardware.model_validate_json(gpu.model_dump_json()) == gpu for gpu in GPUS.values())
    path.write_text(json.dumps(TOY.model_dump() | {"bandwidth": -1}))
    with pytest.raises(ValueError, match=r"mine\.json: bandwidth: must be above 0, got -1"):
        hardware(str(path))


def test_known_devices_have_links_and_about_the_memory_of_their_datasheet() -> None:
    for gpu in GPUS.values():
        assert gpu.network is not None
        assert gpu.host_link is not None
        assert gpu.usable_bytes is not None
        assert gpu.network <= gpu.link
        assert 0.98 < gpu.usable_bytes / gpu.memory_bytes < 1.08


@pytest.mark.slow
def test_measured_rates_of_this_machine_are_plausible() -> None:
    here = measured()
    assert 1e9 < here.peak("float32") < 1e15
    assert 1e8 < here.bandwidth < 1e13
    assert "measured" in here.source
    assert measured() is here


@pytest.mark.parametrize(
    ("context", "batch_size", "message"),
    [(0, 1, "context must be at least 1"), (1, 0, "batch_size must be at least 1"), (-4, 1, "context")],
)
def test_an_invalid_context_or_batch_is_refused(context: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Deployment(DENSE, TOY).decode_s(context, batch_size)


def test_published_tables_are_plain_records() -> None:
    assert json.loads(json.dumps(speedup_table())) == speedup_table()
