"""The `quantize` command: quantise a trained run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from explore.cli.app import app, err, out
from explore.cli.opening import Run
from explore.cli.options import Json, recipe_of
from explore.cli.rules import Needs, Options
from explore.formatting import count

if TYPE_CHECKING:
    from explore.quantizing import Quantization
    from explore.runs import RunFolder

StateName = Literal["fp32", "bf16", "fp16", "fp8", "fp8-blocks", "mxfp8", "mxfp4", "nvfp4", "int8"]
RoundingName = Literal["nearest", "stochastic"]
FORMATS = "nvfp4,fp8"


@app.command(
    rich_help_panel="Use trained models",
    epilog="Example: explore quantize runs/my-run-0123abcd --bits 4.75 --kv fp8 --state fp16",
    rules=(Needs("--formats", "--bits"),),
)
def quantize(
    context: typer.Context,
    run: Run,
    bits: Annotated[
        float | None, typer.Option(help="Choose formats within this many bits per parameter, scales included.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Formats of a recipe: its name, or its JSON file.")
    ] = None,
    formats: Annotated[
        str | None, typer.Option(help=f"Formats that --bits may choose, besides bf16 (default: {FORMATS}).")
    ] = None,
    scales: Annotated[
        Literal["max", "mse", "four_over_six"] | None,
        typer.Option(
            metavar="CRITERION",
            help="Scales of weights: max, mse or four_over_six (default: mse with --bits, else the recipe's).",
        ),
    ] = None,
    kv: Annotated[
        StateName | None, typer.Option(metavar="FORMAT", help="Format of keys and values, such as fp8 or int8.")
    ] = None,
    state: Annotated[
        StateName | None,
        typer.Option(metavar="FORMAT", help="Format of recurrent and convolution state, such as fp16."),
    ] = None,
    kv_rounding: Annotated[RoundingName | None, typer.Option(help="Rounding of keys and values.")] = None,
    state_rounding: Annotated[RoundingName | None, typer.Option(help="Rounding of state.")] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, metavar="COUNT", help="Tokens of the training split to calibrate on.")
    ] = 8192,
    calibration_seed: Annotated[int, typer.Option(min=0, help="Seed that draws the calibration tokens.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of stochastic rounding.")] = 0,
    name: Annotated[str | None, typer.Option(help="Suffix of the child's name, after the parent's name.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw bits against quality of all children, as PNG and SVG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantise a trained run, save the result as a new run, and score it.

    Weights and the activations they multiply are quantised together. With --bits, the KL divergence from the trained
    model is measured with one component quantised at a time, and an integer program chooses the formats. The child's
    folder is next to its parent's, whose weights it needs; eval, generate and table accept it like any run.
    """
    from explore.quantizing import quantize_run
    from explore.runs import RunFolder

    if (bits is None) == (precision is None):
        raise ValueError("--bits, --precision: exactly one of them is required")
    decoding = {"kv": kv, "state": state, "kv_rounding": kv_rounding, "state_rounding": state_rounding}
    request = _request(
        bits, precision, formats or FORMATS, scales, decoding, (calibration_tokens, calibration_seed, seed)
    )
    suffix = name or "-".join([f"{bits:g}-bits" if bits is not None else Path(str(precision)).stem, request.scales])
    for option, rounding, format in (
        ("--kv", kv_rounding, request.recipe.kv),
        ("--state", state_rounding, request.recipe.state),
    ):
        if rounding and not format:
            raise ValueError(f"{option}-rounding: must come with {option}")
    recipe = request.recipe
    is_random = "stochastic" in (recipe.kv_rounding, recipe.state_rounding) or {"x", "w"} & {*recipe.stochastic}
    if "--seed" in Options(context).given and not is_random:
        raise ValueError("--seed: must come with stochastic rounding, such as --state-rounding stochastic")
    parent = RunFolder(run)
    if kv or state:
        _check_decoding(parent, kv, state)
    with err.status("reading the run") as status:
        child = quantize_run(parent, request, name=suffix, report=status.update)
    record = _record(parent, child)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        _show(record)
    if figure is not None:
        _draw(parent, figure, quiet=as_json)


def _request(
    bits: float | None,
    precision: str | None,
    formats: str,
    scales: Literal["max", "mse", "four_over_six"] | None,
    decoding: Mapping[str, str | None],
    numbers: tuple[int, int, int],
) -> Quantization:
    from explore.precision import RECIPES, Recipe
    from explore.quantizing import Quantization

    recipe = recipe_of(precision) or Recipe()
    if scales is None:
        published = RECIPES[precision].scales if precision is not None and precision in RECIPES else "max"
        scales = "mse" if bits is not None else "four_over_six" if "w" in recipe.four_over_six else published
    content = recipe.model_dump() | {field: value for field, value in decoding.items() if value is not None}
    others = tuple(operand for operand in recipe.four_over_six if operand != "w")
    content["four_over_six"] = (*others, "w") if scales == "four_over_six" else others
    return Quantization.model_validate(
        {
            "recipe": content,
            "bits": bits,
            "formats": [each.strip() for each in formats.split(",")],
            "scales": scales,
            "calibration_tokens": numbers[0],
            "calibration_seed": numbers[1],
            "seed": numbers[2],
        }
    )


