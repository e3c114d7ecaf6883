"""Budget solver: solutions compared with exhaustive search, known models recovered, and bounds named."""

from __future__ import annotations

import math
import random
from itertools import product
from typing import Any

import pytest

from explore.blocks import MoEConfig, latent_acc
from explore.model import ModelConfig
from explore.solve import BUDGETS, RANGES, Free, Solution, match, solve
from explore.solve import search as module

NARROW = [
    "d_ff=64:2048:16",
    "d_expert=16:512:16",
    "d_shared=16:512:16",
    "d_latent=16:128:16",
    "d_model=64:512:64",
    "top_k",
]
HYBRID: dict[str, Any] = {"vocab_size": 512, "pattern": "MEM*E-", "d_model": 128, "blocks": {"E": {"n_experts": 32}}}
FOUR = ("flops_train", "params_active", "params_total", "state_bytes")


def variant(values: dict[str, int], content: dict[str, Any] = HYBRID) -> ModelConfig:
    """The model with values set by short names, without using the solver."""
    homes = {"d_ff": "-"} | dict.fromkeys(("d_expert", "d_shared", "d_latent", "n_experts", "top_k"), "E")
    blocks = {letter: dict(block) for letter, block in content["blocks"].items()}
    for name, value in values.items():
        if name in homes:
            blocks.setdefault(homes[name], {})[name] = value
    outer = {name: value for name, value in values.items() if name not in homes}
    return ModelConfig(**{**content, **outer, "blocks": blocks})


def budgets(model: ModelConfig, seq_len: int = 4096) -> dict[str, float]:
    """The four budgets from the rows of the ledger."""
    rows = [row.entry for row in model.ledger(seq_len) if row.letter != "/"]
    return {
        "flops_train": 3 * sum(e.flops_seq for e in rows) / seq_len,
        "params_active": sum(e.params_active for e in rows),
        "params_total": sum(e.params for e in rows),
        "state_bytes": sum(2 * e.kv_numel_seq + 4 * (e.ssm_numel + e.conv_numel) for e in rows),
    }


def worst(model: ModelConfig, targets: dict[str, float]) -> float:
    found = budgets(model)
    return max(abs(math.log(found[name] / target)) for name, target in targets.items())


