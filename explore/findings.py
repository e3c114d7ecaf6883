"""Makes tables, figures and quoted numbers from the records of a study, reproducibly.

A sweep file that defines `tables(runs, pairs)` and `figure(tables)`, and has records beside it in
`records/<name>.parquet`, is a finding. `tables` may also have the parameters `curves` and `documents`, for learning
curves and for scores of test documents. A text that quotes it is a template, in which

    {{latent_or_not.differences[arm=acc4, d_model=48].difference:+.3f}}

is replaced by a cell: study, table, conditions that select exactly one row, column and format. `{{latent_or_not.gate}}`
is replaced by a whole table.

A study answers its question only if it passes its gate (`explore.frontier.gate`). Otherwise its tables and figures are
marked `ungated`, and a text may only state that the study cannot answer.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from explore.figures import RunFigure, mark, save_figure
from explore.files import replacing
from explore.frontier.gate import PASSED, UNGATED, GateReport, gate_report
from explore.runs import PACKED, find_runs
from explore.study import Sweep, load_sweep
from explore.table import load_documents, load_metrics, load_pairs, load_runs, read_table, save_table

TOLERANCE = 1e-6
"""Allowed relative difference between numbers of a table made on different machines."""

STUDIES = "studies.runs.csv"
"""File name of the table of all studies."""

CANNOT = "Cannot be answered at these sizes"
"""First words of the answer of a study that does not pass a gate."""

ANSWER = "**Answer.** "

LOADERS: Mapping[str, Callable[[Path], pd.DataFrame]] = {"curves": load_metrics, "documents": load_documents}
"""Tables that a study's `tables` gets, beyond runs and minimal pairs, as parameters of these names."""

TABLE = re.compile(r"\{\{(\w+)\.(\w+)\}\}")
CELL = re.compile(r"\{\{(\w+)\.(\w+)\[([^\]]*)\]\.(\w+)(?::([^}]*))?\}\}")


@dataclass(frozen=True)
class Finding:
    """A study with its records.

    Attributes:
        sweep: the sweep file.
        records: the table of records.
    """

    sweep: Sweep
    records: Path

    @property
    def name(self) -> str:
        """Name of the sweep file."""
        return self.sweep.name

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The table of the study's runs."""
        return load_runs(self.records)

    @cached_property
    def gate(self) -> GateReport | None:
        """The result of the study's gate on its records; None if its file declares no gate."""
        return None if self.sweep.gate is None else gate_report(self.sweep.gate, self.sweep.seeds, self.records)

    @property
    def sizes(self) -> str:
        """How many of the promised widths have all seeds, such as `2 of 5`; empty if none are promised."""
        promised = list((self.sweep.grid or {}).get("d_model", ()))
        if not promised:
            return ""
        runs = self.runs[self.runs["status"] == "finished"]
        seeds = runs.groupby(["d_model", "name"])["seed"].nunique().groupby("d_model").max()
        return f"{sum(int(seeds.get(size, 0)) >= self.sweep.seeds for size in promised)} of {len(promised)}"

    @property
    def is_gated(self) -> bool:
        """Whether the study passes its gate, so that it may answer its question."""
        return self.gate is not None and self.gate.passed

    @cached_property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """The tables of the study by name, with numbers as in its files; without a passed gate each is marked."""
        assert self.sweep.tables is not None
        more = list(inspect.signature(self.sweep.tables).parameters)[2:]
        if unknown := [name for name in more if name not in LOADERS]:
            raise ValueError(f"{self.sweep.path}: tables: {unknown[0]} must be one of {', '.join(LOADERS)}")
        given = {name: LOADERS[name](self.records) for name in more}
        found = dict(self.sweep.tables(self.runs, load_pairs(self.records), **given))
        if not self.is_gated:
            found = {name: table.assign(gate=UNGATED) for name, table in found.items()}
        return found | ({} if self.gate is None else {"gate": self.gate.table()})

    def figure(self) -> RunFigure:
        """The figure, drawn from the tables only; without a passed gate it is marked."""
        assert self.sweep.figure is not None
        drawn = self.sweep.figure(self.tables)
        drawn.runs = tuple(self.runs["run"])
        if not self.is_gated:
            mark(drawn, UNGATED)
        return drawn

    @cached_property
    def about(self) -> str:
        """Origin of the numbers: commits, data, FLOP convention."""
        environments = [run.environment for run in find_runs(self.records)]
        commits = sorted({str(each.get("commit")) for each in environments})
        hashes = {str((each.get("data") or {}).get("train")) for each in environments} - {"None"}
        return f"commits {', '.join(commits)}; data {', '.join(sorted(hashes)) or 'synthetic'}; FLOPs counted as exact"

    def write(self, folder: Path) -> list[Path]:
        """Writes every table as CSV, and the figure as PDF, SVG and PNG with its origin in the metadata."""
        paths = [self._path(folder, name) for name in self.tables]
        for path, table in zip(paths, self.tables.values(), strict=True):
            save_table(table, path)
        about = f"{self.about}; {_digest(paths)}"
        return [*paths, *save_figure(self.figure(), folder / self.name, pdf=True, about=about)]

    def drift(self, folder: Path) -> list[str]:
        """Differences between the folder and what the records give, one line each; empty if there are none."""
        paths = {name: self._path(folder, name) for name in self.tables}
        found = [line for name, path in paths.items() if (line := _table_drift(path, self.tables[name])) is not None]
        if found:
            return found
        digest = _digest(list(paths.values())).encode()
        for suffix in (".pdf", ".svg", ".png"):
            path = folder / f"{self.name}{suffix}"
            if not path.exists():
                found.append(f"{path}: is missing")
            elif digest not in path.read_bytes():
                found.append(f"{path}: was not drawn from the tables beside it")
        return found

    def _path(self, folder: Path, table: str) -> Path:
        return folder / f"{self.name}.{table}.csv"