def _check_decoding(parent: RunFolder, kv: str | None, state: str | None) -> None:
    """Rejects formats of decoding state that the model does not keep."""
    entries = [row.entry for row in parent.load_experiment().model.ledger(1) if row.layer is not None]
    if kv and not any(entry.kv_numel for entry in entries):
        raise ValueError(f"--kv: must come with a model that has attention, got {kv} for {parent.path}")
    if state and not any(entry.ssm_numel or entry.conv_numel for entry in entries):
        raise ValueError(f"--state: must come with a model that has recurrent layers, got {state} for {parent.path}")


SCORES = ("val_bpb", "test_bpb", "val_loss", "test_loss", "recall", "kl", "kl_decoded", "losses_by_position")


def _record(parent: RunFolder, child: RunFolder) -> dict[str, Any]:
    """The record that `--json` prints."""
    quantized, result, before = child.quantized, child.result or {}, parent.result or {}
    kept = ("bits", "scales", "recipe", "calibration", "seed", "choice", "sensitivities")
    return {
        "run": str(child.path),
        "key": child.key,
        "formats": quantized["formats"],
        **{field: child.cost[field] for field in ("bits_per_element", "weight_bytes")},
        **{field: result.get(field) for field in SCORES},
        "parent": quantized["parent"] | {field: before.get(field) for field in ("val_bpb", "test_bpb", "recall")},
        **{field: quantized.get(field) for field in kept},
        "ledger": child.cost["ledger"],
    }


def _show(record: dict[str, Any]) -> None:
    from explore.formatting import size

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for column in ("component", "format", "layers"):
        table.add_column(column, no_wrap=True)
    for column in ("params", "sensitivity"):
        table.add_column(column, justify="right", no_wrap=True)
    for (component, format), (layers, params, sensitivity) in _grouped(record).items():
        where = ", ".join(map(str, layers))
        shown = where if len(where) <= 24 else f"{len(layers)} ({layers[0]} to {layers[-1]})"
        alone = "" if sensitivity is None else f"{sensitivity:.5f}"
        table.add_row(component, format, shown, count(params), alone)
    out.print(table)
    if record["sensitivities"]:
        out.print(
            "sensitivity: KL divergence with only that component quantised, nats per token",
            style="dim",
            highlight=False,
        )
    scores = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    rows = [name for name in ("val_bpb", "test_bpb", "recall") if record[name] is not None]
    for column in ("", "bits", *(name.replace("_", " ") for name in rows), "kl", "kl decoded"):
        scores.add_column(column, justify="right" if column else "left", no_wrap=True)
    scores.add_row("parent", "", *(f"{record['parent'][name]:.4f}" for name in rows))
    divergences = ["" if record[name] is None else f"{record[name]:.5f}" for name in ("kl", "kl_decoded")]
    bits = f"{record['bits_per_element']:.3f}"
    scores.add_row("quantised", bits, *(f"{record[name]:.4f}" for name in rows), *divergences)
    scores.columns = [column for column in scores.columns if any(column.cells)]
    out.print(scores)
    recipe = record["recipe"]
    state = f"; keys and values in {recipe.get('kv') or 'bf16'}, state in {recipe.get('state') or 'fp32'}"
    out.print(f"{size(record['weight_bytes'])} of weights, scales by {record['scales']}{state}", highlight=False)
    out.print(f"wrote {record['run']}", highlight=False)


def _grouped(record: dict[str, Any]) -> dict[tuple[str, str], tuple[list[int], int, float | None]]:
    """Layers, parameters and summed sensitivity by component and format."""
    groups: dict[tuple[str, str], tuple[list[int], int, float | None]] = {}
    for row in record["ledger"]:
        name = row["component"] if row["layer"] is None else f"layers.{row['layer']}.{row['component']}"
        if name not in record["formats"] or not row["params"]:
            continue
        key = (row["component"], row["format"])
        layers, params, alone = groups.get(key, ([], 0, None))
        measured = (record["sensitivities"] or {}).get(name, {}).get(row["format"])
        if measured is not None:
            alone = (alone or 0.0) + measured
        groups[key] = ([*layers, *([] if row["layer"] is None else [row["layer"]])], params + row["params"], alone)
    return groups


def _draw(parent: RunFolder, path: Path, *, quiet: bool) -> None:
    from explore.figures import plot_bits, save_figure
    from explore.table import load_runs

    folder = parent.path.resolve()
    for written in save_figure(plot_bits(load_runs(folder.parent), folder.name), path):
        if not quiet:
            out.print(f"wrote {written}", highlight=False)
