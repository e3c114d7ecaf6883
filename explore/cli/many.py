"""Many models at once: read their names, and print one row for each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from explore.cli.app import out
from explore.cli.models import is_pattern, load_model
from explore.cli.tables import plain_table, print_fitting
from explore.foreign import echo
from explore.quantities import quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from explore.cost import Dtypes
    from explore.model import ModelConfig

SHOWN = (
    "params_total", "params_active", "flops_fwd", "flops_train", "flops_prefill", "flops_decode", "weight_bytes",
    "kv_bytes", "ssm_state_bytes", "conv_state_bytes", "decode_bytes", "all_to_all_bytes",
)  # fmt: skip
"""Columns of the table of many models; CSV and JSON have every column."""


def read_targets(source: str) -> list[tuple[str, str]]:
    """Patterns, presets, runs or paths, one per line, each with the place it was read from; `-` is standard input.

    Empty lines, lines that begin with `#` and a byte-order mark are skipped.
    """
    if source == "-":
        name, text = "standard input", sys.stdin.read()
    elif not Path(source).is_file():
        raise ValueError(f"--patterns must be a file of patterns, or - for standard input, got {source!r}")
    else:
        name, text = source, Path(source).read_text(encoding="utf-8")
    lines = text.removeprefix("\ufeff").splitlines()
    found = [(line.strip(), f"{name}, line {i}") for i, line in enumerate(lines, start=1)]
    targets = [(text, where) for text, where in found if text and not text.startswith("#")]
    if not targets:
        raise ValueError(f"--patterns: {name} must have a pattern, a preset, a run or a path on each line, got none")
    return targets


def load_models(
    targets: Sequence[tuple[str, str]], d_model: int | None, vocab_size: int | None, overrides: list[str]
) -> dict[str, ModelConfig]:
    """The models by name; `d_model` and `vocab_size` apply to patterns only.

    Args:
        targets: pairs of a name and the place it was read from, which begins an error message.
    """
    models: dict[str, ModelConfig] = {}
    for option, value in (("d_model", d_model), ("vocab_size", vocab_size)):
        if value is not None and not any(is_pattern(target) for target, _ in targets):
            flag = f"--{option.replace('_', '-')}"
            got = ", ".join(target for target, _ in targets)
            raise ValueError(f"{flag}: must come with a pattern, got {echo(got)}; use --set {option}={value}")
    for target, where in targets:
        if target in models:
            raise ValueError(f"{where}: every model must be named once, got {echo(target)} twice")
        sizes = (d_model, vocab_size) if is_pattern(target) else (None, None)
        try:
            models[target] = load_model(target, *sizes, overrides)
        except ValueError as error:
            from pydantic import ValidationError

            from explore.config import explain

            message = explain(error) if isinstance(error, ValidationError) else str(error)
            raise ValueError(f"{where}: {message}" if where else message) from None
    return models


def print_costs(models: dict[str, ModelConfig], seq_len: int, dtypes: Dtypes, *, as_json: bool, as_csv: bool) -> None:
    """Prints one row per model."""
    from explore.roofline import costs_table

    table = costs_table(models, seq_len, dtypes=dtypes)
    if as_json:
        print(json.dumps(table.to_dict("records"), indent=2))
    elif as_csv:
        table.to_csv(sys.stdout, index=False)
    else:
        print_fitting(out, lambda title, fields: _rows(table, title, fields), "", SHOWN)
        out.print(f"{len(table)} models at {seq_len:,} tokens; FLOPs are per token, prefill FLOPs per context")


def _rows(table: pd.DataFrame, title: str, fields: Sequence[str]) -> Table:
    view = plain_table(title)
    view.add_column("model", no_wrap=True)
    for field in fields:
        view.add_column(quantity(field).header, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        cells = (quantity(field).text(row[field]).replace(" ", "") if row[field] else "" for field in fields)
        view.add_row(row["model"], *cells)
    return view
