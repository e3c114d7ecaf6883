"""What is said of a quantity, and of a family of quantities that differ in what was measured."""

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
"""Kinds of facts: which run it is (about); what is chosen before training (setting), and what that costs in closed form
(cost); a loss that the learning curve foretells (loss), another measure of quality (score); how training went
(training)."""

MEMBER = "{}"
"""Stands for what the members of a family differ in, such as the corpus in `{}_bpb`."""


def at(value: Any, *fields: str) -> Any:
    """What lies at the end of a path of fields; None where the path leads nowhere."""
    for field in fields:
        value = value.get(field) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Quantity:
    """One quantity.

    Attributes:
        name: of the column, of the objective, and in mirrors.
        label: what it is in words.
        source: where it is read from: a record, and the fields that lead to it. `metrics` stands for a column of
            `metrics.csv`; a quantity without a source is in no record.
        role: what kind of fact it is.
        unit: what its values count.
        dtype: of its column.
        take: what is made of the value at the source.
        short: header of a narrow table.
        better: which values are better, if any are.
        log: its axis is logarithmic where all values are positive; None: only where it is the cost of a front.
        spec: format of a value; its unit decides where there is none.
        headline: stands in summaries, such as tables on a terminal and the arms of a study.
        tied_to: another quantity that fixes it for runs of equal length.
        budget: sizes of a model can be solved for it.
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
        """Whether the table of runs has it, rather than learning curves alone."""
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
        """Whether it is measured on the data that a run was trained with, so that runs on other data do not compare."""
        return self.is_quality and self.source[:2] not in (("evals", "bpb"), ("evals", "pairs"))

    @property
    def sign(self) -> int:
        """Factor by which lower values are the better ones."""
        return -1 if self.better == "higher" else 1

    @property
    def axis_label(self) -> str:
        """The label with the unit, unless its words say it."""
        says = not self.unit or re.search(rf"\b{re.escape(self.unit)}\b", self.label, re.IGNORECASE)
        return self.label if says else f"{self.label} ({self.unit})"

    @property
    def header(self) -> str:
        """What its column in a narrow table is called."""
        return self.short or self.name

    def read(self, records: Records) -> Any:
        """The value in the records of a run; None where it is missing."""
        value = at(records, *self.source)
        return value if value is None or self.take is None else self.take(value)

    def text(self, value: Any) -> str:
        """A value as tables show it; nothing where it is missing."""
        return formatting.number(value, self.spec) if self.spec else formatting.with_unit(value, self.unit)


@dataclass(frozen=True)
class Family:
    """Quantities that differ in what was measured: `{}_bpb` is bits per byte on any corpus.

    Attributes:
        template: a quantity in whose name, label, header and source `{}` stands for the member.
    """

    template: Quantity

    def member(self, which: str) -> Quantity:
        """The quantity of one member."""
        texts = {name: getattr(self.template, name).replace(MEMBER, which) for name in ("name", "label", "short")}
        source = tuple(which if field == MEMBER else field for field in self.template.source)
        return replace(self.template, **texts, source=source)

    def named(self, name: str) -> Quantity | None:
        """The member with this name; None for a name of another form."""
        before, _, after = self.template.name.partition(MEMBER)
        which = name.removeprefix(before).removesuffix(after)
        return self.member(which) if which and name == before + which + after else None

    def found(self, records: Records) -> Iterator[Quantity]:
        """The members in the records of a run."""
        if MEMBER in self.template.source:
            members = at(records, *self.template.source[: self.template.source.index(MEMBER)])
            yield from map(self.member, sorted(members) if isinstance(members, Mapping) else ())
