"""The experiment: everything that decides a result, in one frozen object with a key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from explore.config import Config, FrozenJson, added_later, explain, set_field
from explore.cost import MTP_LETTER, Ledger, in_formats
from explore.data import DataConfig, Source
from explore.files import read_json
from explore.foreign import check_type, echo, shorten
from explore.formatting import count
from explore.formatting.html import block, line
from explore.model import ModelConfig, check_overrides
from explore.objective import Distillation, NextToken, Objective
from explore.precision import TRAINED, UNQUANTIZED, Recipe, Until, named, unused_setting
from explore.weights import TrainedModel

UNTIL_DECAY = frozenset(
    {"tokens", "flops", "warmup", "decay", "decay_shape", "final_lr_ratio", "val_every", "eval_tokens", "evaluation"}
)
"""Fields of `TrainConfig` without effect before the decay; the warm-up counts by its steps instead."""

AFTER_TRAINING = ("kv", "state", "kv_rounding", "state_rounding")
"""Fields of a recipe that apply to decoding only."""

MOST_TOKENS = 10**15
"""Most training tokens: twenty times the longest published training."""

Beta = Annotated[float, Field(ge=0, lt=1)]

VOCABULARY_MULTIPLE = 128
"""Vocabularies may be padded to a multiple of this without a note."""

NUMERICS_VERSION = 3
"""Part of every key; increase it when the same experiment may give a different result."""


class FreshWeights(Config):
    """Random weights from the experiment's seed."""

    kind: Literal["fresh"] = "fresh"


class ParentWeights(Config):
    """Weights of a trained model, whole or cut.

    Attributes:
        parent: the trained model.
        plan: JSON of an `explore.compress.Plan`, or its path; None keeps all. The experiment's model is the plan's.
    """

    kind: Literal["parent"] = "parent"
    parent: TrainedModel
    plan: FrozenJson | None = None

    @field_validator("plan", mode="before")
    @classmethod
    def _look_up(cls, plan: Any) -> Any:
        return read_json(plan) if isinstance(plan, str | Path) else plan

    def fingerprint(self) -> dict[str, Any]:
        """Omits how the plan was made, which does not affect the result."""
        content = super().fingerprint()
        if content["plan"] is not None:
            content["plan"].pop("origin", None)
        return content


Start = Annotated[FreshWeights | ParentWeights, Field(discriminator="kind")]
"""Initial weights of training; `explore.train.start` implements each kind."""


def _precision(value: Any) -> str | Recipe:
    """Returns the name of a named recipe, otherwise the recipe; both spellings are the same experiment."""
    match value:
        case str():
            named(value, "it", TRAINED.keys())
            return value
        case Mapping():
            try:
                value = Recipe.model_validate(value)
            except ValidationError as error:
                raise ValueError(explain(error)) from None
        case Recipe():
            pass
        case _:
            raise ValueError(f"must be the name of a recipe, or a recipe, got {echo(value)}")
    return next((name for name, recipe in TRAINED.items() if recipe == value), value)


