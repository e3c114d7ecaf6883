"""What does low precision at the end of training cost in bits per byte, and which part of a recipe costs it?

The affordable companion of `precision.py`. One LatentMoE hybrid, `ME*ME`. Each of four seeds trains one trunk in bf16
for 80% of the schedule, at a constant rate. Every arm branches from it and has its own decay to zero. A branch is an
experiment of its own whose recipe begins at `since`, and the runs of a seed share the rung at that point, so the trunk
is trained once. All arms have the learning rate of bf16, tuned once by short runs. The arms are:

- bf16, the baseline; FP8 with a scale for each tensor; MXFP8;
- NVFP4 by its whole recipe; in the forward products only; in the products of both gradients only; in those of the input
  gradient only; in those of the weight gradient only; and in the latent projections only, which are not in print;
- NVFP4 without one ingredient: the rotation, the stochastic rounding of gradients, or the square blocks of weights;
- two controls: NVFP4 with stochastic rounding of activations and weights too, which diverges in print, so it must be
  worse or diverge; and, as the trivial arm, MXFP4 rounded to nearest, which has 4 bits and none of the ingredients.

Branches show what low precision at the end of training costs: the error of quantised weights and activations in the
forward pass, and the effect of noisy gradients during the decay. The arms of a seed share its noise up to the branch,
so their paired differences should be less noisy than those of whole runs. Branches cannot show what builds up over a
whole run: instabilities early in training, routers that settle differently, a bias of gradients that adds up, or a
learning rate that suits low precision better. So a difference here need not equal that of `precision.py`, and an arm
that is equivalent here may differ in a whole run.

Primary comparisons, fixed in advance: FP8, NVFP4, NVFP4 forward only, NVFP4 backward only and the latent projections,
each against bf16. An arm within 0.005 bits per byte is equivalent. All others are exploratory. Published results
suggest that FP8 is equivalent and that NVFP4 is worse by about 0.03, mostly because of the forward pass.

Budget: about 31 core hours for 14 arms and four seeds, by the speed of one core of an AVX2 machine without bf16: 1,080
tokens/s of training in bf16, 830 in NVFP4, and 3,000 of scoring. Trunks and pilots take 4 hours, branches 11, and the
whole validation and test text of 56 runs, 3.1 million tokens each, 16. The gate needs 9 of these hours.

    explore sweep sweeps/bits.py --trials 14 --workers 1 --records sweeps/records/bits.parquet
"""

from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import RunFigure, draw_comparisons, draw_floor, draw_levels, draw_seeds, stacked
from explore.frontier import apart_from_diverged, arms_table, compare, paired_curves, seeds_table
from explore.frontier.gate import Gate
from explore.study import LearningRates

PATTERN, WIDTHS, SEQ_LEN, BATCH_SIZE, STEPS = "ME*ME", (64,), 256, 4, 3_000
TRUNK = 0.8
"""Fraction of the steps before the branch, where every decay begins."""
WINDOW = 50
"""Steps over which the training losses of curves are averaged."""
LATENTS = [{"format": "nvfp4", "components": ["latent_down", "latent_up"]}]
ARMS: Mapping[str, Any] = {
    "bf16": {},
    "stochastic": {"base": "nvfp4", "stochastic": ["x", "w", "dy"]},
    "plain": {"format": "mxfp4"},
    "nvfp4": {"base": "nvfp4"},
    "nvfp4-forward": {"base": "nvfp4", "input_gradient": False, "weight_gradient": False},
    "nvfp4-backward": {"base": "nvfp4", "forward": False},
    "nvfp4-input-gradient": {"base": "nvfp4", "forward": False, "weight_gradient": False},
    "nvfp4-weight-gradient": {"base": "nvfp4", "forward": False, "input_gradient": False},
    "no-rotation": {"base": "nvfp4", "hadamard": []},
    "no-stochastic": {"base": "nvfp4", "stochastic": []},
    "no-squares": {"base": "nvfp4", "square_weights": False},
    "latents": {"base": "nvfp4", "format": "bf16", "rules": LATENTS},
    "fp8": {"base": "fp8"},
    "mxfp8": {"base": "mxfp8"},
}
PRIMARY = ("fp8", "nvfp4", "nvfp4-forward", "nvfp4-backward", "latents")
MARGIN = 0.005
NAMES = {
    "fp8": "FP8, a scale a tensor",
    "mxfp8": "MXFP8",
    "latents": "NVFP4, latents only",
    "nvfp4-backward": "NVFP4, backward only",
    "nvfp4-input-gradient": "NVFP4, input gradient only",
    "nvfp4-weight-gradient": "NVFP4, weight gradient only",
    "nvfp4-forward": "NVFP4, forward only",
    "nvfp4": "NVFP4",
    "no-rotation": "NVFP4, no rotation",
    "no-stochastic": "NVFP4, nearest rounding",
    "no-squares": "NVFP4, no square blocks",
    "stochastic": "NVFP4, all stochastic",
    "plain": "MXFP4, nearest rounding",
}

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"d_model": WIDTHS, "arm": tuple(ARMS)}
seeds = 4
rungs = (TRUNK,)
learning_rates = LearningRates(start=8e-3, share=0.25, precision="bf16")
gate = Gate(
    baseline="bf16",
    worse=("stochastic",),
    trivial=("plain",),
    effect=0.004,
    source="0.2% for NVFP4 in the backward pass alone, public runs of Quartet II",
)


