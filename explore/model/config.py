"""The model as a config: a pattern, its blocks and their cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator

from explore import pattern as patterns
from explore.blocks import STANDARD_LETTERS, AnyBlock, BlockConfig
from explore.config import LARGEST, Config, Frozen, added_later, read_numbers
from explore.cost import MTP_LETTER, Cost, Dtype, Dtypes, Entry, Ledger, Part, matrix, vector
from explore.foreign import echo, shorten
from explore.formatting import count, size
from explore.machine import memory_bytes

if TYPE_CHECKING:
    from explore.model.language_model import LanguageModel

_WIDTH: TypeAdapter[int] = TypeAdapter(PositiveInt)

MOST_DEPTHS = 128
"""Maximum number of depths of multi-token prediction."""

LETTERS = 40
"""Pattern letters shown in one line; longer patterns are shortened in the middle."""


class MTPConfig(Config):
    """Multi-token prediction: depth k predicts the token k positions after the next one.

    Attributes:
        pattern: layers of one depth, in letters of the model.
        n_depths: number of tokens predicted beyond the next one.
        shared: all depths share one set of weights, as in Nemotron 3; otherwise each has its own.
    """

    pattern: str
    n_depths: PositiveInt = Field(default=1, le=MOST_DEPTHS)
    shared: bool = True

    @property
    def n_stored(self) -> int:
        """Number of sets of weights."""
        return 1 if self.shared else self.n_depths


class ModelConfig(Config):
    """A language model: a string of letters and one block config per letter.

    Attributes:
        pattern: one letter per layer; a layer is `x + mixer(norm(x))`. Each `/` starts a depth of multi-token
            prediction, which is stored in `mtp`.
        blocks: config of each letter. Sizes missing from a standard letter follow from `d_model`, unless its `kind`
            is given; then all sizes are required. A custom letter needs a `kind`. Letters that the pattern does not
            use are dropped.
        mtp: multi-token prediction; none when None.
        tie_embeddings: the head shares the embedding's matrix.
        init_std: standard deviation of initial weights; None uses 0.896 / sqrt(d_model), as in Nemotron 3.
        embedding_std: standard deviation of the initial embedding; None uses that of the other weights.
    """

    d_model: PositiveInt
    vocab_size: PositiveInt
    pattern: str
    blocks: Frozen[str, AnyBlock]
    mtp: MTPConfig | None = None
    tie_embeddings: bool = False
    norm_eps: PositiveFloat = 1e-5
    init_std: PositiveFloat | None = None
    embedding_std: PositiveFloat | None = added_later(None)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        data = read_numbers(cls, data)  # before sizes are derived from them
        if not isinstance(data, Mapping) or not isinstance(data.get("pattern"), str):
            return data
        blocks, mtp = data.get("blocks") or {}, data.get("mtp")
        if isinstance(mtp, MTPConfig):
            mtp = mtp.model_dump()
        if not isinstance(blocks, Mapping) or not (mtp is None or isinstance(mtp, Mapping)):
            return data
        pattern, depths = patterns.split_mtp(data["pattern"])
        if depths:
            mtp = {"n_depths": len(depths), **(mtp or {}), "pattern": depths[0]}
            if len(depths) > 1 and mtp["n_depths"] != len(depths):
                raise ValueError(f"mtp: n_depths must be {len(depths)}, as in the pattern, got {echo(mtp['n_depths'])}")
        _check_letters(blocks)
        known = list(dict.fromkeys([*STANDARD_LETTERS, *blocks]))
        patterns.check_pattern(pattern, known)
        pattern, letters = patterns.canonical(pattern), pattern
        if mtp is not None and isinstance(mtp.get("pattern"), str):
            patterns.check_pattern(mtp["pattern"], known)
            mtp = {**mtp, "pattern": patterns.canonical(mtp["pattern"])}
            letters += mtp["pattern"]
        d_model = data.get("d_model")
        chosen = {}
        for letter in dict.fromkeys(patterns.canonical(letters)):
            block = blocks.get(letter, {})
            if letter in STANDARD_LETTERS and isinstance(block, Mapping) and "kind" not in block:
                try:
                    width = _WIDTH.validate_python(d_model)  # as the field reads it: "256" and 256.0 are 256
                except ValidationError:
                    return data  # the field's own error says why
                block = {**_sizes(STANDARD_LETTERS[letter], width, block.keys()), **block}
            chosen[letter] = block
        return {**data, "pattern": pattern, "blocks": chosen, "mtp": mtp}

    def replace(self, **changes: Any) -> ModelConfig:
        """Returns a validated copy with some values changed.

            model.replace(d_model=512, blocks={"E": {"top_k": 4}})

        Letters and fields that are not named keep their values. Sizes derived from the old `d_model` are derived again
        from the new one.
        """
        blocks: dict[Any, Any] = {letter: self._given(letter, changes) for letter in self.blocks}
        if isinstance(given := changes.pop("blocks", {}), Mapping):
            for letter, block in given.items():
                partial = isinstance(block, Mapping) and "kind" not in block
                blocks[letter] = {**blocks.get(letter, {}), **block} if partial else block
            given = blocks
        kept = {name: getattr(self, name) for name in type(self).model_fields}
        if patterns.MTP_MARK in str(changes.get("pattern")):
            kept["mtp"] = None if self.mtp is None else {"shared": self.mtp.shared}
        return type(self).model_validate({**kept, **changes, "blocks": given})

    def __repr__(self) -> str:
        cost = self.cost(1)
        active = "" if cost.params_active == cost.params_total else f", {count(cost.params_active)} active"
        mtp = "" if self.mtp is None else (patterns.MTP_MARK + self.mtp.pattern) * self.mtp.n_depths
        letters = shorten(self.pattern + mtp, LETTERS)
        return f"ModelConfig({letters}, d_model={self.d_model}, {count(cost.params_total)} parameters{active})"

    def _repr_html_(self) -> str:
        from explore.model.display import model_html

        return model_html(self)

    def _given(self, letter: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a block's fields; under a new width, without those derived from the old one."""
        block = self.blocks[letter]
        fields = dict(block)
        if "d_model" not in changes or type(block) is not STANDARD_LETTERS.get(letter):
            return fields
        try:
            default = dict(type(block).default(self.d_model))
        except ValueError:  # no heads divide the old width
            return fields
        return {name: value for name, value in fields.items() if name != "kind" and value != default[name]}

    @property
    def n_layers(self) -> int:
        """Number of layers, without multi-token prediction."""
        return len(self.pattern)

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The block config of every layer."""
        return tuple(self.blocks[letter] for letter in self.pattern)

    @property
    def family(self) -> str:
        """Name of the family in tables and figures."""
        return patterns.family(self.pattern, self.blocks)

    @property
    def std(self) -> float:
        """Standard deviation of initial weights."""
        return self.init_std or 0.896 / math.sqrt(self.d_model)

    def ledger(self, seq_len: int) -> Ledger:
        """Returns the ledger of all components over a sequence of `seq_len` tokens.

        Raises:
            ValueError: `seq_len` is not positive, or too large to count with.
        """
        if not 1 <= seq_len <= LARGEST:
            raise ValueError(f"seq_len must be at least 1 and at most {LARGEST}, got {echo(seq_len)}")
        d, vocab = self.d_model, self.vocab_size
        head = matrix("head", d, vocab, seq_len)
        # A tied matrix counts as the head's, which reads all of it.
        embedding = Entry("embedding") if self.tie_embeddings else Entry("embedding", d * vocab, d * vocab, d, row=d)
        return Ledger(
            seq_len,
            d,
            self.pattern,
            {letter: _part(self.blocks[letter], letter, d, seq_len) for letter in dict.fromkeys(self.pattern)},
            Part("", (embedding,), {"palm": {"embedding": 0}, "6nd": {"embedding": 0}}),
            Part("", (vector("norm", d), head), {"6nd": {"head": 0}}),
            () if self.mtp is None else self._mtp_parts(self.mtp, head, seq_len),
        )

    def cost(
        self,
        seq_len: int,
        *,
        weight_dtype: Dtype = "bfloat16",
        kv_dtype: Dtype = "bfloat16",
        state_dtype: Dtype = "float32",
        activation_dtype: Dtype = "bfloat16",
    ) -> Cost:
        """Totals for sequences and contexts of `seq_len` tokens."""
        return Cost.of(self.ledger(seq_len), Dtypes(weight_dtype, kv_dtype, state_dtype, activation_dtype))

    def build(self) -> LanguageModel:
        """Builds the module with random initial weights.

        Raises:
            ValueError: the weights do not fit into free memory.
        """
        import torch

        from explore.model.language_model import LanguageModel

        if torch.get_default_device().type == "cpu":
            cost = self.cost(1)
            needed = (cost.params_total + cost.params_mtp) * torch.get_default_dtype().itemsize
            total, free = memory_bytes()
            if needed > free:
                line = f"memory: the weights of the model need {size(needed)}, and {size(free)} are free"
                raise ValueError(line) from (MemoryError() if needed <= total else None)
        return LanguageModel(self)

    def _mtp_parts(self, mtp: MTPConfig, head: Entry, seq_len: int) -> tuple[Part, ...]:
        d = self.d_model
        around = (vector("embedding norm, hidden norm", 2 * d), matrix("eh_proj", 2 * d, d, seq_len))
        layers = [_part(self.blocks[letter], letter, d, seq_len) for letter in mtp.pattern]
        after = (vector("norm", d), head._replace(params=0, params_active=0))
        depth = [Part("", around, {"megatron": {"eh_proj": 0}}), *layers, Part("", after)]
        return tuple(
            replace(
                part,
                letter=MTP_LETTER,
                entries=tuple(_in_training(entry, stored=i < mtp.n_stored) for entry in part.entries),
            )
            for i in range(mtp.n_depths)
            for part in depth
        )


def _check_letters(blocks: Mapping[str, Any]) -> None:
    """Rejects a block that no pattern can use, or of unknown kind."""
    for letter, block in blocks.items():
        if len(patterns.canonical(str(letter))) != 1 or letter == patterns.MTP_MARK:
            raise ValueError(f"blocks: a letter must be one character that patterns can have, got {echo(letter)}")
        if letter not in STANDARD_LETTERS and isinstance(block, Mapping) and "kind" not in block:
            near = letter.upper() if letter.upper() in STANDARD_LETTERS else ""
            hint = f"did you mean {near!r}? " if near else ""
            known = " ".join(STANDARD_LETTERS)
            raise ValueError(f"blocks: unknown letter {letter!r}; {hint}known are {known}, and others with a kind")


def check_overrides(model: ModelConfig, overrides: Iterable[str]) -> None:
    """Rejects an override of a block that the model does not use, as it would have no effect.

    Args:
        overrides: `blocks.E.d_latent=64` or `model.blocks.E.d_latent=64`, among others.

    Raises:
        ValueError: the letter of an override is not in the pattern.
    """
    for override in overrides:
        field, *parts = override.partition("=")[0].removeprefix("model.").split(".")
        if field == "blocks" and parts and parts[0] not in model.blocks:
            raise ValueError(f"--set: the letter must be in the pattern {echo(model.pattern)}, got {echo(override)}")


def _sizes(config: type[BlockConfig], d_model: int, given: Collection[str]) -> dict[str, Any]:
    """Block sizes derived from `d_model`; empty if no heads divide it but all required sizes are given."""
    try:
        return config.default(d_model).model_dump()
    except ValueError:
        if all(name in given for name, field in config.model_fields.items() if field.is_required()):
            return {"kind": config.model_fields["kind"].default}
        raise


@lru_cache(maxsize=4096)
def _part(block: BlockConfig, letter: str, d_model: int, seq_len: int) -> Part:
    entries = (vector("input norm", d_model), *block.entries(d_model, seq_len))
    return Part(letter, entries, block.conventions(d_model, seq_len), block.lines)


def _in_training(entry: Entry, *, stored: bool) -> Entry:
    """An entry without its decoding state, and without its weights unless they are stored."""
    params = (entry.params, entry.params_active) if stored else (0, 0)
    return Entry(entry.component, *params, flops_seq=entry.flops_seq, sums_over=entry.sums_over)
