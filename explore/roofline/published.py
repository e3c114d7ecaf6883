"""Roofline predictions for published speed-ups, and for published facts that follow from closed forms."""

from __future__ import annotations

from typing import Any, NamedTuple

from explore.cost import Dtype, Dtypes
from explore.presets import preset
from explore.roofline.hardware import GIB, hardware
from explore.roofline.regimes import Deployment, all_to_all_ratio, expert_intensity, tokens_at_ridge

FP8 = Dtypes(weight="float8", kv="float8")
FP4 = Dtypes(weight="float4", kv="float8")


class Speedup(NamedTuple):
    """A published throughput ratio, and the setting in which it is predicted.

    Attributes:
        batch_size: largest batch in sequences; smaller if fewer fit.
        why: why prediction and publication may differ.
    """

    model: str
    baseline: str
    device: str
    n_in: int
    n_out: int
    published: float
    dtypes: Dtypes
    baseline_dtypes: Dtypes
    why: str
    batch_size: int | None = None
    tensor_parallel: int = 1
    compute_dtype: Dtype | None = None
    baseline_compute_dtype: Dtype | None = None


BF16 = Dtypes()
LONG_INPUT = "65,536 tokens in, 1,024 out: nearly all is prefill, bound by FLOPs, with quadratic attention"
GROWS = "the baseline's KV cache, not its weights, decides how many sequences decode at once"
SPEEDUPS: tuple[Speedup, ...] = (
    Speedup(
        "nemotron-h-56b", "llama-3.1-70b", "H100", 65_536, 1024, 3.0, BF16, BF16,
        f"{LONG_INPUT}; the print is 'up to', on a serving stack whose attention is far from peak", tensor_parallel=8,
    ),
    Speedup(
        "nemotron-h-56b", "qwen2.5-72b", "H100", 65_536, 1024, 3.0, BF16, BF16,
        f"{LONG_INPUT}; the print is 'up to', on a serving stack whose attention is far from peak", tensor_parallel=8,
    ),
    Speedup(
        "nemotron-nano-2-9b", "qwen3-8b", "A10G", 8192, 16_384, 6.0, BF16, BF16,
        f"{GROWS}; of a batch of 8 only those that fit count here; a server pages and evicts", batch_size=8,
    ),
    Speedup(
        "nemotron-3-nano", "qwen3-30b-a3b", "H200", 8192, 16_384, 3.3, FP8, FP8,
        f"{GROWS}; servers stop well before memory is full, and a roofline does not",
    ),
    Speedup(
        "nemotron-3-nano", "gpt-oss-20b", "H200", 8192, 16_384, 2.2, FP8, Dtypes(weight="float4", kv="bfloat16"),
        "the baseline has 4-bit weights and half its layers see 128 tokens; kernels of both are taken as perfect",
        baseline_compute_dtype="bfloat16",
    ),
    Speedup(
        "nemotron-3-super", "gpt-oss-120b", "B200", 8192, 65_536, 2.2, FP4, FP4,
        "decoding with multi-token prediction, for which the model has weights, is not modelled here",
    ),
)  # fmt: skip
"""Settings are the published ones if given: devices, tokens in and out, batch, dtypes of weights."""


def speedup_table() -> list[dict[str, Any]]:
    """Published and predicted ratios of throughput per device.

    Returns:
        Records of model, baseline, device, tokens in and out, batch sizes of both, published and predicted ratio, the
        predicted one if the model ran no larger a batch than the baseline, and why they may differ.
    """
    records = []
    for s in SPEEDUPS:
        ours, theirs = (
            Deployment(
                preset(name),
                hardware(s.device),
                dtypes,
                compute,
                tensor_parallel=s.tensor_parallel,
            )
            for name, dtypes, compute in (
                (s.model, s.dtypes, s.compute_dtype),
                (s.baseline, s.baseline_dtypes, s.baseline_compute_dtype),
            )
        )
        batches = [min(d.largest_batch(s.n_in + s.n_out), s.batch_size or 10**9) for d in (ours, theirs)]
        rates = [d.throughput(s.n_in, s.n_out, batch) for d, batch in zip((ours, theirs), batches, strict=True)]
        at_its_batch = ours.throughput(s.n_in, s.n_out, batches[1])
        records.append(
            {
                "model": s.model,
                "baseline": s.baseline,
                "device": f"{s.tensor_parallel} {s.device}" if s.tensor_parallel > 1 else s.device,
                "n_in": s.n_in,
                "n_out": s.n_out,
                "batch_size": batches[0],
                "baseline_batch_size": batches[1],
                "tokens_per_s": rates[0],
                "baseline_tokens_per_s": rates[1],
                "published": s.published,
                "predicted": rates[0] / rates[1],
                "predicted_at_its_batch": at_its_batch / rates[1],
                "why": s.why,
            }
        )
    return records


def facts() -> list[dict[str, Any]]:
    """Published closed-form facts and their computed values: records of fact, published, computed and unit."""
    gb200, qwen = hardware("GB200"), preset("qwen3-235b-a22b")
    d, m = qwen.d_model, max(getattr(block, "d_expert", 0) for block in qwen.layers)
    ridge = gb200.ridge("float4")
    at_ridge = tokens_at_ridge(ridge, d, m)
    a10g = hardware("A10G")
    room = 0.95 * a10g.memory_bytes - 1.3 * GIB
    nano = Deployment(preset("nemotron-nano-2-9b"), a10g, reserved_bytes=1.3 * GIB)
    needed = nano.weight_bytes + nano.state_bytes(131_072)
    return [
        {"fact": "ridge of GB200 in FP4", "published": 1250, "computed": ridge, "unit": "FLOP/B"},
        {
            "fact": "tokens per expert at which Qwen3-235B reaches it",
            "published": 1418,
            "computed": at_ridge,
            "unit": "tokens",
        },
        {
            "fact": "intensity of its experts there",
            "published": 1250,
            "computed": expert_intensity(at_ridge, d, m),
            "unit": "FLOP/B",
        },
        {
            "fact": "time of its all-to-all over that of an expert's product",
            "published": 9,
            "computed": all_to_all_ratio(gb200.peak("float4"), m, gb200.link),
            "unit": "",
        },
        {"fact": "memory for Nano 2 on an A10G", "published": 19.66, "computed": room / GIB, "unit": "GiB"},
        {
            "fact": "needed by Nano 2 9B at 128k tokens in bf16, batch 1; at most",
            "published": 19.66,
            "computed": needed / GIB,
            "unit": "GiB",
        },
    ]
