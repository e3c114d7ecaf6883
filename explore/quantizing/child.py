"""Quantises a trained run into a child: formats, scales, scores and record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal

import torch

from explore.checkpoints import load_model
from explore.cost import BITS, in_formats
from explore.data import Batch, Source
from explore.experiment import Experiment
from explore.files import held, read_json, write_json
from explore.model import LanguageModel, QuantizedModel, calibrate, check_after_training, formats_of_components
from explore.precision import FormatName, Recipe
from explore.quantizing.choosing import choose
from explore.quantizing.request import Quantization
from explore.quantizing.scoring import Comparison, Reference
from explore.quantizing.sensitivities import (
    Offer,
    Sensitivities,
    bits_of,
    measure,
    offers,
    recipe_with,
    record_of,
    with_high,
)
from explore.runs import LOCK, RunFolder, run_folder
from explore.train import cost_record, score
from explore.train.environment import environment
from explore.weights import weights_digest

KL_TOKENS = 16_384
"""Validation tokens for comparing a child with its parent."""

DECODED_TOKENS = 4_096
"""Tokens read one by one when recurrent state is rounded."""

BATCH_TOKENS = 4_096
"""Tokens per forward pass."""

MOST_CALIBRATION_TOKENS = 1 << 24
"""Most calibration tokens for unlimited training data; otherwise the training split is the limit."""

SENSITIVITIES = "sensitivities.json"
"""File in the parent's folder with measured sensitivities, by their key."""


def quantize_run(
    parent: RunFolder,
    request: Quantization,
    name: str = "quantized",
    report: Callable[[str], None] = lambda _: None,
) -> RunFolder:
    """Quantises a trained run into a run folder beside it; a finished child with the same key is reused.

    Measurements survive a kill: sensitivities are stored with the parent and shared by all budgets.

    Args:
        name: suffix of the child's name after the parent's.
        report: callback for progress messages.

    Raises:
        ValueError: the parent is not a finished run, the recipe does not fit it, no choice fits the budget, or the
            training split is too short for calibration; nothing is written then.
    """
    if parent.quantized:
        raise ValueError(f"{parent.path}: must be a trained run, got a quantised one")
    if parent.status != "finished":
        raise ValueError(f"{parent.path}: must be a finished run, got one that is {parent.status}")
    experiment, model = parent.load_experiment(), load_model(parent)
    check_after_training(request.recipe)
    ledger = experiment.model.ledger(experiment.data.seq_len)
    offered = [] if request.bits is None else offers(ledger, request)
    if request.bits is None:
        in_formats(ledger, request.recipe)
    digest = weights_digest(model.state_dict())
    key = request.key(str(parent.key), digest)
    folder = run_folder(parent.path.resolve().parent, f"{experiment.name}-{name}", key)
    if folder.is_finished:
        return folder
    source = experiment.data.open(experiment.seed)
    most = source.n_train_tokens or MOST_CALIBRATION_TOKENS
    if request.calibration_tokens > most:
        raise ValueError(f"calibration_tokens must be at most {most}, got {request.calibration_tokens}")
    folder.path.mkdir(parents=True, exist_ok=True)
    with held(folder.path / LOCK, lambda: report("another process makes this child")):
        if not folder.is_finished:
            about = {"run": parent.path.resolve().name, "key": parent.key, "digest": digest}
            content = experiment.model_dump(mode="json") | {"name": f"{experiment.name}-{name}"}
            write_json(folder.path / "experiment.json", {"key": key, "experiment": content})
            write_json(folder.path / "environment.json", environment(experiment))
            _Child(parent, folder, experiment, model, source, request, offered, digest, report).make(about)
    return folder


