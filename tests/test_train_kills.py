"""A run killed at any of its file operations resumes to the same result and leaves no temporary files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import EXPERTS, tiny, write_corpus

PROGRAM = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from rich.console import Console
from explore.experiment import Experiment
from explore.train import fit

one, root = Experiment.load(Path(sys.argv[1])), Path(sys.argv[2])
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")

def train(runs):
    return fit(one, runs, checkpoint_every=2, rungs=(0.5,), accelerator="cpu", console=Console(quiet=True))

def kill_at(n, runs):
    left = [n]

    def hook(event, args):
        writes = event in WRITES or (event == "open" and (isinstance(args[1], str) and args[1] != "r" or
                                     isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)))
        if writes and str(args[0]).startswith(str(runs)):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(runs)

def record(folder):
    result = {k: v for k, v in folder.result.items() if k not in ("train_s", "tokens_per_s", "finished_at")}
    return [result, folder.metrics.drop(columns="tokens_per_s").to_csv()]

def in_a_process(work):
    # A fork of this process, which itself never trains, so that nothing is imported again.
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]

def resume(runs, expected):
    folder = train(runs)
    assert json.loads(json.dumps(record(folder))) == expected, (record(folder), expected)
    left = {str(path.relative_to(runs)) for path in runs.rglob("*") if path.is_file()}
    assert left == set(json.loads((root / "files.json").read_text())), left
    os._exit(0)

def reference():
    folder = train(root / "through")
    (root / "record.json").write_text(json.dumps(record(folder)))
    runs = root / "through"
    files = [str(path.relative_to(runs)) for path in runs.rglob("*") if path.is_file()]
    (root / "files.json").write_text(json.dumps(files))
    os._exit(0)

torch.set_num_threads(1)
assert in_a_process(reference) == 0
expected = json.loads((root / "record.json").read_text())
n = 0
while True:
    runs = root / f"killed-{n}"
    status = in_a_process(lambda: kill_at(n, runs))
    if not os.WIFSIGNALED(status):
        break
    assert in_a_process(lambda: resume(runs, expected)) == 0, f"killed at file operation {n}"
    shutil.rmtree(runs)
    n += 1
print(n)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_resumes_to_the_same_result(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    one = tiny(
        write_corpus(tmp_path / "corpus"),
        "E",
        model__d_model=8,
        model__blocks={"E": {**EXPERTS, "n_experts": 4, "d_expert": 8, "d_shared": 8}},
        train__tokens=6 * 4 * 32,
        train__val_every=3,
        train__eval_tokens=64,
    )
    (tmp_path / "one.json").write_text(json.dumps(one.model_dump(mode="json")))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "one.json"), str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) > 50
