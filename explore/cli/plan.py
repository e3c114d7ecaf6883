"""The `plan` command: plan large training runs."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from explore.cli.app import app, out
from explore.cli.models import load_model
from explore.cli.options import DModel, Json, SeqLen, SetOptions, VocabSize
from explore.cli.plan_tables import print_plan, print_published, print_side_by_side, row_of
from explore.cli.rules import Apart, Needs, Only, Options
from explore.cost import SEQ_LEN
from explore.foreign import echo

if TYPE_CHECKING:
    from explore.plan import Found, Plan, Run

Objective = Literal["tokens_per_s", "gpus", "memory"]
Precision = Literal["bf16", "fp8", "fp8-blocks", "mxfp8", "nvfp4"]
AllToAll = Literal["naive", "rank", "node"]


@app.command(
    rich_help_panel="Count",
    epilog="Example: explore plan nemotron-3-super --cluster GB200x256 --seq-len 8192 --global-batch 3072 "
    "--precision mxfp8 --tokens 25T",
    rules=(
        Only("--published", takes="--json --csv"),
        Only("--megatron-args", takes="--world-size --cluster --tokens --megatron --figure --json --csv"),
        Apart("--csv", "--json"),
        Apart("--megatron", "--json --csv --tokens --top"),
        Apart("--largest", "--objective --top"),
        Apart("--micro-batch", "--largest=batch"),
        Apart("--seq-len", "--largest=context"),
        Needs("--world-size", "--megatron-args"),
        Needs("--free", "--largest=model"),
    ),
)
def plan(
    context: typer.Context,
    targets: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="Patterns, presets or paths.")] = None,
    cluster: Annotated[
        str, typer.Option(metavar="GPUxN", help="GPU (a known name or a JSON file) and number of GPUs.")
    ] = "GB200x256",
    seq_len: SeqLen = SEQ_LEN,
    global_batch: Annotated[int, typer.Option(min=1, metavar="COUNT", help="Sequences per step.")] = 1024,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences per micro-batch.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks.")] = None,
    cp: Annotated[int | None, typer.Option(min=1, help="Context-parallel ranks.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline ranks.")] = None,
    vpp: Annotated[int | None, typer.Option(min=1, help="Virtual pipeline stages per rank.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Expert-parallel ranks.")] = None,
    etp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks within an expert.")] = None,
    pipeline_layout: Annotated[
        str | None,
        typer.Option(metavar="LAYOUT", help="Pipeline stages, e.g. 'Et*4|(tttt|)*14tmL', or a pattern with |."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Number format of weights and matrix products.")] = "bf16",
    recompute: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="Module to recompute, or full; repeatable.")
    ] = None,
    moments: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of Adam's moments.")] = "float32",
    grads: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of gradients.")] = "float32",
    zero: Annotated[
        int, typer.Option(min=0, max=3, help="Shard: 1 optimizer state, 2 gradients, 3 weights (FSDP).")
    ] = 1,
    offload_optimizer: Annotated[
        bool, typer.Option("--offload-optimizer", help="Keep optimizer state in host memory.")
    ] = False,
    offload_activations: Annotated[float, typer.Option(help="Fraction of activations to keep in host memory.")] = 0.0,
    memory_efficient_permutation: Annotated[
        bool, typer.Option("--efficient-permutation", help="Apply routing weights before the last matrix.")
    ] = False,
    all_to_all: Annotated[
        AllToAll, typer.Option(help="Send one copy of a token per expert (naive), rank or node.")
    ] = "node",
    expert_groups: Annotated[
        str | None,
        typer.Option(metavar="GROUPS:CHOSEN", help="Number of expert groups and of groups a token uses, e.g. 8:4."),
    ] = None,
    objective: Annotated[Objective, typer.Option(help="What the search optimizes.")] = "tokens_per_s",
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="COUNT", help="Training tokens, e.g. 25T; adds days and GPU-hours.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of layouts to show.")] = 8,
    largest: Annotated[
        Literal["batch", "context", "model"] | None, typer.Option(help="Find the largest value that fits.")
    ] = None,
    free: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="Size that --largest model changes (default: d_model).")
    ] = None,
    megatron: Annotated[bool, typer.Option("--megatron", help="Print Megatron-LM's arguments.")] = False,
    megatron_args: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan the run of Megatron-LM's arguments, in JSON.")
    ] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Number of GPUs of the --megatron-args run.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw memory and throughput, as PNG and SVG.")] = None,
    d_model: DModel = None,
    vocab_size: VocabSize = None,
    set_: SetOptions = None,
    published: Annotated[bool, typer.Option("--published", help="Compare with published numbers.")] = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the layouts as CSV.")] = False,
) -> None:
    """Plan a large training run: memory of each rank, traffic, throughput, and the best layouts.

    If --tp --cp --pp --vpp --ep --micro-batch are all given, that one layout is costed; otherwise the missing ones
    are searched. The ceiling assumes matrix products at the peak rate and all traffic hidden; the estimate uses
    efficiencies fitted to published runs.
    """
    from explore.plan import Cluster, Plan, Run

    if published:
        _published(as_json, as_csv)
        return
    fixed = {
        name: value
        for name, value in (
            ("tp", tp), ("cp", cp), ("pp", pp), ("vpp", vpp), ("ep", ep), ("etp", etp), ("micro_batch", micro_batch),
        )
        if value is not None
    }  # fmt: skip
    if megatron_args is not None:
        from explore.files import read_json
        from explore.interop.megatron_read import read_arguments

        if world_size is None:
            raise ValueError("--world-size: required with --megatron-args")
        device, _, n_gpus = cluster.rpartition("x")
        if "--cluster" in Options(context).given and device and n_gpus != str(world_size):
            raise ValueError(f"--cluster must have the GPUs of --world-size {world_size}, got {echo(cluster)}")
        device = device or cluster
        plans = {str(megatron_args): read_arguments(read_json(megatron_args), world_size, device)}
        _show(plans, {}, tokens, as_json, as_csv, megatron, figure)
        return
    if not targets:
        raise ValueError("MODEL: a pattern, preset or path is required, or --published, or --megatron-args")
    if len(set(targets)) < len(targets):
        raise ValueError(f"MODEL must be different models, got {echo(' '.join(targets))}")
    if _is_one_layout(fixed, pipeline_layout):
        for name in {"--objective", "--top"} & set(Options(context).given):
            raise ValueError(f"{name}: must come with a search, got one layout: all degrees and --micro-batch are set")
    run = Run.model_validate(
        {
            "seq_len": seq_len, "global_batch": global_batch, "precision": precision, "moments": moments,
            "grads": grads, "zero": zero, "recompute": _modules(recompute), "offload_optimizer": offload_optimizer,
            "offload_activations": offload_activations, "expert_groups": _groups(expert_groups),
            "memory_efficient_permutation": memory_efficient_permutation, "all_to_all": all_to_all,
        }
    )  # fmt: skip
    on, plans = Cluster.named(cluster), dict[str, Plan]()
    found: dict[str, Any] = {}
    for target in targets:
        model = load_model(target, d_model, vocab_size, set_ or [])
        if largest is not None:
            from explore.plan.largest import describe
            from explore.plan.largest import largest as find_largest

            most = find_largest(
                largest, model, on, run, fixed, pipeline=pipeline_layout, free=tuple(free or ["d_model"])
            )
            plans[target] = most.plan
            if not as_json and not as_csv:
                out.print(Text.assemble((target, "bold"), f": {describe(most)}"))
            found[target] = most.value
        else:
            plans[target], found[target] = _planned(model, run, on, fixed, pipeline_layout, objective, top)
    _show(plans, found, tokens, as_json, as_csv, megatron, figure)


def _published(as_json: bool, as_csv: bool) -> None:
    from explore.plan import published as compare

    rows = compare()
    if as_json:
        print(json.dumps([row.to_dict() for row in rows], indent=2))
    elif as_csv:
        _write_csv([row.to_dict() for row in rows])
    else:
        print_published(rows)


def _write_csv(rows: list[dict[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _is_one_layout(fixed: dict[str, int], pipeline: str | None) -> bool:
    """Whether all degrees are given, so that there is nothing to search."""
    return {"tp", "cp", "pp", "ep", "micro_batch"} | (set() if pipeline else {"vpp"}) <= set(fixed)


def _planned(
    model: Any, run: Run, on: Any, fixed: dict[str, int], pipeline: str | None, objective: Objective, top: int
) -> tuple[Plan, Found | None]:
    """The given layout if all degrees are given, else the best layout and the search that found it."""
    from explore.plan import Layout, Plan, search

    if _is_one_layout(fixed, pipeline):
        return Plan.of(model, run, Layout(**fixed, pipeline=pipeline), on), None
    found = search(model, on, run, fixed, objective=objective, pipeline=pipeline, n=top)
    if not found.plans:
        raise ValueError(found.refusal())
    return found.plans[0], found


def _show(
    plans: dict[str, Plan],
    found: dict[str, Any],
    tokens: int | None,
    as_json: bool,
    as_csv: bool,
    megatron: bool,
    figure: Path | None,
) -> None:
    from explore.plan import Found

    searches = {name: value for name, value in found.items() if isinstance(value, Found)}
    if figure is not None:
        from explore.figures import plot_plans, save_figure

        save_figure(plot_plans(plans, searches), figure)
    if megatron:
        _arguments(plans)
    elif as_csv:
        shown = {name: searches[name].plans if name in searches else (plan,) for name, plan in plans.items()}
        _write_csv([row_of(name, plan, tokens) for name, several in shown.items() for plan in several])
    elif as_json:
        records = []
        for name, plan in plans.items():
            record = {"model": name} | plan.to_dict(tokens)
            if name in searches:
                record |= {
                    "alternatives": [other.to_dict(tokens) for other in searches[name].plans[1:]],
                    "walls": [wall._asdict() for wall in searches[name].walls],
                    "n_layouts": searches[name].n_legal,
                    "n_fitting": searches[name].n_fitting,
                }
            elif name in found and found[name] is not None:
                record |= {"largest": found[name]}
            records.append(record)
        print(json.dumps(records[0] if len(records) == 1 else {"plans": records}, indent=2))
    else:
        for name, plan in plans.items():
            print_plan(name, plan, searches.get(name), tokens)
        if len(plans) > 1:
            print_side_by_side(plans, tokens)


def _arguments(plans: dict[str, Plan]) -> None:
    from explore.interop.megatron_layout import plan_arguments

    for name, plan in plans.items():
        arguments, notes = plan_arguments(plan)
        for note in [f"{name} on {plan.cluster.name}", *notes]:
            print(f"# {note}")
        print(" \\\n".join(shlex.join(argument) for argument in arguments))


def _modules(given: list[str] | None) -> tuple[str, ...]:
    return tuple(module for text in given or [] for module in text.replace(",", " ").split())


def _groups(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    n, colon, chosen = text.partition(":")
    if not colon or not n.isdigit() or not chosen.isdigit():
        raise ValueError(f"--expert-groups must be GROUPS:CHOSEN, such as 8:4, got {echo(text)}")
    return int(n), int(chosen)