def load_finding(path: Path) -> Finding:
    """The finding of a sweep file.

    Raises:
        ValueError: the file is not a sweep, defines no tables or figure, or has no records beside it.
    """
    sweep, records = load_sweep(path, or_script=True), path.parent / "records" / f"{path.stem}{PACKED}"
    for name in ("tables", "figure"):
        if getattr(sweep, name) is None:
            raise ValueError(f"{path}: must define a function {name} to be a finding")
    if not records.is_file():
        raise ValueError(f"{records}: is missing; `explore sweep {path} --records {records}` makes it")
    return Finding(sweep, records)


def find_findings(folder: Path) -> list[Finding]:
    """All findings whose records are in `folder/records`, by name.

    Raises:
        ValueError: there are none, or a sweep file is wrong.
    """
    files = sorted(folder / f"{records.stem}.py" for records in (folder / "records").glob(f"*{PACKED}"))
    if not files:
        raise ValueError(f"{folder}: has no records/*{PACKED} to make figures from")
    return [load_finding(file) for file in files]


def studies_table(findings: Sequence[Finding]) -> pd.DataFrame:
    """Number of runs of each study and, in the last row, of all studies, with the devices that trained them.

    Returns:
        The columns study, runs (finished), seeds (distinct), sizes (how many of the promised sizes have all seeds),
        gate (`passed` or `ungated`) and devices.
    """
    about = {finding.name: (finding.sizes, PASSED if finding.is_gated else UNGATED) for finding in findings}
    runs = pd.concat([finding.runs.assign(study=finding.name) for finding in findings])
    runs = runs[runs["status"] == "finished"]
    groups = [*runs.groupby("study"), ("all", runs)]
    return pd.DataFrame(
        {
            "study": [name for name, _ in groups],
            "runs": [len(each) for _, each in groups],
            "seeds": [each["seed"].nunique() for _, each in groups],
            "sizes": [about.get(str(name), ("", ""))[0] for name, _ in groups],
            "gate": [about.get(str(name), ("", ""))[1] for name, _ in groups],
            "devices": [", ".join(sorted(each["device"].dropna().unique())) for _, each in groups],
        }
    )


