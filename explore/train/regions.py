"""Which ops of a run are compiled: those on which it gains more time than their compilation takes.

The gain is from a measured table, `regions.csv`: nanoseconds an element, forward and backward, by default and
compiled, the seconds of a first compilation, and the threads that shared the work. `explore bench --what regions
--save` measures another on this machine, which is taken from then on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from explore.blocks import BlockConfig
from explore.cost import in_formats
from explore.data.cache import cache_folder
from explore.model import ModelConfig
from explore.ops import NO_COMPILER, compiler_failure, has_compiler, is_forced, paths_that
from explore.precision import Recipe
from explore.table import read_table

SHIPPED = Path(__file__).with_name("regions.csv")
NUMBERS = ("default_ns", "compiled_ns", "compile_s", "threads")
MARGIN = 2.0
"""Times the seconds of a compilation that must be gained: shapes differ from the measured ones, and so do machines."""

QUANTIZE = "quantize"
"""The op that quantises operands of any block, where a recipe of precision wants that."""

COMPILED = tuple(op for op in paths_that(lambda path: path.compiled) if op != QUANTIZE)
"""Ops of blocks that have a path named `compiled`."""


def own_table() -> Path:
    """The file of a table that was measured on this machine."""
    return cache_folder("bench") / "regions.csv"


def compiled_ops(
    model: ModelConfig,
    seq_len: int,
    n_tokens: int,
    precision: str,
    device: str = "cpu",
    recipe: Recipe | None = None,
) -> dict[str, dict[str, float]]:
    """The ops that it pays to compile, each with the seconds that this saves and costs; no forced one.

    Only on a CPU, where a C++ compiler is: on CUDA kernels do what compilation would.

    Args:
        n_tokens: that a process trains on.
        device: torch's name of the type of device.
        recipe: of the run, where operands of products are quantised.

    Raises:
        ValueError: the table that was measured on this machine is none.
    """
    found = _gains(model, seq_len, n_tokens, precision, device, recipe)
    return found if found and compiler_failure() is None and has_compiler() else {}


def missing_compiler(
    model: ModelConfig,
    seq_len: int,
    n_tokens: int,
    precision: str,
    device: str = "cpu",
    recipe: Recipe | None = None,
) -> list[str]:
    """What to say of a run that would gain by a compiler and finds none; nothing otherwise."""
    found = _gains(model, seq_len, n_tokens, precision, device, recipe)
    if not found or has_compiler():
        return []
    gained = sum(op["saves_s"] - op["costs_s"] for op in found.values())
    return [f"{NO_COMPILER}, so nothing is compiled; with one this run would take about {gained:.0f} s less"]


def _gains(
    model: ModelConfig, seq_len: int, n_tokens: int, precision: str, device: str, recipe: Recipe | None
) -> dict[str, dict[str, float]]:
    """The ops that it would pay to compile, where a compiler is."""
    layers = list(_layers(model, seq_len))
    has_regions = recipe is not None or any(block.regions(length) for block, length in layers)
    if device != "cpu" or not has_regions:
        return {}
    own = own_table()
    table = _read(own if own.exists() else SHIPPED)
    found: dict[str, tuple[float, float]] = {}
    for op in COMPILED:
        calls = [(block, length, block.regions(length)[op]) for block, length in layers if op in block.regions(length)]
        if is_forced(op) or not calls:
            continue
        n_elements = sum(region.n_elements * length / seq_len for _, length, region in calls) * n_tokens
        shapes = {(block, part) for block, _, region in calls for part in region.lengths}
        found[op] = _saved(_row(table, op, precision), n_elements, len(shapes))
    if recipe is not None and not is_forced(QUANTIZE):
        found[QUANTIZE] = _quantizer(table, model, recipe, n_tokens)
    return {
        op: {"saves_s": round(saves, 1), "costs_s": round(costs, 1)}
        for op, (saves, costs) in found.items()
        if saves > MARGIN * costs
    }


def _saved(row: pd.Series[float], n_elements: float, n_shapes: int) -> tuple[float, float]:
    """Seconds that a run saves and spends by compiling an op."""
    spared = 1e-9 * float(row["default_ns"] - row["compiled_ns"]) * float(row["threads"]) / torch.get_num_threads()
    return spared * n_elements, float(row["compile_s"]) * n_shapes


def _quantizer(table: pd.DataFrame, model: ModelConfig, recipe: Recipe, n_tokens: int) -> tuple[float, float]:
    """Seconds for the quantisers of all products, by width of what is quantised and by format."""
    n_elements, shapes, last = 0.0, set(), "bf16"
    for row in in_formats(model.ledger(1), recipe):
        entry = row.entry
        if entry.is_quantized and entry.weight is not None:
            last = entry.weight
            d_in, *rest = entry.sums_over
            # One width: a matrix (d_in, d_out). Two: matrices (d_in, d_out) and (d_out, d_in).
            d_out = rest[0] if rest else entry.flops_seq // (2 * d_in)
            n_matrices = entry.flops_seq / (2 * d_in * d_out)
            n_elements += 2 * n_matrices * (d_in + d_out)  # each operand in two products
            routed = entry.all_to_all_numel > 0  # where each row has the scale of its expert
            for x, dy in ((d_in, d_out), (d_out, d_in)) if rest else ((d_in, d_out),):
                of_rows = {(operand, width, axis) for operand, width in (("x", x), ("dy", dy)) for axis in (0, 1)}
                shapes |= {(last, routed, *shape) for shape in (*of_rows, ("w", x, dy))}
    rows = table if (table["op"] == QUANTIZE).any() else _read(SHIPPED)
    return _saved(_row(rows, QUANTIZE, last), n_elements * n_tokens, len(shapes))


def _layers(model: ModelConfig, seq_len: int) -> Iterator[tuple[BlockConfig, int]]:
    """The layers, those of multi-token prediction too, and how many positions each of them sees."""
    depths = [(model.layers, seq_len)]
    if model.mtp is not None:
        blocks = tuple(model.blocks[letter] for letter in model.mtp.pattern)
        depths += [(blocks, seq_len - k) for k in range(1, model.mtp.n_depths + 1)]
    for blocks, length in depths:
        yield from ((block, length) for block in blocks)


def _read(path: Path) -> pd.DataFrame:
    try:
        table = read_table(path)
        for op in COMPILED:
            numbers = table.loc[table["op"] == op, [*NUMBERS]].to_numpy(dtype=float)
            if not (len(numbers) and np.isfinite(numbers).all() and (numbers > 0).all()):
                raise ValueError(f"{op} has no numbers above 0 in {', '.join(NUMBERS)}")
        return table
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}; `explore bench --what regions --save` makes it anew") from None


def _row(table: pd.DataFrame, op: str, precision: str) -> pd.Series[float]:
    """What was measured in this precision, or in the one that was measured."""
    rows = table[table["op"] == op]
    exact = rows[rows["precision"] == precision]
    return (rows if exact.empty else exact).iloc[0]


def keep_compiled() -> None:
    """Keeps what torch compiles with the other cached files, where a reboot leaves it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))
