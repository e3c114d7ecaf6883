"""Is a model cut from a parent and distilled better than one of the same size trained from scratch?

The parent is a hybrid of about a million parameters (`sweeps/examples/hybrid_parent.json`), trained on the embedded
text. It is scored, then cut to half of its active parameters by width, by depth and, if the command exists, by
`explore puzzle`. Each child is distilled, and a model of the same shape is trained from scratch on as many tokens.

Every step is a command of `explore`, printed before it runs. If the chain is stopped, the same call resumes it. At the
end it prints one table: bits per byte on validation and test, and all FLOPs. `flops_before` holds the FLOPs of the
parent, of its scores and of the candidates. There is one seed, so differences of a few thousandths of a bit per byte
mean nothing.

    python sweeps/parent_to_child.py --records sweeps/records/parent_to_child.csv
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from explore import Experiment, ModelConfig
from explore.formatting import count, flops
from explore.runs import RunFolder

PARENT = Path(__file__).parent / "examples" / "hybrid_parent.json"
SHARE = 0.5
"""Share of the parent's active parameters that a child keeps."""
COLUMNS = (
    "arm", "pattern", "layers", "d_model", "params_active", "tokens", "val_bpb", "test_bpb",
    "flops_run", "flops_teacher", "flops_before", "run",
)  # fmt: skip

console = Console(soft_wrap=True, highlight=False)


def explore(*arguments: object) -> dict[str, Any]:
    """Prints and runs a command of `explore`, and returns its JSON output."""
    words = [str(each) for each in arguments]
    console.print("$ explore", *words, style="bold", markup=False)
    command = [sys.executable, "-c", "from explore.cli import main; main()", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def has_puzzle() -> bool:
    """Whether this version has the command `explore puzzle`."""
    command = [sys.executable, "-c", "from explore.cli import main; main()", "puzzle", "--help"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def plans(parent: Path, model: ModelConfig, seq_len: int, *, quick: bool) -> dict[str, Path]:
    """A plan for each way to cut the parent to half of its active parameters."""
    target = round(SHARE * model.cost(seq_len).params_active)
    narrow = ["--free", "d_model", "--free", "d_ff", "--free", "M.n_heads"]
    budget = ["--target", f"params_active={target}", "--best", 1, "--score-at-most", 4 if quick else 32]
    found = {
        "width": explore("cut", parent, *budget, "--tolerance", 0.02, *narrow),
        "depth": explore("cut", parent, *budget, "--tolerance", 0.1, "--free", "depth=2:12"),
    }
    if has_puzzle():
        found["puzzle"] = explore("puzzle", parent, "--max", f"params_active={target}")
    return {arm: Path(each["plan"]) for arm, each in found.items()}


def from_scratch(child: RunFolder, lr: float, folder: Path, arm: str) -> Path:
    """An experiment with the shape of a child that starts from fresh weights and trains on text alone."""
    content = child.load_experiment().model_dump(mode="json")
    content["start"] = {"kind": "fresh"}
    content["train"] |= {"objective": {"kind": "next_token"}, "lr": lr}
    content["name"] = f"scratch-{arm}"
    path = folder / f"scratch-{arm}.json"
    path.write_text(Experiment.model_validate(content).model_dump_json(indent=2), encoding="utf-8")
    return path


def row(arm: str, folder: RunFolder) -> dict[str, Any]:
    """The row of a run in the table."""
    model, record = folder.load_experiment().model, folder.row()
    own = {"arm": arm, "pattern": model.pattern, "layers": model.n_layers}
    return {**own, **{name: record.get(name) for name in COLUMNS if name not in own}}


def study(runs: Path, parent_tokens: int | None, tokens: int, *, quick: bool = False) -> pd.DataFrame:
    """Runs the whole chain and returns its table.

    Args:
        runs: folder of run folders.
        parent_tokens: training tokens of the parent; those in its file if absent.
        tokens: training tokens of every child and of every model from scratch.
        quick: score only a few candidates.
    """
    runs.mkdir(parents=True, exist_ok=True)
    changes = [] if parent_tokens is None else ["--set", f"train.tokens={parent_tokens}"]
    parent = RunFolder(Path(explore("train", PARENT, *changes, "--runs", runs)["run"]))
    experiment = parent.load_experiment()
    explore("score", parent.path)
    rows = [row("parent", parent)]
    for arm, plan in plans(parent.path, experiment.model, experiment.data.seq_len, quick=quick).items():
        child = explore("distil", plan, "--tokens", tokens, "--parent", parent.path, "--runs", runs,
                        "--set", f"name={arm}")  # fmt: skip
        folder = RunFolder(Path(child["run"]))
        rows.append(row(f"{arm}, distilled", folder))
        scratch = explore("train", from_scratch(folder, experiment.train.lr, runs, arm), "--runs", runs)
        rows.append(row(f"{arm}, from scratch", RunFolder(Path(scratch["run"]))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


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
    parser.add_argument("--records", type=Path, help="CSV file for the table")
    parser.add_argument("--quick", action="store_true", help="score only a few candidates, for a quick test")
    given = parser.parse_args()
    found = study(given.runs, given.parent_tokens, given.tokens, quick=given.quick)
    show(found)
    if given.records is not None:
        found.to_csv(given.records, index=False)
