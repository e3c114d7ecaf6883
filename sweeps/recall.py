"""How many attention layers does recall need, in which position, and with which position encoding?

The task is multi-query associative recall: a sequence of 128 tokens holds 4, 8, 16 or 32 pairs of a key and a value,
drawn from 8192 tokens, and queries each value once. Models have four mixers without MLPs at `d_model` 64 and one matrix
for embedding and head, as in the literature (zoology, arXiv 2312.04927). The arms are:

- all Mamba-2 with a state of 8, so small that 32 pairs should not fit (`none`);
- one attention layer of four, the first, third or last (`early`, `middle`, `late`);
- two of four (`half`);
- all four without positions (`all-nope`), with RoPE (`all-rope`), or with RoPE and a convolution over four positions of
  queries, keys and values (`all-rope-conv`).

Design: a step has 64 sequences. A run ends after 2,000 steps, or earlier if it answers 0.99 of the validation queries.
The learning rate of each arm is the one with the best recall, averaged over the steps, in runs of half that length on
seed 0, searched on a grid of factor 3.16. Five seeds run at that rate. A run succeeds if its test accuracy at 32 pairs
is at least 0.9. Results are the share of seeds that succeed, accuracy by number of pairs, and steps until 0.9 on
validation, which is measured every 20 steps.

Primary comparison, fixed in advance: the share of successes of `middle` minus that of `none`. All other comparisons are
exploratory. The gate asks two things of the arms: the control, `all-rope-conv`, answers at least 0.9 of all queries in
the mean over its seeds, as attention does throughout the literature; and `none` stays below 0.9 at 32 pairs and is
resolved as worse than the control. Its other conditions are those of every gate, such as rates interior to their grid.

Departures from what the gate usually asks. A run has 2,000 steps and not 8,000, because arms that solve the task do so
much earlier: the control answers 0.99 of the validation queries by step 140 in all five runs at its rate, and `middle`
by step 600 in pilots at rates of 0.003 and 0.0095. A failure therefore means "not within 2,000 steps". The limit on
steps is the length of the schedule, which every run has, so this condition cannot fail, and neither can that on the
decay, before which a run that solves the task ends; that the control solves the task shows that its steps are enough.
There is no trivial arm, because `none` is already the simplest one.

One change of the gate was made after the control and `none` had run, and before a run of any other arm had ended. The
gate asked for a resolvable difference of 0.1 in mean recall, and failed: one seed of `none` learned late and answered
0.35 of the queries, the others 0.59 to 0.64, so five seeds resolve 0.20. It now asks what the primary comparison is
about, the difference of shares of successes. Five seeds resolve a share of 60%.

Why one matrix and this grid: with one matrix for embedding and head, as in the literature, a pilot of the control at a
rate of 0.003 answered 0.997 of the test queries at step 280. The grid of rates goes to 0.3, so that 0.03, the best rate
in the control's pilots, is not at its end. Training FLOPs are counted as everywhere, with a head at every position,
although only the logits of the queries are computed.

Budget: a full run is 16.4 million tokens, or 0.4 core hours at 12,000 tokens/s, the speed of one core of an AVX2
machine. The 40 runs take at most 15 core hours and the pilots about 6; runs that solve the task end earlier.

    explore sweep sweeps/recall.py --trials 8 --workers 1 --records sweeps/records/partial/recall.parquet
"""

from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, RecallData, TrainConfig
from explore.figures import RunFigure, draw_seeds, stacked
from explore.frontier import success_difference, success_fraction
from explore.frontier.gate import Gate, Target
from explore.study import LearningRates

CONTROL, BASELINE, PRIMARY = "all-rope-conv", "none", "middle"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "all-rope-conv": ("****", {"rope_theta": 10_000.0, "d_conv": 4}),
    "none": ("MMMM", {}),
    "middle": ("MM*M", {}),
    "half": ("M*M*", {}),
    "late": ("MMM*", {}),
    "early": ("*MMM", {}),
    "all-rope": ("****", {"rope_theta": 10_000.0}),
    "all-nope": ("****", {}),
}
"""Patterns and options of attention, the arms of the gate and of the primary claim first."""
PAIRS = (4, 8, 16, 32)
SEQ_LEN, BATCH_SIZE, N_STEPS = 128, 64, 2000

objectives = {"recall": "maximize", "recall_over_steps": "maximize"}
sampler = "grid"
grid = {"arm": tuple(ARMS)}
seeds = 5
learning_rates = LearningRates(low=3e-4, high=0.31, start=9.49e-3, factor=10**0.5, share=0.5, by="recall_over_steps")


def experiment(trial: optuna.Trial) -> Experiment:
    """One arm."""
    arm = trial.suggest_categorical("arm", tuple(ARMS))
    pattern, options = ARMS[arm]
    blocks = {
        "M": {"d_head": 32, "n_heads": 4, "d_state": 8, "n_groups": 1, "chunk_size": 32},
        "*": {"d_head": 32, "n_heads": 2, "n_kv_heads": 2, **options},
    }
    used = {letter: block for letter, block in blocks.items() if letter in pattern}
    model = {"d_model": 64, "vocab_size": 8192, "pattern": pattern, "blocks": used, "tie_embeddings": True}
    return Experiment(
        name=arm,
        model=ModelConfig.model_validate(model),
        data=RecallData(seq_len=SEQ_LEN, n_pairs=PAIRS[-1], fewer_pairs=PAIRS[:-1], vocab_size=8192, n_eval=256),
        train=TrainConfig(
            tokens=N_STEPS * BATCH_SIZE * SEQ_LEN, batch_size=BATCH_SIZE, lr=3e-3, val_every=20, stop_recall=0.99
        ),
    )


