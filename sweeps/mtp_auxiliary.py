"""Does multi-token prediction, as an auxiliary loss, improve the loss of the next token?

All arms have the pattern `MEM*EME` with 16 experts, two of them active. `mtp` adds one depth of multi-token prediction,
the `*E` of the released configurations, and gives its loss a weight of 0.1; in `heavy` the weight is 0.3. That depth is
removed before the model is scored, but it adds more than half to the training FLOPs, mostly in the head. So there are
two baselines without it: `none` trains on the tokens of `mtp`, and `longer` spends the training FLOPs of `mtp` on more
tokens. The learning rate of each arm is tuned separately.

Primary comparisons, fixed in advance: `mtp` against `none` and against `longer`, at two widths with three seeds. Every
run has at least five training tokens per active parameter of the layers that are scored. Budget: one CPU hour.

    explore sweep sweeps/mtp_auxiliary.py --trials 8 --workers 2 --records sweeps/records/mtp_auxiliary.parquet
"""

from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import RunFigure, draw_comparisons, draw_floor, draw_levels, stacked
from explore.frontier import arms_table, compare, seed_bands, seeds_table
from explore.frontier.gate import Gate
from explore.study import LearningRates

PATTERN, DEPTH = "MEM*EME", "*E"
WIDTHS = (32, 48)
SEQ_LEN = 128
TOKENS_PER_D2 = 240
WEIGHTS = {"none": 0.0, "longer": 0.0, "mtp": 0.1, "heavy": 0.3}
PRIMARY = ("none", "longer")

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"arm": tuple(WEIGHTS), "d_model": WIDTHS}
seeds = 3
learning_rates = LearningRates(start=1.6e-2, high=0.256, share=0.5)
gate = Gate(
    baseline="longer",
    worse=("none",),  # the same model on fewer tokens
    effect=0.013,
    source="1.2 times the compute",
    n_sizes=2,
    alike=(),  # `longer` has more steps
)


def model(d_model: int, pattern: str) -> ModelConfig:
    """The hybrid, with multi-token prediction where its pattern has a depth."""
    blocks: dict[str, Any] = {
        "M": {"d_head": d_model // 4, "n_heads": 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": d_model // 4, "n_heads": 4, "n_kv_heads": 2},
        "E": {
            "n_experts": 16,
            "top_k": 2,
            "d_expert": d_model,
            "d_shared": d_model,
            "routed_scaling_factor": 1.0,
            "bias_update_rate": 0.01,
        },
    }
    return ModelConfig.model_validate({"d_model": d_model, "vocab_size": 2048, "pattern": pattern, "blocks": blocks})


def experiment(trial: optuna.Trial) -> Experiment:
    """One arm at one width, on the tokens of the others or for their FLOPs."""
    arm = trial.suggest_categorical("arm", tuple(WEIGHTS))
    d_model = trial.suggest_categorical("d_model", WIDTHS)
    alone, deep = model(d_model, PATTERN), model(d_model, f"{PATTERN}/{DEPTH}")
    tokens = TOKENS_PER_D2 * d_model**2
    if arm == "longer":
        tokens = round(tokens * deep.cost(SEQ_LEN).flops_train / alone.cost(SEQ_LEN).flops_train)
    weight = WEIGHTS[arm]
    return Experiment(
        name=f"{arm}-d{d_model}",
        model=deep if weight else alone,
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=1),
        train=TrainConfig(
            tokens=tokens, batch_size=16, lr=1.6e-2, mtp_weight=weight, precision="fp32", eval_tokens=65_536
        ),
    )


def tables(
    runs: pd.DataFrame, pairs: pd.DataFrame, documents: pd.DataFrame | None = None
) -> Mapping[str, pd.DataFrame]:
    """Test bits per byte of every arm at every width, and the differences from `mtp`."""
    runs = runs[runs["status"] == "finished"].copy()
    runs["arm"] = runs["name"].str.rpartition("-d")[0]
    named = [(width, arm) for width in WIDTHS for arm in PRIMARY]
    return {
        "arms": arms_table(runs, "arm", "mtp", by=["d_model"]),
        "seeds": seeds_table(runs, "arm", "mtp", by=["d_model"]),
        "differences": compare(runs, "arm", "mtp", by=["d_model"], primary=named, documents=documents),
        "bands": seed_bands(runs, ["arm", "d_model"], error="test_bpb"),
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Loss against training FLOPs with its floor, and the differences of the other arms from `mtp`."""
    drawn, (above, below) = stacked([2.2, 2.7], "Does multi-token prediction improve the loss of the next token?")
    arms = {"none": "none", "longer": "none, longer", "mtp": "weight 0.1", "heavy": "weight 0.3"}
    bands = tables["bands"].rename(columns={"test_bpb": "estimate", "arm": "series"})
    bands = bands.assign(x=bands["flops_run"] / 1e9)
    floors = tables["arms"].assign(x=tables["arms"]["flops_run"] / 1e9)
    seeds = tables["seeds"].merge(floors[["arm", "d_model", "x"]]).rename(columns={"test_bpb": "estimate"})
    dots = seeds.assign(series=seeds["arm"])
    draw_levels(above, bands, arms, "Training FLOPs (billions)", "Test bits per byte", seeds=dots)
    draw_floor(above, floors, "x")
    words = {"none": "none, equal tokens", "longer": "none, equal FLOPs", "heavy": "weight 0.3"}
    differences = tables["differences"]
    rows = differences.assign(row=differences["arm"] + differences["d_model"].astype("str"))
    dots = seeds.assign(row=seeds["arm"] + seeds["d_model"].astype("str"))
    names = {f"{arm}{width}": f"{text} (d {width})" for arm, text in words.items() for width in WIDTHS}
    draw_comparisons(below, rows, names, "Test bits per byte,\ndifference from weight 0.1", arm="row", seeds=dots)
    return drawn
