"""Aligns a smaller model with its parent: which layers it keeps, and which sizes of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from explore.blocks import BlockConfig
from explore.compress.cutting import fields
from explore.model import ModelConfig


class Part(NamedTuple):
    """The fate of one layer of the parent.

    Attributes:
        layer: its index in the parent.
        nth: number of layers of its kind before it.
        block: its config.
        child: config of the child's layer; None if the layer is removed or fused.
        fused: the layer is one of several that were merged into fewer, wider ones.
        share: parameters kept, as a fraction of the layer's; fused layers count together.
        kept_in: fraction of all possible alignments that keep the layer; 0 or 1 if it is certain.
    """

    layer: int
    nth: int
    block: BlockConfig
    child: BlockConfig | None
    fused: bool
    share: float
    kept_in: float

    @property
    def is_open(self) -> bool:
        """Whether some possible alignments keep the layer and others remove it."""
        return 0 < self.kept_in < 1

    @property
    def changes(self) -> dict[str, tuple[int, int]]:
        """Sizes that shrink, before and after."""
        return {} if self.child is None or self.child is self.block else _changes(self.block, self.child)

    @property
    def treatment(self) -> str:
        """Describes the layer's fate in words."""
        if self.fused:
            return "fused"
        if self.child is None:
            return "left out"
        return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.changes.items()) or "kept"


@dataclass(frozen=True, eq=False)
class Alignment:
    """A smaller model as a cut of a parent.

    Attributes:
        parts: one entry per layer of the parent.
        ways: number of possible alignments; None if layers were fused.
        fused: the wider layers that replaced the fused ones.
    """

    parent: ModelConfig
    child: ModelConfig
    parts: tuple[Part, ...]
    ways: int | None
    fused: tuple[BlockConfig, ...] = ()

    @property
    def dropped(self) -> list[int]:
        """Indices of removed layers."""
        return [part.layer for part in self.parts if part.child is None and not part.fused]

    def sizes(self) -> dict[str, int]:
        """Returns sizes for `Cutter.plan`, layer by layer.

        Raises:
            ValueError: layers were fused, which a cut cannot do.
        """
        if self.fused:
            n = sum(part.fused for part in self.parts)
            raise ValueError(f"like: {n} layers became {len(self.fused)} wider ones, and a cut cannot fuse layers")
        sizes = {f"{p.layer}.{name}": new for p in self.parts for name, (_, new) in p.changes.items()}
        narrower = self.child.d_model < self.parent.d_model
        return {"d_model": self.child.d_model, **sizes} if narrower else sizes


def align(parent: ModelConfig, child: ModelConfig) -> Alignment:
    """Finds parent layers from which the child's layers could have been cut.

    A child layer fits a parent layer of the same kind that is at least as large in every size. If several alignments
    fit, the one with the earliest layers is returned; only the weights could show which layers were really kept. Child
    layers wider than any of the parent's count as fused: the layers after them are then aligned from the end, and
    those of the same kind in between are fused.

    Raises:
        ValueError: the child is wider, has different options, or has a layer that fits none.
    """
    if child.d_model > parent.d_model:
        raise ValueError(f"like: d_model must be at most the parent's {parent.d_model}, got {child.d_model}")
    ours, theirs = parent.layers, child.layers
    fits = _Fit()
    wide = _too_wide(theirs, ours, fits)
    begin, end = (wide[0], wide[-1] + 1) if wide else (len(theirs), len(theirs))
    if wide and (wide != list(range(begin, end)) or len({block.kind for block in theirs[begin:end]}) > 1):
        raise ValueError("like: layers that are wider than the parent's must be of one kind and in one run")
    head = _earliest(ours, theirs[:begin], fits)
    tail = [len(ours) - 1 - i for i in _earliest(ours[::-1], theirs[end:][::-1], fits)][::-1]
    first, last = (head[-1] + 1 if head else 0), (tail[0] if tail else len(ours))
    if first > last:
        raise ValueError("like: the layers of the child must come in the parent's order, and do not")
    place = {i: j for j, i in enumerate(head)} | {i: end + k for k, i in enumerate(tail)}
    kind = theirs[begin].kind if wide else None
    fused = {i for i in range(first, last) if ours[i].kind == kind}
    if wide and len(fused) <= len(wide):
        raise ValueError(f"like: {len(wide)} layers are wider than the parent's, and there are none to fuse into them")
    share = _share([ours[i] for i in sorted(fused)], theirs[begin:end], parent.d_model, child.d_model) if wide else 0.0
    ways, kept_in = (None, None) if wide else _ways(ours, theirs, fits)
    parts, counts = [], dict.fromkeys((block.kind for block in ours), 0)
    for i, block in enumerate(ours):
        kept = theirs[place[i]] if i in place else None
        own = 0.0 if kept is None else _share([block], [kept], parent.d_model, child.d_model)
        often = kept_in[i] if kept_in is not None else float(i in place or i in fused)
        parts.append(Part(i, counts[block.kind], block, kept, i in fused, share if i in fused else own, often))
        counts[block.kind] += 1
    return Alignment(parent, child, tuple(parts), ways, tuple(theirs[begin:end]))


