"""How commands open a run, or a folder that `explore import` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from explore.data import TextData, Tokenizer
    from explore.experiment import Experiment
    from explore.model import LanguageModel, ModelConfig

Run = Annotated[Path, typer.Argument(help="A run folder, or a folder that import wrote.")]


def open_run(run: Path) -> tuple[LanguageModel, Tokenizer, TextData | None]:
    """The model and tokenizer of a run, and its data; there is none with a folder that import wrote."""
    from explore.data import TextData, load_tokenizer
    from explore.experiment import Experiment
    from explore.interop import is_model_folder, load_model_folder
    from explore.runs import RunFolder
    from explore.train import load_model

    if is_model_folder(run):
        return load_model_folder(run), load_tokenizer(str(run / "tokenizer.json")), None
    data = Experiment.load(run / "experiment.json").data
    if not isinstance(data, TextData):
        raise ValueError(f"{run}: was trained on {data.kind}, and this needs text")
    return load_model(RunFolder(run)), load_tokenizer(data.tokenizer), data


def load_experiment(folder: Path) -> Experiment:
    """The experiment of a run folder."""
    from explore.experiment import Experiment

    path = folder / "experiment.json"
    if not path.exists():
        raise ValueError(f"RUN: {str(folder)!r} has neither an experiment.json nor a model.json")
    return Experiment.load(path)


def load_run(folder: Path) -> tuple[Experiment, LanguageModel, dict[str, Any]]:
    """The experiment of a run, its trained model, and its row in the table of runs."""
    from explore.runs import RunFolder
    from explore.train import load_model

    experiment, run = load_experiment(folder), RunFolder(folder)
    return experiment, load_model(run), {**run.row(), "seq_len": experiment.data.seq_len}


def describe_size(model: ModelConfig) -> str:
    """Pattern and number of parameters."""
    cost = model.cost(1)
    return f"{model.pattern}, {cost.params_total + cost.params_mtp:,} parameters"
