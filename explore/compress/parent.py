"""Parents: a finished run, or an imported checkpoint with the data of another experiment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from explore.checkpoints import load_model
from explore.data import TextData, load_tokenizer
from explore.experiment import Experiment
from explore.files import exists
from explore.model import LanguageModel
from explore.runs import RunFolder
from explore.weights import MODEL, TrainedModel

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Parent:
    """A trained model to score and cut, with data and settings for training its children.

    Attributes:
        path: its folder, where scores and plans are stored.
        experiment: its own; for an imported checkpoint, its model with another experiment's data and training.
        is_run: whether it was trained here.
    """

    path: Path
    experiment: Experiment
    is_run: bool

    @cached_property
    def model(self) -> LanguageModel:
        """Loads the model with its weights, in evaluation mode. Low precision of its training is not emulated."""
        return load_model(self.path) if self.is_run else TrainedModel.model_validate(self.path).load()


def open_parent(path: RunFolder | str | Path, data: str | Path | None = None) -> Parent:
    """Opens a finished run, or a folder that `explore import` wrote.

    Args:
        path: path of the folder.
        data: for an imported checkpoint, a run or experiment JSON that provides data and training settings
            for its children.

    Raises:
        ValueError: it is neither, the run is not finished, data is missing or superfluous, or its tokens differ.
    """
    folder = path.path if isinstance(path, RunFolder) else Path(path)
    if not exists(folder / MODEL):
        if data is not None:
            raise ValueError(f"data: {folder} is a run and has data of its own; only an imported folder needs another")
        return Parent(folder, finished(folder).load_experiment(), is_run=True)
    if data is None:
        raise ValueError(
            f"{folder}: is an imported checkpoint without data; name a run or an experiment in JSON with --data, "
            "whose text is read"
        )
    source = Path(data)
    content: dict[str, Any]
    if source.suffix == ".json":
        content = Experiment.load(source).model_dump(mode="json")
    else:
        content = RunFolder(source).load_experiment().model_dump(mode="json")
    content["name"] = folder.resolve().name
    content["model"] = TrainedModel.model_validate(folder).model.model_dump(mode="json")
    content["start"] = {"kind": "fresh"}
    content["train"]["objective"] = {"kind": "next_token"}
    experiment = Experiment.validated(content, source)
    _check_tokens(folder, experiment)
    return Parent(folder, experiment, is_run=False)


def finished(run: RunFolder | str | Path) -> RunFolder:
    """Opens a finished run.

    Raises:
        ValueError: it is not a run, not finished, or quantised after training, so without weights of its own.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    if folder.key is None:
        raise ValueError(f"{folder.path}: must be a run folder, with an experiment.json that can be read")
    if folder.status != "finished":
        raise ValueError(f"{folder.path}: must be a finished run, and is {folder.status}; train it to its end first")
    if quantized := folder.quantized:
        raise ValueError(
            f"{folder.path}: must be a trained run, got a quantised one, without weights of its own; "
            f"name its parent, {quantized['parent']['run']}"
        )
    return folder


def _check_tokens(folder: Path, experiment: Experiment) -> None:
    """Checks that data has the tokens of an imported checkpoint."""
    data = experiment.data
    if exists(folder / TOKENIZER) and isinstance(data, TextData):
        ours, theirs = load_tokenizer(data.tokenizer), load_tokenizer(str(folder / TOKENIZER))
        if ours.content_hash != theirs.content_hash:
            raise ValueError(
                f"data: the tokenizer must be that of {folder}, got another one, {data.tokenizer}; "
                f"use {folder / TOKENIZER}"
            )
    n_tokens = data.open(experiment.seed).vocab_size
    if n_tokens > experiment.model.vocab_size:
        raise ValueError(
            f"data: must have at most the {experiment.model.vocab_size:,} tokens of {folder}, got {n_tokens:,}"
        )
