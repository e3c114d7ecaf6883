"""Records of many runs in one small file, for committing a sweep and for resuming it on another machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from explore.files import json_text, replacing
from explore.runs import DIGEST, ENDED, FILES, PACKED, RunFolder, packed_digest, read_packed, walk_runs


def check_packed_name(path: Path) -> None:
    """Checks the name of a table of records.

    Raises:
        ValueError: its suffix is not .parquet.
    """
    if path.suffix != PACKED:
        raise ValueError(f"records: the suffix must be {PACKED}, got {str(path)!r}")


def pack_runs(path: str | Path, *roots: str | Path) -> int:
    """Writes the records of all ended runs below the roots, including pilots, as one table; no checkpoints.

    Runs that are in the table but not below the roots are kept. `explore.runs.find_runs`, and everything that reads
    runs, accepts the table like a folder.

    Returns:
        Number of runs in the table.

    Raises:
        ValueError: the suffix is not .parquet, or the existing file is not a table of records.
    """
    path = Path(path)
    check_packed_name(path)
    with _only_writer(path.parent):
        rows = {str(run.path.relative_to(path)): run for run in (read_packed(path) if path.exists() else ())}
        before = packed_digest(_table(rows)) if path.exists() else None
        for root in map(Path, roots):
            ended = [run for run in walk_runs(root, pilots=True) if run.status in ENDED]
            rows |= {str(run.path.relative_to(root)): run for run in ended}
        table = _table(rows)
        table.attrs[DIGEST] = packed_digest(table)
        if table.attrs[DIGEST] == before:  # avoids needless changes of a committed file
            return len(table)
        with replacing(path) as temporary:
            table.to_parquet(temporary, index=False, compression="zstd", compression_level=12)
    return len(table)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process writes to a table of this folder; the lock ends with its process.

    It locks the folder: the table is a new file after each write, and a lock file beside it would end up among the
    committed files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def update_records(path: str | Path, name: str, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces one file of some runs in a table of records.

    Args:
        name: one of `explore.runs.FILES`, such as `evals.json`.
        contents: its new content, by the run's folder name in the table.

    Raises:
        ValueError: the file is not a table of records, or lacks one of the runs.
    """
    path = Path(path)
    with _only_writer(path.parent):
        rows = {str(run.path.relative_to(path)): run for run in read_packed(path)}
        if missing := sorted(contents.keys() - rows.keys()):
            raise ValueError(f"{path}: holds no run {missing[0]!r}")
        table = _table(rows).set_index("run")
        for run, content in contents.items():
            table.loc[run, name] = json_text(content, name)
        table = table.reset_index()
        table.attrs[DIGEST] = packed_digest(table)
        with replacing(path) as temporary:
            table.to_parquet(temporary, index=False, compression="zstd", compression_level=12)


def unpack_runs(path: str | Path, root: str | Path) -> int:
    """Creates run folders below `root` from records that it lacks; ended runs there are left alone.

    Returns:
        Number of folders created.

    Raises:
        ValueError: the file is not a table of records.
    """
    n = 0
    for run in read_packed(path):
        folder = Path(root) / run.path.relative_to(path)
        if RunFolder(folder).status in ENDED:
            continue
        for name in FILES:  # the result last, so that an incomplete folder is not a finished run
            if (text := run.text(name)) is not None:
                with replacing(folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        n += 1
    return n


def _table(rows: Mapping[str, RunFolder]) -> pd.DataFrame:
    texts = [{"run": name, **_texts(rows[name])} for name in sorted(rows)]
    return pd.DataFrame(texts, columns=["run", *FILES], dtype="str")


def _texts(run: RunFolder) -> dict[str, str | None]:
    texts = {name: run.text(name) for name in FILES}
    return {name: text and text.encode(errors="replace").decode() for name, text in texts.items()}
