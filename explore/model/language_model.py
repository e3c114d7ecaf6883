"""The model: what a pattern and its blocks come to, as numbers and as a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from pydantic import PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator
from torch import Tensor, nn

from explore import pattern as patterns
from explore.blocks import STANDARD_LETTERS, AnyBlock, BlockConfig, MoE, RouterStats
from explore.config import Config, Frozen
from explore.cost import Cost, Dtype, Entry, Ledger, Row, matrix, vector
from explore.ops import linear_cross_entropy

_WIDTH: TypeAdapter[int] = TypeAdapter(PositiveInt)


class ModelConfig(Config):
    """A language model as a string of letters and a config for each.

    Attributes:
        pattern: one letter a layer; a layer is `x + mixer(norm(x))`.
        blocks: config of each letter. A standard letter gets the sizes that are not given from `d_model`,
            unless its `kind` is given, which asks for all of them; a letter that the pattern does not
            use is dropped.
        tie_embeddings: the head uses the embedding's matrix.
        init_std: standard deviation of initial weights; 0.896 / sqrt(d_model), as in Nemotron 3, when absent.
    """

    d_model: PositiveInt
    vocab_size: PositiveInt
    pattern: str
    blocks: Frozen[str, AnyBlock]
    tie_embeddings: bool = False
    norm_eps: PositiveFloat = 1e-5
    init_std: PositiveFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("pattern"), str):
            return data
        blocks = data.get("blocks") or {}
        if not isinstance(blocks, Mapping):
            return data
        pattern = data["pattern"]
        patterns.check_pattern(pattern, blocks.keys() | STANDARD_LETTERS.keys())
        pattern = patterns.canonical(pattern)
        d_model = data.get("d_model")
        chosen = {}
        for letter in dict.fromkeys(pattern):
            block = blocks.get(letter, {})
            if letter in STANDARD_LETTERS and isinstance(block, Mapping) and "kind" not in block:
                try:
                    width = _WIDTH.validate_python(d_model)  # as the field reads it: "256" and 256.0 are 256
                except ValidationError:
                    return data  # the field's own error says why
                block = {**STANDARD_LETTERS[letter].default(width).model_dump(), **block}
            chosen[letter] = block
        return {**data, "pattern": pattern, "blocks": chosen}

    @property
    def n_layers(self) -> int:
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
        rows = [Row(None, "", entry) for entry in self._before()]
        for i, letter in enumerate(self.pattern):
            entries = _layer_entries(self.blocks[letter], self.d_model, _checked(seq_len))
            rows.extend(Row(i, letter, entry) for entry in entries)
        rows.extend(Row(None, "", entry) for entry in self._after(seq_len))
        return Ledger(seq_len, tuple(rows))

    def cost(self, seq_len: int, *, kv_dtype: Dtype = "bfloat16", state_dtype: Dtype = "float32") -> Cost:
        """Totals over a sequence of `seq_len` tokens; dtypes are those of the decoding state."""
        return self.ledger(seq_len).cost(kv_dtype, state_dtype)

    def build(self) -> LanguageModel:
        """The module with freshly drawn weights."""
        return LanguageModel(self)

    def _before(self) -> tuple[Entry, ...]:
        return (vector("embedding", self.vocab_size * self.d_model),)

    def _after(self, seq_len: int) -> tuple[Entry, ...]:
        head = matrix("head", self.d_model, self.vocab_size, seq_len)
        if self.tie_embeddings:
            head = Entry("head (tied)", flops_seq=head.flops_seq)
        return (vector("norm", self.d_model), head)


def _checked(seq_len: int) -> int:
    if seq_len < 1:
        raise ValueError(f"seq_len: {seq_len} is not allowed; at least 1 is")
    return seq_len


@lru_cache(maxsize=4096)
def _layer_entries(block: BlockConfig, d_model: int, seq_len: int) -> tuple[Entry, ...]:
    return (vector("input norm", d_model), *block.entries(d_model, seq_len))


class Layer(nn.Module):
    """One residual unit: x + mixer(norm(x))."""

    def __init__(self, block: BlockConfig, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.mixer = block.build(d_model)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"]
    ) -> tuple[Float[Tensor, "batch seq d_model"], RouterStats | None]:
        y, stats = self.mixer(self.norm(x))
        return x + y, stats


class Loss(NamedTuple):
    """What one batch costs.

    Attributes:
        cross_entropy: mean over predicted tokens, in nats.
        aux_loss: sum of the layers' balance losses, coefficients included.
        stats: the router's statistics of every layer that has a router, by layer.
        n_targets: predicted tokens.
    """

    cross_entropy: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    stats: dict[int, RouterStats]
    n_targets: Int[Tensor, ""]


class LanguageModel(nn.Module):
    """Embedding, layers, norm, head.

    Matrices start with `ModelConfig.std`; those that write to the residual stream with that divided by
    the square root of the number of layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(block, config.d_model, config.norm_eps) for block in config.layers)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew from torch's global generator."""
        std, out_std = self.config.std, self.config.std / math.sqrt(self.config.n_layers)
        nn.init.normal_(self.embedding.weight, std=std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=std)
        self.norm.reset_parameters()
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.norm.reset_parameters()
            layer.mixer.init_weights(std, out_std)

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab_size"]:
        """Logits of the next token at every position."""
        hidden, _ = self.hidden(tokens)
        logits: Tensor = self.head(hidden)
        return logits

    def hidden(
        self, tokens: Int[Tensor, "batch seq"]
    ) -> tuple[Float[Tensor, "batch seq d_model"], dict[int, RouterStats]]:
        """What the head reads, and the router's statistics by layer."""
        x = self.embedding(tokens)
        stats: dict[int, RouterStats] = {}
        for i, layer in enumerate(self.layers):
            x, layer_stats = layer(x)
            if layer_stats is not None:
                stats[i] = layer_stats
        return self.norm(x), stats

    def loss(self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]) -> Loss:
        """Mean cross-entropy over the targets that are not -100."""
        hidden, stats = self.hidden(tokens)
        n_targets = (targets != -100).sum()
        total = linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.flatten())
        aux_loss = sum((s.aux_loss for s in stats.values()), start=hidden.new_zeros(()))
        return Loss(total / n_targets, aux_loss, stats, n_targets)

    def moe_layers(self) -> dict[int, MoE]:
        """The layers with a router, by index."""
        return {i: layer.mixer for i, layer in enumerate(self.layers) if isinstance(layer.mixer, MoE)}
