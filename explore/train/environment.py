"""Records the environment of a run: versions, device, code."""

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
    """Versions, device and settings: what a reader needs to reproduce a number."""
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
    """Whether the device multiplies bf16 in hardware; otherwise bf16 is several times slower than fp32."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_precision(experiment: Experiment) -> str | None:
    """A one-line warning if this machine has no instructions for the experiment's precision, else None."""
    if experiment.train.recipe.high == "bf16" and not multiplies_bf16():
        return (
            f"train.precision: bf16 has no instructions on this {processor()}; fp32 trains several times as fast here"
        )
    return None


def processor() -> str:
    """The name of the processor and its widest vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str | None:
    """The commit of the code, with `-dirty` if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
