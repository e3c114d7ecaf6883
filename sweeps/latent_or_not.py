"""Does a LatentMoE buy more than a standard MoE at the same total and active parameters and training FLOPs?

All arms have the pattern `MEM*EME`; only their expert layers differ. The digit in the name of an arm is alpha: its
latent is alpha times narrower than `d_model`.

- `moe`: a standard MoE with 16 experts, two of them active. It is the baseline.
- `acc`: alpha times as many experts, and alpha times as many active ones.
- `eff`: alpha times as many experts, two of them active. By design it is cheaper than `moe`.
- `squeezed`: 16 experts, two of them active. By design it is smaller than `moe`.
- `acc4-norm-in`, `acc4-norm-out`, `acc4-router`: `acc4` with a norm of the latent, a norm of the combined output of the
  experts, or a router that reads the latent.

`acc` and `eff` have a few experts fewer, so that their total parameters equal those of `moe`. `acc` also has its active
parameters: as in the released configurations, it has fewer active experts to make up for its projections and larger
router. The rest of the difference goes to its shared expert, which grows or shrinks by the weights of at most half a
routed expert. The remaining differences of all budgets are recorded.

Primary comparisons, fixed in advance: `acc4` and `eff4` against `moe`, at eight widths with three seeds. The other arms
have one width. Every run has at least five training tokens per active parameter of its layers. Budget: the first 24
trials, at widths up to 64, take two CPU hours. The other nine need a GPU, where larger batches keep the number of steps
the same.

    explore sweep sweeps/latent_or_not.py --trials 24 --workers 2 --records sweeps/records/latent_or_not.parquet
"""

from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import RunFigure, draw_comparisons, draw_floor, draw_laws, draw_levels, draw_residuals, stacked
from explore.frontier import (
    arms_table,
    compare,
    crossover,
    effective_compute,
    fit_power_laws,
    pairs_table,
    rank_correlation,
    reducible_ratio,
    seed_bands,
)
from explore.frontier.gate import Gate
from explore.study import Budgets, LearningRates
from explore.study.budgets import RejectedError

PATTERN = "MEM*EME"
WIDTHS = (24, 32, 40, 48, 64, 128, 192, 256)
SECONDARY_WIDTH = 48
SEQ_LEN = 128
TOKENS_PER_D2 = 300
"""Training tokens over d_model squared: the same number of tokens for each parameter of the layers at every size."""
PRIMARY = ("moe", "acc4", "eff4")
SECONDARY = ("acc2", "acc8", "eff2", "eff8", "squeezed2", "squeezed4", "acc4-norm-in", "acc4-norm-out", "acc4-router")

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"d_model": WIDTHS, "arm": (*PRIMARY, *SECONDARY)}
seeds = 3
learning_rates = LearningRates(start=3.2e-2, high=0.256, share=0.5)
gate = Gate(
    baseline="moe",
    worse=("squeezed4",),
    trivial=("dense",),
    effect=0.013,
    source="1.2 times the compute, arXiv 2601.18089",
)


def blocks(arm: str, d_model: int) -> dict[str, Any]:
    """The layers of an arm, before it is brought to its budget."""
    kind, _, change = arm.partition("-")
    name = kind.rstrip("0123456789")
    factor = int(kind[len(name) :] or 1)
    experts: dict[str, Any] = {
        "n_experts": 16 * (1 if name == "squeezed" else factor),
        "top_k": 2 * (factor if name == "acc" else 1),
        "d_expert": d_model,
        "d_shared": d_model,
        "routed_scaling_factor": 1.0,
        "bias_update_rate": 0.01,
    }
    if factor > 1:
        experts["d_latent"] = d_model // factor
    match change:
        case "norm-in":
            experts["latent_norm"] = "input"
        case "norm-out":
            experts["latent_norm"] = "combined"
        case "router":
            experts["router_input"] = "latent"
    return {
        "M": {"d_head": d_model // 4, "n_heads": 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": d_model // 4, "n_heads": 4, "n_kv_heads": 2},
        "E": experts,
    }


def content(arm: str, d_model: int) -> dict[str, Any]:
    """Fields of the model of an arm."""
    return {"d_model": d_model, "vocab_size": 2048, "pattern": PATTERN, "blocks": blocks(arm, d_model)}


def experiment(trial: optuna.Trial) -> Experiment:
    """One arm at one width, on as many tokens as every other of that width."""
    arm = trial.suggest_categorical("arm", grid["arm"])
    d_model = trial.suggest_categorical("d_model", WIDTHS)
    if arm in SECONDARY and d_model != SECONDARY_WIDTH:
        raise RejectedError(f"{arm} is trained at d_model={SECONDARY_WIDTH} only")
    fields = content(arm, d_model)
    moe = ModelConfig.model_validate(content("moe", d_model)).cost(SEQ_LEN)
    if arm == "moe" or arm.startswith("squeezed"):
        model = ModelConfig.model_validate(fields)
    else:
        experts = fields["blocks"]["E"]
        targets, free = (
            {"params_total": moe.params_total},
            [f"E.n_experts={experts['n_experts'] // 2}:{experts['n_experts']}:1"],
        )
        if arm.startswith("acc"):
            half = experts["d_latent"] // 2  # neurons of the shared expert that weigh half a routed expert
            targets |= {"params_active": moe.params_active}
            free += ["E.top_k=1:16", f"E.d_shared={d_model - half}:{d_model + half}:1"]
        model = Budgets(targets, free, SEQ_LEN, compare={"flops_train": moe.flops_train}).model(trial, fields)
    large = d_model > 64
    return Experiment(
        name=f"{arm}-d{d_model}",
        model=model,
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=3 if large else 1),
        train=TrainConfig(
            tokens=TOKENS_PER_D2 * d_model**2,
            batch_size=d_model**2 // 256 if large else 16,
            lr=3.2e-2,
            precision="bf16" if large else "fp32",
            eval_tokens=65_536,
        ),
    )


