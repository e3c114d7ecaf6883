"""Training speed on this machine, compared with transformers' nemotron_h at the same shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from explore.bench.families import SHAPES, families
from explore.model import ModelConfig
from explore.ops import paths_in_use, paths_that
from explore.precision import TRAINED, UNQUANTIZED
from explore.train import COMPILED, compiled_ops, multiplies_bf16

RUN_TOKENS = 20_000_000
"""Assumed length of the run in tokens; it decides which ops are worth compiling."""


def compare(
    shape: str,
    seconds: float,
    rate: float,
    paths: Mapping[str, str] | None = None,
    names: list[str] | None = None,
    *,
    split: bool = False,
) -> Iterator[dict[str, Any]]:
    """Times every family, ours and the baseline in turn, each in fp32 and bf16, and keeps the faster precision.

    Ops are compiled if a run of `RUN_TOKENS` would compile them.

    Args:
        seconds: duration of each of the four measurements per family.
        rate: measured FLOP/s of matrix products on this machine.
        paths: implementations to force.
        names: names of families; None takes all.
        split: whether ours trains on both halves of a batch at once.

    Yields:
        Records of family, shape, tokens_per_s, baseline_tokens_per_s, ratio, limit (the ratio if training ran at the
        rate of matrix products), first_step_s (including compilation), peak_bytes, baseline_peak_bytes, gemm_fraction
        (training FLOP/s, exact convention, divided by `rate`), precisions and path.

    Raises:
        ValueError: no such shape or family.
    """
    precisions = _precisions()
    for name, model in chosen(shape, names).items():
        compiled = {
            precision: dict.fromkeys(compiled_ops(model, SHAPES[shape].seq_len, RUN_TOKENS, precision), "compiled")
            | dict(paths or {})
            for precision in precisions
        }
        found = {
            (side, precision): _measured(
                name, shape, side, precision, seconds, compiled[precision], split and side == "ours"
            )
            for precision in precisions
            for side in ("ours", "transformers")
        }
        ours, theirs = (
            max(precisions, key=lambda precision: found[side, precision]["tokens_per_s"])
            for side in ("ours", "transformers")
        )
        one, other = found["ours", ours], found["transformers", theirs]
        ratio = one["tokens_per_s"] / other["tokens_per_s"]
        gemm_fraction = model.cost(SHAPES[shape].seq_len).flops_train * one["tokens_per_s"] / rate
        yield {
            "family": name,
            "shape": shape,
            "tokens_per_s": one["tokens_per_s"],
            "baseline_tokens_per_s": other["tokens_per_s"],
            "ratio": ratio,
            "limit": ratio / gemm_fraction,
            "first_step_s": one["first_step_s"],
            "peak_bytes": one["peak_bytes"],
            "baseline_peak_bytes": other["peak_bytes"],
            "gemm_fraction": gemm_fraction,
            "precision": ours,
            "baseline_precision": theirs,
            "path": paths_in_use() | compiled[ours],
        }


def chosen(shape: str, names: list[str] | None) -> dict[str, ModelConfig]:
    """Models of the named families, or of all if `names` is None."""
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    models = families(SHAPES[shape].d_model)
    for name in names or ():
        if name not in models:
            raise ValueError(f"family must be one of {', '.join(models)}, got {name!r}")
    return {name: models[name] for name in names or models}


def _precisions() -> tuple[str, ...]:
    """The precisions to time: bf16 only if the processor multiplies it, since otherwise it is never faster."""
    return ("fp32", "bf16") if multiplies_bf16() else ("fp32",)


def _measured(
    family: str, shape: str, side: str, precision: str, seconds: float, paths: dict[str, str], split: bool
) -> dict[str, Any]:
    task: dict[str, Any] = {"family": family, "shape": shape, "side": side, "precision": precision}
    return in_a_process(what="train", **task, seconds=seconds, paths=paths, split=split)


def compare_curves(
    shape: str,
    n_steps: int,
    paths: Mapping[str, str] | None = None,
    names: list[str] | None = None,
    *,
    split: bool = False,
) -> Iterator[dict[str, Any]]:
    """Trains every family on the same text with the paths in use and, in fp32, with the reference.

    Two runs of the reference also diverge once a weight differs in its last bit and a router chooses another expert.
    `rounding` measures this: the mean difference to a run whose weights were perturbed by about 1e-7.

    Args:
        split: whether the paths in use train on both halves of a batch at once.

    Yields:
        Records of family, precision, n_steps, and the mean and largest difference of the loss, and rounding, in nats.

    Raises:
        ValueError: no such shape or family.
    """
    for name in chosen(shape, names):
        task = {"family": name, "shape": shape, "n_steps": n_steps, "precision": "fp32", "paths": dict(paths or {})}
        truth = _losses(task | {"paths": paths_that(lambda path: path.reference)})
        found = {precision: _losses(task | {"precision": precision, "split": split}) for precision in _precisions()}
        rounding = _apart(found["fp32"], _losses(task | {"nudge": 1e-7, "split": split}))
        for precision, losses in found.items():
            apart = _apart(losses, truth)
            yield {
                "family": name,
                "precision": precision,
                "n_steps": n_steps,
                "mean": sum(apart) / n_steps,
                "largest": max(apart),
                "rounding": sum(rounding) / n_steps,
            }


def _losses(task: Mapping[str, Any]) -> list[float]:
    losses: list[float] = in_a_process(what="curve", **task)["losses"]
    return losses


def _apart(one: list[float], other: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def compare_decoding(
    shape: str, n_new: int, names: list[str] | None = None, *, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Times greedy decoding of 16 sequences: records of family, tokens_per_s, baseline_tokens_per_s and ratio.

    Args:
        compiled: whether our step is compiled; `compile_s` of a record is its time, which no other number includes.

    Raises:
        ValueError: no such shape or family.
    """
    for name in chosen(shape, names):
        yield {"family": name} | in_a_process(what="decode", family=name, shape=shape, n_new=n_new, compiled=compiled)


def time_trials(shape: str, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Times the set-up of a sweep's trial before its first step.

    Yields:
        Records of family, first_s (the first trial in a process) and set_up_s (median of later trials).

    Raises:
        ValueError: no such shape or family.
    """
    for name in chosen(shape, names):
        yield {"family": name} | in_a_process(what="trials", family=name, shape=shape)


def time_regions(shape: str) -> Iterator[dict[str, Any]]:
    """Times the ops that can be compiled at a shape, by default and compiled, each in its own process.

    Yields:
        Rows of the table of `explore.train.regions`: op, precision, default_ns and compiled_ns per element, forward and
        backward, compile_s of a first compilation, and the processor. Rows of `quantize` have a format as precision.

    Raises:
        ValueError: no such shape.
    """
    chosen(shape, None)
    for precision in _precisions():
        for op in COMPILED:
            yield in_a_process(what="region", shape=shape, op=op, precision=precision)
    for format in sorted({recipe.format for recipe in TRAINED.values()} - UNQUANTIZED):
        yield in_a_process(what="quantizer", shape=shape, format=format)


def in_a_process(variables: Mapping[str, str] | None = None, **task: Any) -> dict[str, Any]:
    """Runs one measurement in its own process and returns the result.

    Args:
        variables: its whole environment; None inherits that of this process.

    Raises:
        ValueError: it failed; the message is the last line of its output.
    """
    command = [sys.executable, "-m", "explore.bench.worker", json.dumps(task)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"bench: {task['what']}: {message}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
