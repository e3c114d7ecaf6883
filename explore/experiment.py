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
    model_validator,
)

from explore.config import Config, added_later, explain, set_field
from explore.cost import in_formats
from explore.data import DataConfig, Source
from explore.files import read_json
from explore.foreign import echo
from explore.model import ModelConfig
from explore.precision import TRAINED, Recipe, Until, named

UNTIL_DECAY = frozenset(
    {"tokens", "flops", "warmup", "decay", "decay_shape", "final_lr_ratio", "val_every", "eval_tokens"}
)
"""Fields of `TrainConfig` that do not act on a run before its decay; of the warm-up, only its steps do."""

VOCABULARY_MULTIPLE = 128
"""A vocabulary that is padded to a multiple of this is no mistake."""

NUMERICS_VERSION = 3
"""Part of every key; raised when the same experiment may give another result than before."""


class NextToken(Config):
    """The cross-entropy of the next token, and of those after it where the model has multi-token prediction."""

    kind: Literal["next_token"] = "next_token"


Objective = NextToken
"""What training minimises. A second kind makes this a union, `Annotated[NextToken | ..., Field(discriminator="kind")]`;
its code is in `explore.train.objectives`. A teacher counts by the digest of its weights: see `Config.fingerprint`."""


class FreshWeights(Config):
    """Weights that are drawn from the seed of the experiment."""

    kind: Literal["fresh"] = "fresh"


Start = FreshWeights
"""From which weights training begins. A second kind makes this a union, as of `Objective`; its code is in
`explore.train.start`. A parent counts by the digest of its weights."""


def _precision(value: Any) -> str | Recipe:
    """The name of a recipe, or a recipe that has none: it is the same experiment either way."""
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
    """How a model is trained. The budget is `tokens` or `flops`; exactly one is given.

    Attributes:
        tokens: tokens to train on.
        flops: training FLOPs to spend (exact convention, 3 times forward).
        batch_size: sequences in an optimizer step.
        lr: peak learning rate.
        optimizer: AdamW, or Muon for the matrices of the layers and AdamW for everything else.
        warmup: share of the steps in which the learning rate rises linearly.
        decay: share of the steps, at the end, in which it falls.
        decay_shape: `linear`, or `minus_sqrt`: 1 - sqrt(progress).
        final_lr_ratio: learning rate of the last step over the peak.
        clip: largest norm of the gradient.
        mtp_weight: weight of the mean cross-entropy of the depths of multi-token prediction, where a model has it.
        precision: name of a recipe of `explore.precision`, or a recipe. `fp32`; `bf16`: matrix products in bfloat16,
            weights and optimizer state in fp32; others quantise the operands of some products, and have the rest so.
        val_every: steps between validations; only at the end when absent.
        eval_tokens: tokens of a split that an evaluation reads; all when absent.
        objective: what is minimised.
    """

    tokens: PositiveInt | None = None
    flops: PositiveFloat | None = None
    batch_size: PositiveInt = 16
    lr: PositiveFloat = 2e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
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

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.tokens is None) == (self.flops is None):
            raise ValueError(
                f"tokens and flops: exactly one budget is allowed, got tokens={self.tokens} flops={self.flops}"
            )
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup: {self.warmup} and decay={self.decay} add up to more than the whole run")
        if "fp16" in (self.recipe.format, *(rule.format for rule in self.recipe.rules)):
            raise ValueError("precision: formats must not be fp16, whose gradients would need loss scaling, got 'fp16'")
        return self

    @property
    def recipe(self) -> Recipe:
        """The recipe of precision."""
        return TRAINED[self.precision] if isinstance(self.precision, str) else self.precision

    @property
    def quantizes(self) -> bool:
        """Whether operands of some products may be quantised."""
        return self.precision not in ("fp32", "bf16")

    def fingerprint(self) -> dict[str, Any]:
        """Recipes that quantise count by what they say, whatever their names."""
        return super().fingerprint() | ({"precision": self.recipe.fingerprint()} if self.quantizes else {})

    def n_steps(self, seq_len: int, flops_train: float) -> int:
        """Optimizer steps that the budget pays for, at least one; the budget is rounded to whole steps."""
        tokens = self.tokens if self.tokens is not None else (self.flops or 0) / flops_train
        return max(1, round(tokens / (self.batch_size * seq_len)))

    def warmup_steps(self, n_steps: int) -> int:
        """Steps of so many in which the learning rate rises."""
        return round(self.warmup * n_steps)


class Experiment(Config):
    """One training run: what is trained, on what, how, from which seed and from which weights."""

    name: str = Field(min_length=1)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    seed: NonNegativeInt = 0
    start: Start = added_later(FreshWeights())

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if self.train.quantizes:
            try:
                in_formats(self.model.ledger(self.data.seq_len), self.train.recipe)
            except ValueError as error:
                raise ValueError(f"train.{error}") from None
        return self

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.train.n_steps(self.data.seq_len, self.model.cost(self.data.seq_len).flops_train)

    @property
    def batch_tokens(self) -> int:
        """Tokens in an optimizer step."""
        return self.train.batch_size * self.data.seq_len

    @property
    def flops_run(self) -> float:
        """Training FLOPs of the whole run."""
        return self.model.cost(self.data.seq_len).flops_train * self.n_steps * self.batch_tokens

    def notes(self, source: Source) -> tuple[str, ...]:
        """What a user should know of a run on data that was opened for it, one line each."""
        n_tokens, n_rows = source.vocab_size, self.model.vocab_size
        padded = -(-n_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        notes = (*source.notes, *(f"train.precision: {warning}" for warning in self.train.recipe.warnings))
        if n_rows <= padded:
            return notes
        unused = f"{n_rows - n_tokens:,} rows of the embedding and the head stand for nothing"
        return (*notes, f"model.vocab_size is {n_rows:,} and the data has {n_tokens:,} tokens: {unused}")

    def key(self) -> str:
        """64 hexadecimal digits over everything that decides the result, and nothing else.

        The name does not count, nor does any path: corpus and tokenizer count by their content.
        """
        return self._hash(self.train.fingerprint())

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps in which the learning rate rises."""
        return self.train.warmup_steps(self.n_steps)

    def stable_key(self) -> str:
        """64 hexadecimal digits over everything that decides the states of the stable phase, whatever the budget."""
        train = {name: value for name, value in self.train.fingerprint().items() if name not in UNTIL_DECAY}
        # Where precision changes on the way, it does so after a share of all steps.
        n_steps = {} if self.train.recipe.until == Until() else {"n_steps": self.n_steps}
        return self._hash(train | {"warmup_steps": self.warmup_steps} | n_steps)

    def rung_key(self, step: int) -> str:
        """Key of the state after so many steps, which must be in the stable phase."""
        return f"{self.stable_key()}-{step:06d}"

    def _hash(self, train: dict[str, Any]) -> str:
        content = self.fingerprint() | {"numerics": NUMERICS_VERSION, "train": train}
        del content["name"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> Experiment:
        """Reads an experiment from JSON.

        Args:
            overrides: `path.to.field=value`, the value as JSON or as bare text.

        Raises:
            ValueError: no such file, not JSON, or a field that is not allowed, by its path.
        """
        content = read_json(path)
        if isinstance(content.get("experiment"), dict):  # the record of a run
            content = content["experiment"]
        for override in overrides:
            set_field(content, override)
        return cls.read(content, path)

    @classmethod
    def read(cls, content: Any, path: Path) -> Experiment:
        """Reads the content of a file.

        Raises:
            ValueError: a field that is not allowed, by the path of the file and its own.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{path}: {explain(error)}") from None