NAMES = {
    "acc2": "acc, 2x narrower",
    "acc4": "acc, 4x",
    "acc8": "acc, 8x",
    "eff2": "eff, 2x",
    "eff4": "eff, 4x",
    "eff8": "eff, 8x",
    "squeezed2": "no more experts, 2x",
    "squeezed4": "no more experts, 4x",
    "acc4-norm-in": "acc, 4x, norm before",
    "acc4-norm-out": "acc, 4x, norm after",
    "acc4-router": "acc, 4x, router in latent",
}


def tables(
    runs: pd.DataFrame, pairs: pd.DataFrame, documents: pd.DataFrame | None = None
) -> Mapping[str, pd.DataFrame]:
    """Test bits per byte of every arm at every width, the differences from `moe`, and the results of the power laws."""
    runs = runs[runs["status"] == "finished"].copy()
    runs["arm"] = runs["name"].str.rpartition("-d")[0]
    whole = runs[runs.groupby(["arm", "d_model"])["seed"].transform("nunique") == seeds]
    primary = whole[whole["arm"].isin(PRIMARY)]
    widths = primary.groupby("d_model")["arm"].nunique().eq(len(PRIMARY))
    named = [(width, arm) for width in widths.index[widths] for arm in PRIMARY[1:]]
    laws = fit_power_laws(primary, "arm", loss="test_bpb")
    largest = primary.groupby("arm")["flops_run"].max()
    worth = [effective_compute(laws, arm, "moe", compute=largest[arm]) for arm in PRIMARY[1:]]
    crossings = [crossover(laws, arm, "moe") for arm in PRIMARY[1:]]
    beyond = runs.drop(whole.index).query("arm in @PRIMARY")
    predicted = [laws.predict(run.arm, run.flops_run).iloc[0] for run in beyond.itertuples()]
    arms = arms_table(whole, "arm", "moe", by=["d_model"])
    differences = compare(whole, "arm", "moe", by=["d_model"], primary=named, documents=documents)
    half = (differences["high"] - differences["low"]) / 2
    noise = differences.assign(half_width=half)[["d_model", "sd", "dof", "noise", "bartlett_p", "half_width"]]
    averages = compare(whole, "arm", "moe", strata=["d_model"], primary=(), documents=documents)
    shared = fit_power_laws(primary, "arm", loss="test_bpb", shared_exponent=True)
    common = fit_power_laws(primary.assign(law="all"), "law", loss="test_bpb", n_bootstrap=2)
    every = ["arm", "d_model", "seed", "flops_run", "test_bpb"]
    return {
        "runs": primary[every].assign(fitted=common.predict("all", primary["flops_run"])["loss"].to_numpy()),
        "arms": arms,
        "differences": differences,
        "noise": noise.drop_duplicates("d_model").sort_values("d_model"),
        "saved": arms[arms["arm"] == "eff4"].assign(saved=-arms["flops_run_residual"])[["d_model", "saved"]],
        "counts": pd.DataFrame([{"runs": len(whole), "single": len(beyond)}]),
        "averages": averages[averages["arm"].isin(PRIMARY)],
        "offsets": pd.DataFrame([{"variant": arm, **vars(reducible_ratio(shared, arm, "moe"))} for arm in PRIMARY[1:]]),
        "bands": seed_bands(primary, ["arm", "d_model"], error="test_bpb"),
        "laws": laws.table(),
        "curves": laws.curves().rename(columns={"family": "arm"}),
        "beyond": beyond[["arm", "d_model", "seed", "device", "flops_run", "test_bpb"]].assign(
            **{name: [float(each[name]) for each in predicted] for name in ("loss", "low", "high")}
        ),
        "effective_compute": pd.DataFrame([vars(each) for each in worth]),
        "crossings": pd.DataFrame([vars(each) for each in crossings]).drop(columns="range"),
        "pairs": pairs_table(primary, pairs, "arm", "moe"),
        "ranks": rank_correlation(primary, "arm", "d_model", error="test_bpb"),
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Loss with its floor, residuals of all seeds, the primary differences, and all differences at one width."""
    drawn, (above, residuals, middle, below) = stacked([1.9, 1.9, 1.6, 2.4], "Does a latent pay?")
    primary = {"moe": "standard MoE", "acc4": NAMES["acc4"], "eff4": NAMES["eff4"]}
    draw_laws(above, tables["bands"], tables["curves"], primary)
    draw_floor(above, tables["arms"][tables["arms"]["arm"] == "moe"])
    draw_residuals(residuals, tables["runs"], primary)
    named = tables["differences"].query("primary").rename(columns={"difference": "estimate", "d_model": "x"})
    words = "Test bits per byte,\ndifference from MoE"
    level = named.drop_duplicates("x").assign(arm="moe", estimate=0.0, low=0.0, high=0.0)
    draw_levels(middle, pd.concat([named, level]), primary, "d_model", words, series="arm")
    middle.set_xticks(sorted(named["x"].unique()))
    at = tables["differences"][tables["differences"]["d_model"] == SECONDARY_WIDTH]
    draw_comparisons(below, at, NAMES, f"{words} (d_model {SECONDARY_WIDTH})")
    return drawn
