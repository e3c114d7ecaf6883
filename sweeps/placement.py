"""Where in a hybrid does attention belong, and how much of it, for loss and for recall together?

The arms are those of `recall.py`: four mixers, of which none, one (first, third or last), two or all are attention,
without positions (NoPE), with RoPE, or with RoPE and a convolution. Recall is measured there. Here the same mixers are
trained on text, each followed by an MLP; the MLPs bring every arm to the training FLOPs of `none` with 4 d_model. Two
controls are not brought to that budget: `thin` is `middle` with MLPs a quarter as wide, and `blind` has no mixers, so
it sees one token.

Design: 1,500 training tokens for each d_model squared, 3,000 steps at d_model 64; all arms at that width, then `none`,
`middle`, `half` and `all-rope-conv` at 96; four seeds; a search of the learning rate for each arm and width. Scores are
of the whole test text, by document. An arm is on the front of both if no other has fewer bits per byte and answers more
queries with 32 pairs; widths and MLPs differ between the tasks, so the front is exploratory. The figure shows the
primary result of `recall.py` on that axis: the share of seeds that succeed.

Primary comparison, fixed in advance: the mean over both widths of test bits per byte of `middle` minus `none`. Gate:
`middle` beats a trigram of the same tokens at d_model 64, `thin` is resolved as worse and `blind` either way, and four
seeds at two widths resolve 0.013, the gain from 1.2 times the compute. Recall has the gate of `recall.py`,
and no table is made before the records of that study are complete and pass it.

    explore sweep sweeps/placement.py --trials 14 --workers 2 --records sweeps/records/placement.parquet
"""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, TextData, TrainConfig, load_runs, pareto_front
from explore.figures import RunFigure, draw_comparisons, draw_gaps, stacked
from explore.figures.studies import draw_scatter
from explore.frontier import arms_table, compare, paired_curves, seed_bands, seeds_table
from explore.frontier.gate import Gate, gate_report
from explore.study import Budgets, LearningRates
from explore.study.budgets import RejectedError

FOLDER = Path(__file__).parent
RECALL = runpy.run_path(str(FOLDER / "recall.py"))
HARDEST = RECALL["HARDEST"]
PRIMARY = ("middle", "none", "half", "all-rope-conv")
CONTROLS = ("thin", "blind")
WIDTHS = (64, 96)
TOKENS_PER_D2 = 1500
SEQ_LEN, BATCH_SIZE = 128, 16

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"d_model": WIDTHS, "arm": (*PRIMARY, *CONTROLS, *(arm for arm in RECALL["ARMS"] if arm not in PRIMARY))}
seeds = 4
learning_rates = LearningRates(start=8e-3, high=0.128)
gate = Gate(
    baseline="middle",
    worse=("thin",),
    trivial=("blind",),
    effect=0.013,
    source="1.2 times the compute",
    n_sizes=len(WIDTHS),
)


def content(arm: str, d_model: int) -> dict[str, Any]:
    """Fields of the model of an arm, before it is brought to its budget."""
    mixers, options = RECALL["ARMS"].get("middle" if arm in CONTROLS else arm)
    blocks = {
        "M": {"d_head": d_model // 4, "n_heads": 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": d_model // 4, "n_heads": 4, "n_kv_heads": 2, **options},
        "-": {"d_ff": d_model if arm == "thin" else 4 * d_model},
    }
    pattern = "".join("-" if arm == "blind" else f"{mixer}-" for mixer in mixers)
    used = {letter: block for letter, block in blocks.items() if letter in pattern}
    return {"d_model": d_model, "vocab_size": 2048, "pattern": pattern, "blocks": used}


def experiment(trial: optuna.Trial) -> Experiment:
    """One arm at one width, on as many tokens as every other of that width."""
    d_model = trial.suggest_categorical("d_model", WIDTHS)
    arm = trial.suggest_categorical("arm", grid["arm"])
    if arm not in PRIMARY and d_model != WIDTHS[0]:
        raise RejectedError(f"{arm} is trained at d_model={WIDTHS[0]} only")
    fields = content(arm, d_model)
    model = ModelConfig.model_validate(fields)
    if arm not in CONTROLS:
        flops = ModelConfig.model_validate(content("none", d_model)).cost(SEQ_LEN).flops_train
        model = Budgets({"flops_train": flops}, (f"-.d_ff={d_model}:{8 * d_model}:1",), SEQ_LEN).model(trial, fields)
    return Experiment(
        name=f"{arm}-d{d_model}",
        model=model,
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=3),
        train=TrainConfig(
            tokens=TOKENS_PER_D2 * d_model**2,
            batch_size=BATCH_SIZE,
            lr=8e-3,
            val_every=500,
            eval_tokens=65_536,
            evaluation="whole",
        ),
    )


NAMES = RECALL["NAMES"] | {"thin": "one of four, thin MLPs", "blind": "no mixers"}


