"""Every quantity that a run, a cost or a metric has, declared once.

Tables, figures, sweeps, commands, model cards and mirrors read names, labels, units, dtypes and directions here: a new
quantity is one entry of `explore/quantities/declared.py`, beside the code that measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from explore.foreign import did_you_mean, echo
from explore.quantities.declared import EVAL_DATA, METRICS, PARENTS, QUANTITIES
from explore.quantities.quantity import Family, Quantity, Records

__all__ = [
    "EVAL_DATA",
    "METRICS",
    "PARENTS",
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
    """The quantity with this name; an undeclared column gets a quantity labelled with its name."""
    if isinstance(declared := QUANTITIES.get(name), Quantity):
        return declared
    families = (each for each in QUANTITIES.values() if isinstance(each, Family))
    return next((member for each in families if (member := each.named(name))), Quantity(name, name, log=None))


def read(records: Records) -> dict[str, Any]:
    """The row of a run: every column (None if unknown), and the members of families that the run has."""
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
    """The columns of a table of runs: all declared ones, and the names that are members of families."""
    others = sorted({name for name in names if name not in QUANTITIES})
    found: list[Quantity] = []
    for each in QUANTITIES.values():
        if isinstance(each, Family):
            found += [member for name in others if (member := each.named(name))]
        elif each.is_column:
            found.append(each)
    return found


def headlines(names: Iterable[str] = ()) -> list[Quantity]:
    """The columns shown in summaries; those known before training come first."""
    return sorted((each for each in columns(names) if each.headline), key=lambda each: not each.is_known)


def objectives() -> dict[str, Quantity]:
    """The quantities a sweep can optimize, by name: those a run has when it ends, so none from `evals.json`."""
    numbers = (each for each in columns() if each.is_number and each.source[:1] != ("evals",))
    return {each.name: each for each in numbers if each.better is not None}


def budgets() -> tuple[str, ...]:
    """Names of the totals that the solver accepts as targets."""
    return tuple(each.name for each in columns() if each.budget)


def choose(name: str, among: Iterable[str], field: str, what: str = "a quantity with numbers") -> str:
    """The allowed name with the same words in any order, so `decode_flops` gives `flops_decode`.

    Args:
        among: the allowed names.
        field: the option or field that begins an error message.
        what: the kind of thing that the name must be, for the error message.

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
    """The error for an unknown name; it suggests the nearest known name."""
    hint = did_you_mean(name, allowed)
    return ValueError(f"{field} must be {what}, got {echo(name)}; {hint}choose from {', '.join(allowed)}")