def ungated_claims(template: str, findings: Sequence[Finding]) -> list[str]:
    """Finds claims based on studies that do not pass a gate, and gates that are not shown, one line each.

    A section is about the studies whose files it names as `sweeps/NAME.py`, or whose tables it quotes. An answer must
    be about one that has records.
    """
    found = []
    for section in re.split(r"^## ", template, flags=re.MULTILINE)[1:]:
        title, answer = section.partition("\n")[0], section.partition(ANSWER)[2]
        named = [each for each in findings if re.search(rf"sweeps/{each.name}\.py|\{{\{{{each.name}\.", section)]
        if answer and not named:
            found.append(f"{title!r}: its answer must name a study with records, as sweeps/NAME.py")
        for finding in named:
            if finding.gate is not None and f"{{{{{finding.name}.gate}}}}" not in section:
                found.append(f"{title!r}: must show the gate of its study as {{{{{finding.name}.gate}}}}")
            if not (finding.is_gated or answer.startswith(CANNOT)):
                why = finding.gate.reason if finding.gate is not None else "as its file declares none"
                found.append(f"{title!r}: {finding.name} passes no gate, {why}; its answer must begin {CANNOT!r}")
    return found


def fill(template: str, findings: Sequence[Finding]) -> str:
    """Replaces the names of cells in a text by their values; `studies.runs` is the table of all studies.

    Raises:
        ValueError: a name is unknown, or the conditions do not select exactly one row.
    """
    by_name = {finding.name: finding.tables for finding in findings} | {"studies": {"runs": studies_table(findings)}}

    def cell(match: re.Match[str]) -> str:
        study, name, conditions, column, form = match.groups()
        try:
            table = by_name[study][name]
            for condition in filter(None, map(str.strip, conditions.split(","))):
                key, _, value = condition.partition("=")
                table = table[table[key.strip()].astype(str) == value.strip()]
            if len(table) != 1:
                raise ValueError(f"{match[0]}: must select exactly one row, got {len(table)}")
            return format(table.iloc[0][column], form or "")
        except KeyError as error:
            raise ValueError(f"{match[0]}: there is no {error}") from None

    def whole(match: re.Match[str]) -> str:
        study, name = match.groups()
        if name not in by_name.get(study, {}):
            raise ValueError(f"{match[0]}: there is no such table")
        return _markdown(by_name[study][name])

    return TABLE.sub(whole, CELL.sub(cell, template))


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def write_text(template: Path, path: Path, findings: Sequence[Finding]) -> list[Path]:
    """Writes the text of a template and, beside the template, the table of all studies."""
    table = template.with_name(STUDIES)
    save_table(studies_table(findings), table)
    with replacing(path) as temporary:
        temporary.write_text(fill(template.read_text(encoding="utf-8"), findings), encoding="utf-8")
    return [table, path]


def text_drift(template: Path, path: Path, findings: Sequence[Finding]) -> list[str]:
    """Reports, in one line, that a text or the table of all studies differs from the records."""
    if (line := _table_drift(template.with_name(STUDIES), studies_table(findings))) is not None:
        return [line]
    now = fill(template.read_text(encoding="utf-8"), findings).splitlines()
    was = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if now == was:
        return []
    number = next((i for i, (a, b) in enumerate(zip(now, was, strict=False)) if a != b), min(len(now), len(was)))
    return [f"{path}: line {number + 1} differs from {template} filled with the tables"]


def _digest(paths: Sequence[Path]) -> str:
    content = b"".join(path.read_bytes() for path in sorted(paths) if path.exists())
    return f"tables sha256:{hashlib.sha256(content).hexdigest()}"


def _table_drift(path: Path, table: pd.DataFrame) -> str | None:
    if not path.exists():
        return f"{path}: is missing"
    was = read_table(path)
    now = table.reset_index(drop=True)
    if list(was.columns) != list(now.columns) or len(was) != len(now):
        shapes = [f"{len(each)} rows of {', '.join(each.columns)}" for each in (was, now)]
        return f"{path}: has {shapes[0]}, and the records give {shapes[1]}"
    for column in now:
        same = _same(now[column], was[column])
        if not same.all():
            row = int((~same).to_numpy().argmax())
            return f"{path}: row {row + 1}, {column}: is {was[column][row]}, and the records give {now[column][row]}"
    return None


def _same(now: pd.Series[Any], was: pd.Series[Any]) -> pd.Series[bool]:
    numbers = [pd.to_numeric(each, errors="coerce").astype("float64") for each in (now, was)]
    scale = numbers[0].abs().clip(lower=TOLERANCE)
    texts = [each.astype("str").fillna("") for each in (now, was)]
    return ((numbers[0] - numbers[1]).abs() <= TOLERANCE * scale) | (texts[0] == texts[1])
