"""Converts a plan to Megatron-LM arguments."""

from __future__ import annotations

from collections.abc import Mapping

from explore.interop.megatron import Arguments, megatron_arguments
from explore.plan import Plan

DISPATCHERS: Mapping[str, Arguments] = {
    "naive": [("--moe-token-dispatcher-type", "alltoall")],
    "node": [("--moe-token-dispatcher-type", "flex"), ("--moe-flex-dispatcher-backend", "hybridep")],
}
FP8_RECIPES = {"fp8": "tensorwise", "fp8-blocks": "blockwise", "mxfp8": "mxfp8"}


def plan_arguments(plan: Plan) -> tuple[Arguments, list[str]]:
    """Returns arguments of the architecture and of a plan, and notes on settings left to the user.

    If Megatron-LM's hybrid model cannot express the architecture, its arguments are replaced by a note with the reason.
    """
    notes: list[str]
    try:
        arguments, notes = megatron_arguments(plan.model, seq_len=plan.run.seq_len)
    except ValueError as refusal:
        arguments = [("--seq-length", str(plan.run.seq_len)), ("--max-position-embeddings", str(plan.run.seq_len))]
        notes = [f"the architecture is left to you: {refusal}"]
    notes = [note.replace("optimizer, data, tokenizer and parallelism are", "data and tokenizer are") for note in notes]
    if plan.run.offload_activations:
        notes.append(
            f"--offload-modules: choose modules that hold {plan.run.offload_activations:.0%} of the activations"
        )
    hybrid = next((i for i, argument in enumerate(arguments) if argument[0] == "--hybrid-layer-pattern"), None)
    if plan.layout.pp > 1 and hybrid is not None:
        arguments[hybrid] = ("--hybrid-layer-pattern", plan.batch.stages.hybrid(plan.model))
    return arguments + layout_arguments(plan, hybrid=hybrid is not None), notes


def layout_arguments(plan: Plan, *, hybrid: bool = True) -> Arguments:
    """Returns arguments for a plan's parallelism, batch, precision, optimizer and recomputation.

    Args:
        hybrid: the pattern contains the pipeline stages.

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
    if run.moments == "bfloat16" or run.offload_optimizer:
        arguments.append(("--use-precision-aware-optimizer",))
    if run.moments == "bfloat16":
        arguments += [("--exp-avg-dtype", "bf16"), ("--exp-avg-sq-dtype", "bf16")]
    arguments.append(("--accumulate-allreduce-grads-in-fp32" if run.grads == "float32" else "--grad-reduce-in-bf16",))
    if run.offload_optimizer:
        arguments += [("--optimizer-cpu-offload",), ("--optimizer-offload-fraction", "1.0")]
    if layout.ep > 1:
        arguments += DISPATCHERS["naive" if run.all_to_all == "naive" else "node"]
    if "full" in run.recompute:
        arguments += [
            ("--recompute-granularity", "full"), ("--recompute-method", "uniform"), ("--recompute-num-layers", "1"),
        ]  # fmt: skip
    elif run.recompute:
        arguments += [("--recompute-granularity", "selective"), ("--recompute-modules", *run.recompute)]
    return arguments
