"""Training speed here, beside transformers' nemotron_h on the same shapes."""

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
"""Tokens of the run that a timed step is thought to be of: for so many, ops are compiled that gain by it."""


def compare(
    shape: str,
    seconds: float,
    rate: float,
    paths: Mapping[str, str] | None = None,
    names: list[str] | None = None,
    *,
    split: bool = False,
) -> Iterator[dict[str, Any]]:
    """Times every family, ours and the baseline in turn, each in fp32 and in bf16, and takes the better of each.

    Ops are compiled where a run of `RUN_TOKENS` would compile them.

    Args:
        seconds: of each of the four measurements of a family.
        rate: FLOP/s that matrix products reach here.
        paths: implementations to force.
        names: of families; all when absent.
        split: ours trains on both halves of a batch at once.

    Yields:
        Records of family, shape, tokens_per_s, baseline_tokens_per_s, ratio, limit (the ratio, were training as fast as
        products are), first_step_s (with what is compiled), peak_bytes, baseline_peak_bytes, gemm_fraction (training
        FLOPs, exact convention, over what the rate allows), precisions and path.

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
    """Models of the families asked for, of all where none is."""
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    models = families(SHAPES[shape].d_model)
    for name in names or ():
        if name not in models:
            raise ValueError(f"family must be one of {', '.join(models)}, got {name!r}")
    return {name: models[name] for name in names or models}


def _precisions() -> tuple[str, ...]:
    """Those that are timed: bf16 only where the processor multiplies it, since without that it never is the better."""
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
    """Trains every family on the same text by the paths in use and, in fp32, by the reference.

    Two runs of one reference part as well, once a weight differs in its last bit and a router chooses another expert.
    How far says `rounding`, the mean difference to a run whose weights were moved by about a ten-millionth.

    Args:
        split: the paths in use train on both halves of a batch at once.

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
        compiled: our step is compiled; its seconds are `compile_s` of a record, and in no other number of it.

    Raises:
        ValueError: no such shape or family.
    """
    for name in chosen(shape, names):
        yield {"family": name} | in_a_process(what="decode", family=name, shape=shape, n_new=n_new, compiled=compiled)


def time_trials(shape: str, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Times what a trial of a sweep needs before its first step.

    Yields:
        Records of family, first_s, of the first trial in a process, and set_up_s, the median of those after it.

    Raises:
        ValueError: no such shape or family.
    """
    for name in chosen(shape, names):
        yield {"family": name} | in_a_process(what="trials", family=name, shape=shape)


def time_regions(shape: str) -> Iterator[dict[str, Any]]:
    """Times the ops that can be compiled at a shape, by default and compiled, each in a process of its own.

    Yields:
        Rows of the table of `explore.train.regions`: op, precision, default_ns and compiled_ns an element, forward and
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
    """The result of one measurement, made in a process of its own.

    Args:
        variables: its whole environment; this process's when absent.

    Raises:
        ValueError: it failed; the last line that it wrote says why.
    """
    command = [sys.executable, "-m", "explore.bench.worker", json.dumps(task)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"bench: {task['what']}: {said}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
