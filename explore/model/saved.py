"""What a model keeps for its backward pass, layer by layer, in two conventions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from explore.blocks import BlockConfig
from explore.cost import MTP_LETTER, Saved
from explore.model.config import ModelConfig

SavedConvention = Literal["exact", "megatron"]
FUSED = frozenset({"fused_attention", "memory_efficient_permutation", "no_dropout"})
"""Settings of Megatron-LM as it trains today."""


class SavedRow(NamedTuple):
    """A tensor with its place; embedding, last norm, loss and multi-token prediction have no layer."""

    layer: int | None
    letter: str
    saved: Saved


def saved_rows(model: ModelConfig, seq_len: int, convention: SavedConvention) -> Iterator[SavedRow]:
    """Every tensor that one sequence keeps in training.

    `exact` is what this kit keeps in fp32 on a CPU by its default paths, down to the last byte. `megatron` is what
    Megatron-LM keeps of the layers in bf16, nothing recomputed; its loss is counted where a pipeline is.
    """
    if convention == "megatron":
        for layer, letter in enumerate(model.pattern):
            yield SavedRow(layer, letter, Saved("input norm", "norm", model.d_model * seq_len))
            for tensor in model.blocks[letter].saved(model.d_model, seq_len):
                if tensor.kept(FUSED):
                    yield SavedRow(layer, letter, tensor)
        return
    d = model.d_model
    yield SavedRow(None, "", Saved("embedding", "linear input", seq_len, "int64"))  # tokens
    for layer, letter in enumerate(model.pattern):
        for tensor in _layer(model.blocks[letter], d, seq_len):
            yield SavedRow(layer, letter, tensor)
    yield SavedRow(None, "", Saved("norm", "norm", (d + 1) * seq_len, "float32"))
    # The loss makes its gradient at once and keeps that, not the logits.
    yield SavedRow(None, "", Saved("head", "linear input", d * seq_len, "float32"))
    depths = 0 if model.mtp is None else min(model.mtp.n_depths, seq_len - 1)
    for tensor in (tensor for depth in range(1, depths + 1) for tensor in _depth(model, depth, seq_len)):
        yield SavedRow(None, MTP_LETTER, tensor)


def _layer(block: BlockConfig, d_model: int, seq_len: int) -> Iterator[Saved]:
    yield Saved("input norm", "norm", (d_model + 1) * seq_len, "float32")
    yield from block.kept(d_model, seq_len)


def _depth(model: ModelConfig, depth: int, seq_len: int) -> Iterator[Saved]:
    """What a depth of multi-token prediction keeps; it is shorter by one token than the one before."""
    assert model.mtp is not None
    d, length = model.d_model, seq_len - depth
    # The hidden state is the whole of what the depth before gives, of which the last position is left out.
    norms = d * (length + 1) + (d + 2) * length
    yield Saved("embedding norm, hidden norm", "norm", norms, "float32")
    yield Saved("eh_proj", "linear input", 2 * d * length, "float32")
    for letter in model.mtp.pattern:
        yield from _layer(model.blocks[letter], d, length)
    yield Saved("norm", "norm", (d + 1) * length, "float32")
    yield Saved("head", "linear input", d * length, "float32")


def saved_table(model: ModelConfig, seq_len: int) -> list[dict[str, Any]]:
    """Elements and bytes that a token keeps on average, by letter and group, in both conventions.

    Returns:
        Records of convention, letter, group, layers, numel and bytes; those of a letter are of all its layers.
    """
    records: list[dict[str, Any]] = []
    conventions: tuple[SavedConvention, ...] = ("exact", "megatron")
    for convention in conventions:
        groups: dict[tuple[str, str], list[Saved]] = {}
        for row in saved_rows(model, seq_len, convention):
            groups.setdefault((row.letter, row.saved.group), []).append(row.saved)
        for (letter, group), tensors in groups.items():
            records.append(
                {
                    "convention": convention,
                    "letter": letter,
                    "group": group,
                    "layers": model.pattern.count(letter) if letter else 0,
                    "numel": sum(tensor.numel_seq for tensor in tensors) / seq_len,
                    "bytes": sum(tensor.n_bytes() for tensor in tensors) / seq_len,
                }
            )
    return records


def saved_bytes_of(model: ModelConfig, seq_len: int) -> Mapping[SavedConvention, float]:
    """Bytes that one sequence keeps, in both conventions."""
    return {
        convention: sum(row.saved.n_bytes() for row in saved_rows(model, seq_len, convention))
        for convention in ("exact", "megatron")
    }
