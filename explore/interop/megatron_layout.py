"""A plan as arguments of Megatron-LM, and Megatron-LM's arguments as a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explore.interop.megatron import Arguments, megatron_arguments
from explore.model import ModelConfig
from explore.pattern import canonical, split_mtp
from explore.plan import Cluster, Layout, Plan, Run

FP8_RECIPES = {"fp8": "tensorwise", "fp8-blocks": "blockwise", "mxfp8": "mxfp8"}
GPT2_VOCAB = 50_257
"""The vocabulary of Megatron-LM's tests, where the arguments name a file of it."""


def plan_arguments(plan: Plan) -> tuple[Arguments, list[str]]:
    """Arguments of the architecture and of a plan, and notes on what they leave open.

    An architecture that Megatron-LM's hybrid model cannot express is left out, with a note that says why.
    """
    notes: list[str]
    try:
        arguments, notes = megatron_arguments(plan.model, seq_len=plan.run.seq_len)
    except ValueError as refusal:
        arguments = [("--seq-length", str(plan.run.seq_len)), ("--max-position-embeddings", str(plan.run.seq_len))]
        notes = [f"the architecture is left to you: {refusal}"]
    notes = [note.replace("optimizer, data, tokenizer and parallelism are", "data and tokenizer are") for note in notes]
    hybrid = next((i for i, argument in enumerate(arguments) if argument[0] == "--hybrid-layer-pattern"), None)
    if plan.layout.pp > 1 and hybrid is not None:
        arguments[hybrid] = ("--hybrid-layer-pattern", plan.batch.stages.hybrid(plan.model))
    return arguments + layout_arguments(plan, hybrid=hybrid is not None), notes


def layout_arguments(plan: Plan, *, hybrid: bool = True) -> Arguments:
    """Arguments of a plan's parallelism, batch, precision, optimizer and recomputation.

    Args:
        hybrid: the pattern has the stages of the pipeline.

    Source: Megatron Core 0.19.2, `megatron/training/arguments.py`.
    """
    run, layout = plan.run, plan.layout
    arguments: Arguments = [
        ("--tensor-model-parallel-size", str(layout.tp)),
        ("--context-parallel-size", str(layout.cp)),
        ("--pipeline-model-parallel-size", str(layout.pp)),
        ("--expert-model-parallel-size", str(layout.ep)),
        ("--expert-tensor-parallel-size", str(layout.etp)),
        ("--micro-batch-size", str(layout.micro_batch)),
        ("--global-batch-size", str(run.global_batch)),
        ("--bf16",),
        ("--attention-backend", "fused" if run.fused_attention else "unfused"),
    ]
    if layout.tp > 1 and run.sequence_parallel:
        arguments.append(("--sequence-parallel",))
    if layout.pp > 1 and not hybrid:
        arguments.append(("--pipeline-model-parallel-layout", plan.batch.stages.megatron()))
    if run.precision in FP8_RECIPES:
        arguments += [("--fp8-format", "e4m3"), ("--fp8-recipe", FP8_RECIPES[run.precision])]
    elif run.precision == "nvfp4":
        arguments += [("--fp4-format", "e2m1"), ("--fp4-recipe", "nvfp4")]
    if run.zero == 1:
        arguments.append(("--use-distributed-optimizer",))
    elif run.zero:
        strategy = "optim_grads" if run.zero == 2 else "optim_grads_params"
        arguments += [("--use-megatron-fsdp",), ("--data-parallel-sharding-strategy", strategy)]
    if run.moments == "bfloat16":
        arguments += [("--use-precision-aware-optimizer",), ("--exp-avg-dtype", "bf16"), ("--exp-avg-sq-dtype", "bf16")]
    if run.grads == "float32":
        arguments.append(("--accumulate-allreduce-grads-in-fp32",))
    if run.offload_optimizer:
        arguments.append(("--offload-optimizer-states",))
    if "full" in run.recompute:
        arguments += [
            ("--recompute-granularity", "full"), ("--recompute-method", "uniform"), ("--recompute-num-layers", "1"),
        ]  # fmt: skip
    elif run.recompute:
        arguments += [("--recompute-granularity", "selective"), ("--recompute-modules", *run.recompute)]
    return arguments


