"""Cost of emulated low precision: time and memory of a training step relative to bf16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from explore.bench.families import SHAPES
from explore.bench.training import RUN_TOKENS, chosen, in_a_process
from explore.precision import TRAINED
from explore.train import compiled_ops

EMULATED = ("fp8", "nvfp4")


def compare_precisions(shape: str, seconds: float, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Times training steps in bf16 and in emulated precisions, compiling what a run of 20M tokens would.

    Args:
        seconds: duration of each of three measurements per family.
        names: names of families; None takes all.

    Yields:
        Records of family, precision, tokens_per_s, step_ratio (to the step in bf16), peak_bytes, memory_ratio,
        first_step_s (including compilation) and compiled.

    Raises:
        ValueError: the shape or a family is unknown.
    """
    for name, model in chosen(shape, names).items():
        baseline: dict[str, Any] | None = None
        for precision in ("bf16", *EMULATED):
            recipe = None if baseline is None else TRAINED[precision]
            ops = compiled_ops(model, SHAPES[shape].seq_len, RUN_TOKENS, "bf16", recipe=recipe)
            task: dict[str, Any] = {"family": name, "shape": shape, "side": "ours", "precision": precision}
            found = in_a_process(what="train", **task, seconds=seconds, paths=dict.fromkeys(ops, "compiled"))
            baseline = baseline or found
            yield {
                "family": name,
                "precision": precision,
                "tokens_per_s": found["tokens_per_s"],
                "step_ratio": baseline["tokens_per_s"] / found["tokens_per_s"],
                "peak_bytes": found["peak_bytes"],
                "memory_ratio": found["peak_bytes"] / baseline["peak_bytes"],
                "first_step_s": found["first_step_s"],
                "compiled": list(ops),
            }
