"""Sweeps of branches: the trunk of a seed, and the pilots of a learning rate, are trained once for all arms."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from small_runs import tiny, write_corpus

from explore.runs import PILOTS
from explore.study import LearningRates, load_sweep, preview, run_sweep
from explore.table import load_runs

SWEEP = '''"""What does precision cost?"""

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.study import LearningRates

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "grid"
grid = {"precision": ("bf16", "fp8", "nvfp4")}
seeds = 2
rungs = (0.5,)
learning_rates = LearningRates(low=1e-3, high=4e-3, start=2e-3, share=0.5, precision="bf16")


def experiment(trial):
    name = trial.suggest_categorical("precision", grid["precision"])
    model = ModelConfig(d_model=32, vocab_size=257, pattern="-", blocks={"-": {"d_ff": 64}})
    data = TextData(corpus=CORPUS, tokenizer="bytes", seq_len=32)
    precision = name if name == "bf16" else {"base": name, "since": 0.5}
    train = TrainConfig(tokens=20 * 128, batch_size=4, precision=precision, eval_tokens=128)
    return Experiment(name=name, model=model, data=data, train=train)
'''


@pytest.mark.slow
def test_a_sweep_trains_the_trunk_of_a_seed_once_and_its_pilots_once(tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    path = tmp_path / "branches.py"
    path.write_text(SWEEP.replace("CORPUS", repr(str(text))))
    sweep = load_sweep(path)
    assert run_sweep(sweep, 3, tmp_path / "runs", console=Console(quiet=True)).complete == 3
    runs = load_runs(tmp_path / "runs")
    spent = runs["flops_spent"] / runs["flops_run"]
    assert spent.round(6).value_counts().to_dict() == {0.5: 4, 1.0: 2}
    assert len(runs) == 6
    assert runs["lr"].nunique() == 1
    assert (load_runs(tmp_path / "runs" / PILOTS)["precision"] == "bf16").all()
    expected = preview(sweep, 3, tmp_path / "runs", measure=False)
    assert expected.flops == pytest.approx(runs["flops_spent"].sum())
    assert expected.pilot_flops == pytest.approx(3 * 0.5 * runs["flops_run"].iloc[0])


def test_pilots_of_one_precision_are_one_experiment(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    rates = LearningRates(precision="bf16")
    branches = [
        tiny(corpus, "-", train__precision=precision) for precision in ("bf16", {"base": "fp8", "since": 0.5}, "nvfp4")
    ]
    assert len({rates.pilot(each, 1e-3).key() for each in branches}) == 1
    assert len({LearningRates().pilot(each, 1e-3).key() for each in branches}) == 3


def test_rungs_of_a_sweep_must_be_a_tuple(tmp_path: Path) -> None:
    path = tmp_path / "branches.py"
    path.write_text(SWEEP.replace("rungs = (0.5,)", "rungs = 0.5"))
    with pytest.raises(ValueError, match=r"rungs must be a tuple of fractions of the schedule, got 0\.5"):
        load_sweep(path)
