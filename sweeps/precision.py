"""What does training in low precision cost in bits per byte, and which pass costs it?

All arms train one LatentMoE hybrid, `MEM*EME`, with about a million active parameters and 20 training tokens per active
parameter. Only the precision differs: bf16, FP8 with one scale per tensor, MXFP8, the whole NVFP4 recipe, NVFP4 in the
forward products only, and NVFP4 in the products of both gradients only. All arms have the learning rate of bf16, as in
published work. Published results suggest that FP8 stays within the noise, that NVFP4 is 1 to 2.5% worse, and that the
forward products cause most of that.

Primary comparisons, fixed in advance: FP8, MXFP8 and NVFP4 against bf16, with four seeds. Scores are of the whole test
text, by document. The learning rate is that of bf16, searched once by short runs in bf16 on seed 0. Budget: 24 runs of
19 million tokens; on a CPU a step in emulated precision takes up to three times as long, so run it on a GPU.

    explore sweep sweeps/precision.py --trials 6 --workers 2 --records sweeps/records/precision.parquet
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

PATTERN, D_MODEL, SEQ_LEN = "MEM*EME", 128, 256
TOKENS_PER_PARAMETER = 20
ARMS: Mapping[str, Any] = {
    "bf16": "bf16",
    "fp8": "fp8",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "nvfp4-forward": {"base": "nvfp4", "input_gradient": False, "weight_gradient": False},
    "nvfp4-backward": {"base": "nvfp4", "forward": False},
}
WINDOW = 200
"""Steps over which the training losses of curves are averaged."""
PRIMARY = ("fp8", "mxfp8", "nvfp4")
NAMES = {
    "fp8": "FP8, a scale a tensor",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "nvfp4-forward": "NVFP4, forward only",
    "nvfp4-backward": "NVFP4, backward only",
}

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"arm": tuple(ARMS)}
seeds = 4
learning_rates = LearningRates(start=6.5e-3, share=0.25, precision="bf16")
gate = Gate(
    baseline="bf16",
    worse=("nvfp4",),  # the whole recipe, which costs something in print
    effect=0.02,
    source="1% of two bits per byte, the least that NVFP4 costs in print",
)


def model() -> ModelConfig:
    """The hybrid; every width is a multiple of 32, the longest block of these formats."""
    blocks: dict[str, Any] = {
        "M": {"d_head": 32, "n_heads": 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": 32, "n_heads": 4, "n_kv_heads": 2},
        "E": {
            "n_experts": 64,
            "top_k": 8,
            "d_expert": D_MODEL,
            "d_latent": D_MODEL // 4,
            "d_shared": D_MODEL,
            "routed_scaling_factor": 1.0,
            "bias_update_rate": 0.01,
        },
    }
    return ModelConfig.model_validate({"d_model": D_MODEL, "vocab_size": 2048, "pattern": PATTERN, "blocks": blocks})


def experiment(trial: optuna.Trial) -> Experiment:
    """One arm; only its precision differs from the others."""
    arm, hybrid = trial.suggest_categorical("arm", tuple(ARMS)), model()
    return Experiment(
        name=arm,
        model=hybrid,
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=3),
        train=TrainConfig(
            tokens=TOKENS_PER_PARAMETER * hybrid.cost(SEQ_LEN).params_active_no_input_embedding,
            batch_size=24,  # 3,164 steps
            lr=6.5e-3,
            precision=ARMS[arm],
            eval_tokens=65_536,
            evaluation="whole",
        ),
    )


def tables(
    runs: pd.DataFrame,
    pairs: pd.DataFrame,
    documents: pd.DataFrame | None = None,
    curves: pd.DataFrame | None = None,
) -> Mapping[str, pd.DataFrame]:
    """Test bits per byte of every arm and seed, and differences from bf16, also as shares of it and along training.

    Arms of which a run diverged are only in `seeds`, without the scores of those runs, and in `diverged`.
    """
    runs = runs[runs["status"].isin(["finished", "diverged"])].assign(arm=lambda table: table["name"])
    runs, whole, diverged = apart_from_diverged(runs, "arm", "test_bpb")
    primary = [arm for arm in PRIMARY if arm not in set(diverged["arm"])]
    differences = compare(whole, "arm", "bf16", primary=primary, documents=documents)
    baseline = whole.loc[whole["arm"] == "bf16", "test_bpb"].mean()
    shares = differences.assign(**{name: differences[name] / baseline for name in ("difference", "low", "high")})
    return {
        "arms": arms_table(whole, "arm", "bf16"),
        "seeds": seeds_table(runs, "arm", "bf16"),
        "differences": differences,
        "shares": shares,
        "diverged": diverged,
        "curves": paired_curves(whole, pd.DataFrame() if curves is None else curves, "arm", "bf16", WINDOW),
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Every seed with the floor, the relative difference of every arm from bf16, and the difference along training."""
    curves, seeds = tables["curves"], tables["seeds"]
    heights = [2.2, 2.2, 1.9][: 3 if len(curves) else 2]
    drawn, (above, middle, *below) = stacked(heights, "What does training in low precision cost?")
    missing = (float(seeds["test_bpb"].max()), "diverged") if seeds["test_bpb"].isna().any() else None
    draw_seeds(above, seeds, {"bf16": "bf16"} | NAMES, {"test_bpb": "a seed"}, "Test bits per byte", missing=missing)
    draw_floor(above, tables["arms"], across=True)
    percent = tables["shares"].assign(**{name: 100 * tables["shares"][name] for name in ("difference", "low", "high")})
    bf16 = seeds.loc[seeds["arm"] == "bf16", "test_bpb"].mean()
    own = seeds.assign(difference=100 * seeds["difference"] / bf16)
    draw_comparisons(middle, percent, NAMES, "Test bits per byte, difference from bf16 (%)", seeds=own)
    for panel in below:
        levels = curves.rename(columns={"arm": "series", "step": "x", "difference": "estimate"})
        names = {arm: name for arm, name in NAMES.items() if arm in set(curves["arm"])}
        draw_levels(panel, levels, names, "Step", "Training loss (nats),\nminus that of bf16", joined=True)
    return drawn
