"""Scores the models of runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from explore.checkpoints import load_model
from explore.data import Batch, Source, TextSource
from explore.evals import DocumentScores, bits_per_byte, recall_score, score_documents
from explore.evals.ngram import EVALUATED
from explore.experiment import Experiment
from explore.model import LanguageModel, quantize_products
from explore.runs import RunFolder
from explore.train.low_precision import set_step


def load_trained(run: RunFolder) -> LanguageModel:
    """Loads the model of a run, with products quantised as at the end of training; `evaluate` scores the same model.

    A run in fp32 or bf16 has no quantised products. A run made by `explore quantize` has its own formats, as
    `load_model` gives them. With a format that scales whole tensors, results depend on the tokens that are read at
    once.

    Raises:
        ValueError: as in `load_model`.
    """
    model = load_model(run)
    if not run.quantized:
        _quantize(run.load_experiment(), model)
    return model


def autocast_of(run: RunFolder, model: LanguageModel) -> AbstractContextManager[Any]:
    """The context in which a model from `load_trained` scores text outside its own splits.

    A run in low precision computes in bf16 what its recipe leaves in bf16, as in training. All other runs compute in
    fp32 there.
    """
    if run.quantized or not (experiment := run.load_experiment()).train.quantizes:
        return nullcontext()
    return _autocast(experiment, model)


def evaluate(experiment: Experiment, source: Source, model: LanguageModel) -> dict[str, Any]:
    """Scores of a model for `result.json`, with forward products in the precision of the end of training."""
    return evaluate_splits(experiment, source, model)[0]


def evaluate_splits(
    experiment: Experiment, source: Source, model: LanguageModel
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The scores that `evaluate` gives, and those of documents if splits are read in full; reads each split once."""
    _quantize(experiment, model)
    return _score(experiment, source, model)


def _quantize(experiment: Experiment, model: LanguageModel) -> None:
    """Attaches the quantisers of the end of training; changes nothing in fp32 and bf16."""
    if experiment.train.quantizes:
        emulation = quantize_products(model, experiment.train.recipe, experiment.seed)
        set_step(emulation, experiment, experiment.n_steps)


def _autocast(experiment: Experiment, model: LanguageModel) -> torch.autocast:
    is_bf16 = experiment.train.recipe.high == "bf16"
    return torch.autocast(model.embedding.weight.device.type, torch.bfloat16, enabled=is_bf16)


def score(experiment: Experiment, source: Source, model: LanguageModel) -> dict[str, Any]:
    """Loss and bits per byte of both splits, and recall if that is the task; the model's precision is not changed.

    Returns:
        Numbers by name, None if not measured; `recall_by_pairs` if sequences differ in their number of pairs.
    """
    return _score(experiment, source, model)[0]


def _score(
    experiment: Experiment, source: Source, model: LanguageModel
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    train, model = experiment.train, model.eval()
    device = model.embedding.weight.device
    documents = _by_document(experiment, source, model) if train.evaluation == "whole" else None

    def batches(split: Any) -> Iterator[Batch]:
        max_tokens = None if train.evaluation == "whole" else train.eval_tokens
        read = source.eval_batches
        if train.evaluation == "sampled" and isinstance(source, TextSource):
            read = source.sampled_batches
        for batch in read(split, train.batch_size, max_tokens):
            yield replace(batch, inputs=batch.inputs.to(device), targets=batch.targets.to(device))

    with _autocast(experiment, model):
        if documents is not None:
            val, test = documents["val"].total, documents["test"].total
        else:
            val, test = bits_per_byte(model, batches("val")), bits_per_byte(model, batches("test"))
        recall = recall_score(model, batches("test")) if experiment.data.kind == "recall" else None
    by_pairs = {} if recall is None else recall.by_pairs
    scores = {
        "val_loss": val.loss,
        "val_bpb": val.bits_per_byte,
        "test_loss": test.loss,
        "test_bpb": test.bits_per_byte,
        "recall": None if recall is None else recall.accuracy,
        **({"recall_by_pairs": {str(n): share for n, share in by_pairs.items()}} if len(by_pairs) > 1 else {}),
    }
    return scores, None if documents is None else _records(documents)


def document_scores(experiment: Experiment, source: Source, model: LanguageModel) -> dict[str, Any] | None:
    """The entry `documents` of `evals.json` for an unchanged model; None if documents are not scored.

    Raises:
        ValueError: the tokenizer does not give the number of bytes per token.
    """
    documents = _by_document(experiment, source, model.eval())
    return None if documents is None else _records(documents)


def _by_document(experiment: Experiment, source: Source, model: LanguageModel) -> dict[str, DocumentScores] | None:
    if not isinstance(source, TextSource):
        return None
    with _autocast(experiment, model):
        return {split: score_documents(model, source, split, experiment.train.batch_size) for split in EVALUATED}


def _records(documents: dict[str, DocumentScores]) -> dict[str, Any]:
    return {split: each.to_record() for split, each in documents.items()}
