"""Converts Megatron-LM arguments to a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from explore.cost import HARDWARE
from explore.interop.megatron_layout import FP8_RECIPES
from explore.model import ModelConfig
from explore.pattern import MTP_MARK, PIPELINE_MARK, canonical, split_mtp
from explore.plan import Cluster, Layout, Plan, Run

GPT2_VOCAB = 50_257
"""Vocabulary size of Megatron-LM's tests, used when the arguments name a vocabulary file."""
SHARDING = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
NOT_READ = (
    "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "account-for-embedding-in-pipeline-split",
    "account-for-loss-in-pipeline-split",
)  # fmt: skip
"""Arguments that affect memory but have no counterpart here."""


def read_arguments(content: Mapping[str, Any], n_gpus: int, device: str = HARDWARE) -> Plan:
    """Returns the plan of a run described by Megatron-LM arguments.

    Args:
        content: arguments by name, with or without leading dashes, or under `MODEL_ARGS`.
        n_gpus: ranks of the run.

    Raises:
        ValueError: an argument is missing or has no counterpart here.

    Source: Megatron-LM, `megatron/training/arguments.py`, defaults included.
    """
    named = content.get("MODEL_ARGS", content)
    if not isinstance(named, Mapping):
        raise ValueError(f"--megatron-args: MODEL_ARGS must be arguments by name, got {str(named)[:60]!r}")
    arguments = _Arguments({str(name).lstrip("-").replace("_", "-"): value for name, value in named.items()})
    for name in NOT_READ:
        if arguments.on(name):
            raise ValueError(f"--megatron-args: --{name} is not supported; give the layout of the pipeline in full")
    tp, pp = arguments.number("tensor-model-parallel-size", 1), arguments.number("pipeline-model-parallel-size", 1)
    model = _model(arguments, tp)
    layout = Layout(
        tp=tp,
        cp=arguments.number("context-parallel-size", 1),
        pp=pp,
        ep=arguments.number("expert-model-parallel-size", 1),
        etp=arguments.number("expert-tensor-parallel-size", tp if arguments.number("num-experts", 0) else 1),
        micro_batch=arguments.number("micro-batch-size", 1),
        pipeline=_pipeline(arguments, model, pp),
    )
    return Plan.of(model, _run(arguments), layout, Cluster.named(f"{device}x{n_gpus}"))


