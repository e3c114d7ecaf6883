"""Is a small model better if it is cut from a trained parent and distilled, or if it is trained from scratch?

The parent is a hybrid, `M-M-*-M-M-` at `d_model` 64, trained for 6,000 steps of 1,024 tokens. A child has at most half
of the parent's active parameters without embeddings, or the nearest that its way to cut can reach: by depth up to 15%
more, since whole layers go. Children are cut by the Puzzle program (`puzzle`), by its greedy and random baselines, and
as in Minitron by width or by depth. All are distilled for 3,400 steps. The shape of the Puzzle child is also trained
from fresh weights: on text (`scratch`), on the parent's predictions (`scratch-kd`), and on text for all FLOPs that the
Puzzle child cost, which includes the training of its parent (`scratch-whole`).

Design: three parents, with seeds 0 to 2, which are also those of their children and of random choices. Every arm has
its own learning rate, found with short runs at a quarter of the steps on seed 0, or a tenth for the longer
`scratch-whole`. Whole splits are scored, with books as documents. If two ways to cut choose the same child on a seed,
it is one run, under the name of the first, and the other arm is left out of the comparison.

Primary comparisons, fixed in advance, each with `puzzle`: `scratch-kd` at equal tokens, which is what the parent's
weights are worth; and `scratch-whole` at equal FLOPs, which is whether the detour pays if the parent must be paid for.
All others are exploratory. The positive control is `scratch`, which is worse than a distilled child in all of print;
the other control is the random choice. The gate examines the runs of 3,400 steps, so not `scratch-whole`.

What this size cannot show: parents of published systems see thousands of tokens per parameter, this one 21; and one
number of tokens per child says nothing about the rate at which the arms approach each other.

This is a script, because each experiment needs the weights of another. If it is stopped, the same call resumes it. A
table of records has no weights, so on another machine it continues with what needs none: `scratch-whole` of a seed
whose other arms are there, and the seeds that the table lacks.

    OMP_NUM_THREADS=1 python sweeps/parent_or_scratch.py --records sweeps/records/partial/parent_or_scratch.parquet
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import RunFigure, draw_comparisons, stacked
from explore.files import write_json
from explore.frontier import arms_table, compare
from explore.frontier.gate import Gate
from explore.runs import PILOTS, RunFolder, walk_runs
from explore.study import LearningRates

PATTERN, D_MODEL, SEQ_LEN, BATCH_SIZE = "M-M-*-M-M-", 64, 256, 4
PARENT_STEPS, CHILD_STEPS = 6_000, 3_400
SIZE, SHARE = "params_active_no_embeddings", 0.5
"""The measure of a model's size, and the share of the parent's that a child keeps."""
CUTS: Mapping[str, tuple[str, ...]] = {
    "width": ("--tolerance", "0.02", "--free", "d_model", "--free", "d_ff", "--free", "M.n_heads"),
    "depth": ("--tolerance", "0.15", "--free", f"depth=2:{len(PATTERN) - 1}"),
}
"""Options of `explore cut` for the arms of Minitron."""
DISTILLED = ("puzzle", "greedy", "random", *CUTS)
WHOLE = "scratch-whole"
LAST_CHILD = "scratch-kd"
"""The last arm that needs the weights of the parent."""
PRIMARY = (LAST_CHILD, WHOLE)
NAMES = {
    "greedy": "greedy, distilled",
    "random": "random, distilled",
    "width": "width, distilled",
    "depth": "depth, distilled",
    "scratch": "from scratch",
    "scratch-kd": "from scratch, distilled",
    WHOLE: "from scratch, all FLOPs",
}

seeds = 3
gate = Gate(
    baseline="puzzle",
    worse=("scratch",),
    trivial=("random",),
    effect=0.02,
    source="expected 0.02 to 0.1 bits per byte; Minitron, arXiv 2407.14679, table 11, has a larger gap",
    arm="name",
    size="n_steps",  # the children of equal tokens are the shortest runs
)

console = Console(soft_wrap=True, highlight=False)


def parent_experiment(seed: int) -> Experiment:
    blocks = {
        "M": {"n_heads": 8, "d_head": 16, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 16},
        "-": {"d_ff": 4 * D_MODEL},
    }
    model = {"d_model": D_MODEL, "vocab_size": 2048, "pattern": PATTERN, "tie_embeddings": True, "blocks": blocks}
    return Experiment(
        name="parent",
        seed=seed,
        model=ModelConfig.model_validate(model),
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=3),
        train=TrainConfig(
            tokens=PARENT_STEPS * BATCH_SIZE * SEQ_LEN,
            batch_size=BATCH_SIZE,
            lr=8e-3,
            eval_tokens=65_536,
            evaluation="whole",
        ),
    )


def plans(parent: RunFolder) -> dict[str, str]:
    """Paths of the plans by arm, from the commands `score`, `puzzle` and `cut`."""
    from parent_to_child import Commands  # the script beside this one

    explore, experiment = Commands(), parent.load_experiment()
    most = round(SHARE * getattr(experiment.model.cost(SEQ_LEN), SIZE))
    explore("score", parent.path)
    asked = ("--max", f"{SIZE}={most}", "--tokens", 131_072, "--seed", experiment.seed)
    found = explore("puzzle", parent.path, *asked, "--baselines")
    baselines = {row["method"]: row["plan"] for row in found["baselines"]}
    cuts = {
        arm: explore("cut", parent.path, "--target", f"{SIZE}={most}", "--best", 1, "--score-at-most", 32, *words)
        for arm, words in CUTS.items()
    }
    paths = {"puzzle": found["plan"], "greedy": baselines["greedy"], "random": baselines["random"]}
    return paths | {arm: record["plan"] for arm, record in cuts.items()}


def children(parent: RunFolder) -> Iterator[Experiment]:
    """The experiments of all arms of equal tokens; their learning rates are those at which a search starts."""
    from explore.train import child_experiment

    tokens = CHILD_STEPS * BATCH_SIZE * SEQ_LEN
    made = {
        arm: child_experiment(path, tokens, parent=parent.path, overrides=[f"name={arm}", "train.lr=2e-3"])
        for arm, path in plans(parent).items()
    }
    yield from made.values()
    yield fresh(made["puzzle"], "scratch", objective={"kind": "next_token"})
    yield fresh(made["puzzle"], LAST_CHILD)


def fresh(child: Experiment, name: str, **train: Any) -> Experiment:
    """An experiment with the shape of a child that starts from random weights."""
    content = child.model_dump(mode="json")
    content |= {"name": name, "start": {"kind": "fresh"}, "train": {**content["train"], "lr": 8e-3, **train}}
    return Experiment.model_validate(content)


class Rates:
    """Learning rates by arm, found with short runs by the first seed, whose runs record them for the others."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.known = {run.load_experiment().name: run.trial for run in walk_runs(runs) if run.trial}

    def of(self, experiment: Experiment) -> dict[str, Any]:
        """The rate of an arm, whether it is interior to its grid, and how much half or twice of it would lose."""
        if experiment.name not in self.known:
            if experiment.seed != 0 and experiment.name in DISTILLED and "puzzle" in self.known:
                return self.known["puzzle"]  # on seed 0 it was the same child as that of another arm
            if experiment.seed != 0:
                raise SystemExit(f"error: {self.runs}: has no rate for {experiment.name}; run --seeds 0 first")
            rates = LearningRates(start=experiment.train.lr, share=0.1 if experiment.name == WHOLE else 0.25)
            tuned = rates.search(lambda lr: self._score(rates.pilot(experiment, lr)))
            about = {"tuned": tuned.interior, "lr": tuned.lr, "lr_sensitivity": tuned.sensitivity}
            self.known[experiment.name] = about
        return self.known[experiment.name]

    def _score(self, pilot: Experiment) -> float:
        from explore.train import fit

        row = fit(pilot, self.runs / PILOTS, console=console).row()
        return float(row["val_bpb"]) if row["status"] == "finished" else float("inf")