def read_arguments(content: Mapping[str, Any], n_gpus: int, device: str = "H100") -> Plan:
    """The plan of a run that Megatron-LM's arguments describe.

    Args:
        content: arguments by name, with or without leading dashes, or under `MODEL_ARGS`.
        n_gpus: ranks of the run.

    Raises:
        ValueError: an argument is missing, or has no counterpart here.
    """
    given = {
        str(name).lstrip("-").replace("_", "-"): value for name, value in content.get("MODEL_ARGS", content).items()
    }
    arguments = _Arguments(given)
    tp, pipeline = arguments.number("tensor-model-parallel-size", 1), None
    model = _model(arguments, tp)
    pattern = arguments.text("hybrid-layer-pattern") or arguments.text("hybrid-override-pattern")
    if pattern and "|" in pattern:
        pipeline = pattern
    layout = Layout(
        tp=tp,
        cp=arguments.number("context-parallel-size", 1),
        pp=arguments.number("pipeline-model-parallel-size", 1),
        ep=arguments.number("expert-model-parallel-size", 1),
        etp=arguments.number("expert-tensor-parallel-size", tp if "expert-model-parallel-size" in given else 1),
        micro_batch=arguments.number("micro-batch-size", 1),
        pipeline=arguments.text("pipeline-model-parallel-layout") or pipeline,
    )
    modules = given.get("recompute-modules") or ()
    selective = tuple(modules.split()) if isinstance(modules, str) else tuple(modules)
    granularity = arguments.text("recompute-granularity")
    run = Run.model_validate(
        {
            "seq_len": arguments.number("seq-length"),
            "global_batch": arguments.number("global-batch-size"),
            "precision": _precision(arguments),
            "recompute": ("full",) if granularity == "full" else selective if granularity == "selective" else (),
            "moments": "bfloat16" if arguments.text("exp-avg-dtype") in ("bf16", "bfloat16") else "float32",
            "grads": "bfloat16" if arguments.text("main-grads-dtype") in ("bf16", "bfloat16") else "float32",
            "zero": 1 if arguments.on("use-distributed-optimizer") else 0,
            "offload_optimizer": arguments.on("offload-optimizer-states"),
            "memory_efficient_permutation": True,
            "fused_attention": arguments.text("attention-backend") != "unfused",
            "dropout": arguments.real("hidden-dropout", 0.1) > 0,
            "sequence_parallel": arguments.on("sequence-parallel"),
        }
    )
    return Plan.of(model, run, layout, Cluster.named(f"{device}x{n_gpus}"))


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
            raise ValueError(f"--megatron-args: --{name} must be a number, got {self.given[name]!r}") from None

    def text(self, name: str) -> str | None:
        value = self.given.get(name)
        return None if value is None else str(value)

    def on(self, name: str) -> bool:
        return self.given.get(name, False) not in (False, "false", "False", None)


def _precision(arguments: _Arguments) -> str:
    if arguments.text("fp4-format"):
        return "nvfp4"
    if not arguments.text("fp8-format"):
        return "bf16"
    recipe = arguments.text("fp8-recipe") or "tensorwise"
    return next((name for name, known in FP8_RECIPES.items() if known == recipe), "fp8")


def _model(arguments: _Arguments, tp: int) -> ModelConfig:
    d_model = arguments.number("hidden-size")
    n_heads = arguments.number("num-attention-heads")
    d_head = arguments.number("kv-channels", d_model // n_heads)
    n_kv = arguments.number("num-query-groups", 1) if arguments.on("group-query-attention") else n_heads
    d_ff = arguments.number("ffn-hidden-size", 4 * d_model)
    gated = "swiglu" if arguments.on("swiglu") else "relu2"
    divisor = arguments.number("make-vocab-size-divisible-by", 128)
    vocab = arguments.number("vocab-size", GPT2_VOCAB)
    padded = arguments.number("padded-vocab-size", -(-vocab // (divisor * tp)) * divisor * tp)
    n_experts = arguments.number("num-experts", 0)
    blocks: dict[str, Any] = {
        "M": {
            "n_heads": arguments.number("mamba-num-heads", 2 * d_model // arguments.number("mamba-head-dim", 64)),
            "d_head": arguments.number("mamba-head-dim", 64),
            "d_state": arguments.number("mamba-state-dim", 128),
            "n_groups": arguments.number("mamba-num-groups", 8),
        },
        "*": {"n_heads": n_heads, "n_kv_heads": n_kv, "d_head": d_head, "qk_norm": arguments.on("qk-layernorm")},
        "-": {"d_ff": d_ff, "activation": gated},
    }
    if n_experts:
        shared = arguments.number("moe-shared-expert-intermediate-size", 0)
        blocks["E"] = {
            "n_experts": n_experts,
            "top_k": arguments.number("moe-router-topk", 2),
            "d_expert": arguments.number("moe-ffn-hidden-size", d_ff),
            "d_latent": arguments.number("moe-latent-size", 0) or None,
            "n_shared": 1 if shared else 0,
            "d_shared": shared or None,
            "activation": gated,
        }
    pattern = arguments.text("hybrid-layer-pattern") or arguments.text("hybrid-override-pattern")
    if pattern is None:
        pattern = ("*E" if n_experts else "*-") * arguments.number("num-layers")
    main, depths = split_mtp(pattern)
    mtp = {"pattern": canonical(depths[0]), "n_depths": len(depths)} if depths else None
    used = {letter: blocks[letter] for letter in canonical(main + "".join(depths)) if letter in blocks}
    return ModelConfig.model_validate(
        {
            "d_model": d_model,
            "vocab_size": padded,
            "pattern": main,
            "blocks": used,
            "mtp": mtp,
            "tie_embeddings": not arguments.on("untie-embeddings-and-output-weights"),
        }
    )