class _Arguments:
    """Arguments of Megatron-LM by name without dashes, with its defaults."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given

    def number(self, name: str, default: int | None = None) -> int:
        value = self.given.get(name, default)
        if value is None:
            raise ValueError(f"--megatron-args: --{name} is required")
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ValueError(f"--megatron-args: --{name} must be an integer, got {str(value)[:60]!r}") from None

    def real(self, name: str, default: float) -> float:
        try:
            return float(self.given.get(name, default))
        except (TypeError, ValueError):
            raise ValueError(
                f"--megatron-args: --{name} must be a number, got {str(self.given[name])[:60]!r}"
            ) from None

    def text(self, name: str) -> str | None:
        value = self.given.get(name)
        return None if value is None else str(value)

    def on(self, name: str) -> bool:
        return self.given.get(name, False) not in (False, "false", "False", None)


def _run(arguments: _Arguments) -> Run:
    modules = arguments.given.get("recompute-modules") or ("core_attn",)
    selective = tuple(modules.split()) if isinstance(modules, str) else tuple(modules)
    recompute = {"full": ("full",), "selective": selective}.get(arguments.text("recompute-granularity") or "", ())
    if arguments.on("use-megatron-fsdp"):
        strategy = arguments.text("data-parallel-sharding-strategy") or "optim_grads_params"
        if strategy not in SHARDING:
            allowed = ", ".join(SHARDING)
            raise ValueError(
                f"--megatron-args: --data-parallel-sharding-strategy must be one of {allowed}, got {strategy[:60]!r}"
            )
        zero = SHARDING[strategy]
    else:
        zero = int(arguments.on("use-distributed-optimizer"))
    bf16 = ("bf16", "bfloat16")
    grads_in_bf16 = arguments.on("grad-reduce-in-bf16") or arguments.text("main-grads-dtype") in bf16
    return Run.model_validate(
        {
            "seq_len": arguments.number("seq-length"),
            "global_batch": arguments.number("global-batch-size"),
            "precision": _precision(arguments),
            "recompute": recompute,
            "moments": "bfloat16" if arguments.text("exp-avg-dtype") in bf16 else "float32",
            "grads": "bfloat16" if grads_in_bf16 else "float32",
            "zero": zero,
            "offload_optimizer": arguments.on("optimizer-cpu-offload"),
            "memory_efficient_permutation": True,
            "fused_attention": arguments.text("attention-backend") != "unfused",
            "dropout": arguments.real("hidden-dropout", 0.1) > 0,
            "sequence_parallel": arguments.on("sequence-parallel"),
            "all_to_all": "node" if arguments.text("moe-token-dispatcher-type") == "flex" else "naive",
        }
    )


def _precision(arguments: _Arguments) -> str:
    if arguments.text("fp4-format"):
        return "nvfp4"
    if not arguments.text("fp8-format"):
        return "bf16"
    recipe = arguments.text("fp8-recipe") or "delayed"
    return next((name for name, known in FP8_RECIPES.items() if known == recipe), "fp8")


def _pipeline(arguments: _Arguments, model: ModelConfig, pp: int) -> str | None:
    """Returns the stages, from a layout string or a marked pattern, or else equal numbers of layers."""
    pattern = _pattern(arguments)
    if pattern is not None and PIPELINE_MARK in pattern:
        return pattern
    if (given := arguments.text("pipeline-model-parallel-layout")) is not None or pp == 1:
        return given
    n_layers = model.n_layers if pattern is not None else arguments.number("num-layers")
    if of_stage := arguments.number("num-layers-per-virtual-pipeline-stage", 0):
        n_stages = n_layers // of_stage
    else:
        n_stages = pp * arguments.number("num-virtual-stages-per-pipeline-rank", 1)
    if n_stages < 1 or n_layers % n_stages:
        raise ValueError(f"--megatron-args: --num-layers={n_layers} must be divisible by the {n_stages} stages")
    size = n_layers // n_stages
    if pattern is not None:
        main = model.pattern
        return PIPELINE_MARK.join(main[i : i + size] for i in range(0, n_layers, size))
    depths = 0 if model.mtp is None else model.mtp.n_depths
    return "E" + PIPELINE_MARK.join(["t" * size] * n_stages) + "m" * depths + "L"


def _pattern(arguments: _Arguments) -> str | None:
    return arguments.text("hybrid-layer-pattern") or arguments.text("hybrid-override-pattern")


def _model(arguments: _Arguments, tp: int) -> ModelConfig:
    divisor = arguments.number("make-vocab-size-divisible-by", 128)
    vocab = arguments.number("vocab-size", GPT2_VOCAB)
    padded = arguments.number("padded-vocab-size", -(-vocab // (divisor * tp)) * divisor * tp)
    blocks = _blocks(arguments)
    pattern, n_mtp = _pattern(arguments), arguments.number("mtp-num-layers", 0)
    if pattern is None:
        attention = "L" if arguments.on("multi-latent-attention") else "*"
        layers = [attention + ("E" if routed else "-") for routed in _routed(arguments, arguments.number("num-layers"))]
        pattern = "".join(layers) + (MTP_MARK + layers[-1]) * n_mtp
    main, depths = split_mtp(pattern)
    shared = arguments.on("mtp-use-repeated-layer")
    mtp = {"pattern": canonical(depths[0]), "n_depths": len(depths), "shared": shared} if depths else None
    used = {letter: blocks[letter] for letter in canonical(main + "".join(depths)) if letter in blocks}
    return ModelConfig.model_validate(
        {
            "d_model": arguments.number("hidden-size"),
            "vocab_size": padded,
            "pattern": main,
            "blocks": used,
            "mtp": mtp,
            "tie_embeddings": not arguments.on("untie-embeddings-and-output-weights"),
        }
    )


def _routed(arguments: _Arguments, n_layers: int) -> list[bool]:
    """Returns which layers have experts: every N-th, or those marked by a list such as `([0]*3+[1]*58)`."""
    if not arguments.number("num-experts", 0):
        return [False] * n_layers
    text = arguments.text("moe-layer-freq") or "1"
    if text.isdigit():
        return [i % int(text) == 0 for i in range(n_layers)]
    terms = re.findall(r"\[([01](?:,[01])*)\](?:\*(\d{1,4}))?", text.replace(" ", ""))
    flags = [flag == "1" for flags, times in terms for flag in flags.split(",") * int(times or 1)]
    if len(flags) != n_layers:
        raise ValueError(
            f"--megatron-args: --moe-layer-freq must be a number or a list of {n_layers} layers such as "
            f"([0]*3+[1]*{max(n_layers - 3, 1)}), got {text[:60]!r}"
        )
    return flags


def _blocks(arguments: _Arguments) -> dict[str, Any]:
    """Returns all blocks whose sizes the arguments give, by standard letter."""
    d_model, n_heads = arguments.number("hidden-size"), arguments.number("num-attention-heads")
    gated = arguments.on("swiglu")
    d_ff = arguments.number("ffn-hidden-size", int(8 * d_model / 3) // 64 * 64 if gated else 4 * d_model)
    activation = "swiglu" if gated else "relu2"
    d_head = arguments.number("mamba-head-dim", 64)
    blocks: dict[str, Any] = {
        "M": {
            "n_heads": arguments.number("mamba-num-heads", 2 * d_model // d_head),
            "d_head": d_head,
            "d_state": arguments.number("mamba-state-dim", 128),
            "n_groups": arguments.number("mamba-num-groups", 8),
        },
        "*": {
            "n_heads": n_heads,
            "n_kv_heads": arguments.number("num-query-groups", 1) if arguments.on("group-query-attention") else n_heads,
            "d_head": arguments.number("kv-channels", d_model // n_heads),
            "qk_norm": arguments.on("qk-layernorm"),
        },
        "L": {
            "n_heads": n_heads,
            "q_rank": arguments.number("q-lora-rank", 0) or None,
            "kv_rank": arguments.number("kv-lora-rank", 32),
            "d_nope": arguments.number("qk-head-dim", 128),
            "d_rope": arguments.number("qk-pos-emb-head-dim", 64),
            "d_v": arguments.number("v-head-dim", 128),
        },
        "-": {"d_ff": d_ff, "activation": activation},
    }
    if n_experts := arguments.number("num-experts", 0):
        shared = arguments.number("moe-shared-expert-intermediate-size", 0)
        blocks["E"] = {
            "n_experts": n_experts,
            "top_k": arguments.number("moe-router-topk", 2),
            "d_expert": arguments.number("moe-ffn-hidden-size", d_ff),
            "d_latent": arguments.number("moe-latent-size", 0) or None,
            "n_shared": 1 if shared else 0,
            "d_shared": shared or None,
            "activation": activation,
        }
    return blocks
