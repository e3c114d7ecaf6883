"""Times every op in each of its implementations, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from explore.bench.families import families
from explore.blocks import KINDS
from explore.blocks.base import Call
from explore.blocks.declarations import leaf
from explore.ops import PATHS, forced_paths, linear, linear_cross_entropy, linear_kl, rms_norm


def time_ops(d_model: int, n_tokens: int, seq_len: int, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Times every op in every implementation, in fp32 and bf16, at the shapes of a model of this width.

    Yields:
        Records of op, path, precision, and seconds of the fastest forward and backward pass. The step-by-step
        recurrence is left out, and so are paths without a backward pass or whose package, device or compiler is
        missing.
    """
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for op, call in op_calls(d_model, n_tokens, seq_len, dtype).items():
            name = op.partition(",")[0]
            for path in PATHS[name]:
                if path.needs or path.compiled or path.stepwise or not path.backward:
                    continue
                with forced_paths(**{name: path.name}):
                    seconds = min(timed(call, dtype == torch.bfloat16) for _ in range(repeats + 1))
                yield {"op": op, "path": path.name, "precision": str(dtype).removeprefix("torch."), "seconds": seconds}


def timed(call: Call, autocast: bool) -> float:
    """Seconds of a forward and backward pass."""
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = call()
    y.float().square().mean().backward()
    return time.perf_counter() - began


def op_calls(d_model: int, n_tokens: int, seq_len: int, dtype: torch.dtype) -> dict[str, Call]:
    """The ops outside blocks, and those of the blocks of all families and of kinds that no family has."""
    tokens, weight = leaf(n_tokens, d_model, dtype=dtype), leaf(4 * d_model, d_model, dtype=dtype)
    scale = leaf(d_model, dtype=dtype)
    targets = torch.randint(4 * d_model, (n_tokens,))
    calls: dict[str, Call] = {
        "divergence": lambda: linear_kl(tokens, weight, tokens.detach(), weight.detach(), targets).kl,
        "linear": lambda: linear(tokens, weight),
        "loss": lambda: linear_cross_entropy(tokens, weight, targets),
        "norm": lambda: rms_norm(tokens, scale, 1e-5),
    }
    blocks = [block for model in families(d_model).values() for block in model.layers]
    others = [config.default(d_model) for config in KINDS.values() if config not in map(type, blocks)]
    for block in dict.fromkeys([*blocks, *others]):
        calls = {**block.op_calls(d_model, n_tokens // seq_len, seq_len, dtype), **calls}
    return dict(sorted(calls.items()))
