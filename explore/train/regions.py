"""Chooses the ops that a run compiles: those that save more time than their compilation takes.

The C++ kernels are compiled together, so they are worth it if all of them together save enough. The saving is read from
a measured table, `regions.csv`: nanoseconds per element, forward and backward, default and compiled, seconds of a first
compilation, and number of threads. `explore bench --what regions --save` measures a new table on this machine, which is
used from then on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from explore.cost import in_formats
from explore.data.cache import cache_folder
from explore.model import ModelConfig
from explore.ops import NO_COMPILER, compiler_failure, has_compiler, is_forced, paths_that
from explore.precision import Recipe
from explore.table import read_table

SHIPPED = Path(__file__).with_name("regions.csv")
NUMBERS = ("default_ns", "compiled_ns", "compile_s", "threads")
MARGIN = 2.0
"""Compile only if it saves this many times its own cost: shapes and machines differ from the measured ones."""

QUANTIZE = "quantize"
"""The op that quantises operands of any block if the precision recipe does."""

COMPILED = tuple(op for op in paths_that(lambda path: path.compiled) if op != QUANTIZE)
"""Ops that have a C++ kernel."""


def own_table() -> Path:
    """The path of the table measured on this machine."""
    return cache_folder("bench") / "regions.csv"


def compiled_ops(
    model: ModelConfig,
    seq_len: int,
    n_tokens: int,
    precision: str,
    device: str = "cpu",
    recipe: Recipe | None = None,
) -> dict[str, dict[str, float]]:
    """Returns the ops worth compiling, each with the seconds it saves and its share of the seconds spent.

    An op whose path is forced is never among them. Only on a CPU with a C++ compiler: on CUDA, kernels take the place
    of compilation.

    Args:
        n_tokens: number of tokens that one process trains on.
        device: device type, as torch names it.
        recipe: precision recipe of the run, if operands of products are quantised.

    Raises:
        ValueError: the table measured on this machine cannot be read.
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
    """A note if the run would gain from a compiler and there is none; otherwise empty."""
    found = _gains(model, seq_len, n_tokens, precision, device, recipe)
    if not found or has_compiler():
        return []
    gained = sum(op["saves_s"] - op["costs_s"] for op in found.values())
    return [f"{NO_COMPILER}, so nothing is compiled; with one this run would take about {gained:.0f} s less"]


def _gains(
    model: ModelConfig, seq_len: int, n_tokens: int, precision: str, device: str, recipe: Recipe | None
) -> dict[str, dict[str, float]]:
    """The ops that would be worth compiling if there is a compiler."""
    if device != "cpu":
        return {}
    calls = list(_calls(model, seq_len))
    own = own_table()
    table = _read(own if own.exists() else SHIPPED)
    kernels: dict[str, float] = {}
    compile_s = 0.0
    for op in COMPILED:
        n_elements = n_tokens * sum(n for name, n in calls if name == op)
        if n_elements and not is_forced(op):
            saves, costs = _saved(_row(table, op, precision), n_elements)
            if saves > 0:
                kernels[op], compile_s = saves, max(compile_s, costs)
    found: dict[str, tuple[float, float]] = {}
    if sum(kernels.values()) > MARGIN * compile_s:  # one compilation for all of them
        found = {op: (saves, compile_s / len(kernels)) for op, saves in kernels.items()}
    if recipe is not None and not is_forced(QUANTIZE):
        saves, costs = _quantizer(table, model, recipe, n_tokens)
        if saves > MARGIN * costs:
            found[QUANTIZE] = saves, costs
    return {op: {"saves_s": round(saves, 1), "costs_s": round(costs, 1)} for op, (saves, costs) in found.items()}


def _saved(row: pd.Series[float], n_elements: float, n_shapes: int = 1) -> tuple[float, float]:
    """Seconds that compiling an op saves and costs a run."""
    spared = 1e-9 * float(row["default_ns"] - row["compiled_ns"]) * float(row["threads"]) / torch.get_num_threads()
    return spared * n_elements, float(row["compile_s"]) * n_shapes


def _quantizer(table: pd.DataFrame, model: ModelConfig, recipe: Recipe, n_tokens: int) -> tuple[float, float]:
    """Seconds saved and spent on the quantisers of all products, by operand width and format."""
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
            routed = entry.all_to_all_numel > 0  # each row has the scale of its expert
            for x, dy in ((d_in, d_out), (d_out, d_in)) if rest else ((d_in, d_out),):
                of_rows = {(operand, width, axis) for operand, width in (("x", x), ("dy", dy)) for axis in (0, 1)}
                shapes |= {(last, routed, *shape) for shape in (*of_rows, ("w", x, dy))}
    return _saved(_row(table, QUANTIZE, last), n_elements * n_tokens, len(shapes))


def _calls(model: ModelConfig, seq_len: int) -> Iterator[tuple[str, float]]:
    """The ops of loss and layers, including multi-token prediction, with their elements per token of the sequence."""
    depths = [(model.layers, seq_len)]
    if model.mtp is not None:
        blocks = tuple(model.blocks[letter] for letter in model.mtp.pattern)
        depths += [(blocks, seq_len - k) for k in range(1, model.mtp.n_depths + 1)]
    for blocks, length in depths:
        yield "loss", model.vocab_size * length / seq_len
        for block in blocks:
            for op, n_elements in {"norm": model.d_model, **block.regions(length)}.items():
                yield op, n_elements * length / seq_len


def _read(path: Path) -> pd.DataFrame:
    """The table; ops that it lacks, because an earlier version measured it, have the rows of the shipped table."""
    try:
        table = read_table(path)
        for op, rows in table.groupby("op"):
            numbers = rows[[*NUMBERS]].to_numpy(dtype=float)
            if not (np.isfinite(numbers).all() and (numbers > 0).all()):
                raise ValueError(f"{op} has no numbers above 0 in {', '.join(NUMBERS)}")
        shipped = read_table(SHIPPED)
        return pd.concat([table, shipped[~shipped["op"].isin(table["op"])]])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}; `explore bench --what regions --save` makes a new one") from None


def _row(table: pd.DataFrame, op: str, precision: str) -> pd.Series[float]:
    """The measurements of an op in this precision, or else in the one that was measured."""
    rows = table[table["op"] == op]
    exact = rows[rows["precision"] == precision]
    return (rows if exact.empty else exact).iloc[0]


def keep_compiled() -> None:
    """Keeps torch's compiled code with the other cached files, so that it survives a reboot."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))
