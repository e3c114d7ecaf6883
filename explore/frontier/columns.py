"""Columns of a table of runs, as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from explore.foreign import check_type
from explore.quantities import quantity

Floats = npt.NDArray[np.float64]


def check_columns(table: pd.DataFrame, columns: Iterable[str], name: str = "table") -> None:
    """Raises an error that names every missing column.

    Args:
        name: what the error calls the table.

    Raises:
        TypeError: it is not a table.
        ValueError: a column is missing.
    """
    check_type(table, pd.DataFrame, f"{name} must be a table of runs, as explore.load_runs gives it")
    needed = list(dict.fromkeys(columns))
    if missing := [column for column in needed if column not in table]:
        have = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(
            f"{name} must have the column{'s' * (len(needed) > 1)} {_listed(needed)}, got none named "
            f"{_listed(missing)}; its columns: {have}"
        )


def _listed(names: Sequence[str]) -> str:
    """`'a', 'b' and 'c'`."""
    return " and ".join(filter(None, [", ".join(map(repr, names[:-1])), repr(names[-1])]))


def numbers(table: pd.DataFrame, column: str) -> Floats:
    """A column as float64, with NaN for missing values.

    Raises:
        ValueError: the column is missing.
    """
    check_columns(table, [column])
    values: Any = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.asarray(values, dtype=np.float64)


def oriented(table: pd.DataFrame, column: str) -> Floats:
    """A column as float64 in which lower is better: negated if `explore.quantities` declares that higher is better.

    Raises:
        ValueError: the column is missing.
    """
    return quantity(column).sign * numbers(table, column)


def oriented_reference(reference: tuple[float, float], cost: str, error: str) -> tuple[float, float]:
    """A reference point of a hypervolume, with the sign of its error as in `oriented`.

    Raises:
        ValueError: `cost` is a column in which higher is better; the log axis does not allow that.
    """
    if quantity(cost).better == "higher":
        raise ValueError(f"cost must be a column whose lower values are better, got {cost!r}")
    return reference[0], quantity(error).sign * reference[1]


def known_rows(table: pd.DataFrame, labels: Iterable[str], *values: str) -> pd.DataFrame:
    """The rows in which every value is finite: the columns `labels` unchanged, `values` as float64.

    Raises:
        ValueError: a column is missing, or no row is left.
    """
    labels = list(labels)
    check_columns(table, [*labels, *values])
    rows = table[labels].assign(**{value: numbers(table, value) for value in values})
    rows = rows[np.isfinite(rows[list(values)].to_numpy(dtype=np.float64)).all(axis=1)]
    if rows.empty:
        raise ValueError(f"table: no row has a finite {' and '.join(values)}")
    return pd.DataFrame(rows).reset_index(drop=True)
