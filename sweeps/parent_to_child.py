"""Is a model cut from a parent and distilled better than one of the same size trained from scratch?

The parent is a hybrid of about a million parameters (`sweeps/examples/hybrid_parent.json`), trained on the embedded
text. It is scored, then cut to half of its active parameters by width, by depth and by Puzzle. Each child is distilled,
and a model of the same shape is trained from scratch on as many tokens. With `--equal-flops` the shape of the Puzzle
child is also trained from scratch for as many FLOPs as the child cost after the training of the parent: scores,
library, teacher and its own training.

Every step is a command of `explore`, printed before it runs. If the chain is stopped, the same call resumes it. The
commands for the children run at the same time, one per core, each with one thread. At the end it prints one
table: bits per byte on validation and test, and all FLOPs. `flops_before` holds the FLOPs of the parent, of its scores
and of the candidates. There is one seed, so differences of a few thousandths of a bit per byte mean nothing.

    python sweeps/parent_to_child.py --records sweeps/records/parent_to_child.csv
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from explore import Experiment
from explore.formatting import count, flops
from explore.runs import RunFolder
from explore.threads import n_cores

PARENT = Path(__file__).parent / "examples" / "hybrid_parent.json"
SHARE = 0.5
"""Share of the parent's active parameters that a child keeps."""
ARMS = ("puzzle", "width", "depth")
"""Ways to cut, in the order in which they begin."""
NARROW = ("--free", "d_model", "--free", "d_ff", "--free", "M.n_heads")
COLUMNS = (
    "arm", "pattern", "layers", "d_model", "params_active", "tokens", "val_bpb", "test_bpb",
    "flops_run", "flops_teacher", "flops_before", "run",
)  # fmt: skip

console = Console(soft_wrap=True, highlight=False)


class Commands:
    """Prints and runs commands of `explore`.

    Attributes:
        beside: whether other commands run at the same time; each then has one thread and draws no progress.
    """

    def __init__(self, *, beside: bool = False) -> None:
        self.beside, self._failed = beside, Event()

    def __call__(self, *arguments: object) -> dict[str, Any]:
        """Returns the JSON output of a command. After one has failed, no other begins."""
        if self._failed.is_set():
            sys.exit(1)
        words = [str(each) for each in arguments]
        console.print("$ explore", *words, style="bold", markup=False)
        command = [sys.executable, "-c", "from explore.cli import main; main()", *words, "--json"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"} if self.beside else None
        errors = subprocess.PIPE if self.beside else None
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=env, text=True, check=False)
        if done.returncode:
            self._failed.set()
            sys.stderr.write(done.stderr or "")
            sys.exit(done.returncode)
        content: dict[str, Any] = json.loads(done.stdout)
        return content


def plan(explore: Commands, arm: str, parent: RunFolder, *, quick: bool) -> Path:
    """The plan that cuts the parent to half of its active parameters in one way."""
    experiment = parent.load_experiment()
    target = round(SHARE * experiment.model.cost(experiment.data.seq_len).params_active)
    if arm == "puzzle":
        found = explore("puzzle", parent.path, "--max", f"params_active={target}")
    else:
        free = NARROW if arm == "width" else ("--free", "depth=2:12")
        budget = ("--target", f"params_active={target}", "--best", 1, "--score-at-most", 4 if quick else 32)
        found = explore("cut", parent.path, *budget, "--tolerance", 0.02 if arm == "width" else 0.1, *free)
    return Path(found["plan"])


def from_scratch(child: RunFolder, lr: float, folder: Path, name: str, budget: Mapping[str, float | None]) -> Path:
    """An experiment with the shape of a child that starts from fresh weights and trains on text alone.

    Args:
        budget: `tokens` or `flops` of its training; if empty, the tokens of the child.
    """
    content = child.load_experiment().model_dump(mode="json")
    content["start"] = {"kind": "fresh"}
    content["train"] |= {"objective": {"kind": "next_token"}, "lr": lr, **budget}
    content["name"] = name
    path = folder / f"{name}.json"
    path.write_text(Experiment.model_validate(content).model_dump_json(indent=2), encoding="utf-8")
    return path


def flops_after(parent: RunFolder, child: RunFolder) -> float:
    """All FLOPs of a child except those of the parent's training."""
    spent, record = (parent.result or {})["flops_run"], child.result or {}
    return float(record["flops_run"] + record["flops_teacher"] + record["flops_before"] - spent)


def row(arm: str, folder: RunFolder) -> dict[str, Any]:
    """The row of a run in the table."""
    model, record = folder.load_experiment().model, folder.row()
    own = {"arm": arm, "pattern": model.pattern, "layers": model.n_layers}
    return {**own, **{name: record.get(name) for name in COLUMNS if name not in own}}


