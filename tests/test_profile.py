"""The time of a training step: every microsecond has one kind, and all kinds sum to the step."""

from __future__ import annotations

import json
from itertools import repeat

import pytest
import torch
from command_line import run
from torch.autograd.profiler_util import FunctionEvent

from explore.bench import KINDS, profile
from explore.bench.profile import BACKWARD, DATA, OPTIMIZER, PART, STEP, OpTime, divide, kind_of, profiled, summary
from explore.bench.worker import train_step


def event(name: str, start: float, end: float, *inside: FunctionEvent, number: int = -1) -> FunctionEvent:
    """An event of the main thread with start and end in microseconds, and the events inside it."""
    made = FunctionEvent(id=next(IDS), name=name, thread=1, start_us=start, end_us=end, sequence_nr=number)
    for child in inside:
        made.append_cpu_child(child)
    return made


IDS = iter(range(10_000))


def flat(root: FunctionEvent) -> list[FunctionEvent]:
    return [root, *(each for child in root.cpu_children for each in flat(child))]


def a_step(start: float) -> FunctionEvent:
    """100 us: 10 of data, 30 forward, 40 backward, 15 of the optimizer, and 5 between them."""
    t = start
    mixer = event(
        PART + "MLP",
        t + 10,
        t + 40,
        event("aten::linear", t + 12, t + 32, event("aten::t", t + 13, t + 15), event("aten::addmm", t + 15, t + 31)),
        event("aten::relu", t + 32, t + 38, number=7),
    )
    backward = event(
        BACKWARD + "ReluBackward0", t + 42, t + 80, event("aten::threshold_backward", t + 45, t + 75), number=7
    )
    optimizer = event(OPTIMIZER, t + 83, t + 98, event("aten::_fused_adamw_", t + 84, t + 97))
    data = event(DATA, t, t + 10, event("aten::copy_", t + 1, t + 9))
    return event(STEP, t, t + 100, data, mixer, backward, optimizer)


def test_every_microsecond_of_a_step_has_one_kind_and_one_part() -> None:
    steps = [a_step(0), a_step(200)]
    ops, n_events = divide([each for step in steps for each in flat(step)])
    assert n_events == len(flat(steps[0]))
    assert sum(op.seconds for op in ops) == pytest.approx(100e-6)
    found = {kind: 1e6 * sum(op.seconds for op in ops if op.kind == kind) for kind in KINDS}
    assert found == pytest.approx({"products": 16, "passes": 36, "dispatch": 23, "optimizer": 15, "data": 10})
    mlp = {op.op: 1e6 * op.seconds for op in ops if op.part == "MLP"}
    assert mlp == pytest.approx(
        {
            "Python in MLP": 4,  # 30 without the 20 of the linear layer and the 6 of the activation
            "aten::linear": 2,
            "aten::t": 2,
            "aten::addmm": 16,
            "aten::relu": 6,
            "ReluBackward0": 8,  # the node of the event with its number
            "aten::threshold_backward": 30,
        }
    )
    assert all(op.calls == 1 for op in ops)


def test_the_shares_and_the_unexplained_rest_sum_to_the_step() -> None:
    ops = [OpTime("a", "products", "MLP", 1, 0.05), OpTime("b", "dispatch", "MLP", 9, 0.04)]
    record = summary(ops, step_s=0.1, profiler_s=0.01)
    assert record["shares"] == pytest.approx(
        {"products": 0.05, "passes": 0, "dispatch": 0.03, "optimizer": 0, "data": 0}
    )
    assert record["unexplained_s"] == pytest.approx(0.02)
    assert sum(record["shares"].values()) + record["unexplained_s"] == pytest.approx(record["step_s"])


def test_ops_are_classified_by_their_use_of_time() -> None:
    kinds = {
        "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
        "passes": ("aten::mul", "aten::add_", "aten::sum", "aten::copy_", "aten::cat", "aten::_embedding_bag"),
        "dispatch": (
            "aten::linear",
            "aten::matmul",
            "aten::view",
            "aten::slice",
            "aten::empty",
            "aten::to",
            "MulBackward0",
        ),
    }
    for kind, names in kinds.items():
        assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)
    assert kind_of("Torch-Compiled Region: 0/0") == "passes"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hybrid LatentMoE", "attention + MLP"])
def test_a_tiny_step_is_divided_into_all_its_parts(family: str) -> None:
    tokens = torch.randint(0, 1024, (4, 129), generator=torch.Generator().manual_seed(0))
    batches = repeat((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    record = profiled(train_step(family, "tiny", "ours", "fp32"), batches, 0.1)
    total = sum(op["seconds"] for op in record["ops"])
    assert total == pytest.approx(record["profiled_step_s"], rel=0.5)  # of a few steps, sum of means beside a median
    assert sum(record["shares"].values()) + record["unexplained_s"] == pytest.approx(record["step_s"])
    assert sum(op["seconds"] for op in record["ops"]) - record["profiler_s"] == pytest.approx(
        sum(record["shares"].values())
    )
    assert all(record["shares"][kind] > 0 for kind in ("products", "passes", "optimizer"))
    parts = {op["part"] for op in record["ops"]}
    mixers = {"Attention", "MLP"} if family == "attention + MLP" else {"Mamba2", "MoE", "Attention"}
    assert {*mixers, "RMSNorm", "rest of the model", "optimizer", "data"} == parts
    for part in mixers:  # forward and backward passes both
        names = {op["op"] for op in record["ops"] if op["part"] == part}
        assert any(name.endswith(("Backward0", "Backward")) for name in names), part
        assert any(name.startswith("aten::") for name in names), part


def test_the_profile_is_a_table_of_eighty_columns_and_a_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops, _ = divide(flat(a_step(0)))
    record = {"precision": "bf16", "paths": {}, "threads": 1} | summary(ops, 110e-6, 2e-6)
    monkeypatch.setattr(profile, "in_a_process", lambda **task: record)
    monkeypatch.setenv("COLUMNS", "80")
    code, table, _ = run(capsys, monkeypatch, "bench", "--what", "profile", "--shape", "tiny")
    assert code == 0
    assert max(map(len, table.splitlines())) <= 80
    (row,) = (line for line in table.splitlines() if line.startswith("hybrid LatentMoE ") and "%" in line)
    assert row.split()[2:] == ["0.1", "15%", "33%", "19%", "14%", "9%", "11%"]
    _, out, _ = run(capsys, monkeypatch, "bench", "--what", "profile", "--shape", "tiny", "--json")
    assert json.loads(out)[0]["family"] == "attention + MLP"
    assert json.loads(out)[0]["shares"]["data"] == pytest.approx(10e-6)
