"""How much attention does a Mamba hybrid need?

Every model has four mixers, each followed by an MLP. Zero, one, two, three or four of the mixers are attention and the
others are Mamba-2. A single attention layer is the first, second or last mixer, and two arms add RoPE. The solver sets
the width of the MLPs so that every arm has the training FLOPs of `M-M-M-M-` with a `d_ff` of 4 `d_model`. The remaining
differences in active parameters and in the state at 128 tokens are recorded.

Two tasks: bits per byte on Gutenberg text (`text`), and multi-query associative recall of six pairs (`recall`), which
bits per byte does not show. A run on recall succeeds or fails, so its result is the share of seeds that succeed.

Primary comparisons, fixed in advance: `25` against `0` and against `100`, on text at two widths and on recall at one,
with three seeds. The other arms have one width. Every run on text has at least four training tokens per active
parameter of its layers. Budget: three CPU hours.

    explore sweep sweeps/attention_share.py --trials 21 --workers 2 --records sweeps/records/attention_share.parquet
"""

from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, RecallData, TextData, TrainConfig
from explore.figures import RunFigure, draw_comparisons, draw_floor, draw_gaps, draw_levels, stacked
from explore.frontier import (
    arms_table,
    compare,
    paired_curves,
    rank_correlation,
    seed_bands,
    seeds_table,
    success_difference,
    success_fraction,
)
from explore.frontier.gate import Gate
from explore.study import Budgets, LearningRates
from explore.study.budgets import RejectedError

ARMS = {
    "0": "M-M-M-M-",
    "25": "M-*-M-M-",
    "100": "*-*-*-*-",
    "25-early": "*-M-M-M-",
    "25-late": "M-M-M-*-",
    "50": "M-*-M-*-",
    "75": "*-M-*-*-",
    "25-rope": "M-*-M-M-",
    "100-rope": "*-*-*-*-",
}
PRIMARY = ("0", "25", "100")
WIDTHS = (32, 48)
SECONDARY_WIDTH = 48
SEQ_LEN = 128
TOKENS_PER_D2 = 320
RECALL = {"seq_len": 24, "n_pairs": 6, "vocab_size": 32}
RECALL_WIDTH, RECALL_TOKENS = 32, 1_048_576

objectives = {"val_loss": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"task": ("text", "recall"), "arm": tuple(ARMS), "d_model": WIDTHS}
seeds = 3
learning_rates = LearningRates(start=1.6e-2, high=0.256, share=0.5)
gate = Gate(
    baseline="25",
    worse=("100",),  # in print a hybrid beats attention alone, arXiv 2406.07887
    trivial=("0",),
    where={"task": "text"},
    effect=0.013,
    source="1.2 times the compute",
    n_sizes=2,
)


