"""Published compressions: their search spaces and budgets, and the position of the released model in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import pandas as pd

from explore.compress.alignment import Alignment, align
from explore.compress.measures import Setting, measure
from explore.compress.spaces import Grid
from explore.cost import Dtypes
from explore.presets import preset

GIB = 2**30


@dataclass(frozen=True)
class BudgetSearch:
    """A search for the best child within a memory budget for weights and the state of one sequence.

    Attributes:
        parent: preset of the parent.
        child: preset of the released child.
        budget_gib: published budget, in GiB.
        settings: settings for counting memory, by name; the grid uses the first.
        layers: allowed numbers of layers, by letter.
        depths: allowed total numbers of layers; empty allows any.
        widths: allowed values by size.
        printed: which parts of the space are published, and which are this kit's reading.
    """

    parent: str
    child: str
    source: str
    budget_gib: float
    settings: Mapping[str, Setting]
    layers: Mapping[str, range]
    depths: tuple[int, ...]
    widths: Mapping[str, range | tuple[int, ...]]
    printed: str

    @property
    def setting(self) -> Setting:
        """The grid's setting."""
        return next(iter(self.settings.values()))

    @property
    def budget(self) -> float:
        """The budget in bytes."""
        return self.budget_gib * GIB

    @cached_property
    def grid(self) -> Grid:
        return Grid(preset(self.parent), self.layers, self.depths, self.widths, self.setting)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Lists every child of the grid, with `memory_bytes` and whether it is `within` the budget."""
        table = self.grid.table()
        return table.assign(within=table["memory_bytes"] <= self.budget)

    def memory_gib(self, name: str, setting: Setting | None = None) -> float:
        """Memory of a preset's weights and state, in bytes."""
        return measure("memory_bytes", preset(name), setting or self.setting) / GIB

    def position(self) -> dict[str, int | float | bool]:
        """Summarises the position of the released child among those within the budget.

        Returns:
            The number of children, the number `within` the budget, whether child and parent are among these, the
            memory of both in GiB, the numbers that use `less` and `more` memory than the child, and the number of
            those using at least as much that are at least as large in every size (`larger`).
        """
        table, own = self.table, self.grid.row_of(preset(self.child))
        within = table[table["within"]]
        (found,) = self.grid.find(table, preset(self.child)).to_dict("records")
        others = within[within["memory_bytes"] != found["memory_bytes"]]
        larger = within
        for name, n in own.items():
            larger = larger[larger[name] >= n]
        parent = self.grid.find(within, preset(self.parent))
        return {
            "n": len(table),
            "n_within": len(within),
            "child_within": bool(found["within"]),
            "parent_within": len(parent) > 0 or self.memory_gib(self.parent) <= self.budget_gib,
            "child_gib": self.memory_gib(self.child),
            "parent_gib": self.memory_gib(self.parent),
            "n_less": int((others["memory_bytes"] < found["memory_bytes"]).sum()),
            "n_more": int((others["memory_bytes"] > found["memory_bytes"]).sum()),
            "n_larger": len(larger) - 1,
        }

    def depths_table(self) -> pd.DataFrame:
        """The first stage: depths at the parent's widths, with as many attention layers as the child.

        Returns:
            One row per depth and split into the other letters: its counts, `params_total`, `memory_gib`,
            `flops_decode` per token at the context, `decode_s` by roofline, and `within` the budget.
        """
        full = {name.rpartition(".")[2]: max(values) for name, values in self.widths.items()}
        counts = self.grid.counts
        counts = counts[counts["*"] == self.grid.row_of(preset(self.child))["*"]]
        rows = [{str(letter): int(n) for letter, n in row.items()} for row in counts.to_dict("records")]
        return self._measured([{**row, **full} for row in rows])

    def widths_table(self) -> pd.DataFrame:
        """The second stage: with the child's layers, the largest last width in budget for all other widths.

        Returns:
            Columns as in `depths_table`; `released` marks the child's own widths.
        """
        own = self.grid.row_of(preset(self.child))
        table = self.table[self.table["within"]]
        for letter in self.layers:
            table = table[table[letter] == own[letter]]
        *others, last = [name.rpartition(".")[2] for name in self.widths]
        largest = table.sort_values(last).groupby(others, sort=True).tail(1)
        shown = (
            pd.concat([largest, self.grid.find(table, preset(self.child))])
            .drop_duplicates()
            .sort_values([*others, last])
        )
        rows = [{str(name): int(n) for name, n in row.items()} for row in shown[list(own)].to_dict("records")]
        return self._measured(rows).assign(released=[row == own for row in rows])

    def _measured(self, rows: list[dict[str, int]]) -> pd.DataFrame:
        found = []
        for row in rows:
            memory, setting = self.grid.measured("memory_bytes", row), self.setting
            found.append(
                {
                    **row,
                    "layers": sum(row[letter] for letter in self.layers),
                    "params_total": int(measure("params_total", self.grid.model(row), setting)),
                    "memory_gib": memory / GIB,
                    "flops_decode": self.grid.measured("flops_decode", row),
                    "decode_s": self.grid.measured("decode_s", row),
                    "within": memory <= self.budget,
                }
            )
        return pd.DataFrame(found)


