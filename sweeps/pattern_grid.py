"""Which sampler finds the front of a small space of patterns with the fewest trained models?

The space holds every pattern of three or four layers that begins with a mixer and ends with a feed-forward layer, at
three widths: 240 models, few enough to train them all. `records/pattern_grid.csv` is the table of such a run, which
`explore replay-samplers` lets every sampler search. To train the grid again:

    explore sweep sweeps/pattern_grid.py --sampler grid --trials 240
"""

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.runs import find_runs
from explore.search.spaces import PatternSpace

PATTERNS = PatternSpace(letters="M*-E", min_layers=3, max_layers=4, first="M*", last="-E")
WIDTHS = (64, 96, 128)
COLUMNS = ["pattern", "d_model", "family", "params_total", "params_active", "flops_run", "val_bpb", "test_bpb"]

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
grid = {"pattern": PATTERNS, "d_model": WIDTHS}


def experiment(trial: optuna.Trial) -> Experiment:
    """One model of the grid, trained on the same tokens as every other."""
    pattern = PATTERNS.suggest(trial)
    d_model = trial.suggest_int("d_model", 64, 128, step=32)
    blocks = {
        "M": {"d_head": 16, "n_heads": d_model // 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": 16, "n_heads": d_model // 16, "n_kv_heads": 2},
        "-": {"d_ff": 4 * d_model},
        "E": {
            "n_experts": 16,
            "top_k": 4,
            "d_expert": d_model,
            "d_latent": d_model // 2,
            "d_shared": 2 * d_model,
            "routed_scaling_factor": 1.0,
            "bias_update_rate": 0.01,
        },
    }
    return Experiment(
        name=f"{pattern}-d{d_model}",
        model=ModelConfig(d_model=d_model, vocab_size=2048, pattern=pattern, blocks=blocks),
        data=TextData(corpus="austen", tokenizer="austen-bpe-2048", seq_len=128),
        train=TrainConfig(tokens=102_400, batch_size=8, lr=4e-3, precision="bf16", val_every=20, eval_tokens=16_384),
    )


def table(*roots: str) -> pd.DataFrame:
    """The finished runs below the folders, with the learning curve at every fifth of the schedule."""
    rows = []
    for run in find_runs(*roots):
        row, metrics = run.row(), run.metrics
        if row["status"] == "finished":
            curve = metrics.dropna(subset="val_bpb")
            percent = (100 * curve["step"] / metrics["step"].max()).round().astype(int)
            at = {f"val_bpb_at_{p}": bpb for p, bpb in zip(percent, curve["val_bpb"], strict=True)}
            rows.append({**{name: row[name] for name in COLUMNS}, **at, "commit": row["commit"], "key": row["key"]})
    return pd.DataFrame(rows).sort_values(["pattern", "d_model"], ignore_index=True)