def model(d_model: int) -> ModelConfig:
    """The hybrid; every width is a multiple of 32, the longest block of these formats."""
    blocks: dict[str, Any] = {
        "M": {"d_head": d_model // 4, "n_heads": 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": d_model // 4, "n_heads": 4, "n_kv_heads": 2},
        "E": {
            "n_experts": 16,
            "top_k": 4,
            "d_expert": d_model,
            "d_latent": 32,
            "d_shared": d_model,
            "routed_scaling_factor": 1.0,
            "bias_update_rate": 0.01,
        },
    }
    return ModelConfig.model_validate({"d_model": d_model, "vocab_size": 2048, "pattern": PATTERN, "blocks": blocks})


def experiment(trial: optuna.Trial) -> Experiment:
    """One branch; only its precision after the trunk differs from the others."""
    d_model = trial.suggest_categorical("d_model", WIDTHS)
    arm = trial.suggest_categorical("arm", tuple(ARMS))
    return Experiment(
        name=f"{arm}-d{d_model}",
        model=model(d_model),
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=3),
        train=TrainConfig(
            tokens=STEPS * BATCH_SIZE * SEQ_LEN,
            batch_size=BATCH_SIZE,
            lr=8e-3,
            decay=1 - TRUNK,
            final_lr_ratio=0.0,
            precision="bf16" if arm == "bf16" else {**ARMS[arm], "since": TRUNK},
            eval_tokens=65_536,
            evaluation="whole",
        ),
    )


def tables(
    runs: pd.DataFrame, pairs: pd.DataFrame, documents: pd.DataFrame, curves: pd.DataFrame | None = None
) -> Mapping[str, pd.DataFrame]:
    """Test bits per byte of every arm and seed, and differences from bf16, also as shares and along the branches.

    Arms of which a run diverged are only in `seeds`, without the scores of those runs, and in `diverged`.
    """
    runs = runs[runs["status"].isin(["finished", "diverged"])]
    runs = runs.assign(arm=runs["name"].str.rpartition("-d")[0])
    runs, whole, diverged = apart_from_diverged(runs, "arm", "test_bpb")
    primary = [arm for arm in PRIMARY if arm not in set(diverged["arm"])]
    differences = compare(whole, "arm", "bf16", primary=primary, margin=MARGIN, documents=documents)
    baseline = whole.loc[whole["arm"] == "bf16", "test_bpb"].mean()
    shares = differences.assign(**{name: differences[name] / baseline for name in ("difference", "low", "high")})
    along = paired_curves(whole, pd.DataFrame() if curves is None else curves, "arm", "bf16", WINDOW)
    return {
        "arms": arms_table(whole, "arm", "bf16"),
        "seeds": seeds_table(runs, "arm", "bf16"),
        "differences": differences,
        "shares": shares,
        "diverged": diverged,
        "curves": along[along["step"] > TRUNK * STEPS].reset_index(drop=True),
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Every seed with the floor, what every branch loses to that in bf16, and the primary ones along the branch."""
    curves, seeds = tables["curves"], tables["seeds"]
    heights = [3.6, 3.6, 1.9][: 3 if len(curves) else 2]
    drawn, (above, middle, *below) = stacked(heights, "What does low precision at the end of training cost?")
    missing = (float(seeds["test_bpb"].max()), "diverged") if seeds["test_bpb"].isna().any() else None
    draw_seeds(above, seeds, {"bf16": "bf16"} | NAMES, {"test_bpb": "a seed"}, "Test bits per byte", missing=missing)
    draw_floor(above, tables["arms"], across=True)
    draw_comparisons(middle, tables["differences"], NAMES, "Test bits per byte, difference from bf16", seeds=seeds)
    for panel in below:
        levels = curves.rename(columns={"arm": "series", "step": "x", "difference": "estimate"})
        names = {arm: NAMES[arm] for arm in PRIMARY if arm in set(curves["arm"])}
        draw_levels(panel, levels, names, "Step", "Training loss (nats),\nminus that of bf16", joined=True)
    return drawn
