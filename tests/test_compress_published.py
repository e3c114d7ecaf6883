"""Published compressions in numbers: alignments of released models with their parents, and the spaces searched."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from small_runs import tiny, train, write_corpus

from explore.compress import Plan
from explore.compress.alignment import align
from explore.compress.measures import Setting, measure
from explore.compress.published import GIB, BlockSearch, BudgetSearch, published
from explore.compress.spaces import Grid
from explore.cost import Dtypes
from explore.figures import cut_table, plot_cut
from explore.model import ModelConfig
from explore.presets import preset

CASES = {
    "llama-3.1-70b": "llama-nemotron-super-49b",
    "llama-3.1-405b": "llama-nemotron-ultra-253b",
    "nemotron-nano-2-12b": "nemotron-nano-2-9b",
    "nemotron-h-56b": "nemotron-h-47b",
}


@pytest.fixture
def explore_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(run, capsys, monkeypatch)


def searched(parent: str) -> BudgetSearch:
    search = published(parent)
    assert isinstance(search, BudgetSearch)
    return search


def block_search(parent: str) -> BlockSearch:
    search = published(parent)
    assert isinstance(search, BlockSearch)
    return search


# Alignments


@pytest.mark.parametrize("parent", CASES)
def test_the_parts_that_are_kept_are_the_released_model(parent: str) -> None:
    found = align(preset(parent), preset(CASES[parent]))
    kept = [part.child for part in found.parts if part.child is not None]
    theirs = list(found.child.layers)
    for block in found.fused:
        theirs.remove(block)
    assert kept == theirs
    assert len(found.parts) == found.parent.n_layers


def test_super_49b_keeps_attention_in_49_of_80_blocks_and_every_mlp() -> None:
    found = align(preset("llama-3.1-70b"), preset("llama-nemotron-super-49b"))
    kept = [part for part in found.parts if part.child is not None]
    assert found.ways == 1
    assert [sum(part.block.kind == kind for part in kept) for kind in ("attention", "mlp")] == [49, 80]
    assert len(found.dropped) == 31


def test_ultra_253b_fuses_49_mlps_into_4() -> None:
    found = align(preset("llama-3.1-405b"), preset("llama-nemotron-ultra-253b"))
    fused = [part.nth for part in found.parts if part.fused]
    assert fused == list(range(66, 115))
    assert [block.d_ff for block in found.fused] == [399_360, 425_984, 343_040, 301_056]  # type: ignore[attr-defined]
    attention = [part for part in found.parts if part.block.kind == "attention"]
    assert (len(attention), sum(part.child is not None for part in attention)) == (126, 64)
    with pytest.raises(ValueError, match=r"^like: 49 layers became 4 wider ones, and a cut cannot fuse layers"):
        found.sizes()


def test_alignments_equal_those_of_an_exhaustive_search() -> None:
    parent, child = "M-*M-M-*-", "M-M--"
    blocks: Any = {"-": {"d_ff": 16}}
    found = align(*(ModelConfig(d_model=64, vocab_size=16, pattern=each, blocks=blocks) for each in (parent, child)))
    choices = [
        each
        for each in itertools.combinations(range(len(parent)), len(child))
        if "".join(parent[i] for i in each) == child
    ]
    assert found.ways == len(choices)
    for i, part in enumerate(found.parts):
        assert part.kept_in == pytest.approx(sum(i in each for each in choices) / len(choices))
    assert [part.layer for part in found.parts if part.child is not None] == list(min(choices))


def test_a_model_that_is_not_a_cut_of_the_parent_is_refused() -> None:
    parent = preset("llama-3.1-70b")
    for child, message in (
        ("llama-3.1-405b", "d_model must be at most the parent's 8192, got 16384"),
        ("qwen3-8b", "layer 0 of 72, attention, must fit a layer of the parent: rope_theta is 1000000.0, not 500000.0"),
        ("nemotron-h-8b", "layer 0 of 52, mamba2, must fit a layer of the parent: it has no mamba2"),
    ):
        with pytest.raises(ValueError, match=f"^like: {message}"):
            align(parent, preset(child))


def test_the_figure_draws_a_bar_for_each_layer_that_is_kept() -> None:
    found = align(preset("llama-3.1-70b"), preset("llama-nemotron-super-49b"))
    table = cut_table(found)
    assert table["state"].value_counts().to_dict() == {"kept": 98, "narrower": 31, "left out": 31}
    attention, mlp = plot_cut(found, "parent", "child").axes
    assert sorted(bar.get_height() for bar in mlp.patches) == pytest.approx(  # type: ignore[attr-defined]
        sorted(100 * table.loc[table["kind"] == "mlp", "share"])
    )
    (crosses,) = [line for line in attention.lines if line.get_marker() == "x" and len(line.get_xdata())]  # type: ignore[arg-type]
    assert len(crosses.get_xdata()) == 31  # type: ignore[arg-type]
    assert mlp.get_xlabel() == "Layer of parent"


# Spaces


def test_a_grid_sums_the_costs_of_its_children() -> None:
    setting = Setting(4096, 1, Dtypes("float4", "float8", "bfloat16"))
    blocks: Any = {"M": {"n_heads": 8, "d_head": 8, "n_groups": 2, "d_state": 16}, "-": {"d_ff": 96}}
    parent = ModelConfig(d_model=64, vocab_size=100, pattern="M-M-*-", blocks=blocks, tie_embeddings=False)
    layers = {"M": range(3), "-": range(1, 4), "*": range(2)}
    grid = Grid(parent, layers, (3, 4), {"d_model": (32, 64), "M.n_heads": (4, 8), "d_ff": (48, 96)}, setting)
    table = grid.table()
    assert len(table) == 8 * sum(m + f + a in (3, 4) for m in range(3) for f in range(1, 4) for a in range(2))
    for row in table.to_dict("records")[::5]:
        child = grid.model(row)
        assert row["memory_bytes"] == measure("memory_bytes", child, setting)
        if row["M"]:
            assert {name: row[name] for name in grid.row_of(child)} == grid.row_of(child)


def test_the_9b_is_a_candidate_of_the_12b_under_its_budget_and_the_12b_is_not() -> None:
    search = searched("nemotron-nano-2-12b")
    standing = search.position()
    assert (standing["child_within"], standing["parent_within"]) == (True, False)
    assert standing["child_gib"] == pytest.approx(18.62, abs=0.005)
    assert standing["parent_gib"] == pytest.approx(26.00, abs=0.005)
    assert (standing["n"], standing["n_within"], standing["n_larger"]) == (16_353, 9549, 7)
    (row,) = search.grid.find(search.table, preset("nemotron-nano-2-9b")).to_dict("records")
    assert row["memory_bytes"] / GIB == standing["child_gib"]


def test_nano_2_meets_its_budget_by_every_listed_width_and_not_by_depth_alone() -> None:
    search = searched("nemotron-nano-2-12b")
    depth, width = search.depths_table(), search.widths_table()
    assert depth.groupby("layers")["memory_gib"].min().round(2).to_dict() == {52: 21.79, 54: 22.42, 56: 23.2}
    assert not depth["within"].any()
    assert width["within"].all()
    (released,) = width[width["released"]].to_dict("records")
    assert (released["d_model"], released["n_heads"], released["d_ff"]) == (4480, 128, 15_680)
    assert released["params_total"] == preset("nemotron-nano-2-9b").cost(1).params_total
    for row in width[~width["released"]].to_dict("records"):  # the next d_ff is too much
        assert search.grid.measured("memory_bytes", {**row, "d_ff": row["d_ff"] + 320}) > search.budget


def test_the_47b_fits_31_7_gib_with_8_bit_keys_with_little_margin() -> None:
    search = searched("nemotron-h-56b")
    inside = {name for name, setting in search.settings.items() if search.memory_gib(search.child, setting) <= 31.7}
    assert inside == {
        "4-bit weights, 8-bit KV, bf16 state",
        "4-bit weights, 8-bit KV and state",
        "4-bit weights and KV, bf16 state",
    }
    standing = search.position()
    assert standing["child_gib"] == pytest.approx(31.68, abs=0.005)
    assert (standing["child_within"], standing["parent_within"]) == (True, False)
    assert (standing["n"], standing["n_within"], standing["n_more"], standing["n_larger"]) == (11_250, 5380, 5, 0)


def test_puzzle_has_54_variants_per_block() -> None:
    for parent, blocks, log10_size in (("llama-3.1-70b", 80, 138.6), ("llama-3.1-405b", 126, 218.3)):
        search = block_search(parent)
        assert (search.n_choices, search.n_blocks) == (54, blocks)
        assert search.log10_size == pytest.approx(log10_size, abs=0.05)
    table = block_search("llama-3.1-70b").blocks()
    assert table["attention"].sum() == 49
    assert len(table[["attention", "d_ff"]].drop_duplicates()) == 8
    assert table.loc[~table["is_printed"], "d_ff"].tolist() == [17_920]  # 62.5%, no printed choice


# The command


@pytest.mark.slow
@pytest.mark.parametrize("parent", CASES)
def test_the_command_shows_a_published_cut(parent: str, explore_: Any, tmp_path: Path) -> None:
    code, printed, _ = explore_("cut", parent, "--like", CASES[parent], "--show", "--figure", tmp_path / "cut.png")
    assert code == 0
    assert f"{CASES[parent]} as a cut of {parent}" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert (tmp_path / "cut.svg").exists()
    code, printed, _ = explore_("cut", parent, "--like", CASES[parent], "--json")
    assert (code, len(json.loads(printed)["layers"])) == (0, preset(parent).n_layers)


@pytest.mark.slow
@pytest.mark.parametrize("parent", CASES)
def test_the_command_shows_a_published_search(parent: str, explore_: Any) -> None:
    code, printed, _ = explore_("cut", parent, "--published")
    assert (code, parent in printed) == (0, True)
    code, printed, _ = explore_("cut", parent, "--published", "--json")
    assert (code, json.loads(printed)["child"]) == (0, CASES[parent])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-3.1-70b"], "llama-3.1-70b: has no weights to cut; add --like MODEL to show a cut"),
        (["qwen3-8b", "--published"], "published: must be one of nemotron-nano-2-12b, nemotron-h-56b, llama-3.1-70b"),
        (["llama-3.1-70b", "--published", "--figure", "a.png"], "--figure: must not be combined with --published"),
        (["llama-3.1-70b", "--like", "llama-3.1-8"], "preset: 'llama-3.1-8' is unknown; the nearest are llama-3.1-8b"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, explore_: Any) -> None:
    code, _, printed = explore_("cut", *arguments)
    assert (code, len(printed.splitlines())) == (2, 1)
    assert printed.startswith(f"error: {message}")


def test_a_run_is_cut_to_the_sizes_of_another_model(tmp_path: Path, explore_: Any) -> None:
    corpus = write_corpus(tmp_path)
    blocks = {"-": {"d_ff": 48}}
    parent = train(tiny(corpus, "*-*-", model__blocks=blocks, train__tokens=128), tmp_path / "runs")
    child = {**parent.load_experiment().model.model_dump(mode="json"), "pattern": "*--", "d_model": 32}
    child["blocks"]["-"]["d_ff"] = 16
    (tmp_path / "child.json").write_text(json.dumps(child))
    code, printed, _ = explore_("cut", parent.path, "--like", tmp_path / "child.json", "--by", "magnitude",
                                "--no-norm-scales", "--figure", tmp_path / "cut.png", "--json")  # fmt: skip
    assert code == 0
    plan = Plan.load(json.loads(printed)["plan"])
    assert plan.model() == ModelConfig.model_validate(child)
    assert [layer.drop for layer in plan.layers] == [False, False, True, False]
    assert (tmp_path / "cut.png").exists()
