"""Which patterns of Mamba-2, attention, MLP and LatentMoE layers are on the frontier of bits per byte and FLOPs?

The search draws patterns of three to eight layers that begin with a mixer and end with a feed-forward layer, at widths
from 64 to 160, each with its own experts and latent. Short runs tune the learning rate of each architecture. A run
whose curve falls behind the front at equal FLOPs is stopped. The baselines are four hand-made patterns.
"""

import optuna

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.blocks import Powers
from explore.search import PatternSpace
from explore.search.sizes import suggest_sizes
from explore.study import FrontPruner, LearningRates

TOKENS = 163_840

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "tpe"
patterns = PatternSpace(letters="M*-E", min_layers=3, max_layers=8, first="M*", last="-E")
learning_rates = LearningRates(start=4e-3, share=0.25)
pruner = FrontPruner()

SIZES = {
    "d_model": 96,
    "moe_n_experts_log2": 5,
    "moe_sparsity_log2": 2,
    "moe_compression_log2": 1,
    "moe_ratio": 1.0,
    "moe_shared_ratio": 2.0,
}
baselines = tuple(SIZES | patterns.params(pattern) for pattern in ("*-*-*-", "M-M-M-", "M-M*-M-E", "MEM*EME"))


def experiment(trial: optuna.Trial) -> Experiment:
    """One pattern at one width, trained on the same tokens as every other."""
    pattern = patterns.suggest(trial)
    d_model = trial.suggest_int("d_model", 64, 160, step=32)
    blocks = {
        "M": {"d_head": 32, "n_heads": d_model // 16, "d_state": 32, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": 32, "n_heads": d_model // 32, "n_kv_heads": 2 if d_model % 64 == 0 else 1},
        "-": {"d_ff": 4 * d_model},
    }
    if "E" in pattern:
        drawn = {"n_experts": Powers(16, 64), "ratio": (0.5, 1.0), "compression": Powers(2, 4)}
        experts = suggest_sizes(trial, "E", d_model, **drawn)
        blocks["E"] = experts | {"routed_scaling_factor": 1.0, "bias_update_rate": 0.01}
    model = ModelConfig(d_model=d_model, vocab_size=2048, pattern=pattern, blocks=blocks)
    return Experiment(
        name=f"{pattern}-d{d_model}",
        model=model,
        data=TextData(corpus="austen", tokenizer="austen-bpe-2048", seq_len=256),
        train=TrainConfig(tokens=TOKENS, batch_size=8, lr=4e-3, precision="bf16", val_every=16, eval_tokens=32_768),
    )