def residuals(solution: Solution) -> dict[str, float | None]:
    return {line.name: line.residual for line in solution.residuals}


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses few points, because dataclasses with checked types take milliseconds per point."""
    monkeypatch.setattr(module, "EXHAUSTIVE", 24)
    monkeypatch.setattr(module, "MAX_GROUPS", 4)


def near(values: range, x: float) -> int:
    return min(values, key=lambda value: abs(value - x))


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole lattice", "descent"])
@pytest.mark.parametrize(
    ("free", "targets"),
    [
        (["d_expert=16:512:16"], {"params_total": 2.3e6}),
        (["d_expert=64:320:64", "top_k=1:10"], {"params_active": 9e5, "params_total": 3.1e6}),
        (["d_ff=128:1024:128", "d_shared=64:512:64"], {"flops_train": 5e6, "params_total": 4e6}),
        (["d_model=64:176:16", "d_expert=64:256:64"], {"state_bytes": 1.5e6, "params_total": 3e6}),
        (["n_experts=8:32:8", "top_k=1:5", "d_latent=32:96:32"], {"params_active": 8e5, "params_total": 2e6}),
    ],
)
def test_no_point_of_a_small_lattice_is_nearer(
    free: list[str], targets: dict[str, float], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole:
        monkeypatch.setattr(module, "EXHAUSTIVE", 1_000)
    dimensions = [Free.parse(text) for text in free]
    names = [each.field for each in dimensions]
    scores = {}
    for point in product(*(each.lattice for each in dimensions)):
        try:
            scores[point] = worst(variant(dict(zip(names, point, strict=True))), targets)
        except ValueError:
            assert "d_model" in names or "top_k" in names
    solution = solve(HYBRID, targets, free)
    # The descent ends at a ten-thousandth.
    assert worst(solution.model, targets) == pytest.approx(min(scores.values()), abs=1e-9 if whole else 1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_the_budgets_of_a_known_model_are_met_again(seed: int) -> None:
    rng = random.Random(seed)
    free = rng.sample(NARROW, 1 + seed % 4)
    targets = rng.sample(FOUR, 1 + seed % 3)
    lattices = {each.field: each.lattice for each in map(Free.parse, free)}
    while True:
        drawn = {
            name: near(values, values[0] * (values[-1] / values[0]) ** rng.random())
            for name, values in lattices.items()
        }
        try:
            known = variant(drawn)
        except ValueError:
            continue
        if drawn.get("d_latent", 0) <= known.d_model:
            break
    wanted = {name: value for name, value in budgets(known).items() if name in targets}
    solution = solve(HYBRID, wanted, free)
    assert solution.feasible
    assert not solution.why
    assert worst(solution.model, wanted) <= math.log(1.01)
    for name, lattice in lattices.items():
        assert {n for path, n in solution.values.items() if path.endswith(name)} <= set(lattice)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "vocab_size", "d_model", "d_latent", "moe"),
    [
        ("MEM*E", 4096, 256, 64, MoEConfig(n_experts=32, top_k=4, d_expert=192, d_shared=384)),
        ("MEMEMEM*E" * 4, 131_072, 4096, 1024, MoEConfig(n_experts=128, top_k=6, d_expert=2688, d_shared=5376)),
    ],
)
def test_a_standard_moe_and_its_acc_variant_get_equal_active_and_total_parameters(
    pattern: str, vocab_size: int, d_model: int, d_latent: int, moe: MoEConfig
) -> None:
    fields: dict[str, Any] = {"pattern": pattern, "vocab_size": vocab_size, "d_model": d_model}
    standard = ModelConfig(**fields, blocks={"E": moe})
    acc = ModelConfig(**fields, blocks={"E": latent_acc(moe, d_model, d_latent)})
    around = [f"d_expert={moe.d_expert // 2}:{2 * moe.d_expert}:16", "n_experts=8:1024:8", "top_k"]
    solution = match(standard, acc, around)
    block = solution.model.blocks["E"]
    assert isinstance(block, MoEConfig)
    assert (block.d_latent, block.d_shared) == (d_latent, moe.d_shared)
    found, wanted = solution.model.cost(4096), standard.cost(4096)
    assert found.params_active == pytest.approx(wanted.params_active, rel=0.01)
    assert found.params_total == pytest.approx(wanted.params_total, rel=0.01)
    assert all(residual is not None for residual in residuals(solution).values())
    assert {line.name for line in solution.residuals if line.solved} == {"params_active", "params_total"}


def test_residuals_are_those_of_the_ledger_for_every_budget_solved_for_or_not() -> None:
    targets: dict[str, float] = {"params_total": 2e6}
    solution = solve(HYBRID, targets, ["d_expert=16:256:16"], seq_len=512, compare={"flops_train": 7e6})
    found = budgets(solution.model, 512)
    lines = {line.name: line for line in solution.residuals}
    assert list(lines) == list(BUDGETS)
    for name in FOUR:
        assert lines[name].value == pytest.approx(found[name], rel=1e-12)
    expected = {"params_total": found["params_total"] / 2e6 - 1, "flops_train": found["flops_train"] / 7e6 - 1}
    assert {name: r for name, r in residuals(solution).items() if r is not None} == pytest.approx(expected)
    assert [name for name, line in lines.items() if line.solved] == ["params_total"]
    for line in solution.residuals:
        assert f"{line.value:,.0f}" in str(solution)
        assert line.residual is None or f"{line.residual:+.2%}" in str(solution)


def test_sizes_that_are_not_given_follow_d_model_and_those_of_a_config_stay() -> None:
    target = {"params_total": float(variant({"d_model": 256}).cost(1).params_total)}
    assert solve(HYBRID, target, ["d_model=64:512:64"]).model == variant({"d_model": 256})
    fixed = variant({})
    assert solve(fixed, target, ["d_model=64:512:64"]).model.blocks == fixed.blocks


def test_a_short_name_is_one_dimension_of_every_block_that_has_it() -> None:
    blocks = {"E": {"n_experts": 8}, "X": MoEConfig(n_experts=8, top_k=2, d_expert=64, d_shared=64)}
    content = {**HYBRID, "pattern": "MEX*", "blocks": blocks}
    both = solve(content, {"params_total": 1.5e6}, ["d_expert=16:256:16"])
    assert both.values.keys() == {"blocks.E.d_expert", "blocks.X.d_expert"}
    assert len(set(both.values.values())) == 1
    for name in ("X.d_expert", "blocks.X.d_expert"):
        one = solve(content, {"params_total": 1.5e6}, [f"{name}=16:256:16"])
        assert one.values.keys() == {"blocks.X.d_expert"}
        assert one.model.blocks["E"] == ModelConfig(**content).blocks["E"]


@pytest.mark.parametrize(
    ("free", "targets", "nearest", "why"),
    [
        (["d_expert=128:512:16"], {"params_total": 1e6}, {"d_expert": 128}, ["least in reach", "d_expert >= 128"]),
        (["d_expert=16:64:16"], {"params_total": 5e6}, {"d_expert": 64}, ["most in reach", "d_expert <= 64"]),
        (["d_model=64:512:128"], {"params_total": 4e6}, None, ["nearest in reach", "d_model in steps of 128"]),
        (
            ["top_k"],
            {"params_active": 5e6},
            {"top_k": 32},
            ["most in reach", "top_k: must be at most n_experts=32"],
        ),
        (["d_expert"], {"state_bytes": 1e12}, None, ["most in reach", "the fixed dimensions"]),
        (["top_k"], {"params_active": 8e5, "params_total": 9e9}, None, ["params_total: ", "the fixed dimensions"]),
        (
            ["d_ff=256:16384:256"],
            {"params_active": 1.12e6, "params_total": 4e6},
            None,
            ["params_active and params_total: each can be met, but not together"],
        ),
    ],
)
def test_an_infeasible_target_is_refused_with_the_reason_and_the_nearest_point(
    free: list[str], targets: dict[str, float], nearest: dict[str, int] | None, why: list[str]
) -> None:
    solution = solve(HYBRID, targets, free)
    assert not solution.feasible
    for part in why:
        assert part in solution.why
        assert part in str(solution)
    if nearest is not None:
        assert solution.model == variant(nearest)


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("d_expert=100:2048:16", Free("d_expert", 100, 2048, 16)),
        ("E.top_k", Free("E.top_k", *RANGES["top_k"])),
        ("d_ff=32:64", Free("d_ff", 32, 64, RANGES["d_ff"][2])),
    ],
)
def test_a_free_dimension_is_read(text: str, free: Free) -> None:
    assert Free.parse(text) == free
    assert all(value % free.step == 0 and free.low <= value <= free.high for value in free.lattice)


@pytest.mark.parametrize(
    ("content", "targets", "free", "message"),
    [
        ({}, {"params_totl": 1e6}, ["d_ff"], "'params_totl' is unknown; did you mean 'params_total'"),
        ({}, {"params_total": 0}, ["d_ff"], "params_total: the target must be a positive number, got 0"),
        ({}, {}, ["d_ff"], "targets: at least one"),
        ({}, {"params_total": 1e6}, [], "free: at least one"),
        (
            {},
            {"params_total": 1e6},
            ["d_f"],
            r"free must be among d_model, .*blocks.-.d_ff",
        ),
        ({}, {"params_total": 1e6}, ["M.d_ff"], r"free must be among .*'M.d_ff'"),
        ({}, {"params_total": 1e6}, ["d_ff", "-.d_ff"], "blocks.-.d_ff is named twice"),
        ({}, {"params_total": 1e6}, ["d_ff=1:x"], "'d_ff=1:x' is not of the form"),
        ({}, {"params_total": 1e6}, ["d_ff=20:30:16"], "d_ff: no multiple of 16 is between 20 and 30"),
        ({}, {"params_total": 1e6}, ["d_ff=0:30:16"], "d_ff: low must be at least 1"),
        ({"pattern": "Q-"}, {"params_total": 1e6}, ["d_ff"], "no candidate is a valid model; .*unknown letter 'Q'"),
        ({"pattern": None}, {"params_total": 1e6}, ["d_ff"], "a pattern is required"),
        ({"blocks": {"E": 3}}, {"params_total": 1e6}, ["d_ff"], "blocks.E must be a mapping"),
    ],
)
def test_an_invalid_problem_is_refused(
    content: dict[str, Any], targets: dict[str, float], free: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solve({**HYBRID, **content}, targets, free)
