"""Divides the time of a training step into products, passes over memory, dispatch, optimizer and data."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, record_function

from explore.bench.families import SHAPES
from explore.bench.training import RUN_TOKENS, chosen, in_a_process
from explore.blocks import Mixer, RMSNorm
from explore.train import compiled_ops, multiplies_bf16

Kind = Literal["products", "passes", "dispatch", "optimizer", "data"]
KINDS: tuple[Kind, ...] = get_args(Kind)

STEP, DATA, OPTIMIZER, PART = "bench: step", "bench: data", "bench: optimizer", "bench: part "
"""Names of the ranges in a profiled step; the last is a prefix for the name of a part of the model."""

OWNERS: Mapping[str, Kind] = {DATA: "data", OPTIMIZER: "optimizer"}
"""Ranges whose time is all of one kind, regardless of the op."""

BACKWARD = "autograd::engine::evaluate_function: "
"""Prefix of the name of a backward node when torch runs it."""

COMPILED = ("Torch-Compiled Region", "CompiledFunction", "## Call CompiledFxGraph")
"""Prefixes of the names of compiled code; its time, without that of products, goes to loops over memory."""

PRODUCTS = frozenset(
    f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm", "mv", "dot")
) | {"mkldnn::_linear_pointwise", "mkl::_mkl_linear"}

MOVES = frozenset(f"aten::{name}" for name in ("copy_", "fill_", "zero_", "cat", "stack", "_foreach_norm"))
"""Ops that pass over memory although torch registers them for no specific device."""

CALIBRATION_CALLS = 10_000


class OpTime(NamedTuple):
    """The time of one op in one part of the model, per step.

    Attributes:
        op: name of the op in torch.
        part: part of the model, in the forward or backward pass: the class of a mixer, a norm, or the rest; or
            optimizer or data.
        calls: calls per step.
        seconds: seconds per step, without the ops that it calls.
    """

    op: str
    kind: Kind
    part: str
    calls: float
    seconds: float


def profile_training(
    shape: str, seconds: float, paths: Mapping[str, str] | None = None, names: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Profiles a training step of every family, with the precision and compiled ops of a long run.

    Args:
        seconds: duration of the steps without the profiler; profiled steps take about a third of that.
        paths: implementations to force.
        names: names of families; None takes all.

    Yields:
        Records of family, shape, precision, paths, threads, step_s (median without the profiler), shares (seconds of a
        step by kind; with `unexplained_s` they add up to `step_s`), profiler_s (overhead of the profiler per step,
        subtracted from dispatch), and ops: records of op, kind, part, calls and seconds, slowest first.

    Raises:
        ValueError: the shape or a family is unknown.
    """
    precision = "bf16" if multiplies_bf16() else "fp32"
    for name, model in chosen(shape, names).items():
        compiled = compiled_ops(model, SHAPES[shape].seq_len, RUN_TOKENS, precision)
        used = dict.fromkeys(compiled, "compiled") | dict(paths or {})
        task: dict[str, Any] = {"family": name, "shape": shape, "precision": precision, "paths": used}
        yield task | in_a_process(what="profile", seconds=seconds, **task)


def profiled(
    step: Callable[[Tensor, Tensor], float], batches: Iterator[tuple[Tensor, Tensor]], seconds: float
) -> dict[str, Any]:
    """Times steps with and without the profiler, and divides their time.

    Args:
        step: a function that trains on a batch; its time in a range named `OPTIMIZER` counts as optimizer.
        batches: an iterator over batches; its time counts as data.
    """

    def run() -> float:
        began = time.perf_counter()
        with record_function(STEP):
            with record_function(DATA):
                batch = next(batches)
            step(*batch)
        return time.perf_counter() - began

    run()  # for compilation and first allocations
    plain = _repeated(run, seconds / 2)
    n_steps = max(2, round(seconds / 3 / statistics.median(plain)))
    with _parts_marked(), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        marked = [run() for _ in range(n_steps)]
    plain += _repeated(run, seconds / 2)
    ops, n_events = divide(profiler.events())
    return summary(ops, statistics.median(plain), n_events * seconds_of_an_event()) | {
        "profiled_step_s": statistics.median(marked),
        "threads": torch.get_num_threads(),
    }


def summary(ops: list[OpTime], step_s: float, profiler_s: float) -> dict[str, Any]:
    """The record of a step of `step_s` seconds, explained by the profiled ops as far as possible."""
    found: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    for op in ops:
        found[op.kind] += op.seconds
    found["dispatch"] -= profiler_s
    return {
        "step_s": step_s,
        "shares": {kind: found[kind] for kind in KINDS},
        "unexplained_s": step_s - sum(found.values()),
        "profiler_s": profiler_s,
        "ops": [op._asdict() for op in sorted(ops, key=lambda op: -op.seconds)],
    }


