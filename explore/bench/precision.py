"""Cost of emulated low precision: time and memory of a training step relative to bf16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from explore.bench.families import SHAPES
from explore.bench.training import RUN_TOKENS, chosen, in_a_process
from explore.precision import TRAINED
from explore.train import compiled_ops, product_paths

STEP_RATIOS: Mapping[str, float] = MappingProxyType({"fp8": 2.0, "nvfp4": 3.0})
"""Bounds: time of a training step in each emulated precision, relative to the step in bf16."""

MEMORY_RATIO = 1.3
"""Bound: peak memory of training in an emulated precision, relative to bf16."""


def compare_precisions(shape: str, seconds: float, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Times training steps in bf16 and in emulated precisions, compiling what a run of 20M tokens would.

    Args:
        seconds: duration of each of three measurements per family.
        names: names of families; None takes all.

    Yields:
        Records of family, precision, tokens_per_s, step_ratio (to the step in bf16), peak_bytes, memory_ratio,
        first_step_s (including compilation), compiled, step_bound and memory_bound (the largest allowed ratios; None
        for bf16), and whether the record `holds` both.

    Raises:
        ValueError: the shape or a family is unknown.
    """
    for name, model in chosen(shape, names).items():
        baseline: dict[str, Any] | None = None
        for precision in ("bf16", *STEP_RATIOS):
            recipe = None if baseline is None else TRAINED[precision]
            ops = compiled_ops(model, SHAPES[shape].seq_len, RUN_TOKENS, "bf16", recipe=recipe)
            task: dict[str, Any] = {"family": name, "shape": shape, "side": "ours", "precision": precision}
            paths = dict.fromkeys(ops, "compiled") | (product_paths("cpu") if recipe else {})
            found = in_a_process(what="train", **task, seconds=seconds, paths=paths)
            baseline = baseline or found
            step_ratio = baseline["tokens_per_s"] / found["tokens_per_s"]
            memory_ratio = found["peak_bytes"] / baseline["peak_bytes"]
            step_bound = STEP_RATIOS.get(precision)
            yield {
                "family": name,
                "precision": precision,
                "tokens_per_s": found["tokens_per_s"],
                "step_ratio": step_ratio,
                "peak_bytes": found["peak_bytes"],
                "memory_ratio": memory_ratio,
                "first_step_s": found["first_step_s"],
                "compiled": list(ops),
                "step_bound": step_bound,
                "memory_bound": None if step_bound is None else MEMORY_RATIO,
                "holds": step_bound is None or (step_ratio <= step_bound and memory_ratio <= MEMORY_RATIO),
            }
