"""A model as numbers per kind of pipeline item: weights by how they are split, FLOPs, saved bytes, traffic.

Items are the letters of the pattern, then the embedding, multi-token prediction and the loss (final norm and head).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from explore.blocks import BlockConfig
from explore.cost import Cut, Entry, Saved
from explore.model import ModelConfig
from explore.plan.run import Run
from explore.plan.stages import EMBEDDING, LOSS, MTP, Stages

CUTS: tuple[Cut, ...] = ("tokens", "width", "expert width", "expert tokens")
LOGIT_BYTES = 6
"""Bytes per logit of the last stage: its softmax in fp32, and the logit or its gradient in bf16."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Numbers of every item; FLOPs and bytes are of one sequence.

    Attributes:
        names: names of the items.
        weights: parameters, (items, divided by tp | whole | experts, narrow products | not).
        flops: forward FLOPs, (items, narrow outside experts | experts | full width).
        divided: 1 if tensor-parallel ranks gather and scatter an item's tokens, else 0.
        d_routed: width of tokens sent to experts, 0 without experts; for multi-token prediction, the sum over
            its layers.
        top_k: experts per token.
    """

    model: ModelConfig
    seq_len: int
    names: tuple[str, ...]
    weights: Float[np.ndarray, "items 3 2"]
    flops: Float[np.ndarray, "items 3"]
    divided: Float[np.ndarray, " items"]
    d_routed: Float[np.ndarray, " items"]
    top_k: Float[np.ndarray, " items"]

    @property
    def flops_train(self) -> float:
        """Training FLOPs per token, without recomputation."""
        return 3 * self.model.cost(self.seq_len).flops_fwd

    def saved(self, run: Run) -> Float[np.ndarray, "items cuts"]:
        """Bytes saved per sequence and item, by how devices split them."""
        return _saved(self, run.settings, run.format.narrow)

    def recomputed(self, modules: tuple[str, ...]) -> Float[np.ndarray, " items"]:
        """Forward FLOPs recomputed per item; a product inside two recomputed modules counts once."""
        return _recomputed(self, modules)

    def context_numel(self, cp: int) -> Float[np.ndarray, " items"]:
        """Elements that a context-parallel rank sends in a forward pass for each of its tokens."""
        if cp == 1:
            return np.zeros(len(self.names))
        of = {letter: block.context_numel(cp) for letter, block in self.model.blocks.items()}
        depth = 0.0 if self.model.mtp is None else self.model.mtp.n_depths * sum(of[x] for x in self.model.mtp.pattern)
        return np.array([of.get(name, depth if name == MTP_NAME else 0.0) for name in self.names])

    def counts(self, stages: Stages) -> Float[np.ndarray, "pp vpp items"]:
        """How often each stage of each rank has each item."""
        letters = stages.letters(self.model.pattern)
        rows = [
            [layers.count(name) for name in self.names[:-3]] + [int(item in items) for item in (EMBEDDING, MTP, LOSS)]
            for layers, items in zip(letters, stages.items, strict=True)
        ]
        return np.array(rows, dtype=float).reshape(stages.vpp, stages.pp, len(self.names)).swapaxes(0, 1)

    def costs(self, stages_unit: int) -> list[float]:
        """Forward FLOPs of embedding, units, multi-token prediction if there is one, and loss."""
        of = dict(zip(self.names, self.flops.sum(axis=1), strict=True))
        pattern = self.model.pattern
        units = [sum(of[x] for x in pattern[i : i + stages_unit]) for i in range(0, len(pattern), stages_unit)]
        mtp = [of[MTP_NAME]] if self.model.mtp is not None else []
        return [0.0, *units, *mtp, of[LOSS_NAME]]


INPUT_NORM = "input norm"
EMBEDDING_NAME, MTP_NAME, LOSS_NAME = "embedding", "mtp", "loss"
WIDTH, WHOLE, EXPERTS = 0, 1, 2
DENSE, ROUTED, FULL = 0, 1, 2


@lru_cache(maxsize=256)
def profile(model: ModelConfig, seq_len: int) -> Profile:
    """The numbers of a model at a sequence length."""
    ledger, d = model.ledger(seq_len), model.d_model
    letters = tuple(ledger.blocks)
    names = (*letters, EMBEDDING_NAME, MTP_NAME, LOSS_NAME)
    weights, flops = np.zeros((len(names), 3, 2)), np.zeros((len(names), 3))
    divided, d_routed, top_k = np.zeros(len(names)), np.zeros(len(names)), np.zeros(len(names))
    blocks = {letter: model.blocks[letter] for letter in letters}
    for i, letter in enumerate(letters):
        part = ledger.blocks[letter]
        weights[i], flops[i] = _divided(part.entries, blocks[letter])
        divided[i] = float(weights[i, WIDTH].sum() > 0)
        d_routed[i], top_k[i] = _routed(part.entries, blocks[letter])
    depths = 0 if model.mtp is None else model.mtp.n_depths
    head = next(entry for entry in ledger.after.entries if entry.component == "head")
    weights[-3, WIDTH, 1] = ledger.before.total.params
    weights[-1, WIDTH, 1], weights[-1, WHOLE, 1] = head.params, ledger.after.total.params - head.params
    flops[-1, FULL] = (1 + depths) * head.flops_seq
    divided[-3] = 1 / 2  # tokens are scattered after the embedding, and gathered before the head
    divided[-1] = (1 + depths) / 2
    if model.mtp is not None:
        i = len(names) - 2
        for letter in model.mtp.pattern:
            block = model.blocks[letter]
            entries = _with_norm(block, d, seq_len)
            of_block, products = _divided(entries, block)
            weights[i] += of_block * model.mtp.n_stored
            flops[i] += products * depths
            divided[i] += depths * float(of_block[WIDTH].sum() > 0)
            width, k = _routed(entries, block)
            d_routed[i], top_k[i] = d_routed[i] + depths * width, max(top_k[i], k)
        weights[i, WIDTH, 0] += 2 * d * d * model.mtp.n_stored
        weights[i, WHOLE, 1] += 3 * d * model.mtp.n_stored
        flops[i, DENSE] += 2.0 * 2 * d * d * seq_len * depths
    if model.tie_embeddings:  # the first and the last stage each hold the matrix
        weights[-3, WIDTH, 1] = head.params
    return Profile(model, seq_len, names, weights, flops, divided, d_routed, top_k)


def _with_norm(block: BlockConfig, d_model: int, seq_len: int) -> tuple[Entry, ...]:
    return (Entry(INPUT_NORM, d_model, d_model, d_model), *block.entries(d_model, seq_len))


def _divided(entries: Iterable[Entry], block: BlockConfig) -> tuple[np.ndarray, np.ndarray]:
    weights, flops = np.zeros((3, 2)), np.zeros(3)
    for entry in entries:
        whole = entry.component in block.ranks.replicated or entry.component == INPUT_NORM
        cut = EXPERTS if entry.component in block.ranks.routed else WHOLE if whole else WIDTH
        narrow = bool(entry.params and entry.flops_seq) and entry.component not in block.ranks.full_width
        weights[cut, 0 if narrow else 1] += entry.params
        flops[(ROUTED if cut == EXPERTS else DENSE) if narrow else FULL] += entry.flops_seq
    return weights, flops


def _routed(entries: Iterable[Entry], block: BlockConfig) -> tuple[float, float]:
    """Width of the tokens sent to experts, and experts per token."""
    _, k = block.routing()
    return (sum(entry.all_to_all_numel for entry in entries) / (2 * k), float(k)) if k else (0.0, 0.0)


@lru_cache(maxsize=1024)
def _layer(block: BlockConfig, d_model: int, seq_len: int) -> tuple[Saved, ...]:
    """Tensors saved by one layer: the residual stream before its norm, and those of its block."""
    return (Saved(INPUT_NORM, "norm", d_model * seq_len), *block.saved(d_model, seq_len))


@lru_cache(maxsize=1024)
def _saved_of(
    block: BlockConfig, d_model: int, seq_len: int, settings: frozenset[str], narrow: float | None
) -> tuple[float, ...]:
    tensors = _layer(block, d_model, seq_len)
    if "full" in settings:
        tensors = tensors[:1]
    kept = [tensor for tensor in tensors if tensor.kept(settings)]
    return tuple(sum(tensor.n_bytes(narrow) for tensor in kept if tensor.cut == cut) for cut in CUTS)


@lru_cache(maxsize=256)
def _saved(profile: Profile, settings: frozenset[str], narrow: float | None) -> np.ndarray:
    model, seq_len, d = profile.model, profile.seq_len, profile.model.d_model
    of = {x: np.array(_saved_of(block, d, seq_len, settings, narrow)) for x, block in model.blocks.items()}
    rows = [of[letter] for letter in profile.names[:-3]]
    embedding, mtp, loss = np.zeros((3, len(CUTS)))
    depths = 0
    if model.mtp is not None:
        depths = model.mtp.n_depths
        mtp = depths * sum((of[letter] for letter in model.mtp.pattern), np.zeros(len(CUTS)))
        mtp[0] += depths * 2 * 4 * d * seq_len  # two norms' inputs, and the input of the projection, twice as wide
    loss[0] = 2 * 2 * d * seq_len
    loss[1] = (1 + depths) * LOGIT_BYTES * model.vocab_size * seq_len
    table: np.ndarray = np.stack([*rows, embedding, mtp, loss])
    table.flags.writeable = False
    return table


@lru_cache(maxsize=1024)
def _recomputed(profile: Profile, modules: tuple[str, ...]) -> np.ndarray:
    model, spent = profile.model, {}
    for letter, block in model.blocks.items():
        entries, of = block.entries(model.d_model, profile.seq_len), dict(block.ranks.recomputed)
        again = {component for module in modules for component in of.get(module, ())}
        spent[letter] = sum(
            entry.flops_seq for entry in entries if "full" in modules or entry.component in again
        )  # fmt: skip
    depth = 0.0 if model.mtp is None else model.mtp.n_depths * sum(spent[letter] for letter in model.mtp.pattern)
    return np.array([*(spent[letter] for letter in profile.names[:-3]), 0.0, depth, 0.0])
