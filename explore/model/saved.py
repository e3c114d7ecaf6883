"""Tensors that a model saves for the backward pass, layer by layer, in two conventions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from explore.blocks import BlockConfig
from explore.cost import MTP_LETTER, Saved
from explore.model.config import ModelConfig

SavedConvention = Literal["exact", "megatron"]
FUSED = frozenset({"fused_attention", "memory_efficient_permutation", "no_dropout"})
"""Settings of Megatron-LM in common use today."""


class SavedRow(NamedTuple):
    """A saved tensor and its layer; None for embedding, final norm, loss and multi-token prediction."""

    layer: int | None
    letter: str
    saved: Saved


def saved_rows(model: ModelConfig, seq_len: int, convention: SavedConvention) -> Iterator[SavedRow]:
    """Yields every tensor saved for one sequence in training.

    `exact` counts what this kit saves (fp32, CPU, default paths), exact to the byte. `megatron` counts what
    Megatron-LM saves for the layers in bf16 without recomputation; pipeline plans count its loss separately.
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
    # The loss computes its gradient at once and keeps that instead of the logits.
    yield SavedRow(None, "", Saved("head", "linear input", d * seq_len, "float32"))
    depths = 0 if model.mtp is None else min(model.mtp.n_depths, seq_len - 1)
    for tensor in (tensor for depth in range(1, depths + 1) for tensor in _depth(model, depth, seq_len)):
        yield SavedRow(None, MTP_LETTER, tensor)


def _layer(block: BlockConfig, d_model: int, seq_len: int) -> Iterator[Saved]:
    yield Saved("input norm", "norm", (d_model + 1) * seq_len, "float32")
    yield from block.kept(d_model, seq_len)


def _depth(model: ModelConfig, depth: int, seq_len: int) -> Iterator[Saved]:
    """Yields the tensors saved by one depth of multi-token prediction, one token shorter than the previous depth."""
    assert model.mtp is not None
    d, length = model.d_model, seq_len - depth
    # The hidden state is a view of the previous depth's whole output, without the last position.
    norms = d * (length + 1) + (d + 2) * length
    yield Saved("embedding norm, hidden norm", "norm", norms, "float32")
    yield Saved("eh_proj", "linear input", 2 * d * length, "float32")
    for letter in model.mtp.pattern:
        yield from _layer(model.blocks[letter], d, length)
    yield Saved("norm", "norm", (d + 1) * length, "float32")
    yield Saved("head", "linear input", d * length, "float32")


def saved_table(model: ModelConfig, seq_len: int) -> list[dict[str, Any]]:
    """Mean elements and bytes saved per token, by letter and group, in both conventions.

    Returns:
        Records of convention, letter, group, layers, numel and bytes; the numbers of a letter cover all its layers.
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
    """Bytes saved per sequence, in both conventions."""
    return {
        convention: sum(row.saved.n_bytes() for row in saved_rows(model, seq_len, convention))
        for convention in ("exact", "megatron")
    }
