"""Which ops of a run are compiled: those on which it gains more time than their compilation takes.

The gain is from a measured table, `regions.csv`: nanoseconds an element, forward and backward, by default and
compiled, the seconds of a first compilation, and the threads that shared the work. `explore bench --what regions
--save` measures another on this machine, which is taken from then on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from explore.blocks import BlockConfig
from explore.data.cache import cache_folder
from explore.model import ModelConfig
from explore.ops import is_forced, paths_that
from explore.table import read_table

SHIPPED = Path(__file__).with_name("regions.csv")
NUMBERS = ("default_ns", "compiled_ns", "compile_s", "threads")
MARGIN = 2.0
"""Times the seconds of a compilation that must be gained: shapes differ from the measured ones, and so do machines."""

COMPILED = tuple(paths_that(lambda path: path.compiled))
"""Ops that have a path named `compiled`."""


def own_table() -> Path:
    """The file of a table that was measured on this machine."""
    return cache_folder("bench") / "regions.csv"


def compiled_ops(
    model: ModelConfig, seq_len: int, n_tokens: int, precision: str, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """The ops that it pays to compile, each with the seconds that this saves and costs; no forced one.

    Only on a CPU, where a C++ compiler is: on CUDA kernels do what compilation would.

    Args:
        n_tokens: that a process trains on.
        device: torch's name of the type of device.

    Raises:
        ValueError: the table that was measured on this machine is none.
    """
    layers = list(_layers(model, seq_len))
    if device != "cpu" or not any(block.regions(length) for block, length in layers) or not _has_compiler():
        return {}
    own = own_table()
    table = _read(own if own.exists() else SHIPPED)
    found = {}
    for op in COMPILED:
        calls = [(block, length, block.regions(length)[op]) for block, length in layers if op in block.regions(length)]
        if is_forced(op) or not calls:
            continue
        row = _row(table, op, precision)
        n_elements = sum(region.n_elements * length / seq_len for _, length, region in calls) * n_tokens
        spared = 1e-9 * float(row["default_ns"] - row["compiled_ns"]) * float(row["threads"]) / torch.get_num_threads()
        shapes = {(block, part) for block, _, region in calls for part in region.lengths}
        saves, costs = spared * n_elements, float(row["compile_s"]) * len(shapes)
        if saves > MARGIN * costs:
            found[op] = {"saves_s": round(saves, 1), "costs_s": round(costs, 1)}
    return found


def _layers(model: ModelConfig, seq_len: int) -> Iterator[tuple[BlockConfig, int]]:
    """The layers, those of multi-token prediction too, and how many positions each of them sees."""
    depths = [(model.layers, seq_len)]
    if model.mtp is not None:
        blocks = tuple(model.blocks[letter] for letter in model.mtp.pattern)
        depths += [(blocks, seq_len - k) for k in range(1, model.mtp.n_depths + 1)]
    for blocks, length in depths:
        yield from ((block, length) for block in blocks)


@cache
def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # of several kinds, as torch looks for one
        return False


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
