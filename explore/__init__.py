"""Explore hybrids of Mamba-2, attention, MLP and (latent) mixture-of-experts layers.

The names below are the public ones; they are imported on first use, so that `import explore` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from explore.threads import choose_waiting

if TYPE_CHECKING:
    __version__: str
    from explore.blocks import AttentionConfig as AttentionConfig
    from explore.blocks import Mamba2Config as Mamba2Config
    from explore.blocks import MLPConfig as MLPConfig
    from explore.blocks import MoEConfig as MoEConfig
    from explore.blocks import latent_acc as latent_acc
    from explore.blocks import latent_eff as latent_eff
    from explore.data import RecallData as RecallData
    from explore.data import TextData as TextData
    from explore.experiment import Experiment as Experiment
    from explore.experiment import TrainConfig as TrainConfig
    from explore.figures import plot_frontier as plot_frontier
    from explore.frontier import pareto_front as pareto_front
    from explore.interop import from_hf as from_hf
    from explore.interop import to_hf as to_hf
    from explore.model import LanguageModel as LanguageModel
    from explore.model import ModelConfig as ModelConfig
    from explore.model import generate as generate
    from explore.ops import quantize as quantize
    from explore.presets import preset as preset
    from explore.study import load_sweep as load_sweep
    from explore.study import run_sweep as run_sweep
    from explore.table import load_metrics as load_metrics
    from explore.table import load_runs as load_runs
    from explore.train import fit as fit
    from explore.train import load as load
    from explore.workbench import Frontier as Frontier
    from explore.workbench import Workbench as Workbench

choose_waiting()  # before anything below loads torch

_HOMES = {
    "explore.blocks": ("AttentionConfig", "Mamba2Config", "MLPConfig", "MoEConfig", "latent_acc", "latent_eff"),
    "explore.data": ("RecallData", "TextData"),
    "explore.experiment": ("Experiment", "TrainConfig"),
    "explore.figures": ("plot_frontier",),
    "explore.frontier": ("pareto_front",),
    "explore.interop": ("from_hf", "to_hf"),
    "explore.model": ("LanguageModel", "ModelConfig", "generate"),
    "explore.ops": ("quantize",),
    "explore.presets": ("preset",),
    "explore.study": ("load_sweep", "run_sweep"),
    "explore.table": ("load_metrics", "load_runs"),
    "explore.train": ("fit", "load"),
    "explore.workbench": ("Frontier", "Workbench"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_PACKAGES = (
    "blocks", "compress", "cost", "data", "evals", "figures", "frontier", "interop", "kernels", "model", "ops", "plan",
    "precision", "presets", "quantities", "quantizing", "roofline", "search", "solve", "study", "train", "workbench",
)  # fmt: skip
"""Packages that can be used as `explore.NAME` without being imported by name."""

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # the slowest import of this module

        return version("hybrid-frontier")
    if name in _PACKAGES:
        return import_module(f"explore.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'explore' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]