class TrainConfig(Config):
    """Training settings. The budget is either `tokens` or `flops`.

    Attributes:
        tokens: tokens to train on.
        flops: training FLOPs to spend (exact convention, 3 times forward).
        batch_size: sequences per optimizer step.
        lr: peak learning rate.
        optimizer: AdamW, or Muon for the matrices of the layers and AdamW for everything else.
        warmup: fraction of steps, at the start, with linearly rising learning rate.
        decay: fraction of steps, at the end, with falling learning rate.
        decay_shape: `linear`, or `minus_sqrt`: 1 - sqrt(progress).
        final_lr_ratio: final learning rate divided by the peak.
        clip: maximum gradient norm.
        mtp_weight: weight of the mean cross-entropy of multi-token prediction.
        precision: a recipe of `explore.precision`, or its name. `bf16` computes matrix products in bfloat16 and keeps
            weights and optimizer state in fp32; other recipes also quantise operands of some products.
        val_every: steps between validations; None validates only at the end.
        eval_tokens: tokens per evaluation of a split; None reads all.
        evaluation: `opening` reads the first `eval_tokens` of a split. `sampled` spreads them over the whole split.
            `whole` does so during training; at the end it reads both splits in full and scores by document.
        objective: training objective.
        stop_recall: end the run early at this validation recall, checked every `val_every` steps.
    """

    tokens: Annotated[int, Field(gt=0, le=MOST_TOKENS)] | None = None
    flops: PositiveFloat | None = None
    batch_size: PositiveInt = 16
    lr: PositiveFloat = 2e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.1
    warmup: float = Field(default=0.02, ge=0, le=1)
    decay: float = Field(default=0.2, ge=0, le=1)
    decay_shape: Literal["linear", "minus_sqrt"] = "minus_sqrt"
    final_lr_ratio: float = Field(default=0.01, ge=0, le=1)
    clip: PositiveFloat = 1.0
    mtp_weight: NonNegativeFloat = 0.3
    precision: Annotated[str | Recipe, BeforeValidator(_precision)] = "fp32"
    val_every: PositiveInt | None = None
    eval_tokens: PositiveInt | None = None
    objective: Objective = added_later(NextToken())
    stop_recall: Annotated[float, Field(gt=0, le=1)] | None = added_later(None)
    evaluation: Literal["opening", "sampled", "whole"] = added_later("opening")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.tokens is None) == (self.flops is None):
            raise ValueError(
                f"exactly one of tokens and flops must be given, got tokens={self.tokens} flops={self.flops}"
            )
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup: must be at most 1 - decay={1 - self.decay:g}, got {self.warmup}")
        if "fp16" in (self.recipe.format, *(rule.format for rule in self.recipe.rules)):
            raise ValueError("precision: formats must not be fp16, whose gradients would need loss scaling, got 'fp16'")
        for field in AFTER_TRAINING:
            value, default = getattr(self.recipe, field), Recipe.model_fields[field].default
            if value != default:
                raise ValueError(
                    f"precision.{field}: must be {json.dumps(default)} in training, since it applies to decoding after "
                    f"training (`explore quantize`), got {json.dumps(value)}"
                )
        if self.quantizes and (unused := unused_setting(self.recipe)):
            raise ValueError(f"precision.{unused}")
        if self.stop_recall is not None and self.val_every is None:
            raise ValueError(f"val_every: must be given with stop_recall={self.stop_recall}, which validations decide")
        return self

    @property
    def recipe(self) -> Recipe:
        """The precision recipe."""
        return TRAINED[self.precision] if isinstance(self.precision, str) else self.precision

    @property
    def quantizes(self) -> bool:
        """Whether operands of some products may be quantised."""
        return self.precision not in ("fp32", "bf16")

    def fingerprint(self) -> dict[str, Any]:
        """Quantising recipes are hashed by content, not by name."""
        return super().fingerprint() | ({"precision": self.recipe.fingerprint()} if self.quantizes else {})

    def n_steps(self, seq_len: int, flops_train: float) -> int:
        """Number of optimizer steps in the budget, rounded to whole steps, at least 1."""
        tokens = self.tokens if self.tokens is not None else (self.flops or 0) / flops_train
        return max(1, round(tokens / (self.batch_size * seq_len)))

    def warmup_steps(self, n_steps: int) -> int:
        """Number of warm-up steps in a run of `n_steps`."""
        return round(self.warmup * n_steps)


def _check_trainable(ledger: Ledger, recipe: Recipe) -> None:
    """Rejects formats that training would not use: it quantises products of linear layers and experts only."""
    (head,) = (row.entry.weight for row in ledger if (row.letter, row.entry.component) == ("", "head"))
    for row in ledger:
        component, weight = row.entry.component, row.entry.weight
        if row.entry.row and weight not in UNQUANTIZED:
            raise ValueError(
                f"train.precision: {component} must be in bf16 or fp32 in training, which quantises products only, "
                f"got {weight!r}"
            )
        if not row.entry.sums_over and weight != recipe.high:
            raise ValueError(
                f"train.precision: {component} must be in {recipe.high} in training, where rules apply only to linear "
                f"layers and routed experts, got {weight!r}"
            )
        if row.letter == MTP_LETTER and component == "head" and weight != head:
            raise ValueError(
                f"train.precision: head must be in {head} in multi-token prediction too, which uses the same weights, "
                f"got {weight!r}"
            )


