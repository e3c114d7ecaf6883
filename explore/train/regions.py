"""Which ops of a run are compiled: those on which it gains more time than their compilation takes.

The gain is from a measured table, `regions.csv`: nanoseconds an element, forward and backward, by default and
compiled, the seconds of a first compilation, and the threads that shared the work. `explore bench --what regions
--save` measures another on this machine, which is taken from then on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from explore.blocks import Mamba2Config
from explore.data.cache import cache_folder
from explore.model import ModelConfig
from explore.ops import is_forced
from explore.runs import read_table

SHIPPED = Path(__file__).with_name("regions.csv")
NUMBERS = ("default_ns", "compiled_ns", "compile_s", "threads")
MARGIN = 2.0
"""Times the seconds of a compilation that must be gained: shapes differ from the measured ones, and so do machines."""

ELEMENTS: Mapping[str, Callable[[Mamba2Config], int]] = {
    "conv": lambda block: block.d_conv_channels,
    "norm": lambda block: block.d_inner,
    "ssd": lambda block: block.n_heads * block.chunk_size,
}
"""Elements a token of a layer, to which the time of an op is proportional."""


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
    layers = list(_mamba_layers(model, seq_len))
    if not layers or device != "cpu" or not _has_compiler():
        return {}
    own = own_table()
    table = _read(own if own.exists() else SHIPPED)
    found = {}
    for op in ELEMENTS:
        if is_forced(op):
            continue
        row = _row(table, op, precision)
        n_elements = sum(ELEMENTS[op](block) * length / seq_len for block, length in layers) * n_tokens
        spared = 1e-9 * float(row["default_ns"] - row["compiled_ns"]) * float(row["threads"]) / torch.get_num_threads()
        shapes = {(block, part) for block, length in layers for part in _parts(op, block, length)}
        saves, costs = spared * n_elements, float(row["compile_s"]) * len(shapes)
        if saves > MARGIN * costs:
            found[op] = {"saves_s": round(saves, 1), "costs_s": round(costs, 1)}
    return found


def _mamba_layers(model: ModelConfig, seq_len: int) -> Iterator[tuple[Mamba2Config, int]]:
    """The Mamba-2 layers, those of multi-token prediction too, and how many positions each of them sees."""
    depths = [(model.layers, seq_len)]
    if model.mtp is not None:
        blocks = tuple(model.blocks[letter] for letter in model.mtp.pattern)
        depths += [(blocks, seq_len - k) for k in range(1, model.mtp.n_depths + 1)]
    for blocks, length in depths:
        yield from ((block, length) for block in blocks if isinstance(block, Mamba2Config))


def _parts(op: str, block: Mamba2Config, length: int) -> tuple[int, ...]:
    """Lengths of the calls of an op, each of which is compiled: the scan of whole chunks, and that of what is left."""
    whole = length - length % block.chunk_size
    return tuple(filter(None, (whole, length - whole))) if op == "ssd" else (length,)


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
        for op in ELEMENTS:
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
