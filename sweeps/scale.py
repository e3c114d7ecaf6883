"""How much time does the framework add to a trial, and how does the storage grow, when many workers share one study?

Nothing is trained. Each trial goes through the loop of a real sweep: it draws parameters, claims its experiment, writes
its description and a curve, and reports an artificial result. The script prints the times and sizes as JSON:

    python sweeps/scale.py --trials 10000 --workers 16
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import optuna
from rich.console import Console

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.search import PatternSpace
from explore.study import load_sweep
from explore.study.claim import claim
from explore.study.identity import open_study
from explore.study.storage import open_storage
from explore.study.worker import Outcome, TrialOptions, Worker

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
sampler = "random"
patterns = PatternSpace(letters="M*-E", min_layers=4, max_layers=12, first="M*", last="-E", at_least={"M*": 1})


def experiment(trial: optuna.Trial) -> Experiment:
    d_model = trial.suggest_int("d_model", 64, 512, step=64)
    blocks = {
        "M": {"d_head": 32, "n_heads": d_model // 16, "d_state": 32, "n_groups": 1, "chunk_size": 64},
        "*": {"d_head": 32, "n_heads": d_model // 32, "n_kv_heads": 2},
        "-": {"d_ff": 4 * d_model},
        "E": {"n_experts": 16, "top_k": 4, "d_expert": d_model, "d_latent": d_model // 2},
    }
    model = ModelConfig(d_model=d_model, vocab_size=2048, pattern=patterns.suggest(trial), blocks=blocks)
    data = TextData(corpus="austen", tokenizer="austen-bpe-2048", seq_len=256)
    return Experiment(name="scale", model=model, data=data, train=TrainConfig(tokens=1_000_000))


class SimulatedWorker(Worker):
    """The loop of a sweep around an objective that takes no time."""

    def _train(self, trial: optuna.Trial) -> Outcome:
        tried = self.sweep.experiment(trial)
        claim(self.study, trial, tried.key(), self.reaper)
        self._describe(trial, tried)
        loss = 2 + 3 / math.log(tried.flops_run)
        for tenth in range(2, 11, 2):
            trial.set_user_attr("curve", [[i / 10, loss + 1 / i] for i in range(2, tenth + 1, 2)])
        return Outcome("done", [loss, tried.flops_run])


def work(runs: Path, storage: str | None, n_trials: int, answers: multiprocessing.Queue[tuple[float, str]]) -> None:
    began, wrong = time.process_time(), ""
    try:
        sweep = load_sweep(Path(__file__))
        study = open_study(sweep, open_storage(runs, storage))
        began = time.process_time()
        SimulatedWorker(sweep, study, runs, TrialOptions(notes=False), Console(quiet=True)).work(n_trials)
    except Exception as error:
        wrong = repr(error)
    answers.put((time.process_time() - began, wrong))


def simulate(n_trials: int, n_workers: int, storage: str | None = None) -> dict[str, object]:
    """Runs the simulation in a temporary folder."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        study = open_study(load_sweep(Path(__file__)), open_storage(runs, storage))
        crew = [context.Process(target=work, args=(runs, storage, n_trials, answers)) for _ in range(n_workers)]
        for process in crew:
            process.start()
        while len(study.get_trials(deepcopy=False)) < n_workers:
            time.sleep(0.1)
        began = time.perf_counter()
        found = [answers.get() for _ in crew]
        wall_s = time.perf_counter() - began
        for process in crew:
            process.join()
        trials = study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
        keys = {trial.user_attrs["key"] for trial in done}
        journal = runs / "study.journal"
        size = journal.stat().st_size if journal.exists() else 0
        return {
            "trials": len(done),
            "keys": len(keys),
            "rejected": sum(trial.user_attrs.get("outcome") == "rejected" for trial in trials),
            "workers": n_workers,
            "wall_s": round(wall_s, 1),
            "wall_ms_per_trial": round(1000 * wall_s / len(trials), 2),
            "cpu_ms_per_trial": round(1000 * sum(cpu for cpu, _ in found) / len(trials), 2),
            "journal_bytes": size,
            "journal_bytes_per_trial": round(size / len(trials)),
            "errors": [wrong for _, wrong in found if wrong],
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--storage", help="storage URL (default: a journal file in a temporary folder)")
    given = parser.parse_args()
    print(json.dumps(simulate(given.trials, given.workers, given.storage), indent=2))
