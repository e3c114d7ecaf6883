"""The `compare` command: models or runs side by side."""

from __future__ import annotations

import json
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from explore.cli.app import app, out
from explore.cli.many import load_models
from explore.cli.options import DModel, Json, KVDtype, SeqLen, SetOptions, StateDtype, VocabSize, WeightDtype
from explore.cli.tables import plain_table, print_fitting
from explore.cost import HARDWARE, SEQ_LEN
from explore.formatting import seconds
from explore.quantities import columns, quantity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from explore.runs import RunFolder

SIZES = ("n_layers", "d_model", "vocab_size")
LABELS = {"n_layers": "layers", "vocab_size": "vocabulary"}
COSTS = (
    "params_total", "params_active", "flops_fwd", "flops_train", "flops_prefill", "flops_decode", "weight_bytes",
    "kv_bytes", "ssm_state_bytes", "conv_state_bytes", "decode_bytes",
)  # fmt: skip
TIMES = {
    "prefill_s": "prefill", "decode_s": "decoding step", "largest_batch": "largest batch", "tokens_per_s": "tokens/s",
}  # fmt: skip
"""Columns of a device's roofline, and their labels."""

OUTCOMES = ("tokens", "flops_run", "train_s", "tokens_per_s")
NAME_WIDTH = 12
"""Characters per line of a model's or run's name in a column header."""