SOLVED = 0.9
"""Accuracy from which a run counts as a success."""
BY_PAIRS = {f"recall_{n}_pairs": f"{n} pairs" for n in PAIRS}
HARDEST = f"recall_{PAIRS[-1]}_pairs"
gate = Gate(
    baseline=CONTROL,
    worse=(BASELINE,),
    value="recall",
    floor=SOLVED,
    effect=1.0,
    source="attention solves the task with every seed, and a state that overflows with none, arXiv 2312.04927",
    shares=True,
    targets=(Target(BASELINE, HARDEST, below=SOLVED),),
    min_steps=N_STEPS,  # the schedule of every run, so this cannot fail; the control shows that it is enough
    min_tokens=0,  # a run ends when it has solved the task
    alike=("n_steps",),
)
NAMES = {
    "none": "none",
    "early": "one of four, first",
    "middle": "one of four, third",
    "late": "one of four, last",
    "half": "two of four",
    "all-nope": "all, NoPE",
    "all-rope": "all, RoPE",
    "all-rope-conv": "all, RoPE, convolution",
}
"""The arms as figures show them, from above."""


def tables(runs: pd.DataFrame, pairs: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """Results by arm and by seed, the successes compared with `none`, and two checks; arms may be missing."""
    runs = runs[runs["status"].isin(["finished", "diverged"])].copy()
    runs["arm"] = runs["name"]
    runs["solved"] = runs[HARDEST].fillna(0.0) >= SOLVED
    scores = ["recall", *BY_PAIRS]
    groups = runs.groupby("arm")
    what = ["pattern", "lr", "tuned", "params_active_no_embeddings", "state_bytes", "flops_fwd"]
    arms = groups[what].first().join(groups[scores].mean())
    steps = runs.assign(steps_to_90=runs["steps_to_90"].astype(float).fillna(float("inf"))).groupby("arm")[
        "steps_to_90"
    ]
    medians = steps.median()
    arms["median_steps_to_90"] = medians.where(medians < float("inf"))  # absent if half of the seeds do not reach it
    counts = groups["solved"].agg(n_seeds="size", successes="sum")
    arms = counts.join(arms).loc[[arm for arm in NAMES if arm in counts.index]]
    shares = [vars(success_fraction(int(each.successes), int(each.n_seeds))) for each in arms.itertuples()]
    return {
        "arms": arms.reset_index(),
        "solved": pd.DataFrame(shares, index=arms.index)[["estimate", "low", "high"]].reset_index(),
        "differences": _differences(arms),
        "checks": _gate(arms),
        "seeds": runs[["arm", "seed", "lr", "step", "steps_to_90", "recall_over_steps", *scores]].sort_values(
            ["arm", "seed"]
        ),
    }


def _differences(arms: pd.DataFrame) -> pd.DataFrame:
    """Shares of successes minus that of `none`, each with its own interval."""
    rows = []
    for arm in arms.index if BASELINE in arms.index else ():
        if arm == BASELINE:
            continue
        numbers = [int(arms.loc[name, column]) for name in (arm, BASELINE) for column in ("successes", "n_seeds")]
        rows.append({"arm": arm, "primary": arm == PRIMARY, **vars(success_difference(*numbers))})
    return pd.DataFrame(rows, columns=["arm", "primary", "estimate", "low", "high", "level"])


def _gate(arms: pd.DataFrame) -> pd.DataFrame:
    """The two checks of means without which nothing follows from the other arms; what has not run has not passed."""
    rows = [
        ("the control recalls", CONTROL, "recall", "at least", lambda value: value >= SOLVED),
        ("no attention overflows", BASELINE, HARDEST, "below", lambda value: value < SOLVED),
    ]
    records = []
    for check, arm, quantity, words, passes in rows:
        value = float(arms.loc[arm, quantity]) if arm in arms.index else float("nan")
        records.append((check, arm, quantity, value, f"{words} {SOLVED}", bool(passes(value))))
    return pd.DataFrame(records, columns=["check", "arm", "quantity", "value", "needs", "passed"])


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Accuracy by number of pairs, and steps to 90%, with one dot per seed."""
    drawn, (above, below) = stacked([3.4, 2.2], "What does attention need in order to recall?")
    seeds = tables["seeds"]
    draw_seeds(above, seeds, NAMES, BY_PAIRS, "Accuracy on test")
    above.set_xlim(-0.02, 1.02)
    never = (float(N_STEPS), f"not within {N_STEPS:,} steps")
    draw_seeds(below, seeds, NAMES, {"steps_to_90": "a seed"}, "Steps to 90% of all queries", missing=never, log=True)
    return drawn