def content(arm: str, d_model: int, vocab_size: int) -> dict[str, Any]:
    """Fields of the model of an arm, before it is brought to its budget."""
    attention = {"d_head": d_model // 4, "n_heads": 4, "n_kv_heads": 2}
    if arm.endswith("rope"):
        attention["rope_theta"] = 10_000.0
    blocks = {
        "M": {"d_head": d_model // 4, "n_heads": 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": attention,
        "-": {"d_ff": 4 * d_model},
    }
    used = {letter: block for letter, block in blocks.items() if letter in ARMS[arm]}
    return {"d_model": d_model, "vocab_size": vocab_size, "pattern": ARMS[arm], "blocks": used}


def experiment(trial: optuna.Trial) -> Experiment:
    """One arm at one width, trained on as much of its task as every other of that width."""
    task = trial.suggest_categorical("task", grid["task"])
    arm = trial.suggest_categorical("arm", tuple(ARMS))
    d_model = trial.suggest_categorical("d_model", WIDTHS)
    if task == "recall" and d_model != RECALL_WIDTH:
        raise RejectedError(f"recall is trained at d_model={RECALL_WIDTH} only")
    if task == "text" and arm not in PRIMARY and d_model != SECONDARY_WIDTH:
        raise RejectedError(f"{arm} is trained at d_model={SECONDARY_WIDTH} only")
    vocab_size = 2048 if task == "text" else RECALL["vocab_size"]
    mamba = ModelConfig.model_validate(content("0", d_model, vocab_size)).cost(SEQ_LEN)
    state = mamba.kv_bytes + mamba.ssm_state_bytes + mamba.conv_state_bytes
    compare = {"params_active": mamba.params_active, "params_total": mamba.params_total, "state_bytes": state}
    tie = Budgets({"flops_train": mamba.flops_train}, (f"-.d_ff={d_model}:{8 * d_model}:1",), SEQ_LEN, compare=compare)
    data: TextData | RecallData = RecallData(**RECALL)
    tokens, batch_size = RECALL_TOKENS, 64
    if task == "text":
        data = TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=1)
        tokens, batch_size = TOKENS_PER_D2 * d_model**2, 16
    return Experiment(
        name=f"{task}-{arm}-d{d_model}",
        model=tie.model(trial, content(arm, d_model, vocab_size)),
        data=data,
        train=TrainConfig(tokens=tokens, batch_size=batch_size, lr=1.6e-2, precision="fp32", eval_tokens=65_536),
    )


NAMES = {
    "0": "none",
    "50": "half",
    "75": "three of four",
    "100": "all",
    "25-early": "one of four, first",
    "25-late": "one of four, last",
    "25-rope": "one of four, RoPE",
    "100-rope": "all, RoPE",
}
SHARES = {"0": 0, "25": 25, "50": 50, "75": 75, "100": 100}
SOLVED = 0.9
"""Recall accuracy from which a run counts as a success."""


WINDOW = 20
"""Steps over which the training losses of curves are averaged."""


def tables(
    runs: pd.DataFrame, pairs: pd.DataFrame, curves: pd.DataFrame, documents: pd.DataFrame | None = None
) -> Mapping[str, pd.DataFrame]:
    """Test bits per byte and successes in recall of every arm, and the differences from `25`, also during training.

    Raises:
        ValueError: `25` has no run on one of the tasks.
    """
    runs = runs[runs["status"] == "finished"].copy()
    runs["arm"] = runs["name"].str.extract(r"^[a-z]+-(.*)-d\d+$")[0]
    text, recall = (runs[runs["name"].str.startswith(task)] for task in grid["task"])
    named = [(width, arm) for width in WIDTHS for arm in PRIMARY if arm != "25"]
    recall_arms = arms_table(recall, "arm", "25")
    primary = text[text["arm"].isin(PRIMARY)]
    solved = recall.groupby("arm")["recall"].agg(n="size", successes=lambda each: int((each >= SOLVED).sum()))
    of = solved.loc["25"]
    shares = pd.DataFrame([vars(success_fraction(each.successes, each.n)) for each in solved.itertuples()])
    against = pd.DataFrame(
        [vars(success_difference(each.successes, each.n, of.successes, of.n)) for each in solved.itertuples()]
    )
    gaps = paired_curves(primary, curves, "arm", "25", WINDOW, by=["d_model"])
    leads = gaps[(gaps["arm"] == "100") & (gaps["difference"] < 0)].groupby("d_model")["step"].max()
    crossing = gaps.groupby("d_model")["step"].max().rename("last_step").to_frame().join(leads.rename("last_lead"))
    return {
        "curves": gaps,
        "crossing": crossing.reset_index(),
        "arms": arms_table(text, "arm", "25", by=["d_model"]),
        "seeds": seeds_table(text, "arm", "25", by=["d_model"]),
        "differences": compare(text, "arm", "25", by=["d_model"], primary=named, documents=documents),
        "ranks": rank_correlation(primary, "arm", "d_model", error="test_bpb"),
        "counts": pd.DataFrame([{"text": len(text), "recall": len(recall)}]),
        "bands": seed_bands(text, ["arm", "d_model"], error="test_bpb"),
        "recall": solved.reset_index().join(shares).join(against[["estimate", "low", "high"]], rsuffix="_difference"),
        "recall_arms": recall_arms,
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Loss against the share of attention, recall by the first mixer, and all differences from one layer in four."""
    heights = [2.0, 1.5, 1.5, 1.7, 2.4]
    drawn, (above, steps, flops, middle, below) = stacked(heights, "How much attention does a Mamba hybrid need?")
    curves = tables["curves"][tables["curves"]["arm"] == "100"]
    for panel, x in ((steps, "step"), (flops, "flops_run")):
        draw_gaps(panel, curves, x, WIDTHS, label="Training loss (nats),\nall minus one in four")
    bands = tables["bands"].rename(columns={"test_bpb": "estimate"})
    bands = bands[bands["arm"].isin(SHARES)]
    bands = bands.assign(x=bands["arm"].map(SHARES), series=bands["d_model"])
    label = "Mixers that are attention (%)"
    widths = {width: f"d_model {width}" for width in WIDTHS}
    seeds = tables["seeds"][tables["seeds"]["arm"].isin(SHARES)]
    dots = seeds.assign(x=seeds["arm"].map(SHARES), series=seeds["d_model"], estimate=seeds["test_bpb"])
    draw_levels(above, bands, widths, label, "Test bits per byte", joined=True, seeds=dots)
    floors = tables["arms"].assign(x=tables["arms"]["arm"].map(SHARES)).dropna(subset="x")
    for width, words in widths.items():
        draw_floor(above, floors[floors["d_model"] == width], "x", label=f"trigram, {words}")
    shares = SHARES | {"25-early": 25}
    recall = tables["recall"][tables["recall"]["arm"].isin(shares)]
    recall = recall.assign(x=recall["arm"].map(shares), series=[ARMS[arm][0] for arm in recall["arm"]])
    first = {"M": "Mamba-2 first", "*": "attention first"}
    draw_levels(middle, recall, first, label, f"Share of seeds that recall\n(d_model {RECALL_WIDTH})", joined=True)
    at = tables["differences"][tables["differences"]["d_model"] == SECONDARY_WIDTH]
    words = f"Test bits per byte,\ndifference from one in four (d_model {SECONDARY_WIDTH})"
    own = tables["seeds"][tables["seeds"]["d_model"] == SECONDARY_WIDTH]
    draw_comparisons(below, at, NAMES, words, seeds=own)
    return drawn
