"""Tidy tables from run folders: one row per run, learning curves, accuracy on minimal pairs."""

from __future__ import annotations

import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow.parquet as pq

from explore.files import check_regular, replacing
from explore.foreign import echo
from explore.formatting import read_count
from explore.quantities import Quantity, choose, columns, read
from explore.runs import ENDED, UNREADABLE_TABLE, find_runs

if TYPE_CHECKING:
    from explore.experiment import Experiment

SUFFIXES = (".csv", ".parquet")


def load_runs(*roots: str | Path, unfinished: bool = False) -> pd.DataFrame:
    """Loads the runs below the roots as a tidy table: one row per run, the columns of `explore.quantities`.

    Scores by corpus and by suite have their own columns if any run has them.

    Args:
        unfinished: whether to include runs that have not ended, with the status `unfinished` unless a result has
            another.

    Returns:
        A table in which unknown values are NaN or NA; without rows if no run has finished.

    Raises:
        ValueError: a root does not exist or holds no run.
    """
    return tabulate(run.row() for run in find_runs(*roots) if unfinished or run.status in ENDED)


def load_table(*roots: str | Path, unfinished: bool = False) -> pd.DataFrame:
    """Loads runs from folders, tables of records, and .csv or .parquet tables of runs, into one table.

    Raises:
        ValueError: a root does not exist, or holds no run.
    """
    tables = []
    for root in map(Path, roots):
        is_plain = root.is_file() and (root.suffix == ".csv" or (root.suffix == ".parquet" and not _is_records(root)))
        tables.append(read_table(root) if is_plain else load_runs(root, unfinished=unfinished))
    return pd.concat(tables, ignore_index=True) if len(tables) > 1 else tables[0]


def _is_records(path: Path) -> bool:
    """Whether a file is a table of records, rather than of runs; False if unreadable, which is reported later."""
    try:
        return "experiment.json" in pq.read_schema(path).names
    except UNREADABLE_TABLE:
        return True


CONDITION = re.compile(r"\s*(\w+)\s*(==|!=|<=|>=|=|<|>|~)\s*(.*?)\s*")
"""A condition on a column: `d_model>=64`, `family=Mamba hybrid`, or with `~` a substring."""


def where(table: pd.DataFrame, *conditions: str) -> pd.DataFrame:
    """The rows that meet all conditions, such as `d_model>=64`, `params_active<1M`, `corpus=austen` or `name~moe`.

    A missing value meets only `!=`.

    Raises:
        ValueError: a condition has another form, names an unknown column, or compares a number with something else.
    """
    for condition in conditions:
        if (parts := CONDITION.fullmatch(condition)) is None:
            raise ValueError(f"--where must be COLUMN, one of = != < <= > >= ~ and a value, got {echo(condition)}")
        name, sign, text = parts.groups()
        column = table[choose(name, list(map(str, table.columns)), "--where", "a column")]
        table = table[_meets(column, sign, text, condition).fillna(False).astype(bool)]
    return table


def _meets(column: pd.Series[Any], sign: str, text: str, condition: str) -> pd.Series[Any]:
    compare: dict[str, Callable[[Any, Any], Any]] = {
        "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
        ">": operator.gt, ">=": operator.ge,
    }  # fmt: skip
    found: pd.Series[Any]
    if sign == "~":
        found = column.astype("str").str.contains(text, regex=False)
    elif pd.api.types.is_bool_dtype(column):
        found = compare[sign](column, text.lower() in ("true", "yes", "1"))
    elif pd.api.types.is_numeric_dtype(column):
        try:
            found = compare[sign](column, read_count(text))
        except ValueError:
            raise ValueError(f"--where: {column.name} must be compared with a number, got {echo(condition)}") from None
    else:
        found = compare[sign](column.astype("str"), text)
    return found