def train(experiment: Experiment, runs: Path, rate: Mapping[str, Any]) -> RunFolder:
    """Trains one arm at its rate, and records the arm and how the rate was found in the run's folder."""
    from explore.train import fit

    tuned = experiment.model_copy(update={"train": experiment.train.model_copy(update={"lr": rate["lr"]})})
    folder = fit(tuned, runs, console=console)
    found = {key: rate[key] for key in ("tuned", "lr", "lr_sensitivity")}
    trial = {"study": Path(__file__).stem, "trial": experiment.seed, "params": {}, **found, "residuals": {}}
    write_json(folder.path / "trial.json", trial)
    row = folder.row()
    about = f"seed {experiment.seed}, {experiment.name}: lr {rate['lr']:.3g}"
    console.print(f"{about}, test {row['test_bpb']:.4f} bits per byte")
    return folder


def one(runs: Path, seed: int, rates: Rates) -> Iterator[RunFolder]:
    """Trains a parent and all its arms, unless they are there, and yields each run that was trained."""
    ended = [(run.load_experiment(), run) for run in walk_runs(runs) if run.status == "finished"]
    found = {experiment.name: run for experiment, run in ended if experiment.seed == seed}
    if WHOLE in found:
        return
    if LAST_CHILD not in found:
        experiment = parent_experiment(seed)
        yield (parent := train(experiment, runs, rates.of(experiment)))
        for child in children(parent):
            yield (run := train(child, runs, rates.of(child)))
            found[child.name] = run
    scratch, spent = found["scratch"].load_experiment(), found["puzzle"].row()["flops_with_parent"]
    whole = fresh(scratch, WHOLE, tokens=None, flops=spent)
    yield train(whole, runs, rates.of(whole))


