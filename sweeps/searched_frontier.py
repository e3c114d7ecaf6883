"""Does a search over patterns, latent width, expert count and top-k find more than the hand-made Nemotron-style family?

The search draws patterns of four to eight layers of Mamba-2, attention, MLP and MoE, at `d_model` 48, with any latent,
number of experts and top-k. The solver sets the width of the MLPs and shared experts so that every model has the
training FLOPs of the hand-made `MEM*EME`. All models train on the same tokens, so all cost the same, and bits per byte
is the only objective. The hand-made patterns are the first trials and have the same search of the learning rate.

There is one seed, so the best model here is not a finding yet; `searched_winners.py` trains it on fresh seeds. Budget:
two CPU hours.

    explore sweep sweeps/searched_frontier.py --trials 21 --workers 2 --records sweeps/records/searched_frontier.parquet
"""

from collections.abc import Mapping
from typing import Any

import optuna
import pandas as pd

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.figures import RunFigure, draw_search, stacked
from explore.search import PatternSpace
from explore.study import Budgets, LearningRates

D_MODEL, SEQ_LEN, VOCAB_SIZE = 48, 128, 2048
TOKENS = 691_200

objectives = {"val_bpb": "minimize"}
sampler = "tpe"
patterns = PatternSpace(letters="M*-E", min_layers=4, max_layers=8, first="M*", last="-E")
learning_rates = LearningRates(start=1.6e-2, high=0.256, share=0.5)
HAND_MADE = ("MEM*EME", "M-M*-M-", "MEMEM*E", "*-*-*-")
STANDARD = {"n_experts_log2": 4, "top_k": 2, "compression_log2": 0}
LATENT = {"n_experts_log2": 6, "top_k": 6, "compression_log2": 2}
baselines = tuple(
    patterns.params(pattern) | (experts if "E" in pattern else {})
    for pattern in HAND_MADE
    for experts in ((STANDARD, LATENT) if "E" in pattern else (STANDARD,))
)


def content(pattern: str, experts: dict[str, int]) -> dict[str, Any]:
    """Fields of a model, before it is brought to its budget."""
    blocks: dict[str, Any] = {
        "M": {"d_head": D_MODEL // 4, "n_heads": 8, "d_state": 16, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": D_MODEL // 4, "n_heads": 4, "n_kv_heads": 2},
        "-": {"d_ff": 4 * D_MODEL},
    }
    if "E" in pattern:
        latent = {"d_latent": D_MODEL >> experts["compression_log2"]} if experts["compression_log2"] else {}
        blocks["E"] = {
            "n_experts": 1 << experts["n_experts_log2"],
            "top_k": experts["top_k"],
            "d_expert": D_MODEL,
            "d_shared": D_MODEL,
            "routed_scaling_factor": 1.0,
            "bias_update_rate": 0.01,
            **latent,
        }
    return {"d_model": D_MODEL, "vocab_size": VOCAB_SIZE, "pattern": pattern, "blocks": blocks}


def experiment(trial: optuna.Trial) -> Experiment:
    """One pattern with its own experts, at the training FLOPs and on the tokens of every other."""
    pattern = patterns.suggest(trial)
    experts: dict[str, int] = {}
    if "E" in pattern:
        experts["n_experts_log2"] = trial.suggest_int("n_experts_log2", 3, 6)
        experts["top_k"] = trial.suggest_int("top_k", 1, 8)
        experts["compression_log2"] = trial.suggest_int("compression_log2", 0, 3)
    target = ModelConfig.model_validate(content("MEM*EME", STANDARD)).cost(SEQ_LEN)
    compare = {"params_active": target.params_active, "params_total": target.params_total}
    free = (f"-.d_ff={D_MODEL}:{16 * D_MODEL}:1", f"E.d_shared={D_MODEL // 4}:{8 * D_MODEL}:1")
    tie = Budgets({"flops_train": target.flops_train}, free, SEQ_LEN, compare=compare)
    return Experiment(
        name=f"{pattern}",
        model=tie.model(trial, content(pattern, experts)),
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN, n_shards=1),
        train=TrainConfig(tokens=TOKENS, batch_size=16, lr=1.6e-2, precision="fp32", eval_tokens=65_536),
    )


def tables(runs: pd.DataFrame, pairs: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """All trials in the order in which they finished, ranked by bits per byte on validation; one seed each."""
    runs = runs[runs["status"] == "finished"].sort_values("finished_at", ignore_index=True)
    what = ["n_experts", "top_k", "d_latent"]
    hand_made = set()
    for each in baselines:
        pattern = str(patterns.read(each))
        experts = content(pattern, each)["blocks"].get("E", {})
        hand_made.add((pattern, *(experts.get(size, 0) for size in what)))
    models = runs[["pattern", *what]].fillna(dict.fromkeys(what, 0)).itertuples(index=False, name=None)
    columns = ["pattern", *what, "params_total", "params_active", "lr", "tuned", "val_bpb"]
    search = runs[columns].assign(rank=runs["val_bpb"].rank(method="first").astype(int))
    search.insert(0, "kind", ["hand" if each in hand_made else "found" for each in models])
    search.insert(0, "trial", search.index + 1)
    return {"search": search}


def figure(tables: Mapping[str, pd.DataFrame]) -> RunFigure:
    """Bits per byte of every trial in order; not a finding, because each trial has one seed."""
    drawn, (ax,) = stacked([2.4], "What did the search find?")
    label = "Trials in the order in which they finished, one seed each"
    draw_search(ax, tables["search"], {"hand": "hand-made", "found": "found"}, label)
    return drawn
