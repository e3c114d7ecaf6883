"""The `cost` command: parameters, FLOPs, memory and traffic in closed form; no model is built."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from explore.cli.app import app, out
from explore.cli.many import load_models, print_costs, read_targets
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
from explore.cli.rules import Apart, Only
from explore.cli.tables import fits, plain_table, print_fitting
from explore.cost import SEQ_LEN, By, ConventionName
from explore.formatting import count, flops, ranges, size
from explore.quantities import Quantity, quantity

if TYPE_CHECKING:
    from explore.cost import Ledger
    from explore.model import ModelConfig
    from explore.presets import Preset


MODEL = "TARGET --d-model --vocab-size --seq-len --set"
"""Options that choose a model and its context."""


@app.command(
    rich_help_panel="Count",
    epilog='Example: explore cost "MEM*E" --d-model 256 --set blocks.E.d_latent=64 --by component',
    rules=(
        Only("--list", takes="--json"),
        Only("--published", takes="--json"),
        Only(
            "--patterns",
            takes="--d-model --vocab-size --seq-len --set --weight-dtype --kv-dtype --state-dtype --activation-dtype "
            "--json --csv",
        ),
        Only("--diff", takes=f"{MODEL} --json"),
        Only("--saved", takes=f"{MODEL} --json"),
        Apart("--csv", "--json --by --convention"),
        Apart("--json", "--by"),
    ),
)
def cost(
    target: Target = None,
    d_model: DModel = None,
    vocab_size: VocabSize = None,
    seq_len: SeqLen = SEQ_LEN,
    set_: SetOptions = None,
    by: Annotated[By, typer.Option(help="Rows of the table.")] = "letter",
    convention: Annotated[ConventionName, typer.Option(help="Convention for counting FLOPs.")] = "exact",
    diff: Annotated[
        str | None,
        typer.Option(metavar="ONE,OTHER", help="Show the components that two conventions count differently."),
    ] = None,
    weight_dtype: OwnWeightDtype = None,
    kv_dtype: OwnKVDtype = None,
    state_dtype: OwnStateDtype = None,
    activation_dtype: ActivationDtype = "bfloat16",
    precision: Precision = None,
    as_json: Json = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: every component of every layer, or with --patterns every model.")
    ] = False,
    saved: Annotated[
        bool, typer.Option("--saved", help="Show the bytes saved per token for the backward pass.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Compare computed with published counts.")] = False,
    patterns: Annotated[
        str | None,
        typer.Option(metavar="FILE|-", help="Print one row for each line of FILE: a pattern, preset, run or path."),
    ] = None,
) -> None:
    """Itemise a model's parameters, FLOPs, memory and traffic.

    Block sizes of a pattern follow d_model as in the Nemotron models. Mamba-2: heads of 64, d_inner = 2 d_model,
    d_state 128, up to 8 groups. Attention: heads of up to 128, 2 KV heads. MLP: d_ff = 4 d_model, squared ReLU. MoE:
    128 experts of 11/16 d_model, top 6, and a shared expert of twice that width. Change any of them with --set
    blocks.LETTER.FIELD=VALUE. Forward and training FLOPs are per token, averaged over a sequence. With --precision,
    weight bytes follow the recipe's formats and include scales and multi-token prediction.
    """
    from explore.cost import CONVENTIONS, Cost, flops_train, in_formats, storage
    from explore.model import saved_table

    if list_:
        _list_presets(as_json)
        return
    if published:
        _published(as_json)
        return
    recipe = recipe_of(precision)
    dtypes = dtypes_of(weight_dtype, kv_dtype, state_dtype, activation_dtype, recipe)
    if patterns is not None:
        models = load_models(read_targets(patterns), d_model, vocab_size, set_ or [])
        print_costs(models, seq_len, dtypes, as_json=as_json, as_csv=as_csv)
        return
    if target is None:
        raise ValueError("TARGET: a pattern, preset or path is required, or --list, --patterns or --published")
    model = load_model(target, d_model, vocab_size, set_ or [])
    ledger = model.ledger(seq_len)
    if recipe is not None:
        ledger = in_formats(ledger, recipe)
    if diff is not None:
        _diff(model, ledger, diff, as_json)
        return
    if saved and not as_json:
        _saved(model, seq_len)
        return
    totals = Cost.of(ledger, dtypes).to_dict()
    if recipe is not None:
        totals |= {"precision": precision, "weight_dtype": None} | ledger.flops_quantized(ledger) | storage(ledger)
    counted = flops_train(ledger, convention)
    if as_csv:
        records = ledger.to_records(dtypes)
        writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return
    if as_json:
        about = {"pattern": model.pattern, "family": model.family, "convention": convention}
        if convention != "exact":
            totals |= {"flops_fwd": counted / 3, "flops_train": counted}
        kept = {"saved": saved_table(model, seq_len)} if saved else {}
        print(json.dumps(about | totals | kept | {"ledger": ledger.to_records(dtypes)}, indent=2))
        return
    out.print(
        Text.assemble(
            (model.family, "bold"),
            f", {model.n_layers} layers, d_model {model.d_model}, vocabulary {model.vocab_size:,}; ",
            f"{seq_len:,} tokens\n{model.pattern}",
            f"  {_mtp(model)}" if model.mtp else "",
        )
    )
    records = ledger.fold(by, dtypes)
    quantized = () if recipe is None else ("flops_train_quantized",)
    print_fitting(out, partial(_receipt, records), "computes", (*COMPUTES, *quantized))
    print_fitting(out, partial(_receipt, records), "holds and moves", HOLDS)
    if recipe is not None:
        out.print(_formats(ledger))
    _summary(totals)
    if convention != "exact":
        out.print(
            f"{convention}: {flops(counted)} training FLOPs per token, {counted / totals['flops_train']:.3f} of exact; "
            f"it counts {CONVENTIONS[convention].summary} ({CONVENTIONS[convention].source})",
            highlight=False,
        )


COMPUTES = ("params", "params_active", "flops_fwd", "flops_train", "flops_prefill", "flops_decode", "share")
"""Columns of the first table: compute. Prefill covers the whole context, decode one step."""

HOLDS = ("weight_bytes", "kv_bytes", "ssm_state_bytes", "conv_state_bytes", "decode_bytes", "all_to_all_bytes")
"""Columns of the second table: weights, state of one sequence at the context, bytes moved by one decoding step."""

LEDGER_ONLY = {
    "params": quantity("params_total"),
    "share": Quantity("share", "Share of the forward pass", spec=".1%"),
}
"""Columns of ledger records that runs lack, or have under another name."""


def _declared(field: str) -> Quantity:
    """The quantity that declares a column of ledger records."""
    return LEDGER_ONLY.get(field) or quantity(field)


def _receipt(records: list[dict[str, Any]], title: str, fields: Sequence[str]) -> Table:
    """A table of the records with a nonzero value in any of these columns."""
    table = plain_table(title)
    names = [name for name in ("layer", "letter", "component") if name in records[0]]
    folded = "layer" not in records[0]
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in (*(("layers",) if folded else ()), *(_declared(field).header for field in fields)):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        label = [str(record[name]) or ("model" if name == "letter" else "") for name in names]
        layers = [str(record["layers"] or "")] if folded else []
        cells = [_cell(field, record[field]) for field in fields]
        if any(record[field] for field in fields):
            table.add_row(*label, *layers, *cells)
    return table


def _formats(ledger: Ledger) -> Table:
    """A table of the format of each component, with its layers and parameters."""
    from explore.cost import formats_of

    table = plain_table("in formats")
    for name in ("letter", "component", "format"):
        table.add_column(name, no_wrap=True)
    table.add_column("layers")
    table.add_column("params", justify="right", no_wrap=True)
    for record in formats_of(ledger):
        layers = record["layers"]
        table.add_row(
            record["letter"] or "model", record["component"], record["format"], ranges(layers), count(record["params"])
        )
    return table


def _cell(field: str, value: float) -> str:
    return _declared(field).text(value).replace(" ", "") if value or field == "share" else ""


def _summary(totals: dict[str, Any]) -> None:
    active = [
        ("with embeddings", "params_active"),
        ("without the input embedding", "params_active_no_input_embedding"),
        ("without embeddings and head", "params_active_no_embeddings"),
    ]
    mtp = f", without {count(totals['params_mtp'])} of MTP" if totals["params_mtp"] else ""
    lines = [f"parameters: {count(totals['params_total'])}{mtp}; active"]
    lines += [
        f"  {count(totals[field])} {name}" + f" ({count(totals[field + '_no_router'])} without routers)"
        for name, field in active
    ]
    out.print("\n".join(lines), highlight=False)
    out.print(
        f"FLOPs per token: {flops(totals['flops_fwd'])} forward, {flops(totals['flops_train'])} training, "
        f"{flops(totals['flops_decode'])} decode; prefill {flops(totals['flops_prefill'])}\n"
        f"state: {size(totals['kv_bytes_per_token'])} of KV per token ({totals['kv_dtype']});\n"
        f"  {size(totals['ssm_state_bytes'])} of recurrent and {size(totals['conv_state_bytes'])} of conv state "
        f"per sequence ({totals['state_dtype']})\n"
        f"a decoding step of one sequence moves {size(totals['decode_bytes'])} "
        f"(weights in {totals['weight_dtype'] or totals['precision']})",
        highlight=False,
    )
    if "bits_per_element" in totals:
        out.print(
            f"{totals['precision']}: {totals['bits_per_element']:.2f} bits per element, scales included;\n"
            f"  {size(totals['weight_bytes'])} of weights, MTP included;\n"
            f"  {totals['flops_train_quantized'] / totals['flops_train']:.1%} of training FLOPs "
            "with quantised operands",
            highlight=False,
        )


def _saved(model: ModelConfig, seq_len: int) -> None:
    from explore.model import saved_table

    titles = {
        "exact": "in this kit (fp32, CPU, default paths)",
        "megatron": "in Megatron-LM (layers in bf16, nothing recomputed)",
    }
    records = saved_table(model, seq_len)
    for convention, title in titles.items():
        rows = [record for record in records if record["convention"] == convention]
        groups = list(dict.fromkeys(record["group"] for record in rows))
        table = plain_table(f"bytes saved per token {title}")
        words = [group.split()[0] for group in groups]
        heads = [word if len(word) < 8 else f"{word[:5]}." for word in words]
        for i, name in enumerate(("letter", "layers", *heads, "total")):
            table.add_column(name, justify="right" if i else "left")
        for letter in dict.fromkeys(record["letter"] for record in rows):
            of = {record["group"]: record["bytes"] for record in rows if record["letter"] == letter}
            layers = next(record["layers"] for record in rows if record["letter"] == letter)
            cells = [size(of[group]).replace(" ", "") if group in of else "" for group in groups]
            table.add_row(letter or "model", str(layers or ""), *cells, size(sum(of.values())).replace(" ", ""))
        table.add_row("", "", *[""] * len(groups), size(sum(record["bytes"] for record in rows)).replace(" ", ""))
        out.print(table)


def _diff(model: ModelConfig, ledger: Ledger, names: str, as_json: bool) -> None:
    from explore.cost import diff, flops_train

    one, comma, other = names.partition(",")
    if not comma:
        raise ValueError(f"--diff must be of the form ONE,OTHER, such as exact,megatron, got {names!r}")
    records = diff(ledger, one, other)
    totals = {name: flops_train(ledger, name) for name in (one, other)}
    if as_json:
        print(json.dumps({"seq_len": ledger.seq_len, "flops_train": totals, "lines": records}, indent=2))
        return
    table = Table(
        title=f"Training FLOPs per token, {ledger.seq_len:,} tokens: {model.pattern}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for name in ("letter", "component"):
        table.add_column(name)
    for name in ("layers", one, other, "difference", "of the total"):
        table.add_column(name, justify="right")
    for record in records:
        numbers = [flops(record[one]), flops(record[other]), signed(record["difference"])]
        share = f"{record['difference'] / totals[one]:+.2%}"
        table.add_row(record["letter"] or "model", record["component"], str(record["layers"] or ""), *numbers, share)
    table.add_section()
    difference = totals[other] - totals[one]
    table.add_row(
        "",
        "total",
        "",
        flops(totals[one]),
        flops(totals[other]),
        signed(difference),
        f"{difference / totals[one]:+.2%}",
    )
    out.print(table)


def signed(value: float) -> str:
    """FLOPs as text, always with a sign."""
    return ("-" if value < 0 else "+") + flops(abs(value))


def _list_presets(as_json: bool) -> None:
    from explore.presets import PRESETS, preset

    if as_json:
        records = {name: {"source": entry.source, "pattern": preset(name).pattern} for name, entry in PRESETS.items()}
        print(json.dumps(records, indent=2))
        return
    tables = [_presets(PRESETS, "source"), _presets(PRESETS, "arXiv")]
    out.print(tables[0] if fits(out, tables[0]) else tables[1])


def _presets(presets: Mapping[str, Preset], source: Literal["source", "arXiv"]) -> Table:
    """A table of the presets with their sources, or with arXiv numbers only."""
    from explore.presets import preset

    table = plain_table()
    for name in ("preset", "family"):
        table.add_column(name, no_wrap=True)
    for name in ("total", "active", source):
        table.add_column(name, justify="left" if name == source else "right", no_wrap=True)
    for name, entry in presets.items():
        totals = preset(name).cost(4096)
        on_arxiv = re.search(r"arXiv (\S+?)[,;:]?( |$)", entry.source)
        where = entry.source if source == "source" else on_arxiv[1] if on_arxiv else ""
        table.add_row(name, preset(name).family, count(totals.params_total), count(totals.params_active), where)
    return table


def _published(as_json: bool) -> None:
    from explore.presets import published_table

    records = published_table()
    if as_json:
        print(json.dumps(records, indent=2))
        return
    table = Table(
        title="Parameters in billions, published and computed", title_justify="left", box=None, header_style="dim"
    )
    table.add_column("preset", no_wrap=True)
    table.add_column("count")
    table.add_column("published", justify="right")
    table.add_column("computed", justify="right")
    table.add_column("")
    for record in records:
        meaning = record["quantity"].removeprefix("params_").replace("_", " ").replace(" no ", ", no ")
        mark = "✓" if record["agrees"] else "✗"
        printed = f"{float(record['published']):g}" if "e" in record["published"] else record["published"]
        table.add_row(record["preset"], meaning, printed, f"{record['computed']:.3f}", mark)
    out.print(table)
    agreeing = sum(record["agrees"] for record in records)
    out.print(f"{agreeing} of {len(records)} computed counts round to the published digits", highlight=False)
    if agreeing < len(records):
        raise typer.Exit(1)


def _mtp(model: ModelConfig) -> str:
    assert model.mtp is not None
    weights = "shared" if model.mtp.shared else "separate"
    return f"plus multi-token prediction: depth {model.mtp.n_depths}, {model.mtp.pattern}, {weights} weights"