@dataclass(eq=False)
class _Child:
    """A child in the making.

    Attributes:
        model: the parent's model, quantised in place.
        source: the parent's data.
        offers: components whose formats are chosen; empty when a recipe is given.
        digest: digest of the parent's weights.
    """

    parent: RunFolder
    folder: RunFolder
    experiment: Experiment
    model: LanguageModel
    source: Source
    request: Quantization
    offers: list[Offer]
    digest: str
    report: Callable[[str], None]

    def make(self, parent: dict[str, Any]) -> None:
        """Quantises and scores the model and writes the run, the result file last.

        Args:
            parent: the record's entry about the parent.
        """
        self.model.to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.experiment.train.recipe.high == "bf16"):
            text = list(self._calibration_text())
            self.report("calibration")
            amax = calibrate(self.model, ((each.inputs, each.targets) for each in text))
            square = self.request.recipe.square_weights
            quantized = QuantizedModel(self.model, self.request.scales, square_weights=square, amax=amax)
            recipe, choice = self._recipe(quantized, text)
            write_json(self.folder.path / "cost.json", cost_record(self.experiment, recipe))
            n_tokens = sum(each.inputs.numel() for each in text)
            record = {
                "parent": parent,
                "bits": self.request.bits,
                "recipe": recipe.model_dump(mode="json"),
                "scales": self.request.scales,
                "seed": self.request.seed,
                "calibration": {"split": "train", "tokens": n_tokens, "seed": self.request.calibration_seed},
                "formats": self._formats(recipe),
                **choice,
                "amax": amax,
            }
            write_json(self.folder.path / "quantized.json", record)
            compared = self._compared(quantized, recipe)
        self.report("validation and test")
        trained = self.parent.result or {}
        result = {
            "status": "finished",
            "reason": None,
            **{name: trained.get(name) for name in ("step", "tokens", "flops_run")},
            **score(self.experiment, self.source, self.model),
            **compared,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.folder.path / "result.json", result)

    def _compared(self, quantized: QuantizedModel, recipe: Recipe) -> dict[str, Any]:
        """Quantises the model permanently and compares it with the original."""
        reference = self._reference("val", KL_TOKENS)
        by_token = None if recipe.state is None else self._reference("val", DECODED_TOKENS)
        losses = {"parent": reference.compare(self.model).losses}
        quantized.apply(recipe, self.request.seed)
        self.report("comparison with the parent")
        whole = reference.compare(self.model)
        losses["quantized"] = whole.losses
        decoded: Comparison | None = None
        if by_token is not None:
            self.report("comparison token by token")
            decoded = by_token.compare(self.model, by_token=True)
            losses["decoded"] = decoded.losses
        kl_decoded = None if decoded is None else decoded.kl
        return {"kl": whole.kl, "kl_decoded": kl_decoded, "losses_by_position": losses}

    @property
    def device(self) -> str:
        """Type of the model's device."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _recipe(self, quantized: QuantizedModel, text: list[Batch]) -> tuple[Recipe, dict[str, Any]]:
        """Returns the child's recipe and the record of how it was chosen."""
        request, base = self.request, self.request.recipe
        if request.bits is None:
            return base, {}
        path = self.parent.path / SENSITIVITIES
        key = request.sensitivity_key(self.digest)

        def save(measured: Sensitivities) -> None:
            write_json(path, (read_json(path) if path.exists() else {}) | {key: measured})

        known = (read_json(path) if path.exists() else {}).get(key, {})
        reference = Reference(self.model, text)
        measured = measure(quantized, reference, self.offers, request.formats, known, save, self.report)
        sensitivities = with_high(self.offers, measured, request.formats)
        formats: tuple[FormatName, ...] = ("bf16", *request.formats)
        n_params = sum(row.entry.params for row in self.experiment.model.ledger(1))
        rest = BITS["bf16"] * (n_params - sum(each.params for each in self.offers))
        choice = choose(sensitivities, bits_of(self.offers, formats), request.bits * n_params - rest)
        recipe = recipe_with(base, self.offers, choice.formats)  # type: ignore[arg-type]
        return recipe, {"sensitivities": sensitivities, "choice": record_of(choice, rest, n_params)}

    def _formats(self, recipe: Recipe) -> dict[str, FormatName]:
        """Returns the format of every quantisable component."""
        formats = formats_of_components(self.model, recipe)
        return {str(component): formats[component] for component in QuantizedModel(self.model).components}

    def _calibration_text(self) -> Iterator[Batch]:
        """Yields the first windows of the training split in a seeded order."""
        n_windows = max(1, round(self.request.calibration_tokens / self.experiment.data.seq_len))
        source = self.experiment.data.open(self.request.calibration_seed)
        n_batches = -(-n_windows // self._batch_size)
        for i in range(n_batches):
            batch = source.batch(i, -(-n_windows // n_batches))
            yield Batch(batch.inputs.to(self.device), batch.targets.to(self.device))

    @property
    def _batch_size(self) -> int:
        return max(1, BATCH_TOKENS // self.experiment.data.seq_len)

    def _reference(self, split: Literal["val", "test"], n_tokens: int) -> Reference:
        batches = self.source.eval_batches(split, self._batch_size, self.experiment.train.eval_tokens)
        return Reference(self.model, islice(batches, max(1, n_tokens // BATCH_TOKENS)))
