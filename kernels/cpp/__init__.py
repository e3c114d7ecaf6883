"""Compiles the C++ kernels and hands tensors to them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent


@cache
def library() -> ctypes.CDLL:
    """Compiles all C++ kernels together, in twenty seconds; torch keeps the result with its own compiled code.

    Most of that time goes into the headers, so one library takes little longer than one kernel. The source of each
    kernel is in a namespace with the name of its folder. A function takes whether tensors are bf16, and addresses.

    Raises:
        RuntimeError: the compiler is missing or fails; an error of `torch._inductor.exc`.
    """
    from torch._inductor.codecache import CppCodeCache

    sources = sorted(FOLDER.parent.glob("*/*.cpp"))
    parts = [f"namespace {source.parent.name} {{\n{source.read_text()}\n}}\n" for source in sources]
    loaded: ctypes.CDLL = CppCodeCache.load((FOLDER / "common.h").read_text() + "".join(parts))
    for source in sources:
        for name in re.findall(r"^void (\w+)\(bool", source.read_text(), re.MULTILINE):
            getattr(loaded, name).restype = None
    return loaded


def integers(*numbers: int) -> ctypes.Array[ctypes.c_int64]:
    """An array of 64-bit integers for a kernel."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def views(*tensors: Tensor | None, strides: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Address and the chosen strides of each tensor; zeros for None."""
    none = (0,) * (1 + len(strides))
    return integers(
        *(
            number
            for x in tensors
            for number in (none if x is None else (x.data_ptr(), *(x.stride(axis) for axis in strides)))
        )
    )


def dense(x: Tensor) -> Tensor:
    """The tensor itself if the values of its last axis are adjacent, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def computes(*tensors: Tensor) -> bool:
    """Whether kernels compute these tensors: all fp32 on a CPU, or all bf16 on a CPU with AVX-512 bf16."""
    dtypes = {x.dtype for x in tensors}
    on_cpu = all(x.device.type == "cpu" for x in tensors)
    return on_cpu and (dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and _has_bf16()))


@cache
def _has_bf16() -> bool:
    """Whether the CPU has the instructions, and oneDNN may use them (ONEDNN_MAX_CPU_ISA)."""
    return torch.cpu._is_avx512_bf16_supported() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_bf16(x: Tensor) -> ctypes.c_bool:
    """Whether a tensor is bf16, for a kernel."""
    return ctypes.c_bool(x.dtype == torch.bfloat16)
