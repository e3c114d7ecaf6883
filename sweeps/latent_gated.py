"""Does a LatentMoE buy more than a standard mixture of experts, at sizes that can answer?

The question of `latent_or_not.py`, whose models lose to a trigram, asked again with a gate. One hybrid, `MEM*EME`; only
its expert layers differ. `moe` has 64 experts of two thirds of d_model, six of them active, and two shared ones. With
a latent of a quarter of d_model, `eff4` has 256 experts and six active, `acc4` 256 and 22, by the paper's own ratios
(arXiv 2601.18089); `acc4-norm` has a norm on the combined latent. Two controls: `squeezed4` has the latent and no more
experts, which the paper calls clearly worse, and `dense` an MLP as wide as all that `moe` activates.

Design: 1,300 training tokens for each d_model squared, 21 or more for each active parameter of the layers; all arms at
d_model 96, then `moe`, `acc4` and `eff4` at 128; four seeds; a search of the learning rate for each arm and width.
Scores are of the whole test text, by document. The paper's vocabulary of 4096 is 2048 here.

Primary comparison, fixed in advance: the mean over both widths of test bits per byte of `acc4` minus `moe`. Second,
with the same correction: `eff4` is within 0.005 of `moe`. All other comparisons are exploratory. Gate: `moe` beats a
trigram of the same tokens at d_model 96, `squeezed4` is resolved as worse and `dense` either way, routers are balanced,
and four seeds at two widths resolve 0.013, the gain from 1.2 times the compute.

    explore sweep sweeps/latent_gated.py --trials 9 --workers 2 --records sweeps/records/latent_gated.parquet
"""

from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, MoEConfig, TextData, TrainConfig, latent_acc, latent_eff
from explore.figures import RunFigure, draw_comparisons, draw_floor, draw_gaps, draw_laws, stacked
from explore.frontier import arms_table, compare, paired_curves, seed_bands, seeds_table
from explore.frontier.gate import Gate
from explore.study import LearningRates
from explore.study.budgets import RejectedError

WIDTHS = (96, 128)
PRIMARY = ("moe", "acc4", "eff4")
CONTROLS = ("squeezed4", "dense")
TOKENS_PER_D2 = 1300
SEQ_LEN, BATCH_SIZE = 128, 16
MARGIN = 0.005
"""Largest difference in bits per byte of arms that count as equivalent."""

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"d_model": WIDTHS, "arm": (*PRIMARY, *CONTROLS, "acc4-norm")}
seeds = 4
learning_rates = LearningRates(start=6e-3, high=9.6e-2)
gate = Gate(
    baseline="moe",
    worse=("squeezed4",),
    trivial=("dense",),
    effect=0.013,
    source="1.2 times the compute, arXiv 2601.18089",
    n_sizes=len(WIDTHS),
)


