"""The `bench` command: time training, decoding, ops and sweeps on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from explore.cli.app import app, err, out
from explore.cli.options import Json, Paths, SplitBatch, forced
from explore.cli.rules import Needs
from explore.formatting import duration, flops, size

What = Literal[
    "train",
    "profile",
    "decode",
    "ops",
    "curves",
    "trials",
    "regions",
    "neighbours",
    "sharing",
    "text",
    "precision",
    "compress",
]

PROFILED_OPS = 12
"""Number of ops in the profile table of a family."""


USED = {
    "--shape": ("train", "profile", "decode", "ops", "curves", "trials", "regions", "neighbours", "precision"),
    "--family": ("train", "profile", "decode", "curves", "trials", "precision"),
    "--seconds": ("train", "profile", "neighbours", "sharing", "precision", "compress"),
    "--path": ("train", "profile", "curves"),
    "--split-batch": ("train", "curves"),
    "--steps": ("curves",),
    "--megabytes": ("text",),
    "--new-tokens": ("decode",),
    "--compile": ("decode",),
    "--save": ("regions", "sharing"),
}
"""The values of --what with which an option has an effect."""


@app.command(
    rich_help_panel="Prove",
    epilog="Example: explore bench --shape small; explore bench --what ops",
    rules=tuple(Needs(option, " ".join(f"--what={what}" for what in used)) for option, used in USED.items()),
)
def bench(
    what: Annotated[
        What,
        typer.Option(
            help="What to time. train: a training step. decode: decoding. ops: every op on each path. "
            "profile: a training step by products, memory passes, dispatch, optimizer and data. "
            "curves: losses against the reference. trials: a sweep's overhead before a trial's first step. "
            "regions: gain and cost of compiling an op. neighbours: a run beside busy processes. "
            "sharing: one run on all cores against one run per core. text: splitting, tokenizing and caching. "
            "precision: emulated FP8 and NVFP4 against bf16. "
            "compress: scores, distillation, a library of replacements and its integer program."
        ),
    ] = "train",
    shape: Annotated[
        Literal["tiny", "small", "large"],
        typer.Option(help="tiny: d_model 64, 4 x 128 tokens; small: 192, 8 x 512; large: 512, 8 x 1024."),
    ] = "small",
    family: Annotated[list[str] | None, typer.Option(help="Only this family; repeatable.")] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Seconds per training measurement (up to four for each family).")
    ] = 10,
    path: Paths = None,
    split_batch: SplitBatch = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each loss curve.")] = 300,
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the text, in millions of bytes.")] = 20,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode in each of 16 sequences.")] = 256,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile our decoding step; compilation is not in the timing.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Save the table of regions or sharing; later runs and sweeps here use it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time training and decoding on this machine against transformers' nemotron_h, and every op on each of its paths.

    Training is a whole step: forward, backward, gradient clipping and AdamW. Each side uses the faster of fp32 and
    bf16, each measurement has its own process, and ops are compiled as in a run of 20M tokens. `--what curves` trains
    with the paths in use and with the fp32 reference, and prints the difference of their losses. "of GEMM rate" is
    exact training FLOPs per second over the measured rate of matrix products (bf16, or fp32 on CPUs without bf16
    instructions); "limit" is the ratio to the baseline at that rate.
    """
    from explore.bench import SHAPES, compare, compare_curves, compare_decoding, time_neighbours, time_ops, time_trials
    from explore.cost import Dtype
    from explore.roofline import measured

    if what == "regions":
        _regions(shape, save, as_json)
        return
    if what == "sharing":
        _sharing(seconds, save, as_json)
        return
    if what == "text":
        _text(megabytes, as_json)
        return
    if what == "precision":
        _precision(shape, seconds, family, as_json)
        return
    if what == "compress":
        _compress(seconds, as_json)
        return
    if what == "ops":
        records = list(time_ops(SHAPES[shape].d_model, SHAPES[shape].batch_tokens, SHAPES[shape].seq_len))
        _show(records, as_json, ("op", "path", "precision"), {"ms": lambda r: f"{1e3 * r['seconds']:.1f}"})
        return
    if what == "trials":
        records = _report(
            time_trials(shape, family), lambda r: f"{r['family']}: {r['set_up_s']:.2f} s before the first step"
        )
        columns = {"first in a process": lambda r: f"{r['first_s']:.2f} s", "later": lambda r: f"{r['set_up_s']:.2f} s"}
        _show(records, as_json, ("family",), columns)
        return
    if what == "neighbours":
        records = _report(
            time_neighbours(shape, seconds),
            lambda r: f"beside {r['neighbours']} busy processes: {r['of_idle']:.0%} of the idle speed",
        )
        columns = {
            "threads": lambda r: str(r["threads"]),
            "tokens/s": lambda r: f"{r['tokens_per_s']:,.0f}",
            "of idle": lambda r: f"{r['of_idle']:.0%}",
            "torch's choice": lambda r: f"{r['torch_tokens_per_s']:,.0f}",
            "of idle, torch's": lambda r: f"{r['torch_of_idle']:.0%}",
        }
        _show(records, as_json, ("neighbours",), columns)
        return
    paths = forced(path)
    if what == "profile":
        _profile(shape, seconds, paths, family, as_json)
        return
    if what == "curves":
        curves = compare_curves(shape, steps, paths, family, split=split_batch)
        records = _report(curves, lambda r: f"{r['family']}, {r['precision']}: losses differ by {r['mean']:.4f} nats")
        apart = {name: lambda r, name=name: f"{r[name]:.4f}" for name in ("mean", "largest", "rounding")}
        _show(records, as_json, ("family", "precision"), apart)
        if not as_json:
            out.print(f"difference from the fp32 reference over {steps} steps, nats", highlight=False)
        return
    fastest: Dtype = max(("bfloat16", "float32"), key=measured().peak)  # fp32 on CPUs without bf16 instructions
    rate = measured().peak(fastest)
    training = what == "train"
    timed = (
        compare(shape, seconds, rate, paths, family, split=split_batch)
        if training
        else compare_decoding(shape, new_tokens, family, compiled=compiled)
    )
    records = _report(timed, lambda r: f"{r['family']}: {r['ratio']:.2f} times the baseline")
    columns = {
        "tokens/s": lambda r: f"{r['tokens_per_s']:,.0f}",
        "baseline": lambda r: f"{r['baseline_tokens_per_s']:,.0f}",
        "ratio": lambda r: f"{r['ratio']:.2f}",
    }
    if training:
        columns |= {
            "limit": lambda r: f"{r['limit']:.2f}",
            "dtype": lambda r: "/".join(dict.fromkeys((r["precision"], r["baseline_precision"]))),
            "memory": lambda r: size(r["peak_bytes"]),
            "baseline memory": lambda r: size(r["baseline_peak_bytes"]),
            "of GEMM rate": lambda r: f"{r['gemm_fraction']:.0%}",
        }
    if compiled:
        columns["compilation"] = lambda r: duration(r["compile_s"])
    _show(records, as_json, ("family",), columns)
    if not as_json:
        out.print(f"matrix products reach {flops(rate)} FLOP/s here in {fastest}", highlight=False)


