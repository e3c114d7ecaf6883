"""Is an average of the checkpoints of a constant learning rate as good as a decay?

All arms have the pattern `MEM*EME` with 16 experts, two of them active, and the same tokens. There are two schedules:

- `decayed`: the learning rate falls over the last fifth of the steps, as in the other studies here.
- `constant`: the learning rate stays. Eight checkpoints of the last fifth are averaged as `explore merge` does, once
  with weights that imitate the same decay (`minus_sqrt`) and once with equal weights (`flat`).

Each schedule has its own search of the learning rate: `decayed` for the final model, `constant` for the `minus_sqrt`
average. The last checkpoint of `constant` is reported too, but its learning rate was not tuned for it. Both averages
come from the same runs, so each is compared with `decayed` alone and never with the other.

Primary comparison, fixed in advance: `minus_sqrt` against `decayed`, at two widths with five seeds. The claim is the
interval of the difference: a difference that is not resolved is not evidence of equality. Every run has at least six
training tokens per active parameter of its layers. Budget: one CPU hour.

    explore sweep sweeps/merge_or_decay.py --trials 4 --workers 2 --records sweeps/records/merge_or_decay.parquet
"""

from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import RunFigure, draw_comparisons, draw_floor, draw_levels, stacked
from explore.frontier import arms_table, compare, seed_bands, seeds_table
from explore.frontier.gate import Gate
from explore.study import LearningRates, Merging

WIDTHS = (32, 48)
SEQ_LEN = 128
TOKENS_PER_D2 = 320
DECAY = 0.2

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"arm": ("decayed", "constant"), "d_model": WIDTHS}
seeds = 5
learning_rates = LearningRates(start=1.6e-2, high=0.256, share=0.5)
merging = Merging(share=DECAY, last=8, shapes=("minus_sqrt", "flat"))
gate = Gate(
    baseline="decayed",
    worse=("constant",),  # the last checkpoint of a constant rate, neither decayed nor averaged
    effect=0.005,
    source="largest difference of an average that counts as equal to the decay",
    n_sizes=2,
)


def experiment(trial: optuna.Trial) -> Experiment:
    """One schedule at one width."""
    arm = trial.suggest_categorical("arm", grid["arm"])
    d_model = trial.suggest_categorical("d_model", WIDTHS)
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
    return Experiment(
        name=f"{arm}-d{d_model}",
        model=ModelConfig(d_model=d_model, vocab_size=2048, pattern="MEM*EME", blocks=blocks),
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=1),
        train=TrainConfig(
            tokens=TOKENS_PER_D2 * d_model**2,
            batch_size=16,
            lr=1.6e-2,
            decay=DECAY if arm == "decayed" else 0.0,
            decay_shape="minus_sqrt",
            precision="fp32",
            eval_tokens=65_536,
        ),
    )


def tables(runs: pd.DataFrame, pairs: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """Test bits per byte of the decay, both averages and the last checkpoint, and the differences from `decayed`."""
    runs = runs[runs["status"] == "finished"].copy()
    runs["arm"] = runs["name"].str.rpartition("-d")[0]
    decayed, constant = (runs[runs["arm"] == arm] for arm in grid["arm"])
    others = {"constant": constant}
    for shape in merging.shapes:
        scores = {score: constant[f"{score}_{shape}"] for score in ("val_bpb", "test_bpb")}
        others[shape] = constant.assign(arm=shape, **scores)
    each = [pd.concat([decayed, other]) for other in others.values()]
    named = {"minus_sqrt": [(width, "minus_sqrt") for width in WIDTHS]}
    differences = [
        compare(both, "arm", "decayed", by=["d_model"], primary=named.get(arm, ()))
        for arm, both in zip(others, each, strict=True)
    ]
    bands = [seed_bands(one, ["arm", "d_model"], error="test_bpb") for one in (decayed, *others.values())]
    every = pd.concat([decayed, *others.values()])
    return {
        "arms": arms_table(every, "arm", "decayed", by=["d_model"]),
        "seeds": seeds_table(every, "arm", "decayed", by=["d_model"]),
        "differences": pd.concat(differences, ignore_index=True),
        "bands": pd.concat(bands, ignore_index=True)[["arm", "d_model", "test_bpb", "low", "high", "n_seeds"]],
    }


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Loss of the decay, both averages and the last checkpoint with its floor, and the differences of the averages."""
    drawn, (above, below) = stacked([2.2, 2.0], "Is an average of checkpoints as good as a decay?")
    arms = {"decayed": "decay", "minus_sqrt": "average, minus sqrt", "flat": "average, flat", "constant": "neither"}
    bands = tables["bands"].rename(columns={"test_bpb": "estimate", "d_model": "x", "arm": "series"})
    seeds = tables["seeds"].rename(columns={"test_bpb": "estimate"})
    dots = seeds.assign(x=seeds["d_model"], series=seeds["arm"])
    draw_levels(above, bands, arms, "d_model", "Test bits per byte", seeds=dots)
    draw_floor(above, tables["arms"][tables["arms"]["arm"] == "decayed"], "d_model")
    above.set_xticks(WIDTHS)
    differences = tables["differences"]
    rows = differences.assign(row=differences["arm"] + differences["d_model"].astype("str"))
    shown = ("minus_sqrt", "flat")
    names = {f"{arm}{width}": f"{arms[arm].split(', ')[1]} (d {width})" for arm in shown for width in WIDTHS}
    dots = seeds.assign(row=seeds["arm"] + seeds["d_model"].astype("str"))
    words = "Test bits per byte of the average,\ndifference from the decay"
    draw_comparisons(below, rows, names, words, arm="row", seeds=dots)
    return drawn
