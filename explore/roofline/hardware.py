"""Named hardware: peak rates, memory and links, each with its source; and this machine, measured."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from explore.cost import Dtype, Stored
from explore.precision import FORMATS

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        flops_per_s: peak of dense matrix products by dtype of their operands, without sparsity.
        memory_bytes: what models and state can live in.
        bandwidth: bytes per second between that memory and the processor.
        link: bytes per second to other devices, one direction.
        source: where the figures stand.
    """

    name: str
    flops_per_s: Mapping[Dtype, float] = field(hash=False)
    memory_bytes: float
    bandwidth: float
    link: float
    source: str

    def peak(self, dtype: Stored) -> float:
        """Peak FLOP/s for operands of `dtype`; of the next wider dtype that the device multiplies.

        Raises:
            ValueError: it multiplies neither.
        """
        operands = OPERANDS.get(dtype, dtype)
        for wider in ORDER[ORDER.index(operands) :]:
            if wider in self.flops_per_s:
                return self.flops_per_s[wider]
        raise ValueError(f"dtype: {self.name} has no rate for {dtype!r}; allowed are {', '.join(self.flops_per_s)}")

    def ridge(self, dtype: Stored) -> float:
        """FLOPs per byte above which matrix products, not memory, are the limit."""
        return self.peak(dtype) / self.bandwidth


ORDER: tuple[Dtype, ...] = ("float4", "float8", "float16", "bfloat16", "float32")
"""Dtypes in which products can be taken, the narrow first: operands are widened where a device knows no product."""

_ELEMENTS: Mapping[str, Dtype] = {
    "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "e2m1": "float4", "int8": "bfloat16",
}  # fmt: skip
OPERANDS: Mapping[str, Dtype] = {name: _ELEMENTS.get(entry.element, "float8") for name, entry in FORMATS.items()}
"""Dtypes in which elements of a format are multiplied; int8 is for storage."""


def _gpu(name: str, tera: Mapping[Dtype, float], memory: float, bandwidth: float, link: float, source: str) -> Hardware:
    """A device in teraFLOP/s, bytes, GB/s and GB/s."""
    rates = MappingProxyType({dtype: value * TERA for dtype, value in tera.items()})
    return Hardware(name, rates, memory, bandwidth * GB, link * GB, source)


GPUS: Mapping[str, Hardware] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            _gpu(
                "A10G",
                {"bfloat16": 70, "float32": 35},
                22.06 * GIB,
                600,
                32,
                "NVIDIA A10G in AWS G5: 70 TFLOP/s tensor, 600 GB/s; PCIe 4.0 x16; 22.06 GiB usable, arXiv 2508.14444",
            ),
            _gpu(
                "A100",
                {"bfloat16": 312, "float32": 19.5},
                80 * GB,
                2039,
                300,
                "NVIDIA A100 80GB SXM datasheet: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s in both directions",
            ),
            _gpu(
                "H100",
                {"bfloat16": 989.4, "float8": 1978.9, "float32": 67},
                80 * GB,
                3350,
                450,
                "NVIDIA H100 SXM datasheet, half the figures with sparsity; NVLink 900 GB/s in both directions",
            ),
            _gpu(
                "H200",
                {"bfloat16": 989.4, "float8": 1978.9, "float32": 67},
                141 * GB,
                4800,
                450,
                "NVIDIA H200 SXM datasheet, half the figures with sparsity; NVLink 900 GB/s in both directions",
            ),
            _gpu(
                "B200",
                {"bfloat16": 2250, "float8": 4500, "float4": 9000, "float32": 75},
                180 * GB,
                7700,
                900,
                "NVIDIA HGX B200 datasheet, an eighth of eight devices, dense; NVLink 1.8 TB/s in both directions",
            ),
            _gpu(
                "GB200",
                {"bfloat16": 2500, "float8": 5000, "float4": 10_000, "float32": 80},
                186 * GB,
                8000,
                900,
                "NVIDIA GB200 NVL72 datasheet, per device, dense; the figures of arXiv 2601.18089",
            ),
        )
    }
)
HERE = "here"


def hardware(name: str) -> Hardware:
    """A device by name; `here` is this machine, measured on first use.

    Raises:
        ValueError: no such device; the nearest names are given.
    """
    if name == HERE:
        return measured()
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    near = difflib.get_close_matches(name.upper(), GPUS, n=2, cutoff=0.3)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise ValueError(f"hardware: {name!r} is unknown{hint}; allowed are {', '.join(GPUS)} and {HERE}")


@cache
def measured() -> Hardware:
    """This machine: the best of several matrix products and of several copies; it has no link."""
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
        HERE,
        MappingProxyType(rates),
        memory,
        2 * block.numel() * block.element_size() / seconds,
        float("inf"),
        f"measured on {where}: products of {n} x {n} matrices, a copy of {block.numel() * 4 / GIB:g} GiB",
    )


def _fastest(work: Callable[[], object], device: str, repeats: int = 5, limit_s: float = 2.0) -> float:
    """Seconds of the fastest of several repeats, of which none begins after the limit."""
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
