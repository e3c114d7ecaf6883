"""The model as a config: what a pattern and its blocks come to, in numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator

from explore import pattern as patterns
from explore.blocks import STANDARD_LETTERS, AnyBlock, BlockConfig
from explore.config import Config, Frozen
from explore.cost import MTP_LETTER, Cost, Dtype, Dtypes, Entry, Ledger, Part, matrix, vector

if TYPE_CHECKING:
    from explore.model.language_model import LanguageModel

_WIDTH: TypeAdapter[int] = TypeAdapter(PositiveInt)


class MTPConfig(Config):
    """Multi-token prediction: depth k predicts the token that comes k after the next one.

    Attributes:
        pattern: layers of a depth, in letters of the model.
        n_depths: how many tokens beyond the next are predicted.
        shared: all depths use one set of weights, as in Nemotron 3; else each has its own.
    """

    pattern: str
    n_depths: PositiveInt = 1
    shared: bool = True

    @property
    def n_stored(self) -> int:
        """Sets of weights."""
        return 1 if self.shared else self.n_depths


class ModelConfig(Config):
    """A language model as a string of letters and a config for each.

    Attributes:
        pattern: one letter a layer; a layer is `x + mixer(norm(x))`. What follows a `/` is multi-token prediction,
            once for every depth, and becomes `mtp`.
        blocks: config of each letter. A standard letter gets the sizes that are not given from `d_model`,
            unless its `kind` is given, which asks for all of them; a letter that the pattern does not
            use is dropped.
        mtp: multi-token prediction; none when absent.
        tie_embeddings: the head uses the embedding's matrix.
        init_std: standard deviation of initial weights; 0.896 / sqrt(d_model), as in Nemotron 3, when absent.
    """

    d_model: PositiveInt
    vocab_size: PositiveInt
    pattern: str
    blocks: Frozen[str, AnyBlock]
    mtp: MTPConfig | None = None
    tie_embeddings: bool = False
    norm_eps: PositiveFloat = 1e-5
    init_std: PositiveFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
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

    @property
    def n_layers(self) -> int:
        """Layers, those of multi-token prediction apart."""
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
        """Itemises every component of every layer over a sequence of `seq_len` tokens.

        Raises:
            ValueError: `seq_len` is not positive.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len: {seq_len} is not allowed; at least 1 is")
        d, vocab = self.d_model, self.vocab_size
        head = matrix("head", d, vocab, seq_len)
        # A tied matrix is the head's: it is read whole there, whatever row the embedding took.
        embedding = Entry("embedding") if self.tie_embeddings else Entry("embedding", d * vocab, d * vocab, d)
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
        """Totals over a sequence, and a context, of `seq_len` tokens."""
        return Cost.of(self.ledger(seq_len), Dtypes(weight_dtype, kv_dtype, state_dtype, activation_dtype))

    def build(self) -> LanguageModel:
        """The module with freshly drawn weights."""
        from explore.model.language_model import LanguageModel

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


def _sizes(config: type[BlockConfig], d_model: int, given: Collection[str]) -> dict[str, Any]:
    """Sizes of a block that follow from `d_model`; none where no heads divide it and all that is required is given."""
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
    """What an entry counts where no decoding keeps its state; its weights only where they are stored."""
    params = (entry.params, entry.params_active) if stored else (0, 0)
    return Entry(entry.component, *params, flops_seq=entry.flops_seq, sums_over=entry.sums_over)
