"""Run folders on disk. The folder is the record: everything else can be recomputed from it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import pandas as pd
from pyarrow.lib import ArrowException

from explore.files import check_regular, safe_name, try_lock
from explore.foreign import check_type, echo, parse_json
from explore.quantities import headlines, read

if TYPE_CHECKING:
    from explore.experiment import Experiment

FINISHED = ("finished", "diverged")
"""Final statuses of a run."""
PRUNED = "pruned"
"""Status of a run that a judge stopped early; it has ended, but can still be trained to its end."""
ENDED = (*FINISHED, PRUNED)
UNFINISHED = "unfinished"

PACKED = ".parquet"
"""Suffix of a table of records: many runs in one file, which is read like a folder of runs."""

DIGEST = "sha256"
"""Metadata key of the digest of a table of records; tables of older versions have none."""

UNREADABLE_TABLE = (ArrowException, OSError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError)
"""Errors of pandas and pyarrow for a file that is not a table, or damaged."""

PILOTS = "pilots"
"""Subfolder for the short runs that search a learning rate; tables of runs omit it unless it is named."""

RUNS = "runs"
"""Default folder of runs."""

LOCK = "lock"
"""Lock file of a run folder, held by the process that trains the run."""

PREFIX = 4
"""Minimum length of a key prefix that identifies a run."""

FILES = (
    "experiment.json",
    "cost.json",
    "environment.json",
    "trial.json",
    "evals.json",
    "merged.json",
    "quantized.json",
    "metrics.csv",
    "result.json",
)
"""Files that make up the record of a run, in the order in which they may be written; not checkpoints."""


@dataclass(frozen=True)
class RunFolder:
    """The record of one run on disk. A missing or unreadable file gives an empty record, never an error.

    Attributes:
        path: the folder.
        packed: texts of the files by name, if the run is a row of a table of records and has no folder.
    """

    path: Path
    packed: Mapping[str, str] | None = None

    def __repr__(self) -> str:
        score = next((f", {name} {value:.4f}" for name, value in self._scores()), "")
        return f"RunFolder({self.path}, {self.status}{score})"

    def _repr_html_(self) -> str:
        from explore.model.display import record_html

        return record_html(self.row(), self.experiment.get("experiment"), self.metrics)

    def _scores(self) -> Iterator[tuple[str, float]]:
        row = self.row()
        known = ((each.name, row.get(each.name)) for each in headlines(row) if each.is_quality)
        return ((name, value) for name, value in known if isinstance(value, float))

    def text(self, name: str) -> str | None:
        """The text of one of `FILES`, or None if it is missing."""
        if self.packed is not None:
            return self.packed.get(name)
        path = self.path / name
        try:
            return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else None
        except OSError:
            return None

    @property
    def experiment(self) -> dict[str, Any]:
        """`experiment.json`: the key, and the experiment under `experiment`."""
        return _json(self.text("experiment.json")) or {}

    def load_experiment(self) -> Experiment:
        """The experiment of the run.

        Raises:
            ValueError: `experiment.json` is missing or not a JSON object, or has an invalid field.
        """
        from explore.experiment import Experiment

        if not (record := self.experiment):
            raise ValueError(f"{self.path}: must be a run folder, with an experiment.json that can be read")
        return Experiment.validated(record.get("experiment"), self.path / "experiment.json")

    @property
    def cost(self) -> dict[str, Any]:
        """`cost.json`: the totals, the ledger and the family."""
        return _json(self.text("cost.json")) or {}

    @property
    def environment(self) -> dict[str, Any]:
        """`environment.json`: commit, device, versions and data."""
        return _json(self.text("environment.json")) or {}

    @property
    def trial(self) -> dict[str, Any]:
        """`trial.json` of a run of a sweep: the trial, and how its learning rate and sizes were chosen."""
        return _json(self.text("trial.json")) or {}

    @property
    def evals(self) -> dict[str, Any]:
        """`evals.json`: measurements after training, by kind: `pairs` by suite and paradigm, `bpb` by corpus."""
        return _json(self.text("evals.json")) or {}

    @property
    def merged(self) -> dict[str, Any]:
        """`merged.json`: scores of averages of the last checkpoints, by the shape of the decay that they imitate."""
        return _json(self.text("merged.json")) or {}

    @property
    def quantized(self) -> dict[str, Any]:
        """`quantized.json` of a quantised run: its parent, recipe and scales, and how they were chosen."""
        return _json(self.text("quantized.json")) or {}

    @property
    def result(self) -> dict[str, Any] | None:
        """`result.json`, or None if it is missing or unreadable."""
        return _json(self.text("result.json"))

    @property
    def metrics(self) -> pd.DataFrame:
        """`metrics.csv`, without a last line that a kill cut off."""
        return _csv(self.text("metrics.csv"))

    @property
    def lost(self) -> pd.DataFrame:
        """`precision.csv` of a run in low precision: shares of elements lost, by step, component and operand.

        `explore.train.low_precision.LostElements` describes its columns.
        """
        return _csv(self.text("precision.csv"))

    @property
    def key(self) -> str | None:
        """The full key of the experiment, or None if `experiment.json` does not have it."""
        key = self.experiment.get("key")
        return key if isinstance(key, str) else None

    @property
    def status(self) -> str:
        """The status in `result.json`; `unfinished` if it is missing or another record is unreadable."""
        status = str((self.result or {}).get("status") or UNFINISHED)
        records = ("experiment.json", "cost.json", "environment.json")
        broken = any((text := self.text(name)) is not None and _json(text) is None for name in records)
        return UNFINISHED if status in ENDED and (broken or self.key is None) else status

    @property
    def is_finished(self) -> bool:
        """Whether the status is final and all records are readable; a pruned run can still continue."""
        return self.status in FINISHED

    def row(self) -> dict[str, Any]:
        """The run as one row of the table of runs, with None for unknown values."""
        return read(
            {
                "folder": {"run": self.path.resolve().name, "key": self.key, "status": self.status},
                "experiment": self.experiment.get("experiment") or {},
                "cost": self.cost,
                "environment": self.environment,
                "trial": self.trial,
                "evals": self.evals,
                "merged": self.merged,
                "quantized": self.quantized,
                "result": self.result or {},
            }
        )


def _csv(text: str | None) -> pd.DataFrame:
    """A table whose last line may be cut off."""
    text = text or ""
    try:
        return pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]), on_bad_lines="skip")
    except (pd.errors.EmptyDataError, pd.errors.ParserError):
        return pd.DataFrame()


def find_run(root: str | Path, key: str) -> RunFolder | None:
    """The run folder below `root` with this full key, preferring a finished one, or None."""
    if len(key) < 8:
        raise ValueError(f"key: must be the full key of an experiment, got {key!r}")
    found = [run for run in walk_runs(Path(root)) if run.path.name.endswith(f"-{key[:8]}") and run.key == key]
    return min(found, key=lambda run: not run.is_finished, default=None)


def run_folder(root: str | Path, name: str, key: str) -> RunFolder:
    """The run folder of this key: the existing one, whatever its name, or else the path for a new one.

    Returns:
        A path `<name>-<first 8 characters of the key>`, numbered if another experiment has it; nothing is created.
    """
    if (existing := find_run(root, key)) is not None:
        return existing
    slug = safe_name(name)
    number, path = 1, Path(root) / f"{slug}-{key[:8]}"
    while path.exists() and ((taken := RunFolder(path)).key is not None or (path / "result.json").exists()):
        number += 1
        path = taken.path.with_name(f"{slug}-{number}-{key[:8]}")
    return RunFolder(path)


def resolve_run(name: str | Path, root: str | Path = RUNS) -> RunFolder:
    """Finds a run by its path, the name of its folder, or the start of its name or key.

    Args:
        name: an existing folder is used directly. Otherwise the last part is looked up in its parent folder, or below
            `root` if it has none.
        root: folder of runs, or a table of records.

    Raises:
        ValueError: no run or more than one matches; the message lists the matches.
    """
    path = Path(name)
    if path.is_dir():
        return RunFolder(path)
    found = match_runs(path, root)
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(str(run.path) for run in found[:4]) + (", ..." if len(found) > 4 else "")
        raise ValueError(f"run {echo(path.name)} matches {len(found)} runs: {several}; give more characters")
    where = _place(path, root)
    see = "explore runs" if where == Path(RUNS) else f"explore runs --runs {where}"
    raise ValueError(
        f"run must be a run folder, the start of its name, or at least {PREFIX} characters of its key, in "
        f"{str(where)!r}, got {echo(str(name))}; see `{see}`"
    )


def match_runs(name: str | Path, root: str | Path = RUNS) -> list[RunFolder]:
    """The runs below `root` whose folder has this name, else those whose name or key begins with it.

    A key needs at least four characters of it.

    Args:
        name: a name or the start of a key; its parent folder, if any, replaces `root`.
        root: folder of runs, or a table of records.
    """
    text, where = Path(name).name, _place(name, root)
    is_key = re.fullmatch(rf"[0-9a-f]{{{PREFIX},64}}", text) is not None
    if not where.is_file() and not (where.is_dir() and any(walk_runs(where))):
        return []
    found = find_runs(where) if text else []
    return [run for run in found if run.path.name == text] or [
        run for run in found if run.path.name.startswith(text) or (is_key and (run.key or "").startswith(text))
    ]


def _place(name: str | Path, root: str | Path) -> Path:
    """The folder in which a run with this name is looked up."""
    return Path(root) if Path(name).parent == Path() else Path(name).parent


def remove_run(run: RunFolder) -> None:
    """Deletes the folder of a run, including its checkpoints.

    Raises:
        ValueError: the run is in a table of records, or another process is training it.
    """
    if run.packed is not None:
        raise ValueError(f"{run.path}: must be a run folder, got a row of a table of records")
    with (run.path / LOCK).open("w") as lock:
        if not try_lock(lock.fileno()):
            raise ValueError(f"{run.path}: another process is training this run; end it first")
        (run.path / "experiment.json").unlink()  # first: a half-deleted folder must not count as a run
        shutil.rmtree(run.path)


def find_runs(*roots: str | Path) -> list[RunFolder]:
    """Every run at or below the roots, finished or not, each once, sorted by path within its root.

    Args:
        roots: folders that hold runs, or tables of records that `explore.records.pack_runs` wrote.

    Raises:
        ValueError: a root does not exist or holds no run.
    """
    if not roots:
        raise ValueError("runs: no folder given; name at least one folder that holds runs")
    found: dict[Path, RunFolder] = {}
    for each in roots:
        check_type(each, (str, Path), "runs must be a folder that holds runs")
    for root in map(Path, roots):
        if root.suffix == PACKED and root.is_file():
            runs = [run for run in read_packed(root) if PILOTS not in run.path.relative_to(root).parts]
        elif root.is_dir():
            runs = list(walk_runs(root))
        else:
            raise ValueError(f"runs: {str(root)!r} must be a folder of runs or a table of records")
        if not runs:
            raise ValueError(f"runs: {str(root)!r} holds no run; a run is a folder with an experiment.json")
        for run in runs:
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def read_packed(path: str | Path) -> list[RunFolder]:
    """The runs in a table of records, pilots too; each path is its former folder below that of the table.

    Raises:
        ValueError: the file is not such a table.
    """
    path = Path(path)
    try:
        check_regular(path)
        table = pd.read_parquet(path)
        names, rows = table["run"].tolist(), _packed_rows(table)
        is_whole = table.attrs.get(DIGEST) in (None, packed_digest(table))
    except UNREADABLE_TABLE as error:
        raise ValueError(f"{path}: is not a table of records ({echo(' '.join(str(error).split()))})") from None
    if not is_whole:
        raise ValueError(f"{path}: is damaged, since {DIGEST} does not match its records; restore the file")
    for name in names:
        if not _is_below(name):
            raise ValueError(f"{path}: run must be the path of a folder below that of all runs, got {echo(name)}")
    return [RunFolder(path / name, row) for name, row in zip(names, rows, strict=True)]


def packed_digest(table: pd.DataFrame) -> str:
    """SHA-256 of the content of a table of records, which is kept in its metadata."""
    digest = hashlib.sha256()
    for name, row in zip(table["run"], _packed_rows(table), strict=True):
        digest.update(json.dumps([name, row], sort_keys=True).encode())
    return digest.hexdigest()


def _packed_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """The texts of each row by the name of their file."""
    rows = table.drop(columns="run").to_dict("records")
    return [{str(name): text for name, text in row.items() if isinstance(text, str)} for row in rows]


def _is_below(name: object) -> bool:
    """Whether a run's name in a table of records stays below the target folder."""
    if not isinstance(name, str) or "\0" in name:
        return False
    parts = PurePath(name).parts
    return bool(parts) and ".." not in parts and not PurePath(name).is_absolute()


def walk_runs(root: Path, *, pilots: bool = False) -> Iterator[RunFolder]:
    """The run folders at or below `root` in sorted order, without those of pilots unless requested."""
    for folder, below, files in os.walk(root):
        if "experiment.json" in files:
            below.clear()  # folders inside a run (checkpoints, logs) are not runs
            yield RunFolder(Path(folder))
        below[:] = sorted(name for name in below if pilots or name != PILOTS)


def _json(text: str | None) -> dict[str, Any] | None:
    try:
        content = parse_json((text or "").encode())
    except ValueError:  # a truncated file, or bytes that are not UTF-8
        return None
    return content if isinstance(content, dict) else None
