"""Functions compiled by torch, which can run uncompiled if the compiler fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from explore.machine import causes

P = ParamSpec("P")
T = TypeVar("T")

MAX_SHAPES = 64
"""Maximum number of shapes compiled per function and process (a sweep may train many); others run uncompiled."""

STEP: Mapping[str, Any] = {
    "cpp_wrapper": True,
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "ATEN,CPP",
    "epilogue_fusion": False,  # fails to compile after some products and saves no time after others
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}
"""Options of torch's compiler for a decoding step."""

SHOWN_CHARS = 120
"""Maximum number of characters shown of a compiler message."""


NO_COMPILER = "no C++ compiler was found (g++, or the one named by CXX)"


class CompilerError(ValueError):
    """The compiler is missing or fails, and the caller required compilation."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; without --compile and --path OP=compiled no compiler is needed")


_falling_back: ContextVar[bool] = ContextVar("falling_back", default=False)
_failures: list[str] = []


@cache
def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Returns the function compiled by torch, once per shape; a compilation takes from ten seconds to a minute.

    If the compiler fails inside `falling_back`, the function runs uncompiled from then on; otherwise the call raises
    `CompilerError`.
    """
    from torch._functorch import config as functorch

    torch._dynamo.config.recompile_limit = max(MAX_SHAPES, torch._dynamo.config.recompile_limit)
    # Compile the backward pass together with the forward pass, so that a failure occurs there.
    functorch.force_non_lazy_backward_lowering = True
    return or_uncompiled(torch.compile(function, dynamic=False), function)


def or_uncompiled(fast: Callable[P, T], function: Callable[P, T]) -> Callable[P, T]:
    """Returns `fast`, which calls the compiler, with `function` in its place where the compiler fails (see `compiled`).

    `function` also runs as part of a larger compiled function, because torch can read its code.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not (_falling_back.get() and _failures):
            try:
                return fast(*args, **kwargs)
            except RuntimeError as error:
                if (failure := _compiler_failure(error)) is None:
                    raise
                if not _falling_back.get():
                    raise CompilerError(f"the compiler failed: {failure}") from error
                _failures.append(failure)
        return function(*args, **kwargs)

    return run


@contextmanager
def falling_back() -> Iterator[None]:
    """Lets functions run uncompiled if the compiler fails; `compiler_failure` reports it afterwards."""
    token = _falling_back.set(True)
    try:
        yield
    finally:
        _falling_back.reset(token)


def compiler_failure() -> str | None:
    """Why the compiler failed in this process, in one line; None if it did not."""
    return _failures[0] if _failures else None


@cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler that torch can call."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # torch's search raises several kinds of errors
        return False


def check_compiler() -> None:
    """Checks that there is a C++ compiler, before work that needs it begins.

    Raises:
        CompilerError: there is none.
    """
    if not has_compiler():
        raise CompilerError(NO_COMPILER)


def _compiler_failure(error: RuntimeError) -> str | None:
    """The cause of an error of torch's compiler, in one line; None for other errors."""
    chain = list(causes(error))
    modules = {base.__module__.partition(".")[2].partition(".")[0] for each in chain for base in type(each).__mro__}
    if not modules & {"_dynamo", "_inductor", "_functorch"}:
        return None
    lines = [line.strip() for each in chain for line in str(each).splitlines() if line.strip()]
    message = next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
    return message if len(message) <= SHOWN_CHARS else f"{message[:SHOWN_CHARS]}..."


@cache
def compiled_step(function: Callable[P, T], varying: str) -> Callable[P, T]:
    """Compiles a decoding step with torch. Such a step has many short loops.

    The code that calls the loops is C++ too. Products are also loops if measurements show that these are faster.

    Args:
        varying: regular expression for torch's names of the numbers that differ from step to step. If another number
            changes, torch compiles once more.

    Returns:
        The step. It raises `CompilerError` if the compiler fails.
    """
    known = torch.compiler.config.dynamic_sources
    torch.compiler.config.dynamic_sources = f"{known},{varying}" if known else varying
    torch._dynamo.config.recompile_limit = max(MAX_SHAPES, torch._dynamo.config.recompile_limit)
    step = torch.compile(function, options=dict(STEP))

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return step(*args, **kwargs)
        except RuntimeError as error:
            if (failure := _compiler_failure(error)) is None:
                raise
            raise CompilerError(f"the compiler failed: {failure}") from error

    return run
