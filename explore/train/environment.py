"""Where a run was made: versions, device, code."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from explore.experiment import Experiment
from explore.threads import n_cores, waiting

PACKAGES = ("hybrid-frontier", "torch", "lightning", "optuna", "numpy", "tokenizers")


def environment(experiment: Experiment) -> dict[str, Any]:
    """What a reader needs to judge whether a number can be made again."""
    return {
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "cores": n_cores(),
        "waiting": waiting(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: version(package) for package in PACKAGES},
        "data": experiment.data.fingerprint(),
    }


def multiplies_bf16() -> bool:
    """Whether the device has instructions for products in bf16; without them bf16 is several times slower than fp32."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_precision(experiment: Experiment) -> str | None:
    """One line that says so where this experiment's precision has no instructions here."""
    if experiment.train.recipe.high == "bf16" and not multiplies_bf16():
        return (
            f"train.precision: bf16 has no instructions on this {processor()}; fp32 trains several times as fast here"
        )
    return None


def processor() -> str:
    """Name of the processor and its widest vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str | None:
    """The commit of the code, with `-dirty` when files differ from it; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
