"""Which implementation of an op runs: the default, or one that was forced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

P = ParamSpec("P")
T = TypeVar("T")

PATHS: Mapping[str, tuple[str, ...]] = {
    "attention": ("blocked", "sdpa", "written_out", "sums"),
    "conv": ("shift", "conv1d", "compiled"),
    "experts": ("padded", "loop", "dense", "triton"),
    "linear": ("transposed", "plain", "vectors"),
    "loss": ("sliced", "whole", "triton"),
    "norm": ("by_hand", "eager", "compiled"),
    "ssd": ("chunked", "recurrent", "mamba_ssm", "triton", "compiled"),
}
"""Every op with its implementations, the default on a CPU first."""

ELSEWHERE: Mapping[str, str] = {"attention": "sdpa", "conv": "conv1d", "linear": "plain"}
"""The default on other devices, where it is another."""

CUDA: Mapping[str, tuple[str, ...]] = {"experts": ("triton",), "loss": ("triton",), "ssd": ("mamba_ssm", "triton")}
"""The default on CUDA: the first of these whose package imports, before those above."""

MODULES: Mapping[str, str] = {"mamba_ssm": "mamba_ssm.ops.triton.ssd_combined", "triton": "triton"}
"""What an implementation needs to import."""

MAX_SHAPES = 64
"""Shapes of a function that are compiled in one process, as where a sweep trains many; others run as they are."""

STEP: Mapping[str, Any] = {
    "cpp_wrapper": True,
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "ATEN,CPP",
    "epilogue_fusion": False,  # fails to compile after some products, and gains nothing after others
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}
"""Options of torch's compiler for a step of decoding."""

_forced: ContextVar[Mapping[str, str]] = ContextVar("forced_paths", default=MappingProxyType({}))


def path_of(op: str, device: str = "cpu") -> str:
    """Name of the implementation of `op` that runs now; compiled code keeps the one it was compiled with.

    Args:
        device: torch's name of the type of device.
    """
    return _forced.get().get(op) or _default(op, device)


assume_constant_result(path_of)  # marks it, since a context variable would break a compiled graph


def is_forced(op: str) -> bool:
    """Whether somebody has forced an implementation of `op`."""
    return op in _forced.get()


def same_paths() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed pass and of its recomputation, which may come after a `forced_paths` has ended."""
    return nullcontext(), forced_paths(**_forced.get())


def _default(op: str, device: str) -> str:
    if device == "cuda" and (kernels := [path for path in CUDA.get(op, ()) if _imports(MODULES[path])]):
        return kernels[0]
    return PATHS[op][0] if device in ("cpu", "meta") else ELSEWHERE.get(op, PATHS[op][0])


@cache
def _imports(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of `x` are made in: autocast's dtype where that is on; for ops that it does not reach."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def paths_in_use(device: str = "cpu") -> dict[str, str]:
    """Every op with the implementation that runs now on a type of device, for the run record."""
    return {op: path_of(op, device) for op in PATHS}


@cache
def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function compiled by torch: for each shape once, which takes from ten seconds to a minute."""
    torch._dynamo.config.recompile_limit = max(MAX_SHAPES, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False)


@cache
def compiled_step(function: Callable[P, T], varying: str) -> Callable[P, T]:
    """A step of decoding compiled by torch, whose loops are short and many.

    What calls them is C++ as well, and products are loops too where those are measured to be faster.

    Args:
        varying: the numbers that differ from step to step, as torch names them, by a regular expression. Others that
            are seen to change cost one more compilation.
    """
    known = torch.compiler.config.dynamic_sources
    torch.compiler.config.dynamic_sources = f"{known},{varying}" if known else varying
    torch._dynamo.config.recompile_limit = max(MAX_SHAPES, torch._dynamo.config.recompile_limit)
    return torch.compile(function, options=dict(STEP))


@contextmanager
def forced_paths(**paths: str) -> Iterator[None]:
    """Forces implementations inside a `with` block, for example `forced_paths(ssd="recurrent")`.

    Raises:
        ValueError: an op or an implementation that does not exist.
    """
    for op, path in paths.items():
        if path not in PATHS.get(op, ()):
            known = PATHS.get(op, tuple(PATHS))
            raise ValueError(f"{op}: {path!r} is unknown; allowed are {', '.join(known)}")
    token = _forced.set({**_forced.get(), **paths})
    try:
        yield
    finally:
        _forced.reset(token)
