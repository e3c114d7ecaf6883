"""A trained run, opened in Python: its model, tokenizer, learning curve and generated text."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from explore.data import TextData, Tokenizer, load_tokenizer
from explore.evals import bits_per_byte
from explore.experiment import Experiment
from explore.foreign import check_type
from explore.interop import is_model_folder, load_model_folder
from explore.model import LanguageModel, ModelConfig, Sampling, generate
from explore.runs import RunFolder, resolve_run
from explore.train.models import autocast_of, load_trained, score


def load(run: str | Path | RunFolder, runs: str | Path = "runs") -> LoadedRun:
    """Opens a trained run, or a folder that `explore import` wrote.

        run = explore.load("0123abcd")
        print(run.generate("It was"))

    Files are read only when they are needed.

    Args:
        run: a folder, or the beginning of a run's key or name.
        runs: folder of run folders in which keys and names are looked up.

    Raises:
        TypeError: `run` is not a string, path or run.
        ValueError: no run or more than one matches, or the folder holds no run.
    """
    if isinstance(run, RunFolder):
        return LoadedRun(run.path)
    check_type(run, (str, Path), "run must be a folder, or the beginning of a key or name (explore.fit gives a run)")
    return LoadedRun(resolve_run(run, runs).path)


class LoadedRun:
    """A trained run, or a folder that `explore import` wrote.

    Attributes:
        path: the folder.
        folder: the record of the run; empty for an imported model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = RunFolder(path)
        if not self.is_imported:
            self.folder.load_experiment()  # raises if the folder is not a run

    def __repr__(self) -> str:
        kind = "imported" if self.is_imported else repr(self.folder).partition(", ")[2].removesuffix(")")
        return f"LoadedRun({self.path}, {kind})"

    def _repr_html_(self) -> str:
        return self.config._repr_html_() if self.is_imported else self.folder._repr_html_()

    @cached_property
    def is_imported(self) -> bool:
        """Whether the folder holds an imported model, which was not trained here."""
        return is_model_folder(self.path)

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment: model, data and training.

        Raises:
            ValueError: the model was imported.
        """
        if self.is_imported:
            raise ValueError(f"{self.path}: must be a run for this, got an imported model, which has no experiment")
        return self.folder.load_experiment()

    @property
    def config(self) -> ModelConfig:
        """The config of the model."""
        return self.model.config if self.is_imported else self.experiment.model

    @cached_property
    def model(self) -> LanguageModel:
        """The trained model, in evaluation mode. A run in low precision has the products of the end of its training.

        Raises:
            ValueError: the checkpoint is missing or damaged.
        """
        return load_model_folder(self.path) if self.is_imported else load_trained(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run's text.

        Raises:
            ValueError: the run was not trained on text.
        """
        return load_tokenizer(str(self.path / "tokenizer.json") if self.is_imported else self._text.tokenizer)

    @property
    def metrics(self) -> pd.DataFrame:
        """The learning curve: the rows of `metrics.csv`."""
        return self.folder.metrics

    @property
    def result(self) -> dict[str, Any]:
        """The contents of `result.json`; empty until the run has ended."""
        return self.folder.result or {}

    @property
    def row(self) -> dict[str, Any]:
        """The run as a row of the table of runs."""
        return self.folder.row()

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """Continues a text.

        Args:
            max_new_tokens: most tokens to generate; fewer if the model ends the document.
            temperature: divides the logits; 0 always takes the most probable token.
            top_k: sample only from this many most probable tokens; None samples from all.
            top_p: sample only from the most probable tokens that together reach this probability.
            seed: seed of the sampling.

        Returns:
            The prompt and its continuation.

        Raises:
            TypeError: the prompt is not a string.
            ValueError: an argument is out of range.
        """
        check_type(prompt, str, "prompt must be a text")
        sampling, end = Sampling(temperature, top_k, top_p, seed), self.tokenizer.eot_id
        device = self.model.embedding.weight.device
        tokens = torch.tensor([[end, *self.tokenizer.encode(prompt)]], device=device)
        new = generate(self.model, tokens, max_new_tokens, sampling, end)[0].tolist()
        return prompt + self.tokenizer.decode(new[: new.index(end)] if end in new else new)

    def evaluate(self, *corpora: str, tokens: int | None = None) -> dict[str, float | None]:
        """Measures the model now: loss and bits per byte of its own data, as in `result.json`.

        Args:
            corpora: names or paths of other texts, on whose test splits bits per byte are measured too.
            tokens: read only this many tokens of each other text; None reads all.

        Returns:
            `val_loss`, `val_bpb`, `test_loss`, `test_bpb` and `recall`, and `NAME_bpb` for every other corpus.

        Raises:
            ValueError: the model was imported, or other corpora are given and the run was not trained on text.
        """
        experiment = self.experiment
        scores = score(experiment, experiment.data.open(experiment.seed), self.model)
        for name in corpora:
            other = self._text.model_copy(update={"corpus": name, "n_shards": None}).open(0)
            with autocast_of(self.folder, self.model):
                found = bits_per_byte(self.model, other.eval_batches("test", experiment.train.batch_size, tokens))
            scores[f"{Path(name).name}_bpb"] = found.bits_per_byte
        return scores

    @property
    def _text(self) -> TextData:
        data = self.experiment.data
        if not isinstance(data, TextData):
            raise ValueError(f"{self.path}: must be trained on text for this, got {data.kind}")
        return data
