"""Watches a study from outside: finds it, and draws it while workers train."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.storages import BaseStorage
from rich.console import Console

from explore.study.journal import open_journal
from explore.study.live import SweepTable
from explore.study.progress import n_counted
from explore.study.secrets import without_password
from explore.study.storage import JOURNAL, open_storage

REDRAW_S = 2.0
N_TRIALS = "n_trials"
"""User attribute of a study: the number of trials last requested."""


class Found(NamedTuple):
    """A study, and the folder of its runs if known."""

    study: optuna.Study
    runs: Path | None


def find_study(place: str, storage: str | None = None, name: str | None = None) -> Found:
    """Opens an existing study; creates nothing.

    Args:
        place: a folder of runs, a journal file, or with `storage` the name of a study.
        storage: URL of an Optuna storage.
        name: name of the study in the journal; default: the newest.

    Raises:
        ValueError: there is no such study; the message lists those that exist.
    """
    if storage is not None:
        runs = Path("runs") / place
        opened = open_storage(Path(), storage)
        return Found(_load(opened, name or place, without_password(storage)), runs if runs.is_dir() else None)
    path = Path(place)
    journal = path / JOURNAL if path.is_dir() else path
    if not journal.is_file():
        raise ValueError(f"STUDY: {_missing(path)}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return Found(_load(open_journal(journal), name, str(journal)), journal.parent)


def _load(opened: BaseStorage, name: str | None, place: str) -> optuna.Study:
    names = [study.study_name for study in opened.get_all_studies()]
    if not names:
        raise ValueError(f"STUDY: {place} holds no study yet")
    if name is not None and name not in names:
        raise ValueError(f"STUDY: {name!r} is not in {place}, which holds {', '.join(names)}")
    return optuna.load_study(study_name=name or names[-1], storage=opened)


def _missing(path: Path) -> str:
    """The problem with a path, and the studies near it, as text."""
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    near = sorted(str(journal.parent) for journal in folder.glob(f"*/{JOURNAL}"))
    there = f"there are {', '.join(near[:8])}" if near else "name a folder that `explore sweep` wrote"
    what = f"holds no {JOURNAL}" if path.is_dir() else "does not exist"
    return f"{without_password(str(path))!r} {what}; {there}"


def watch(
    study: optuna.Study, console: Console, n_trials: int | None = None, *, once: bool = False, every_s: float = REDRAW_S
) -> None:
    """Redraws a study until it has its trials or is interrupted.

    Args:
        n_trials: number of trials at which to stop; default: the number last requested, or never if unknown.
        once: draw the study only once.
        every_s: seconds between updates.
    """

    def asked() -> int | None:
        return n_trials or study.user_attrs.get(N_TRIALS)

    table = SweepTable(study, asked() or n_counted(study), console)
    if once:
        begun = study.get_trials(deepcopy=False)
        console.print(table.render(whole=True) if begun else f"{study.study_name}: no trials yet")
        return
    if (n := asked()) is not None and n_counted(study) >= n:  # there is nothing to wait for
        console.print(table.render(whole=True))
        return
    try:
        with table:
            while True:
                wanted, ended = asked(), n_counted(study)
                table.n_trials = wanted or ended
                table.refresh()
                if wanted is not None and ended >= wanted:
                    return
                time.sleep(every_s)
    except KeyboardInterrupt:
        return
