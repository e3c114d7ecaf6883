"""`Quantity`, the declaration of one quantity, and `Family`, of quantities that differ in what was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from explore import formatting

Records = Mapping[str, Any]
"""The content of the files of a run folder (`experiment`, `cost`, `environment`, `trial`, `evals`, `merged`,
`quantized`, `result`) and `folder`: its name as `run`, and the run's `key` and `status`."""

Role = Literal["about", "setting", "cost", "loss", "score", "training"]
"""Kinds of quantities: identity of the run (about); a choice made before training (setting); a closed-form cost (cost);
a loss that the learning curve predicts (loss); another measure of quality (score); a measurement of training
(training)."""

MEMBER = "{}"
"""Placeholder for the part of a name that differs between members of a family, such as the corpus in `{}_bpb`."""


def at(value: Any, *fields: str) -> Any:
    """The value at a path of fields; None if the path does not exist."""
    for field in fields:
        value = value.get(field) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Quantity:
    """One quantity.

    Attributes:
        name: name as a column, as an objective and in W&B.
        label: name in words, for axes and tables.
        source: path of the value: a record, then fields. `metrics` means a column of `metrics.csv`; a quantity without
            a source is in no record.
        role: kind of quantity.
        unit: unit of its values.
        dtype: dtype of its column.
        take: function applied to the value at the source.
        short: header in narrow tables.
        better: direction of better values; None if neither is better.
        log: use a logarithmic axis if all values are positive; None: only as the cost axis of a front.
        spec: format specification of a value; if empty, the unit decides.
        headline: show it in summaries, such as tables in a terminal and the arms of a study.
        tied_to: another quantity that determines this one for runs of equal length.
        budget: the solver accepts it as a target.
    """

    name: str
    label: str
    source: tuple[str, ...] = ()
    role: Role = "training"
    unit: str = ""
    dtype: Literal["str", "Int64", "float64", "boolean"] = "float64"
    take: Callable[[Any], Any] | None = None
    short: str = ""
    better: Literal["lower", "higher"] | None = None
    log: bool | None = False
    spec: str = ""
    headline: bool = False
    tied_to: str = ""
    budget: bool = False

    @property
    def is_column(self) -> bool:
        """Whether it is a column of the table of runs, not only of learning curves."""
        return self.source[:1] != ("metrics",)

    @property
    def is_number(self) -> bool:
        """Whether it can be on an axis."""
        return self.dtype in ("Int64", "float64")

    @property
    def is_known(self) -> bool:
        """Whether it is known before training."""
        return self.role in ("setting", "cost")

    @property
    def is_quality(self) -> bool:
        """Whether it measures how good the trained model is."""
        return self.role in ("loss", "score")

    @property
    def is_on_own_data(self) -> bool:
        """Whether it is measured on the run's training corpus, so runs on other corpora are not comparable."""
        return self.is_quality and self.source[:2] not in (("evals", "bpb"), ("evals", "pairs"))

    @property
    def sign(self) -> int:
        """Factor (1 or -1) that makes lower values better."""
        return -1 if self.better == "higher" else 1

    @property
    def axis_label(self) -> str:
        """The label with the unit, unless the label already contains it."""
        has_unit = not self.unit or re.search(rf"\b{re.escape(self.unit)}\b", self.label, re.IGNORECASE)
        return self.label if has_unit else f"{self.label} ({self.unit})"

    @property
    def header(self) -> str:
        """Header of its column in a narrow table."""
        return self.short or self.name

    def read(self, records: Records) -> Any:
        """The value in the records of a run; None if missing."""
        value = at(records, *self.source)
        return value if value is None or self.take is None else self.take(value)

    def text(self, value: Any) -> str:
        """A value as tables show it; empty if missing."""
        return formatting.number(value, self.spec) if self.spec else formatting.with_unit(value, self.unit)


@dataclass(frozen=True)
class Family:
    """Quantities that differ in what was measured: `{}_bpb` is bits per byte on any corpus.

    Attributes:
        template: a quantity with `{}` in place of the member in its name, label, header and source.
    """

    template: Quantity

    def member(self, which: str) -> Quantity:
        """The quantity for one member."""
        texts = {name: getattr(self.template, name).replace(MEMBER, which) for name in ("name", "label", "short")}
        source = tuple(which if field == MEMBER else field for field in self.template.source)
        return replace(self.template, **texts, source=source)

    def named(self, name: str) -> Quantity | None:
        """The member with this name; None if the name does not fit the template."""
        before, _, after = self.template.name.partition(MEMBER)
        which = name.removeprefix(before).removesuffix(after)
        return self.member(which) if which and name == before + which + after else None

    def found(self, records: Records) -> Iterator[Quantity]:
        """The members found in the records of a run."""
        if MEMBER in self.template.source:
            members = at(records, *self.template.source[: self.template.source.index(MEMBER)])
            yield from map(self.member, sorted(members) if isinstance(members, Mapping) else ())
