"""Selects the implementation of an op: the default or a forced one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class OpPath(NamedTuple):
    """One implementation of an op.

    Attributes:
        name: its name in `forced_paths`.
        default_on: type of device on which it is the default: `cpu`, `cuda`, or `any` for types without a default. If a
            type has several, the default is the first whose package can be imported.
        needs: module that it imports; without the module it fails and is not a default.
        reference: the slow, obvious implementation that the others are tested against.
        countable: torch's dispatcher sees all its matrix products, and they are those that the ledger counts.
        backward: whether it has a backward pass. A path without one computes a few positions in decoding; larger inputs
            and gradients use another path.
        compiled: it needs a C++ compiler: a kernel of `explore.kernels`, all of which are compiled once per machine, or
            code that torch compiles once per shape.
        stepwise: it computes positions one after another, so it is slow for long sequences.
        decoding: a compiled decoding step uses it.
    """

    name: str
    default_on: Literal["", "cpu", "cuda", "any"] = ""
    needs: str = ""
    reference: bool = False
    countable: bool = False
    backward: bool = True
    compiled: bool = False
    stepwise: bool = False
    decoding: bool = False


_declared: dict[str, tuple[OpPath, ...]] = {}

PATHS: Mapping[str, tuple[OpPath, ...]] = MappingProxyType(_declared)
"""Implementations by op; the file of each op declares them."""

_forced: ContextVar[Mapping[str, str]] = ContextVar("forced_paths", default=MappingProxyType({}))


def declare(op: str, *paths: OpPath) -> None:
    """Registers the implementations of an op. The file of the op calls it once.

    Raises:
        ValueError: no path is the default on every device.
    """
    if not any(path.default_on == "any" and not path.needs for path in paths):
        raise ValueError(f"{op}: one path must have default_on='any' and need no package, got {paths}")
    _declared[op] = paths


def paths_that(fits: Callable[[OpPath], bool]) -> dict[str, str]:
    """Returns the first path of each op that fits, as arguments of `forced_paths`; an op without one is omitted."""
    first = ((op, next(filter(fits, paths), None)) for op, paths in PATHS.items())
    return {op: path.name for op, path in first if path is not None}


def path_of(op: str, device: str = "cpu") -> str:
    """Name of the implementation of `op` that runs now. Compiled code keeps the one with which it was compiled.

    Args:
        device: type of device, as torch names it.
    """
    return _forced.get().get(op) or _default(op, device)


# The context variable would break a compiled graph without this mark. `torch.compiler.assume_constant_result` sets the
# same attribute, but imports the compiler, which takes a second or two.
path_of.__dict__["_dynamo_marked_constant"] = True


def is_forced(op: str) -> bool:
    """Whether an implementation of `op` is forced."""
    return op in _forced.get()


def same_paths() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed pass and of its recomputation, which may run after the end of a `forced_paths`."""
    return nullcontext(), forced_paths(**_forced.get())


def _default(op: str, device: str) -> str:
    for kind in ("cpu" if device == "meta" else device, "any"):
        for path in PATHS[op]:
            if path.default_on == kind and (not path.needs or _imports(path.needs)):
                return path.name
    raise AssertionError(f"{op}: no path is the default on {device}, although `declare` requires one")


@cache
def _imports(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of `x`: autocast's if that is on. For ops that autocast does not cast itself."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def paths_in_use(device: str = "cpu") -> dict[str, str]:
    """Name of the implementation that runs now on a type of device, by op, for the run record."""
    return {op: path_of(op, device) for op in sorted(PATHS)}


@contextmanager
def forced_paths(**paths: str) -> Iterator[None]:
    """Forces implementations inside a `with` block, for example `forced_paths(ssd="recurrent")`.

    Raises:
        ValueError: the op or the implementation does not exist.
    """
    for op, path in paths.items():
        known = [each.name for each in PATHS.get(op, ())]
        if path not in known:
            raise ValueError(f"{op} must be one of {', '.join(known or sorted(PATHS))}, got {path!r}")
    token = _forced.set({**_forced.get(), **paths})
    try:
        yield
    finally:
        _forced.reset(token)