def recalled() -> pd.DataFrame:
    """The arms of `recall.py` from its records, with the interval of the share of seeds that succeed.

    Raises:
        ValueError: there are no records, an arm lacks runs, or the study does not pass its gate.
    """
    records = FOLDER / "records" / "recall.parquet"
    how = f"`explore sweep sweeps/recall.py --records {records}` completes it"
    if not records.is_file():
        raise ValueError(f"{records}: is missing; {how}")
    found = RECALL["tables"](load_runs(records), pd.DataFrame())
    counts = found["arms"].set_index("arm")["n_seeds"]
    if lacking := [arm for arm in RECALL["ARMS"] if counts.get(arm, 0) < RECALL["seeds"]]:
        raise ValueError(f"{records}: must have {RECALL['seeds']} ended runs of every arm, not of {lacking}; {how}")
    report = gate_report(RECALL["gate"], RECALL["seeds"], records)
    if not report.passed:
        raise ValueError(f"{records}: the gate of recall.py fails {report.reason}")
    solved = found["solved"].rename(columns={"estimate": "solved", "low": "solved_low", "high": "solved_high"})
    arms: pd.DataFrame = found["arms"].merge(solved, on="arm")
    return arms


WINDOW = 200
"""Steps over which the training losses of curves are averaged."""


def tables(
    runs: pd.DataFrame, pairs: pd.DataFrame, documents: pd.DataFrame, curves: pd.DataFrame | None = None
) -> Mapping[str, pd.DataFrame]:
    """Test bits per byte of every arm and seed, differences from `none`, also along training, and both scores."""
    runs = runs[runs["status"] == "finished"].copy()
    runs["arm"] = runs["name"].str.rpartition("-d")[0]
    arms = arms_table(runs, "arm", "none", by=["d_model"])
    primary = runs[runs["arm"].isin(PRIMARY)]
    shared = runs[runs["arm"].isin(RECALL["ARMS"]) & (runs["d_model"] == WIDTHS[0])]
    bands = seed_bands(shared, ["arm"], error="test_bpb")
    columns = ["arm", "n_seeds", "successes", "recall", HARDEST, "solved", "solved_low", "solved_high"]
    both = bands[["arm", "test_bpb", "low", "high"]].merge(recalled()[columns], on="arm")
    return {
        "arms": arms,
        "averages": compare(primary, "arm", "none", strata=["d_model"], primary=("middle",), documents=documents),
        "differences": compare(runs, "arm", "none", by=["d_model"], primary=(), documents=documents),
        "seeds": seeds_table(runs, "arm", "none", by=["d_model"]),
        "curves": paired_curves(
            primary, pd.DataFrame() if curves is None else curves, "arm", "none", WINDOW, by=["d_model"]
        ),
        "both": both.assign(on_front=pareto_front(both, "test_bpb", HARDEST)),
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Recall against loss, the mean differences, the named one along training, and all at the smaller width."""
    heights = [2.6, 1.6, 1.6, 1.6, 3.2]
    drawn, (above, middle, steps, flops, below) = stacked(heights, "Where does attention belong?")
    words, seeds = "Test bits per byte,\ndifference from none", tables["seeds"]
    at, own = (each[each["d_model"] == WIDTHS[0]] for each in (tables["differences"], seeds))
    # First, as its long names set the width of all.
    draw_comparisons(below, at, NAMES, f"{words} (d_model {WIDTHS[0]})", seeds=own)
    columns = {"test_bpb": "x", "low": "x_low", "high": "x_high", "solved": "y", "solved_low": "y_low"}
    both = tables["both"].rename(columns=columns | {"solved_high": "y_high"})
    names = {arm: name for arm, name in NAMES.items() if arm in set(both["arm"])}
    arms = tables["arms"][(tables["arms"]["d_model"] == WIDTHS[0]) & (tables["arms"]["arm"] == gate.baseline)]
    floor = float(arms["ngram_test_bpb"].mean()) if "ngram_test_bpb" in arms else None
    y_label = "Share of seeds that recall\n32 pairs"
    draw_scatter(above, both, names, f"Test bits per byte (d_model {WIDTHS[0]})", y_label, floor=floor)
    means = seeds[seeds["arm"].isin(PRIMARY)].groupby(["arm", "seed"])["difference"].agg(["size", "mean"])
    means = means[means["size"] == len(WIDTHS)].rename(columns={"mean": "difference"}).reset_index()
    draw_comparisons(middle, tables["averages"], NAMES, f"{words} (mean of widths)", seeds=means)
    named = tables["curves"][tables["curves"]["arm"] == gate.baseline]
    for panel, x in ((steps, "step"), (flops, "flops_run")):
        draw_gaps(panel, named, x, WIDTHS, label="Training loss (nats),\none in four minus none")
    return drawn