def _profile(shape: str, seconds: float, paths: dict[str, str], family: list[str] | None, as_json: bool) -> None:
    from explore.bench import KINDS, by_op, by_part, profile_training

    timed = profile_training(shape, seconds, paths, family)
    records = _report(timed, lambda r: f"{r['family']}: {_ms(r['step_s'])} ms a step in {r['precision']}")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {"ms": lambda r: _ms(r["step_s"])}
    columns |= {kind: partial(_share_of, kind) for kind in KINDS}
    columns["unexplained"] = lambda r: f"{r['unexplained_s'] / r['step_s']:.0%}"
    _show(records, as_json, ("family",), columns)
    if as_json:
        return
    for record in records:
        out.print(f"\n{record['family']}, ms of a step by part of the model:", highlight=False)
        parts = [{"part": part, **kinds} for part, kinds in by_part(record["ops"]).items()]
        kinds = [kind for kind in KINDS if any(row[kind] for row in parts)]
        shown = {kind: partial(_milliseconds_of, kind) for kind in kinds}
        _show(parts, False, ("part",), shown | {"sum": lambda row: _ms(sum(row[kind] for kind in KINDS))})
        out.print(f"\n{record['family']}, ops that take most of a step:", highlight=False)
        columns = {
            "calls": lambda op: f"{op['calls']:.0f}",
            "ms": lambda op: _ms(op["seconds"]),
            "of the step": lambda op: f"{op['seconds'] / op['step_s']:.0%}",
        }
        ops = [{**op, "step_s": record["step_s"]} for op in by_op(record["ops"])[:PROFILED_OPS]]
        _show(ops, False, ("op", "kind"), columns)
    threads = records[0]["threads"]
    out.print(
        f"\n{threads} thread{'s' * (threads > 1)}; the profiler's overhead is subtracted from dispatch", highlight=False
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _share_of(kind: str, record: dict[str, Any]) -> str:
    return f"{record['shares'][kind] / record['step_s']:.0%}"


def _milliseconds_of(kind: str, row: dict[str, Any]) -> str:
    return _ms(row[kind])


def _regions(shape: str, save: bool, as_json: bool) -> None:
    import pandas as pd

    from explore.bench import time_regions
    from explore.table import save_table
    from explore.train import own_table

    def speed_up(record: dict[str, Any]) -> str:
        ratio = record["default_ns"] / record["compiled_ns"]
        return f"{record['op']}, {record['precision']}: {ratio:.2f} times as fast compiled"

    records = _report(time_regions(shape), speed_up)
    columns = {
        "ns an element": lambda r: f"{r['default_ns']:.2f}",
        "compiled": lambda r: f"{r['compiled_ns']:.2f}",
        "compilation": lambda r: duration(r["compile_s"]),
    }
    _show(records, as_json, ("op", "precision"), columns)
    if save:
        save_table(pd.DataFrame(records), own_table())
        err.print(f"wrote {own_table()}", highlight=False)


def _sharing(seconds: float, save: bool, as_json: bool) -> None:
    import pandas as pd

    from explore.bench import time_sharing
    from explore.study.sharing import own_table
    from explore.table import save_table

    def ratio(record: dict[str, Any]) -> float:
        return float(record["apart_tokens_per_s"] / record["together_tokens_per_s"])

    records = _report(
        time_sharing(seconds), lambda r: f"{r['shape']}: {ratio(r):.2f} times the tokens/s with one run per core"
    )
    columns = {
        "FLOPs a step": lambda r: flops(r["flops_step"]),
        "tokens/s of one run": lambda r: f"{r['together_tokens_per_s']:,.0f}",
        "of one per core": lambda r: f"{r['apart_tokens_per_s']:,.0f}",
        "ratio": lambda r: f"{ratio(r):.2f}",
    }
    _show(records, as_json, ("shape",), columns)
    if save:
        save_table(pd.DataFrame(records), own_table())
        err.print(f"wrote {own_table()}", highlight=False)


def _text(megabytes: int, as_json: bool) -> None:
    from explore.bench import time_text

    timed = time_text(megabytes * 10**6)
    records = _report(timed, lambda r: f"{r['form']}: {r['ratio']:.2f} times the time of the tokenizer")
    columns = {
        "MB/s": lambda r: f"{r['n_bytes'] / r['seconds'] / 1e6:.2f}",
        "tokenizer alone": lambda r: f"{r['n_bytes'] / r['tokenizer_s'] / 1e6:.2f}",
        "time ratio": lambda r: f"{r['ratio']:.2f}",
        "splitting": lambda r: duration(r["split_s"]),
        "peak memory": lambda r: size(r["peak_bytes"]),
        "at the start": lambda r: size(r["start_bytes"]),
    }
    _show(records, as_json, ("form",), columns)


def _precision(shape: str, seconds: float, family: list[str] | None, as_json: bool) -> None:
    from explore.bench import compare_precisions

    timed = compare_precisions(shape, seconds, family)
    records = _report(timed, lambda r: f"{r['family']}, {r['precision']}: {r['step_ratio']:.2f} times the step in bf16")

    def ratio(record: dict[str, Any], name: str) -> str:
        bound = record[f"{name}_bound"]
        return f"{record[f'{name}_ratio']:.2f}" + ("" if bound is None else f" ({bound:g})")

    columns = {
        "tokens/s": lambda r: f"{r['tokens_per_s']:,.0f}",
        "step (bound)": lambda r: ratio(r, "step"),
        "memory (bound)": lambda r: ratio(r, "memory"),
        "holds": lambda r: "" if r["step_bound"] is None else "yes" if r["holds"] else "no",
        "first step": lambda r: duration(r["first_step_s"]),
    }
    _show(records, as_json, ("family", "precision"), columns)


def _compress(seconds: float, as_json: bool) -> None:
    from explore.bench import compare_compression

    def text(record: dict[str, Any], name: str) -> str:
        return size(record[name]) if record["unit"] == "bytes" else f"{record[name]:.2f} {record['unit']}"

    records = _report(compare_compression(seconds), lambda r: f"{r['what']}: {text(r, 'value')}")
    columns = {
        "measured": lambda r: text(r, "value"),
        "bound": lambda r: text(r, "bound"),
        "holds": lambda r: "yes" if r["holds"] else "no",
    }
    _show(records, as_json, ("what",), columns)


def _report(records: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """Prints a line for each record as soon as it is measured, and returns all records."""
    gathered = []
    for record in records:
        err.print(line(record), highlight=False)
        gathered.append(record)
    return gathered


def _show(records: list[dict[str, Any]], as_json: bool, names: tuple[str, ...], columns: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(records, indent=2))
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, no_wrap=name != "what")  # a sentence, which may take several lines
    for name in columns:
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(*(str(record[name]) for name in names), *(show(record) for show in columns.values()))
    out.print(table)
