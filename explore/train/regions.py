"""Which ops of a run are compiled: those on which it gains more time than their compilation takes.

The gain is from a measured table, `regions.csv`: nanoseconds an element, forward and backward, by default and
compiled, and the seconds of a first compilation. `explore bench --what regions --save` measures another on this
machine, which is taken from then on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from explore.blocks import BlockConfig, Mamba2Config
from explore.data.cache import cache_folder
from explore.ops import is_forced
from explore.runs import read_table

SHIPPED = Path(__file__).with_name("regions.csv")
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
    blocks: Iterable[BlockConfig], n_tokens: int, precision: str, device: str
) -> dict[str, dict[str, float]]:
    """The ops that a run compiles, each with the seconds that this saves and costs; no forced one.

    Only a CPU's, where a C++ compiler is: on CUDA kernels do what compilation would.

    Args:
        blocks: of the layers of the model.
        n_tokens: of the whole run, so that one that goes on decides as it did.
        device: torch's name of the type of device.
    """
    if device != "cpu" or shutil.which(os.environ.get("CXX", "c++")) is None:
        return {}
    layers = [block for block in blocks if isinstance(block, Mamba2Config)]
    own = own_table()
    table = read_table(own if own.exists() else SHIPPED)
    found = {}
    for op, elements in ELEMENTS.items():
        if is_forced(op):
            continue
        row = _row(table, op, precision)
        n_elements = n_tokens * sum(map(elements, layers))
        saves = 1e-9 * (row["default_ns"] - row["compiled_ns"]) * n_elements
        costs = row["compile_s"] * len(set(layers))
        if saves > MARGIN * costs:
            found[op] = {"saves_s": round(saves, 1), "costs_s": round(costs, 1)}
    if found:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))
    return found


def _row(table: pd.DataFrame, op: str, precision: str) -> pd.Series[Any]:
    """What was measured in this precision, or in the one that was measured."""
    rows = table[table["op"] == op]
    exact = rows[rows["precision"] == precision]
    return (rows if exact.empty else exact).iloc[0]