def add_parents_floors(runs: Path) -> None:
    """Adds floors: n-gram models of all tokens that a parent saw, which its children know about through its weights."""
    from explore.frontier.floors import add_floors

    every = {run.path.name: (run, run.load_experiment()) for run in walk_runs(runs) if run.status == "finished"}
    parents = {one.seed: run for run, one in every.values() if one.name == "parent"}
    add_floors(runs, names=[run.path.name for run in parents.values()])
    for run, one in every.values():
        write_json(run.path / "evals.json", {**run.evals, "ngram": parents[one.seed].evals["ngram"]})


def tables(runs: pd.DataFrame, pairs: pd.DataFrame, documents: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """Scores, sizes and FLOPs of every arm, with and without those of its parent, and differences from `puzzle`."""
    runs = runs[runs["status"] == "finished"].copy()
    n_seeds = runs.groupby("name")["seed"].transform("nunique")
    complete = runs[(runs["name"] != "parent") & (n_seeds >= runs["seed"].nunique())]
    spent = ["params_active_no_embeddings", "flops_run", "flops_teacher", "flops_before", "flops_with_parent"]
    return {
        "arms": arms_table(runs, "name", "puzzle"),
        "flops": runs.groupby("name", sort=False)[spent].mean().reset_index(),
        "differences": compare(complete, "name", "puzzle", primary=PRIMARY, documents=documents),
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """What every arm loses to the distilled Puzzle child."""
    drawn, (panel,) = stacked([2.4], "Cut and distil, or train from scratch?")
    label = "Test bits per byte, difference from Puzzle, distilled"
    draw_comparisons(panel, tables["differences"], NAMES, label, arm="name")
    return drawn


def main() -> None:
    from explore.cli.sweep import gate_table
    from explore.frontier.gate import gate_report
    from explore.records import pack_runs, unpack_runs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs") / Path(__file__).stem)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)), help="seeds of the parents")
    parser.add_argument("--records", type=Path, help="table of records, written after every run")
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    if given.records is not None and given.records.exists():
        unpack_runs(given.records, given.runs)
    for seed in given.seeds:
        for _ in one(given.runs, seed, Rates(given.runs)):
            if given.records is not None:
                pack_runs(given.records, given.runs)
        add_parents_floors(given.runs)
        if given.records is not None:
            pack_runs(given.records, given.runs)
    report = gate_report(gate, seeds, given.runs)
    console.print(gate_table(f"gate, at {report.size}", report.table()))


if __name__ == "__main__":
    main()