@app.command(
    rich_help_panel="Count",
    epilog='Example: explore compare nemotron-3-nano qwen3-30b-a3b; explore compare "MEM*E" "M-M*-" --figure pair.png; '
    "explore compare 3f2a 9c01 --figure curves.png",
)
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET", help="Patterns, presets, runs (or the first characters of keys) or paths."),
    ],
    d_model: DModel = None,
    vocab_size: VocabSize = None,
    seq_len: SeqLen = SEQ_LEN,
    hardware: Annotated[str, typer.Option(help="Hardware of the roofline.")] = HARDWARE,
    set_: SetOptions = None,
    weight_dtype: WeightDtype = "bfloat16",
    kv_dtype: KVDtype = "bfloat16",
    state_dtype: StateDtype = "float32",
    figure: Annotated[
        Path | None, typer.Option(help="Draw parameters, FLOPs and traffic (for runs: learning curves) as PNG and SVG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare models side by side: parameters, FLOPs, caches, roofline, and ratios to the first.

    If all are runs, also print the settings that differ and the results. FLOPs are per token; prefill FLOPs are per
    context. The roofline is a lower bound on the time of one device to prefill a context and to decode one token of
    one sequence, with the largest batch that fits and its tokens per second.
    """
    from explore.cost import Dtypes
    from explore.roofline import costs_table

    if len(targets) < 2 or len(set(targets)) < len(targets):
        raise ValueError(f"TARGET must be at least two different models or runs, got {', '.join(targets)}")
    dtypes = Dtypes(weight_dtype, kv_dtype, state_dtype)
    runs = _runs(targets)
    names = {target: run.path.name for target, run in runs.items()}
    models = {
        names.get(target, target): model
        for target, model in load_models([(each, "") for each in targets], d_model, vocab_size, set_ or []).items()
    }
    if len(models) < len(targets):
        raise ValueError(f"TARGET must be different runs, got the same run twice in {', '.join(targets)}")
    table = costs_table(models, seq_len, dtypes=dtypes, hardware=hardware)
    rows = {run.path.name: run.row() for run in runs.values()} if len(runs) == len(targets) else {}
    experiments = {run.path.name: run.experiment.get("experiment") or {} for run in runs.values()} if rows else {}
    written: tuple[Path, ...] = ()
    if figure is not None:
        from explore.figures import plot_receipts, save_figure

        drawn = _curves(list(runs.values())) if rows else plot_receipts(models, seq_len, dtypes=dtypes)
        written = save_figure(drawn, figure)
    if as_json:
        print(json.dumps(_record(table, experiments, rows), indent=2))
        return
    for name, model in models.items():
        out.print(f"{name}: {model.family}" + (f", {model.pattern}" if name != model.pattern else ""), highlight=False)
    costs: dict[str, Any] = {str(row["model"]): row for row in table.to_dict("records")}
    print_fitting(
        out, partial(_sizes, costs, hardware), f"at {seq_len:,} tokens, relative to {next(iter(models))}", list(models)
    )
    if rows:
        _print_differences(experiments)
        print_fitting(out, partial(_outcomes, rows), "results", list(rows))
    for path in written:
        out.print(f"wrote {path}", highlight=False)


def _runs(targets: Sequence[str]) -> dict[str, RunFolder]:
    """The targets that are runs, by target."""
    from explore.cli.models import find_file
    from explore.runs import RunFolder

    files = {target: find_file(target) for target in targets}
    found = {target: RunFolder(file.parent) for target, file in files.items() if file is not None}
    return {target: run for target, run in found.items() if run.key is not None}


def _headed(title: str, first: str, names: Sequence[str]) -> Table:
    """An empty table with a value column for each name, followed by a column that compares it with the first."""
    view = plain_table(title)
    view.add_column("", no_wrap=True)
    for name in names:
        view.add_column("\n".join(textwrap.wrap(name, NAME_WIDTH)), justify="right", no_wrap=True)
        if name != first:
            view.add_column("", justify="right", no_wrap=True, style="dim")
    return view


def _sizes(costs: Mapping[str, dict[str, Any]], hardware: str, title: str, names: Sequence[str]) -> Table:
    base = next(iter(costs))
    view, first = _headed(title, base, names), costs[base]
    for field in (*SIZES, *COSTS, *TIMES):
        values = [costs[name][field] for name in names]
        if not any(value == value and value for value in values):  # NaN is no value
            continue
        cells = []
        for name, value in zip(names, values, strict=True):
            is_time = field in ("prefill_s", "decode_s")
            cells.append(seconds(value) if is_time else quantity(field).text(value).replace(" ", "") or "none")
            cells += [] if name == base else [_ratio(value, first[field])]
        label = f"{hardware} {TIMES[field]}" if field in TIMES else LABELS.get(field, quantity(field).header)
        view.add_row(label, *cells)
    return view


def _ratio(value: float, first: float) -> str:
    return f"{value / first:.3g}x" if first and value == value and first == first else ""


def _outcomes(rows: Mapping[str, dict[str, Any]], title: str, names: Sequence[str]) -> Table:
    base = next(iter(rows))
    view, first = _headed(title, base, names), rows[base]
    known = [each for each in columns(name for row in rows.values() for name in row)
             if any(row.get(each.name) is not None for row in rows.values())]  # fmt: skip
    view.add_row("status", *(cell for name in names for cell in (str(rows[name]["status"]), "")[: 1 + (name != base)]))
    for each in known:
        if not (each.is_quality or each.name in OUTCOMES):
            continue
        cells = []
        for name in names:
            value, other = rows[name].get(each.name), first.get(each.name)
            cells.append(each.text(value) if value is not None else "none")
            if name != base:
                if value is None or other is None:
                    cells.append("")
                else:
                    cells.append(f"{value - other:+.4f}" if each.is_quality else _ratio(value, other))
        view.add_row(each.header, *cells)
    return view


def _print_differences(experiments: Mapping[str, dict[str, Any]]) -> None:
    from explore.table import differing

    differences = differing(experiments)
    if differences.empty:
        out.print("no setting differs")
        return

    def table(title: str, names: Sequence[str]) -> Table:
        view = plain_table(title)
        view.add_column("", no_wrap=True)
        for name in names:
            view.add_column("\n".join(textwrap.wrap(name, NAME_WIDTH)), justify="right", no_wrap=True)
        for field, values in differences.iterrows():
            texts = ["" if values[name] is None else str(values[name]) for name in names]
            view.add_row(
                str(field), *(text if len(text) <= NAME_WIDTH else text[: NAME_WIDTH - 3] + "..." for text in texts)
            )
        return view

    print_fitting(out, table, "settings that differ", list(experiments))


def _curves(runs: Sequence[RunFolder]) -> Any:
    from explore.figures import plot_curves
    from explore.table import load_metrics

    metrics = load_metrics(*(run.path for run in runs))
    validated = "val_bpb" in metrics and (metrics.dropna(subset="val_bpb").groupby("run").size() > 1).any()
    return plot_curves(metrics, y="val_bpb" if validated else "loss", by="run")


def _record(
    table: pd.DataFrame, experiments: Mapping[str, dict[str, Any]], rows: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    from explore.table import differing

    known = table.astype(object).where(table.notna(), None)
    record: dict[str, Any] = {"models": known.to_dict("records")}
    if rows:
        record |= {"settings": differing(experiments).to_dict("index"), "runs": list(rows.values())}
    return record