class Experiment(Config):
    """One training run: model, data, training settings, seed and initial weights."""

    name: str = Field(min_length=1)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    seed: NonNegativeInt = 0
    start: Start = added_later(FreshWeights())

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if self.train.flops is not None:
            flops_train = self.model.cost(self.data.seq_len).flops_train
            if self.train.flops > MOST_TOKENS * flops_train:
                raise ValueError(
                    f"train.flops: must be at most {MOST_TOKENS * flops_train:.3g}, the FLOPs of {MOST_TOKENS:,} "
                    f"tokens, got {self.train.flops:.3g}"
                )
        if self.train.quantizes:
            try:
                ledger = in_formats(self.model.ledger(self.data.seq_len), self.train.recipe)
            except ValueError as error:
                raise ValueError(f"train.{error}") from None
            _check_trainable(ledger, self.train.recipe)
        if isinstance(self.train.objective, Distillation):
            self.train.objective.check_student(self.model)
        if self.train.stop_recall is not None and self.data.kind != "recall":
            raise ValueError(f"train.stop_recall: data.kind must be recall, got {self.data.kind!r}")
        mtp, seq_len = self.model.mtp, self.data.seq_len
        if mtp is not None and mtp.n_depths >= seq_len:
            raise ValueError(f"model.mtp: n_depths must be below data.seq_len={seq_len}, got {mtp.n_depths}")
        return self

    def __repr__(self) -> str:
        model = repr(self.model).partition("(")[2].partition(",")[0]
        return f"Experiment({echo(self.name)}, {model}, {self._about()})"

    def _repr_html_(self) -> str:
        return block(line(self.name, self._about()), self.model._repr_html_())

    def _about(self) -> str:
        corpus = shorten(str(getattr(self.data, "corpus", self.data.kind)))
        return f"{count(self.n_steps * self.batch_tokens)} tokens of {corpus}, seed {self.seed}"

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.train.n_steps(self.data.seq_len, self.model.cost(self.data.seq_len).flops_train)

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.train.batch_size * self.data.seq_len

    @property
    def flops_run(self) -> float:
        """Training FLOPs of the whole run."""
        return self.model.cost(self.data.seq_len).flops_train * self.n_steps * self.batch_tokens

    @property
    def trained_models(self) -> dict[str, TrainedModel]:
        """Models that the run starts from or learns from, by digest."""
        found = []
        if isinstance(self.start, ParentWeights):
            found.append(self.start.parent)
        if isinstance(self.train.objective, Distillation):
            found.append(self.train.objective.teacher)
        return {each.digest: each for each in found}

    @property
    def flops_teacher(self) -> float:
        """FLOPs per token of the teacher's forward pass; 0 without a teacher."""
        if not isinstance(self.train.objective, Distillation):
            return 0
        return self.train.objective.teacher.model.cost(self.data.seq_len).flops_fwd

    def notes(self, source: Source) -> tuple[str, ...]:
        """Notes for the user on a run with this data, one line each."""
        n_tokens, n_rows = source.vocab_size, self.model.vocab_size
        padded = -(-n_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        notes = (*source.notes, *(f"train.precision: {warning}" for warning in self.train.recipe.warnings))
        if n_rows <= padded:
            return notes
        unused = f"{n_rows - n_tokens:,} rows of the embedding and the head are unused"
        return (*notes, f"model.vocab_size is {n_rows:,} and the data has {n_tokens:,} tokens: {unused}")

    def key(self) -> str:
        """Hash (64 hexadecimal digits) of all that affects the result: no name, no paths, but the content of files."""
        return self._hash(self.train.fingerprint())

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps."""
        return self.train.warmup_steps(self.n_steps)

    def stable_key(self, step: int | None = None) -> str:
        """Hash (64 hexadecimal digits) of everything that affects the stable phase; it ignores the budget.

        Args:
            step: only what affects the state after this many steps: before `since`, recipes count as bf16 or fp32.
        """
        recipe, train = self.train.recipe, self.train
        length: dict[str, int] = {}
        if step and step <= round(recipe.since * self.n_steps):
            train = train.model_copy(update={"precision": recipe.high})
        elif recipe.since or recipe.until != Until():  # the switch comes after a fraction of all steps
            length = {"n_steps": self.n_steps}
        content = {name: value for name, value in train.fingerprint().items() if name not in UNTIL_DECAY}
        return self._hash(content | {"warmup_steps": self.warmup_steps} | length)

    def rung_key(self, step: int) -> str:
        """Key of the state after `step` steps; the step must be in the stable phase."""
        return f"{self.stable_key(step)}-{step:06d}"

    def _hash(self, train: dict[str, Any]) -> str:
        content = self.fingerprint() | {"numerics": NUMERICS_VERSION, "train": train}
        del content["name"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
        """Reads an experiment from JSON.

        Args:
            overrides: `path.to.field=value`, the value as JSON or as bare text.

        Raises:
            TypeError: `path` is not a path.
            ValueError: no such file, not JSON, or an invalid field, named by its path.
        """
        check_type(path, (str, Path), "path must be the path of an experiment in JSON")
        content = read_json(path)
        if isinstance(content.get("experiment"), dict):  # the record of a run
            content = content["experiment"]
        overrides = list(overrides)
        for override in overrides:
            set_field(content, override)
        experiment = cls.validated(content, path)
        check_overrides(experiment.model, overrides)
        return experiment