class _Fit:
    """Whether a child layer can be a cut of a parent layer; caches the result per pair of configs."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], bool] = {}

    def __call__(self, child: BlockConfig, parent: BlockConfig) -> bool:
        pair = (id(child), id(parent))  # layers of one letter are one config
        if pair not in self._known:
            self._known[pair] = self.alike(child, parent) and not _larger(child, parent)
        return self._known[pair]

    @staticmethod
    def alike(child: BlockConfig, parent: BlockConfig) -> bool:
        """Whether two layers differ only in sizes."""
        return type(child) is type(parent) and _options(child) == _options(parent)


def _earliest(parent: Sequence[BlockConfig], child: Sequence[BlockConfig], fits: _Fit) -> list[int]:
    """Returns the earliest parent layers that fit the child's."""
    found: list[int] = []
    for j, block in enumerate(child):
        after = found[-1] + 1 if found else 0
        place = next((i for i in range(after, len(parent)) if fits(block, parent[i])), None)
        if place is None:
            why = _why(block, parent)
            raise ValueError(f"like: layer {j} of {len(child)}, {block.kind}, must fit a layer of the parent: {why}")
        found.append(place)
    return found


def _ways(parent: Sequence[BlockConfig], child: Sequence[BlockConfig], fits: _Fit) -> tuple[int, list[float]]:
    """Counts the possible alignments, and the fraction that keeps each parent layer."""
    before = [[1] + [0] * len(child)]  # by layers of the parent and of the child that are behind
    for block in parent:
        last = before[-1]
        taken = [0, *(n if fits(theirs, block) else 0 for n, theirs in zip(last, child, strict=False))]
        before.append([n + more for n, more in zip(last, taken, strict=True)])
    after = [[0] * len(child) + [1]]  # by those that are ahead
    kept = []
    for i in reversed(range(len(parent))):
        ahead = after[-1]
        taken = [n if fits(theirs, parent[i]) else 0 for n, theirs in zip(ahead[1:], child, strict=True)]
        kept.append(sum(n * more for n, more in zip(before[i], taken, strict=False)))
        after.append([n + more for n, more in zip(ahead, [*taken, 0], strict=True)])
    total = before[-1][-1]
    return total, [n / total for n in reversed(kept)]


def _sizes(block: BlockConfig) -> dict[str, int]:
    return {name: int(getattr(block, name)) for name in fields(block.axes())}


def _options(block: BlockConfig) -> Mapping[str, object]:
    """Returns the fields of a block that a cut never changes."""
    sizes = fields(block.axes())
    return {name: getattr(block, name) for name in type(block).model_fields if name not in sizes}


def _larger(child: BlockConfig, parent: BlockConfig) -> list[str]:
    """Returns the sizes in which the child's layer is larger."""
    sizes = _sizes(parent)
    return [name for name, n in _sizes(child).items() if n > sizes[name]]


def _distinct(blocks: Sequence[BlockConfig]) -> list[BlockConfig]:
    return list({id(block): block for block in blocks}.values())


def _too_wide(child: Sequence[BlockConfig], parent: Sequence[BlockConfig], fits: _Fit) -> list[int]:
    """Returns child layers that are too wide for every parent layer of their kind, and otherwise fit."""
    wide = set()
    for block in _distinct(child):
        alike = [other for other in _distinct(parent) if fits.alike(block, other)]
        if alike and not any(fits(block, other) for other in alike):
            wide.add(id(block))
    return [j for j, block in enumerate(child) if id(block) in wide]


def _why(block: BlockConfig, parent: Sequence[BlockConfig]) -> str:
    alike = [other for other in parent if type(other) is type(block)]
    if not alike:
        return f"it has no {block.kind}"
    ours, theirs = _options(block), _options(alike[0])
    other = [name for name in ours if ours[name] != theirs[name]]
    return f"{other[0]} is {ours[other[0]]}, not {theirs[other[0]]}" if other else "none is left after those before"


def _changes(block: BlockConfig, child: BlockConfig) -> dict[str, tuple[int, int]]:
    ours = _sizes(child)
    return {name: (n, ours[name]) for name, n in _sizes(block).items() if ours[name] != n}


def _share(parent: Sequence[BlockConfig], child: Sequence[BlockConfig], d_parent: int, d_child: int) -> float:
    return _params(child, d_child) / _params(parent, d_parent)


def _params(blocks: Sequence[BlockConfig], d_model: int) -> int:
    return sum(entry.params for block in blocks for entry in block.entries(d_model, 1))
