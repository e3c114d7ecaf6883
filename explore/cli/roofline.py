"""The `roofline` command: bounds on inference time and throughput."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from explore.cli.app import app, out
from explore.cli.models import load_model
from explore.cli.options import (
    ActivationDtype,
    DModel,
    Json,
    OwnKVDtype,
    OwnStateDtype,
    OwnWeightDtype,
    Precision,
    SeqLen,
    SetOptions,
    Target,
    VocabSize,
    dtypes_of,
    recipe_of,
)
from explore.cli.rules import Needs, Only
from explore.cost import HARDWARE, SEQ_LEN, Dtype
from explore.foreign import echo
from explore.formatting import flops, read_whole_count, seconds, size

if TYPE_CHECKING:
    from explore.roofline import Deployment

WIDTH = 80
"""Columns of text below a table."""
SETTING = (
    "Setting: devices, tokens in / out. Both models run the largest batch that fits, or the published one. A roofline "
    "runs both models at the hardware's peak: it compares their work, not two serving stacks."
)


@app.command(
    rich_help_panel="Count",
    epilog="Example: explore roofline nemotron-3-nano --hardware H200 --context 65536 --weight-dtype float8",
    rules=(Only("--published", takes="--json"), Needs("--activation-dtype", "--expert-parallel")),
)
def roofline(
    target: Target = None,
    hardware: Annotated[
        str, typer.Option(help="A known GPU such as H100, a JSON file, or 'here' (this machine, measured).")
    ] = HARDWARE,
    context: SeqLen = SEQ_LEN,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes of decoding, in sequences.")] = "1,4,16,64,256",
    weight_dtype: OwnWeightDtype = None,
    kv_dtype: OwnKVDtype = None,
    state_dtype: OwnStateDtype = None,
    activation_dtype: ActivationDtype = "bfloat16",
    precision: Precision = None,
    compute_dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of matrix products (default: the weights').")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share every matrix.")] = 1,
    expert_parallel: Annotated[int, typer.Option(min=1, help="Devices that share the experts.")] = 1,
    d_model: DModel = None,
    vocab_size: VocabSize = None,
    set_: SetOptions = None,
    published: Annotated[bool, typer.Option("--published", help="Compare with published facts and speed-ups.")] = False,
    as_json: Json = False,
) -> None:
    """Bound inference: lower bounds on prefill and decode time, and the largest batch that fits in memory.

    This is a bound, not a forecast: each component takes the longer of its FLOPs at the peak rate and its bytes at the
    peak bandwidth. The bound ignores kernels below the peak, launches, norms, activations and their traffic, sampling,
    scheduling, communication between tensor-parallel devices, and imbalance between experts.
    """
    if published:
        _published(as_json)
        return
    if target is None:
        raise ValueError("TARGET: a pattern, preset or path is required, or --published")
    from explore.roofline import Deployment, decode_table
    from explore.roofline import hardware as device_named

    model, device = load_model(target, d_model, vocab_size, set_ or []), device_named(hardware)
    recipe = recipe_of(precision)
    dtypes = dtypes_of(weight_dtype, kv_dtype, state_dtype, activation_dtype, recipe)
    deployed = Deployment(model, device, dtypes, compute_dtype, tensor_parallel, expert_parallel, recipe=recipe)
    ridges = {dtype: device.ridge(dtype) for dtype in device.flops_per_s}
    largest = deployed.largest_batch(context)
    sizes = sorted({*_integers("--batch-sizes", batch_sizes), largest})
    table = decode_table(
        {target: model},
        hardware,
        context,
        sizes,
        dtypes=dtypes,
        compute_dtype=compute_dtype,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
        recipe=recipe,
    )
    prefill = deployed.prefill_s(context)
    if as_json:
        record = {
            "model": target,
            "hardware": device.name,
            "source": device.source,
            "ridges": ridges,
            "context": context,
            "prefill_s": prefill,
            "largest_batch": largest,
            "weight_bytes": deployed.weight_bytes,
            "state_bytes": deployed.state_bytes(context),
            "memory_bytes": deployed.memory_bytes,
            "decode": table.to_dict("records"),
        }
        print(json.dumps(record, indent=2))
        return
    devices = f"{deployed.n_devices} {device.name}" if deployed.n_devices > 1 else device.name
    out.print(
        f"{target} on {devices}: {flops(deployed.flops_per_s)} FLOP/s, {flops(deployed.bandwidth)} B/s, "
        f"ridge {deployed.flops_per_s / deployed.bandwidth:.0f} FLOP/B",
        highlight=False,
    )
    out.print(device.source, style="dim", highlight=False)
    out.print(
        f"ridges: {', '.join(f'{dtype} {ridge:.0f} FLOP/B' for dtype, ridge in ridges.items())}\n"
        f"memory: {size(deployed.weight_bytes)} of weights, {size(deployed.state_bytes(context))} of state for "
        f"{context:,} tokens, out of {size(deployed.memory_bytes)}; {largest:,} sequences fit\n"
        f"prefill of {context:,} tokens: {seconds(prefill)}",
        highlight=False,
    )
    view = Table(title=f"decoding at {context:,} tokens", title_justify="left", box=None, header_style="dim")
    for name in ("batch", "step", "tokens/s per device", "tokens/s per user", ""):
        view.add_column(name, justify="right")
    for row in table.itertuples():
        note = "largest that fits" if row.batch_size == largest else "" if row.fits else "does not fit"
        step = float(row.step_s)  # type: ignore[arg-type]
        view.add_row(
            f"{row.batch_size:,}", seconds(step), f"{row.tokens_per_s:,.0f}", f"{1 / step:,.0f}", Text(note, "dim")
        )
    out.print(view)
    if expert_parallel > 1:
        _communication(deployed, largest)


def _communication(deployed: Deployment, batch_size: int) -> None:
    step_s = deployed.all_to_all_s(batch_size)
    out.print(
        f"all-to-all of {deployed.expert_parallel} devices at {batch_size:,} sequences each: {seconds(step_s)} "
        f"per step at {flops(deployed.device.link)} B/s",
        highlight=False,
    )


def _published(as_json: bool) -> None:
    from explore.roofline import facts, speedup_table

    known, speedups = facts(), speedup_table()
    if as_json:
        print(json.dumps({"facts": known, "speedups": speedups}, indent=2))
        return
    view = Table(title="Closed-form facts", title_justify="left", box=None, header_style="dim")
    view.add_column("fact")
    for name in ("published", "computed"):
        view.add_column(name, justify="right", no_wrap=True)
    for fact in known:
        view.add_row(fact["fact"], f"{fact['published']:g}", f"{fact['computed']:.2f} {fact['unit']}".rstrip())
    out.print(view)
    view = Table(title="\nThroughput over a baseline", title_justify="left", box=None, header_style="dim")
    for name in ("model", "baseline", "setting"):
        view.add_column(name, no_wrap=True)
    for name in ("published", "predicted"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in speedups:
        setting = f"{row['device']}, {row['n_in'] // 1024}k/{row['n_out'] // 1024}k"
        numbers = [f"{row[name]:.1f}" for name in ("published", "predicted")]
        view.add_row(row["model"], row["baseline"], setting, *numbers)
    out.print(view)
    out.print(textwrap.fill(SETTING, WIDTH), highlight=False)
    out.print("Why prediction and publication differ:", highlight=False)
    for row in speedups:
        reason = (
            f"{row['model']} / {row['baseline']}: batches {row['batch_size']:,} and {row['baseline_batch_size']:,}; "
            f"{row['predicted_at_its_batch']:.1f} at the baseline's batch; {row['why']}"
        )
        out.print(textwrap.fill(reason, WIDTH, initial_indent="  ", subsequent_indent="    "), highlight=False)


def _integers(option: str, text: str) -> list[int]:
    try:
        return [read_whole_count(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be positive integers separated by commas, got {echo(text)}") from None
