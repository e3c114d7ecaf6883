"""Open a run, or a folder written by `explore import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from explore.data import TextData, Tokenizer
    from explore.experiment import Experiment
    from explore.model import LanguageModel, ModelConfig

OR_KEY = "a run (its folder, or the first characters of its key)"
"""Help text for an argument that is a run."""


def run_path(text: str) -> Path:
    """The folder that an argument names: a path, or a run in `runs` by its name or the first characters of its key.

    Raises:
        FileNotFoundError: no run matches, or several do; Typer would hide the message of a ValueError.
    """
    from explore.files import exists
    from explore.runs import resolve_run

    if not text:  # which would be the current folder
        raise FileNotFoundError("run must be a folder, a name or the first characters of a key, got ''")
    if exists(path := Path(text)) or path.suffix == ".json":
        return path
    try:
        return resolve_run(path).path
    except ValueError as error:
        raise FileNotFoundError(str(error)) from None


def place_path(text: str) -> Path:
    """A folder or file of runs; if there is none, the run with this name or these first characters of its key."""
    from explore.files import exists
    from explore.runs import match_runs

    if not text:  # which would be the current folder
        raise typer.BadParameter("must be a folder, a table or the first characters of a key, got ''")
    if exists(path := Path(text)) or not match_runs(path):
        return path
    return run_path(text)


def run_argument(help_: str = OR_KEY, metavar: str = "RUN") -> Any:
    """A Typer argument that takes a run."""
    return typer.Argument(parser=run_path, metavar=metavar, help=help_[0].upper() + help_[1:] + ".")


def run_option(help_: str) -> Any:
    """A Typer option that takes a run."""
    return typer.Option(parser=run_path, metavar="RUN", help=help_)


Run = Annotated[Path, run_argument()]
Places = Annotated[
    list[Path],
    typer.Argument(
        parser=place_path, metavar="RUNS",
        help="Folders of runs, run tables (.csv or .parquet), or runs by the first characters of their keys.",
    ),
]  # fmt: skip
RunOrModel = Annotated[Path, run_argument(f"{OR_KEY}, or a folder written by explore import")]


def open_run(run: Path) -> tuple[LanguageModel, Tokenizer, TextData | None]:
    """The model, tokenizer and data of a run; a folder written by import has no data (None).

    The products of a run in low precision have the formats of the end of training.
    """
    from explore.data import TextData, load_tokenizer
    from explore.interop import is_model_folder, load_model_folder
    from explore.runs import RunFolder
    from explore.train.models import load_trained

    if is_model_folder(run):
        return load_model_folder(run), load_tokenizer(str(run / "tokenizer.json")), None
    data = RunFolder(run).load_experiment().data
    if not isinstance(data, TextData):
        raise ValueError(f"{run}: must be trained on text, got {data.kind}")
    return load_trained(RunFolder(run)), load_tokenizer(data.tokenizer), data


def load_run(folder: Path) -> tuple[Experiment, LanguageModel, dict[str, Any]]:
    """The experiment of a run, its trained weights in a model for export, and its row in the table of runs."""
    from explore.runs import RunFolder
    from explore.train import load_model

    run = RunFolder(folder)
    return run.load_experiment(), load_model(run), run.row()


def describe_size(model: ModelConfig) -> str:
    """Pattern and number of parameters."""
    cost = model.cost(1)
    return f"{model.pattern}, {cost.params_total + cost.params_mtp:,} parameters"
