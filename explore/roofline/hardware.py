"""Hardware: peak rates, memory and links of known devices, of user-defined ones, and (measured) of this machine."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from pydantic import ConfigDict, PositiveFloat, PositiveInt

from explore.config import Config, Frozen
from explore.cost import Dtype, Stored
from explore.files import read_json
from explore.precision import FORMATS

GIB = 2**30


class Hardware(Config):
    """A device and its links. Known devices are in `gpus.json`; a user's file has the same fields and a name.

    Attributes:
        flops_per_s: peak FLOP/s of dense matrix products, by dtype of the operands.
        memory_bytes: memory in the datasheet.
        usable_bytes: memory that the driver leaves to a process; default: `memory_bytes`.
        bandwidth: bytes per second between memory and processor.
        link: bytes per second to devices of the same domain, one direction.
        domain_size: number of devices that share the fast link.
        network: bytes per second per device to other domains, one direction; default: `link`.
        host_link: bytes per second between a device and its CPU's memory, one direction; None if unknown.
        transposes_fp8: FP8 products read transposed operands, so a weight with one scale needs no transposed copy.
            Blackwell does and Hopper does not (Transformer Engine, `non_tn_fp8_gemm_supported`).
        source: source of the figures.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    name: str
    flops_per_s: Frozen[Dtype, PositiveFloat]
    memory_bytes: PositiveFloat
    usable_bytes: PositiveFloat | None = None
    bandwidth: PositiveFloat
    link: PositiveFloat
    domain_size: PositiveInt = 1
    network: PositiveFloat | None = None
    host_link: PositiveFloat | None = None
    transposes_fp8: bool = False
    source: str

    def peak(self, dtype: Stored) -> float:
        """Peak FLOP/s for operands of `dtype`, or of the next wider dtype that the device can multiply.

        Raises:
            ValueError: the device multiplies neither.
        """
        operands = OPERANDS.get(dtype, dtype)
        for wider in ORDER[ORDER.index(operands) :]:
            if wider in self.flops_per_s:
                return self.flops_per_s[wider]
        raise ValueError(f"dtype must be one of {', '.join(self.flops_per_s)} on {self.name}, got {dtype!r}")

    def ridge(self, dtype: Stored) -> float:
        """FLOPs per byte above which matrix products, not memory, are the limit."""
        return self.peak(dtype) / self.bandwidth


ORDER: tuple[Dtype, ...] = ("float4", "float8", "float16", "bfloat16", "float32")
"""Dtypes of matrix products, narrowest first: operands are widened if a device cannot multiply them."""

_ELEMENTS: Mapping[str, Dtype] = {
    "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "e2m1": "float4", "int8": "bfloat16",
}  # fmt: skip
OPERANDS: Mapping[str, Dtype] = {name: _ELEMENTS.get(entry.element, "float8") for name, entry in FORMATS.items()}
"""Dtype in which each format's elements are multiplied; int8 is only for storage."""

GPUS: Mapping[str, Hardware] = MappingProxyType(
    {name: Hardware(name=name, **record) for name, record in read_json(Path(__file__).with_name("gpus.json")).items()}
)
HERE = "here"


def hardware(name: str) -> Hardware:
    """A device by name, or from a JSON file of its fields; `here` is this machine, measured on first use.

    Raises:
        ValueError: the device is unknown (the message gives the nearest names), or the file is invalid.
    """
    if name == HERE:
        return measured()
    if name.endswith(".json"):
        return Hardware.validated(read_json(Path(name)), name)
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    near = difflib.get_close_matches(name.upper(), GPUS, n=2, cutoff=0.3)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise ValueError(f"hardware must be one of {', '.join(GPUS)}, a JSON file or {HERE}, got {name!r}{hint}")


@cache
def measured() -> Hardware:
    """This machine, measured: the fastest of several matrix products and of several copies; no link."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names: Mapping[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    n = 8192 if device == "cuda" else 1536
    rates: dict[Dtype, float] = {}
    for name, dtype in names.items():
        a = torch.randn(n, n, device=device, dtype=dtype)
        rates[name] = 2 * n**3 / _fastest(lambda a=a: a @ a, device)  # type: ignore[misc]
    block = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    other = torch.empty_like(block)
    seconds = _fastest(lambda: other.copy_(block), device)
    if device == "cuda":
        where, memory = torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1])
    else:
        where, memory = f"{os.cpu_count()} cores", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Hardware(
        name=HERE,
        flops_per_s=rates,
        memory_bytes=memory,
        bandwidth=2 * block.numel() * block.element_size() / seconds,
        link=float("inf"),
        source=f"measured on {where}: products of {n} x {n} matrices, a copy of {block.numel() * 4 / GIB:g} GiB",
    )


def _fastest(work: Callable[[], object], device: str, repeats: int = 5, limit_s: float = 2.0) -> float:
    """Seconds of the fastest repeat; no repeat starts after the time limit."""
    import torch

    best, started = float("inf"), time.perf_counter()
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        best = min(best, ended - began)
        if ended - started > limit_s:
            break
    return best
