"""Every quantity that a run, a cost or a metric has, declared once.

Tables, figures, sweeps, commands, model cards and mirrors read names, labels, units, dtypes and directions here: a new
quantity is one entry of `explore/quantities/declared.py`, beside the code that measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from explore.foreign import did_you_mean, echo
from explore.quantities.declared import EVAL_DATA, METRICS, QUANTITIES
from explore.quantities.quantity import Family, Quantity, Records

__all__ = [
    "EVAL_DATA",
    "METRICS",
    "QUANTITIES",
    "Family",
    "Quantity",
    "Records",
    "budgets",
    "choose",
    "columns",
    "headlines",
    "objectives",
    "quantity",
    "read",
    "unknown",
]


def quantity(name: str) -> Quantity:
    """The quantity with this name; for a column that is not declared, one that is labelled with its name."""
    if isinstance(declared := QUANTITIES.get(name), Quantity):
        return declared
    families = (each for each in QUANTITIES.values() if isinstance(each, Family))
    return next((member for each in families if (member := each.named(name))), Quantity(name, name, log=None))


def read(records: Records) -> dict[str, Any]:
    """The row of a run: every column, with None for what is not known, and the members of families that it has."""
    row: dict[str, Any] = {}
    for each in QUANTITIES.values():
        if isinstance(each, Family):
            row |= {
                member.name: member.read(records) for member in each.found(records) if member.name not in QUANTITIES
            }
        elif each.is_column:
            row[each.name] = each.read(records)
    return row


def columns(names: Iterable[str] = ()) -> list[Quantity]:
    """The columns of a table of runs: all that are declared, and the members of families among the names."""
    others = sorted({name for name in names if name not in QUANTITIES})
    found: list[Quantity] = []
    for each in QUANTITIES.values():
        if isinstance(each, Family):
            found += [member for name in others if (member := each.named(name))]
        elif each.is_column:
            found.append(each)
    return found


def headlines(names: Iterable[str] = ()) -> list[Quantity]:
    """The columns that stand in summaries, those that are known before training first."""
    return sorted((each for each in columns(names) if each.headline), key=lambda each: not each.is_known)


def objectives() -> dict[str, Quantity]:
    """What a sweep can minimize or maximize, by name: what a run has when it ends, so nothing of `evals.json`."""
    numbers = (each for each in columns() if each.is_number and each.source[:1] != ("evals",))
    return {each.name: each for each in numbers if each.better is not None}


def budgets() -> tuple[str, ...]:
    """Totals of a model that its sizes can be solved for."""
    return tuple(each.name for each in columns() if each.budget)


def choose(name: str, among: Iterable[str], field: str, what: str = "a quantity with numbers") -> str:
    """The name that is meant; its words may come in any order, so `decode_flops` is `flops_decode`.

    Args:
        among: what is allowed.
        field: what an error begins with.
        what: what the name must be the name of, in an error.

    Raises:
        ValueError: no allowed name has these words.
    """
    allowed = list(among)
    if name in allowed:
        return name
    same = [each for each in allowed if sorted(each.split("_")) == sorted(name.split("_"))]
    if len(same) == 1:
        return same[0]
    raise unknown(name, allowed, field, what)


def unknown(name: str, allowed: Sequence[str], field: str, what: str = "a quantity with numbers") -> ValueError:
    """The error about a name that is not allowed; it tells the nearest one that is."""
    hint = did_you_mean(name, allowed)
    return ValueError(f"{field} must be {what}, got {echo(name)}; {hint}allowed are {', '.join(allowed)}")
