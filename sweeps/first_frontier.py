"""Which of attention, Mamba, mixture-of-experts and LatentMoE layers buys the most bits per byte for its FLOPs?

Small models are trained on the embedded text, all on the same number of tokens and under one limit on total
parameters. The baselines are four hand-made models, one of each family, in the style of the Nemotron hybrids.

    explore sweep sweeps/first_frontier.py --trials 24
    explore sweep sweeps/first_frontier.py --trials 24 --set tokens=1M
"""

import optuna

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.study import RejectedError

MAX_PARAMS = 4_000_000
parameters = {"tokens": 114_688}

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}

baselines = (
    {"mixer": "attention", "ffn": "mlp", "d_model": 128, "n_pairs": 3},
    {"mixer": "hybrid", "ffn": "mlp", "d_model": 128, "n_pairs": 3},
    {"mixer": "hybrid", "ffn": "moe", "d_model": 128, "n_pairs": 3, "n_experts": 8, "top_k": 2},
    {
        "mixer": "hybrid",
        "ffn": "latent",
        "d_model": 128,
        "n_pairs": 3,
        "compression": 4,
        "n_experts_latent": 32,
        "top_k_latent": 8,
    },
)


def pattern(mixer: str, ffn: str, n_pairs: int) -> str:
    """Pairs of mixer and feed-forward layer; a hybrid has one attention layer, in its middle pair."""
    letters = {"attention": ["*"] * n_pairs, "mamba": ["M"] * n_pairs, "hybrid": ["M"] * n_pairs}[mixer]
    if mixer == "hybrid":
        letters[n_pairs // 2] = "*"
    return "".join(letter + ("-" if ffn == "mlp" else "E") for letter in letters)


def experiment(trial: optuna.Trial) -> Experiment:
    """One model of the space, trained on the same tokens as every other."""
    mixer = trial.suggest_categorical("mixer", ["attention", "mamba", "hybrid"])
    ffn = trial.suggest_categorical("ffn", ["mlp", "moe", "latent"])
    d_model = trial.suggest_int("d_model", 64, 192, step=64)
    n_pairs = trial.suggest_int("n_pairs", 2, 4)
    d_expert = d_model
    blocks = {
        "M": {"d_head": 32, "n_heads": d_model // 16, "d_state": 32, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": 32, "n_heads": d_model // 32, "n_kv_heads": 2},
        "-": {"d_ff": 4 * d_model},
    }
    if ffn == "moe":
        n_experts = trial.suggest_categorical("n_experts", [8, 16])
        top_k = trial.suggest_categorical("top_k", [1, 2])
        latent = {}
    elif ffn == "latent":
        n_experts = trial.suggest_categorical("n_experts_latent", [16, 32, 64])
        top_k = trial.suggest_categorical("top_k_latent", [4, 8])
        latent = {"d_latent": d_model // trial.suggest_categorical("compression", [2, 4])}
    if ffn != "mlp":
        sizes = {"n_experts": n_experts, "top_k": top_k, "d_expert": d_expert, "d_shared": 2 * d_model}
        blocks["E"] = sizes | latent | {"routed_scaling_factor": 1.0, "bias_update_rate": 0.01}
    model = ModelConfig(d_model=d_model, vocab_size=2048, pattern=pattern(mixer, ffn, n_pairs), blocks=blocks)
    data = TextData(corpus="austen", tokenizer="austen-bpe-2048", seq_len=256)
    params = model.cost(data.seq_len).params_total
    if params > MAX_PARAMS:
        raise RejectedError(f"params_total: {params} is above {MAX_PARAMS}")
    return Experiment(
        name=f"{model.pattern}-d{d_model}",
        model=model,
        data=data,
        train=TrainConfig(tokens=parameters["tokens"], batch_size=8, lr=4e-3, val_every=28, eval_tokens=16_384),
    )