@dataclass(frozen=True)
class BlockSearch:
    """A search over replacements of every block, where a block is an attention and a feed-forward layer.

    Attributes:
        attention: published choices for an attention layer.
        widths: published choices for a feed-forward layer, as fractions of its width.
        others: further choices that are not widths.
    """

    parent: str
    child: str
    source: str
    attention: tuple[str, ...] = ("8 KV heads", "4 KV heads", "2 KV heads", "1 KV head", "linear", "none")
    widths: tuple[float, ...] = (1.0, 0.87, 0.75, 0.5, 0.25, 0.2, 0.1)
    others: tuple[str, ...] = ("linear", "none")

    @property
    def n_choices(self) -> int:
        """Number of choices per block."""
        return len(self.attention) * (len(self.widths) + len(self.others))

    @property
    def n_blocks(self) -> int:
        return sum(block.role == "attention" for block in preset(self.parent).layers)

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of models."""
        return self.n_blocks * math.log10(self.n_choices)

    @cached_property
    def alignment(self) -> Alignment:
        return align(preset(self.parent), preset(self.child))

    def blocks(self) -> pd.DataFrame:
        """Lists what the released child keeps of each block of its parent.

        Returns:
            One row per block: whether `attention` is kept, `d_ff` (0 if fused with others), its `share` of the
            parent's, and whether that share is within half a percentage point of a published width.
        """
        pairs = zip(self.alignment.parts[::2], self.alignment.parts[1::2], strict=True)
        rows = []
        for i, (attention, mlp) in enumerate(pairs):
            whole = int(getattr(mlp.block, "d_ff"))  # noqa: B009  (a field of this kind of block)
            d_ff = 0 if mlp.child is None else int(getattr(mlp.child, "d_ff"))  # noqa: B009
            share = d_ff / whole
            rows.append(
                (i, attention.child is not None, d_ff, share, any(abs(share - w) <= 0.005 for w in self.widths))
            )
        return pd.DataFrame(rows, columns=["block", "attention", "d_ff", "share", "is_printed"])


BF16 = Dtypes(state="bfloat16")

SEARCHES: Mapping[str, BudgetSearch | BlockSearch] = MappingProxyType(
    {
        search.parent: search
        for search in (
            BudgetSearch(
                "nemotron-nano-2-12b",
                "nemotron-nano-2-9b",
                "Nemotron Nano 2, arXiv 2508.14444, section 4",
                19.66,
                {"bf16, 131,072 tokens": Setting(131_072, 1, BF16, "A10G")},
                {"M": range(22, 29), "-": range(22, 29), "*": range(2, 7)},
                (52, 54, 56),
                {"d_model": range(4480, 5121, 320), "M.n_heads": (112, 120, 128), "d_ff": range(13_440, 20_481, 320)},
                "Printed are the budget, the depths and the ranges of the widths. The steps of the widths, and 2 to 6 "
                "attention layers at every split of the rest, are this kit's.",
            ),
            BudgetSearch(
                "nemotron-h-56b",
                "nemotron-h-47b",
                "Nemotron-H, arXiv 2504.03624, section 4",
                31.7,
                {
                    "4-bit weights, 8-bit KV, bf16 state": Setting(
                        1_000_000, 1, Dtypes("float4", "float8", "bfloat16")
                    ),
                    "4-bit weights, 8-bit KV, fp32 state": Setting(1_000_000, 1, Dtypes("float4", "float8", "float32")),
                    "4-bit weights, 8-bit KV and state": Setting(1_000_000, 1, Dtypes("float4", "float8", "float8")),
                    "4-bit weights, bf16 KV and state": Setting(1_000_000, 1, Dtypes("float4", "bfloat16", "bfloat16")),
                    "4-bit weights and KV, bf16 state": Setting(1_000_000, 1, Dtypes("float4", "float4", "bfloat16")),
                    "NVFP4 weights, 8-bit KV, bf16 state": Setting(1_000_000, 1, Dtypes("nvfp4", "float8", "bfloat16")),
                },
                {"M": range(40, 55), "-": range(40, 55), "*": range(1, 11)},
                (),
                {"d_ff": range(24_576, 32_769, 2048)},
                "Printed are the budget, that the counts of attention, MLP and Mamba layers were free, and the range "
                "of d_ff. The ranges of the counts and the step of d_ff are this kit's.",
            ),
            BlockSearch("llama-3.1-70b", "llama-nemotron-super-49b", "Llama-Nemotron, arXiv 2505.00949"),
            BlockSearch("llama-3.1-405b", "llama-nemotron-ultra-253b", "Llama-Nemotron, arXiv 2505.00949"),
        )
    }
)
"""Searches by the parent's preset."""


def published(parent: str) -> BudgetSearch | BlockSearch:
    """Returns the published search that starts from a preset.

    Raises:
        ValueError: there is none.
    """
    if parent not in SEARCHES:
        raise ValueError(f"published: must be one of {', '.join(SEARCHES)}, got {parent!r}")
    return SEARCHES[parent]