def tabulate(rows: Iterable[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """A table of runs from their rows, every column with its declared dtype."""
    rows = list(rows)
    shown = columns(name for row in rows for name in row)
    return pd.DataFrame({each.name: _column([row.get(each.name) for row in rows], each.dtype) for each in shown})


def expected_row(experiment: Experiment) -> dict[str, Any]:
    """The row of a run as far as it is known before training."""
    records = {
        "experiment": experiment.model_dump(mode="json"),
        "cost": {"family": experiment.model.family, **experiment.model.cost(experiment.data.seq_len).to_dict()},
        "result": {"flops_run": experiment.flops_run},
    }
    return {name: value for name, value in read(records).items() if value is not None}


def settings(experiment: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The fields of an experiment, by their paths as `--set` takes them; patterns without layers have no blocks."""
    found: dict[str, Any] = {}
    for name, value in experiment.items():
        where = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping) and value:
            found |= settings(value, where)
        else:
            found[where] = value
    return found


def differing(experiments: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The settings in which experiments differ: a row per field, a column per experiment, None for missing fields.

    Args:
        experiments: experiments by name, in the form of `experiment.json`.
    """
    flat = {name: settings(experiment) for name, experiment in experiments.items()}
    fields = dict.fromkeys(field for each in flat.values() for field in each if field != "name")
    rows = {field: [each.get(field) for each in flat.values()] for field in fields}
    differ = {field: values for field, values in rows.items() if any(value != values[0] for value in values)}
    return pd.DataFrame.from_dict(differ, orient="index", columns=list(flat), dtype=object)


def load_pairs(*roots: str | Path) -> pd.DataFrame:
    """Accuracy on minimal pairs of all ended runs that have it: columns run, suite, uid and accuracy.

    Raises:
        ValueError: a root does not exist or holds no run.
    """
    rows = [
        (run.path.resolve().name, suite, uid, accuracy)
        for run in find_runs(*roots)
        if run.status in ENDED
        for suite, shares in (run.evals.get("pairs") or {}).items()
        for uid, accuracy in shares.items()
    ]
    return pd.DataFrame(rows, columns=["run", "suite", "uid", "accuracy"])


def load_documents(*roots: str | Path, split: str = "test") -> pd.DataFrame:
    """Scores of each document of a split, for all runs that have them: columns run, document, nats, n_targets, n_bytes.

    Raises:
        ValueError: a root does not exist or holds no run.
    """
    columns_of = ["run", "document", "nats", "n_targets", "n_bytes"]
    tables = []
    for run in find_runs(*roots):
        scores = (run.evals.get("documents") or {}).get(split)
        if run.status in ENDED and scores:
            table = pd.DataFrame(scores).rename_axis("document").reset_index()
            tables.append(table.assign(run=run.path.resolve().name)[columns_of])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns_of)


def load_params(*roots: str | Path) -> pd.DataFrame:
    """Parameters of the trial of each run of a sweep: a column `run`, and one column per parameter.

    Raises:
        ValueError: a root does not exist or holds no run.
    """
    rows = [{"run": run.path.resolve().name, **(run.trial.get("params") or {})} for run in find_runs(*roots)]
    return pd.DataFrame(rows)


def load_metrics(*roots: str | Path) -> pd.DataFrame:
    """The learning curves of all runs below the roots: the rows of every `metrics.csv`, led by run, family and pattern.

    Training FLOPs so far (`flops_run`) are computed from the tokens so far (`tokens`) if a run did not log them.

    Raises:
        ValueError: a root does not exist or holds no run.
    """
    tables = []
    for run in find_runs(*roots):
        row, metrics = run.row(), run.metrics
        if "flops_run" not in metrics and "tokens" in metrics and isinstance(row["flops_train"], int | float):
            metrics["flops_run"] = metrics["tokens"] * float(row["flops_train"])
        labels = {column: row[column] for column in ("run", "family", "pattern")}
        metrics = metrics.drop(columns=list(labels), errors="ignore")
        if len(metrics):
            tables.append(pd.DataFrame(labels, index=metrics.index).join(metrics))
    if not tables:
        return pd.DataFrame(columns=["run", "family", "pattern"])
    return pd.concat(tables, ignore_index=True)


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Writes a table atomically, without its index, in the format of the suffix of `path`: .csv or .parquet.

    Raises:
        ValueError: another suffix.
    """
    path = _checked(path)
    with replacing(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)


def read_table(path: str | Path) -> pd.DataFrame:
    """Reads a table that `save_table` wrote.

    Raises:
        ValueError: another suffix, not a regular file, or not a table.
        OSError: the file cannot be read.
    """
    path = _checked(path)
    check_regular(path)
    try:
        return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except ValueError as error:
        raise ValueError(f"{path}: must be a table ({' '.join(str(error).split())})") from None


def model_label(name: str, family: str, pattern: str) -> str:
    """Label of a model to show beside its pattern: its name, or its family if the name begins with the pattern."""
    return family if not name or (pattern and name.startswith(pattern)) else name


def cell(each: Quantity, row: Mapping[Any, Any]) -> str:
    """Formats a value for a terminal table; a learning rate that was not tuned has a question mark."""
    text = each.text(row.get(each.name))
    return f"{text}?" if text and each.name == "lr" and row.get("tuned") is not True else text


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"table must be a {' or '.join(SUFFIXES)} file, got {str(path)!r}")
    return path


def _column(values: list[Any], dtype: str) -> pd.Series[Any]:
    if dtype == "str":
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        return pd.Series(texts, dtype="str")
    if dtype == "boolean":
        return pd.Series([value if isinstance(value, bool) else None for value in values], dtype="boolean")
    limit = 2**63 - 1 if dtype == "Int64" else sys.float_info.max
    numbers = [value if isinstance(value, int | float) and abs(value) <= limit else None for value in values]
    if dtype == "Int64":
        return pd.Series([None if value is None else round(value) for value in numbers], dtype="Int64")
    return pd.Series([math.nan if value is None else float(value) for value in numbers], dtype="float64")
