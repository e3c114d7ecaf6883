"""Does the order of the arms of `latent_gated.py` hold at `d_model` 512 and more? For fifteen minutes of one GPU.

The arms `moe`, `acc4` and `eff4` of that study, one seed each, in bf16. The script first trains every arm for a few
steps and takes the time, then gives all arms the same number of tokens, so that the last one ends in time. There is one
seed, no search of the learning rate and no gate. So the result says whether a larger model contradicts the order of the
arms; it cannot confirm a difference.

    python sweeps/latent_gpu.py --records sweeps/records/partial/latent_gpu.parquet
    python sweeps/latent_gpu.py --minutes 3 --d-model 64 --batch-size 4    # a rehearsal on a CPU

This is a script, because the number of tokens depends on the machine. If it is stopped, the same call with `--tokens`
and the number that it printed resumes it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from latent_gated import PRIMARY, experts  # the study beside this script
from rich.console import Console

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.records import pack_runs
from explore.train import fit

SEQ_LEN, TIMED_STEPS = 512, 20
PLANNED = 0.7
"""Share of the remaining time that is planned for training; scores and checkpoints take the rest."""

console = Console(soft_wrap=True, highlight=False)


def experiment(arm: str, d_model: int, batch_size: int, tokens: int) -> Experiment:
    """One arm of `latent_gated.py` at another width, with state and chunks of a size for GPUs."""
    n_heads = max(4, d_model // 64)
    blocks = {
        "M": {"d_head": d_model // n_heads, "n_heads": 2 * n_heads, "d_state": 64, "n_groups": 1},
        "*": {"d_head": d_model // n_heads, "n_heads": n_heads, "n_kv_heads": 2},
        "E": experts(arm, d_model).model_dump(),
    }
    model = {"d_model": d_model, "vocab_size": 2048, "pattern": "MEM*EME", "blocks": blocks}
    return Experiment(
        name=f"{arm}-d{d_model}",
        model=ModelConfig.model_validate(model),
        data=TextData(corpus="gutenberg", tokenizer="austen-bpe-2048", seq_len=SEQ_LEN),
        train=TrainConfig(
            tokens=tokens,
            batch_size=batch_size,
            lr=6e-3 * (96 / d_model) ** 0.5,  # the first rate of the search of `latent_gated.py` at d_model 96
            precision="bf16",
            eval_tokens=262_144,
            evaluation="sampled",
        ),
    )


def affordable(d_model: int, batch_size: int, runs: Path, end: float) -> int:
    """Tokens that each arm can train on until `end`; the timed runs also compile, tokenize and warm up."""
    step, seconds = batch_size * SEQ_LEN, 0.0
    for arm in PRIMARY:
        timed = fit(experiment(arm, d_model, batch_size, TIMED_STEPS * step), runs / "timed", console=console)
        rates = timed.metrics["tokens_per_s"].dropna()
        seconds += step / float(rates.iloc[len(rates) // 2 :].median())
    n_steps = int(PLANNED * max(0.0, end - time.monotonic()) / seconds)
    if n_steps < TIMED_STEPS:
        raise SystemExit("error: --minutes: must leave time for training after the timed steps; give more")
    return n_steps * step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs") / Path(__file__).stem)
    parser.add_argument("--records", type=Path, help="table of records")
    parser.add_argument("--minutes", type=float, default=15.0, help="time for everything")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32, help=f"sequences of {SEQ_LEN} tokens in a step")
    parser.add_argument("--tokens", type=int, help="training tokens of each arm (default: as many as the time allows)")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    tokens = given.tokens or affordable(given.d_model, given.batch_size, given.runs, end)
    console.print(f"{tokens} tokens for each arm; --tokens {tokens} resumes")
    for arm in PRIMARY:
        row = fit(experiment(arm, given.d_model, given.batch_size, tokens), given.runs, console=console).row()
        size = f"{row['params_active']:,} active parameters, {row['flops_run']:.3g} FLOPs"
        console.print(f"{arm}: test {row['test_bpb']:.4f} bits per byte, {size}")
        if given.records is not None:
            pack_runs(given.records, given.runs)


if __name__ == "__main__":
    main()