def divide(events: Iterable[FunctionEvent]) -> tuple[list[OpTime], float]:
    """Returns the ops of the profiled steps with their time per step, and the number of events per step.

    The own time of an event excludes the events inside it, so the own times of all events add up to the step.
    """
    ordered = sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
    steps = [event for event in ordered if event.name == STEP]
    parts = _parts(ordered)
    calls: Counter[tuple[str, Kind, str]] = Counter()
    seconds: defaultdict[tuple[str, Kind, str], float] = defaultdict(float)
    n_events = 0
    for root in steps:
        pending: list[tuple[FunctionEvent, Kind | None, str]] = [(root, None, "")]
        while pending:
            event, owner, part = pending.pop()
            owner = OWNERS.get(event.name, owner)
            part = owner or parts.get(event.id) or part
            key = (_name(event.name), owner or kind_of(event.name), part or "rest of the model")
            calls[key] += 1
            seconds[key] += 1e-6 * event.self_cpu_time_total
            n_events += 1
            pending += [(child, owner, part) for child in event.cpu_children]
    n = len(steps)
    return [OpTime(*key, calls[key] / n, seconds[key] / n) for key in seconds], n_events / n


def _parts(ordered: list[FunctionEvent]) -> dict[int, str]:
    """Parts of the model by id of the event that starts them, forward or backward."""
    parts: dict[int, str] = {}
    by_sequence: dict[int, str] = {}  # parts of the forward pass, by the sequence number that the backward node shares
    pending = [(event, "") for event in reversed(ordered) if event.name == STEP]
    while pending:
        event, part = pending.pop()
        if event.name.startswith(PART):
            part = part or event.name.removeprefix(PART)
            parts[event.id] = part
        elif event.name.startswith(BACKWARD):
            if made_by := by_sequence.get(event.sequence_nr):
                parts[event.id] = made_by
            continue
        elif event.sequence_nr >= 0:
            by_sequence[event.sequence_nr] = part  # the last event with a number created the node
        pending += [(child, part) for child in reversed(event.cpu_children)]
    return parts


def _name(event: str) -> str:
    if event == STEP:
        return "Python between ops"
    name = event.removeprefix(BACKWARD)
    if name.startswith(PART):
        return f"Python in {name.removeprefix(PART)}"
    for compiled in COMPILED:
        if name.startswith(compiled):
            return compiled
    return name.removeprefix("bench: ").partition("#")[0]


@cache
def kind_of(event: str) -> Kind:
    """The kind of work in an event's own time, in a forward or backward pass."""
    if event in PRODUCTS:
        return "products"
    if event.startswith(COMPILED) or event in MOVES:
        return "passes"
    namespace, _, name = event.partition("::")
    if namespace != "aten" or name.startswith(("empty", "resize_", "new_empty")):
        return "dispatch"
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, each) for each in packet.overloads()] if packet is not None else []
    return "passes" if any(map(_touches_memory, overloads)) else "dispatch"


def _touches_memory(op: torch._ops.OpOverload) -> bool:
    """Whether an op loops over memory itself on a CPU: it neither calls other ops nor returns a view."""
    if any(each.alias_info is not None and not each.alias_info.is_write for each in op._schema.returns):
        return False
    # Overloads for TorchScript's own types are registered for no device.
    return op.name() in _names() and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")


@cache
def _names() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


@contextmanager
def _parts_marked() -> Iterator[None]:
    """Marks the forward passes of mixers and norms as ranges of the profile."""
    ranges: list[Any] = []

    def begin(module: nn.Module, _: Any) -> None:
        if isinstance(module, Mixer | RMSNorm):
            ranges.append(record_function(PART + type(module).__name__))
            ranges[-1].__enter__()

    def end(module: nn.Module, *_: Any) -> None:
        if isinstance(module, Mixer | RMSNorm):
            ranges.pop().__exit__(None, None, None)

    hooks = register_module_forward_pre_hook(begin), register_module_forward_hook(end)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _repeated(run: Callable[[], float], seconds: float) -> list[float]:
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(run())
    return times


def seconds_of_an_event() -> float:
    """Overhead of the profiler per recorded event, in seconds."""
    x = torch.zeros(1)

    def timed() -> float:
        began = time.perf_counter()
        for _ in range(CALIBRATION_CALLS):
            x.view(1)
        return time.perf_counter() - began

    timed()
    plain = min(timed() for _ in range(3))
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]):
        marked = min(timed() for _ in range(3))
    return max(0.0, marked - plain) / CALIBRATION_CALLS


def by_part(ops: Iterable[Mapping[str, Any]]) -> dict[str, dict[Kind, float]]:
    """Seconds per step of each kind, by part of the model, slowest first."""
    found: dict[str, dict[Kind, float]] = {}
    for op in ops:
        found.setdefault(op["part"], dict.fromkeys(KINDS, 0.0))[op["kind"]] += op["seconds"]
    return dict(sorted(found.items(), key=lambda each: -sum(each[1].values())))


def by_op(ops: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls and seconds of each op over all parts of the model, slowest first."""
    found: dict[tuple[str, Kind], dict[str, Any]] = {}
    for op in ops:
        key = op["op"], op["kind"]
        row = found.setdefault(key, {"op": op["op"], "kind": op["kind"], "calls": 0.0, "seconds": 0.0})
        row["calls"] += op["calls"]
        row["seconds"] += op["seconds"]
    return sorted(found.values(), key=lambda row: -row["seconds"])