def distilled(explore: Commands, arm: str, parent: RunFolder, runs: Path, tokens: int, *, quick: bool) -> RunFolder:
    """Cuts the parent in one way and distils the child."""
    path = plan(explore, arm, parent, quick=quick)
    words = ("--tokens", tokens, "--parent", parent.path, "--runs", runs, "--set", f"name={arm}")
    return RunFolder(Path(explore("distil", path, *words)["run"]))


def scratch(
    explore: Commands, child: RunFolder, parent: RunFolder, runs: Path, name: str, budget: Mapping[str, float | None]
) -> RunFolder:
    """Trains the shape of a child from scratch, for the tokens of the child or another budget."""
    shape = from_scratch(child, parent.load_experiment().train.lr, runs, name, budget)
    return RunFolder(Path(explore("train", shape, "--runs", runs)["run"]))


def study(
    runs: Path,
    parent_tokens: int | None,
    tokens: int,
    *,
    workers: int | None = None,
    equal_flops: bool = False,
    quick: bool = False,
) -> pd.DataFrame:
    """Runs the whole chain and returns its table.

    Args:
        runs: folder of run folders.
        parent_tokens: training tokens of the parent; those in its file if absent.
        tokens: training tokens of every child and of every model from scratch that has as many.
        workers: number of commands that run at the same time; the number of cores if absent.
        equal_flops: also train the shape of the Puzzle child from scratch for as many FLOPs as it cost.
        quick: score only a few candidates.
    """
    runs.mkdir(parents=True, exist_ok=True)
    workers = n_cores() if workers is None else workers
    changes = [] if parent_tokens is None else ["--set", f"train.tokens={parent_tokens}"]
    explore = Commands()
    parent = RunFolder(Path(explore("train", PARENT, *changes, "--runs", runs)["run"]))
    explore("score", parent.path)
    beside = Commands(beside=workers > 1)
    with ThreadPoolExecutor(workers) as pool:
        cut = {arm: pool.submit(distilled, beside, arm, parent, runs, tokens, quick=quick) for arm in ARMS}
        trained: dict[str, Future[RunFolder]] = {}
        for arm in ARMS:  # in the order in which they begin; the rest of the children is distilled meanwhile
            child = cut[arm].result()
            if equal_flops and arm == "puzzle":
                budget = {"tokens": None, "flops": flops_after(parent, child)}
                name = "scratch-puzzle-flops"
                trained["puzzle, from scratch, equal FLOPs"] = pool.submit(
                    scratch, beside, child, parent, runs, name, budget
                )
            trained[f"{arm}, from scratch"] = pool.submit(scratch, beside, child, parent, runs, f"scratch-{arm}", {})
    found = {f"{arm}, distilled": each.result() for arm, each in cut.items()}
    found |= {arm: each.result() for arm, each in trained.items()}
    order = sorted(found, key=lambda name: (("width", "depth", "puzzle").index(name.split(",")[0]), len(name)))
    return pd.DataFrame([row("parent", parent), *(row(arm, found[arm]) for arm in order)], columns=list(COLUMNS))


def show(table: pd.DataFrame) -> None:
    """Prints the table."""
    formats: Mapping[str, Any] = {"params_active": count, "val_bpb": "{:.4f}".format, "test_bpb": "{:.4f}".format}
    view = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    heads = {
        "arm": "arm", "layers": "layers", "d_model": "d", "params_active": "active", "val_bpb": "val",
        "test_bpb": "test", "flops_run": "FLOPs", "flops_teacher": "teacher", "flops_before": "before",
    }  # fmt: skip
    names = list(heads)
    for name in names:
        view.add_column(heads[name], justify="left" if name == "arm" else "right", no_wrap=True)
    for record in table.astype(object).where(table.notna(), None).to_dict("records"):
        texts = [
            flops(record[name]) if name.startswith("flops") else
            "" if record[name] is None else formats.get(str(name), str)(record[name])
            for name in names
        ]  # fmt: skip
        view.add_row(*texts)
    console.print(view)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/parent-to-child"))
    parser.add_argument("--parent-tokens", type=int, help="training tokens of the parent (default: as in its file)")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training tokens of every child")
    parser.add_argument("--workers", type=int, help="commands that run at the same time (default: one per core)")
    parser.add_argument(
        "--equal-flops", action="store_true", help="also train the Puzzle child's shape for as many FLOPs as it cost"
    )
    parser.add_argument("--records", type=Path, help="CSV file for the table")
    parser.add_argument("--quick", action="store_true", help="score only a few candidates, for a quick test")
    given = parser.parse_args()
    found = study(
        given.runs,
        given.parent_tokens,
        given.tokens,
        workers=given.workers,
        equal_flops=given.equal_flops,
        quick=given.quick,
    )
    show(found)
    if given.records is not None:
        found.to_csv(given.records, index=False)
