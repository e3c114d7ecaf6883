"""A corpus that is quick to write, and runs on it that take a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from explore.experiment import Experiment, set_field
from explore.runs import RunFolder
from explore.train import fit

STEPS, TOKENS = 20, 4 * 32
"""Steps of a run, and tokens of a step."""
EXPERTS = {"kind": "moe", "n_experts": 8, "top_k": 2, "d_expert": 16, "d_shared": 16}


def write_corpus(folder: Path) -> Path:
    for split, n in (("train", 800), ("val", 30), ("test", 40)):
        (folder / f"{split}.txt").write_text("".join(f"{split} {i} times {i + 1} is {i * i + i}.\n" for i in range(n)))
    return folder


def tiny(corpus: Path, pattern: str, **changes: Any) -> Experiment:
    """An experiment; changes are named by their field, such as `train__lr`."""
    blocks = {"E": EXPERTS} if "E" in pattern else {}
    record = {
        "name": "tiny",
        "model": {"d_model": 64, "vocab_size": 257, "pattern": pattern, "blocks": blocks},
        "data": {"kind": "text", "corpus": str(corpus), "tokenizer": "bytes", "seq_len": 32},
        "train": {"tokens": STEPS * TOKENS, "batch_size": 4},
    }
    for path, value in changes.items():
        set_field(record, f"{path.replace('__', '.')}={json.dumps(value)}")
    return Experiment.model_validate(record)


def train(one: Experiment, runs: Path, **options: Any) -> RunFolder:
    return fit(one, runs, accelerator="cpu", **options)


def result(folder: RunFolder) -> dict[str, Any]:
    found = folder.result
    assert found is not None
    return found


def kill_after_a_checkpoint(one: Experiment, runs: Path) -> None:
    """Trains in a separate process, which is killed soon after its first checkpoint; it writes one every five steps."""
    file = runs.with_suffix(".json")
    file.write_text(one.model_dump_json())
    program = (
        "import sys, pathlib, torch; torch.set_num_threads(1)\n"
        "from explore.experiment import Experiment; from explore.train import fit\n"
        "fit(Experiment.load(pathlib.Path(sys.argv[1])), sys.argv[2], checkpoint_every=5, accelerator='cpu')\n"
    )
    command = [sys.executable, "-c", program, str(file), str(runs)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not list(runs.glob("*/checkpoints/last.ckpt")):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(runs.glob("*/result.json"))