def experts(arm: str, d_model: int) -> MoEConfig:
    """The expert layers of an arm that has some."""
    width = 2 * d_model // 3
    moe = MoEConfig(n_experts=64, top_k=6, d_expert=width, n_shared=2, d_shared=width, bias_update_rate=0.01)
    latent = {"d_latent": d_model // 4}
    found = {
        "moe": moe,
        "squeezed4": moe.model_copy(update=latent),
        "eff4": latent_eff(moe, d_model, **latent),
        "acc4": latent_acc(moe, d_model, **latent),
    }
    found["acc4-norm"] = found["acc4"].model_copy(update={"latent_norm": "combined"})
    return found[arm]


def experiment(trial: optuna.Trial) -> Experiment:
    """One arm at one width, on as many tokens as every other of that width."""
    d_model = trial.suggest_categorical("d_model", WIDTHS)
    arm = trial.suggest_categorical("arm", grid["arm"])
    if arm not in PRIMARY and d_model != WIDTHS[0]:
        raise RejectedError(f"{arm} is trained at d_model={WIDTHS[0]} only")
    blocks: dict[str, Any] = {
        "M": {"d_head": d_model // 4, "n_heads": 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": d_model // 4, "n_heads": 4, "n_kv_heads": 2},
    }
    moe, letter = experts("moe", d_model), "E"
    if arm == "dense":
        blocks["-"], letter = {"d_ff": moe.top_k * moe.d_expert + moe.n_shared * (moe.d_shared or 0)}, "-"
    else:
        blocks["E"] = experts(arm, d_model).model_dump()
    pattern = "MEM*EME".replace("E", letter)
    return Experiment(
        name=f"{arm}-d{d_model}",
        model=ModelConfig(d_model=d_model, vocab_size=2048, pattern=pattern, blocks=blocks),
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=3),
        train=TrainConfig(
            tokens=TOKENS_PER_D2 * d_model**2,
            batch_size=BATCH_SIZE,
            lr=6e-3,
            val_every=500,
            eval_tokens=65_536,
            evaluation="whole",
        ),
    )


NAMES = {
    "acc4": "acc, 4x",
    "eff4": "eff, 4x",
    "acc4-norm": "acc, 4x, norm on the latent",
    "squeezed4": "no more experts, 4x",
    "dense": "dense",
}


WINDOW = 200
"""Steps over which the training losses of curves are averaged."""


def tables(
    runs: pd.DataFrame, pairs: pd.DataFrame, documents: pd.DataFrame, curves: pd.DataFrame | None = None
) -> Mapping[str, pd.DataFrame]:
    """Test bits per byte of every arm, width and seed, differences from `moe`, also along training, and their means."""
    runs = runs[runs["status"] == "finished"].copy()
    runs["arm"] = runs["name"].str.rpartition("-d")[0]
    primary = runs[runs["arm"].isin(PRIMARY)]
    averages = compare(
        primary, "arm", "moe", strata=["d_model"], primary=PRIMARY[1:], margin=MARGIN, documents=documents
    )
    return {
        "arms": arms_table(runs, "arm", "moe", by=["d_model"]),
        "averages": averages,
        "differences": compare(runs, "arm", "moe", by=["d_model"], primary=(), documents=documents),
        "seeds": seeds_table(runs, "arm", "moe", by=["d_model"]),
        "curves": paired_curves(
            primary, pd.DataFrame() if curves is None else curves, "arm", "moe", WINDOW, by=["d_model"]
        ),
        "bands": seed_bands(primary, ["arm", "d_model"], error="test_bpb"),
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Loss and its floor, the two named comparisons, also along training, and all differences at the smaller width."""
    drawn, (above, middle, steps, flops, below) = stacked([1.9, 1.5, 1.9, 1.9, 2.6], "Does a latent pay?")
    none = pd.DataFrame(columns=["arm", "compute", "loss", "low", "high"], dtype="float64")
    arms, seeds = tables["arms"], tables["seeds"]
    words = "Test bits per byte,\ndifference from MoE"
    at, own = (each[each["d_model"] == WIDTHS[0]] for each in (tables["differences"], seeds))
    # First, as its long names set the width of all.
    draw_comparisons(below, at, NAMES, f"{words} (d_model {WIDTHS[0]})", seeds=own)
    costs = arms[["arm", "d_model", "flops_run"]]
    names = {"moe": "standard MoE", "acc4": NAMES["acc4"], "eff4": NAMES["eff4"]}
    draw_laws(above, tables["bands"], none, names, seeds=seeds.merge(costs))
    draw_floor(above, arms[arms["arm"] == "moe"])
    means = seeds[seeds["arm"].isin(PRIMARY)].groupby(["arm", "seed"])["difference"].agg(["size", "mean"])
    means = means[means["size"] == len(WIDTHS)].rename(columns={"mean": "difference"}).reset_index()
    draw_comparisons(middle, tables["averages"], NAMES, f"{words} (mean of widths)", seeds=means)
    lines = {arm: NAMES[arm] for arm in PRIMARY[1:]}
    for panel, x in ((steps, "step"), (flops, "flops_run")):
        draw_gaps(
            panel, tables["curves"], x, WIDTHS, arm="arm", names=lines, label="Training loss (nats),\nminus that of MoE"
        )
    return drawn
