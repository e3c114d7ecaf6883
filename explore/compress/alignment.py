"""Alignment of two configs: which layers of a parent a smaller model keeps, and what it keeps of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from explore.blocks import BlockConfig
from explore.compress.cutting import fields
from explore.model import ModelConfig


class Part(NamedTuple):
    """What becomes of one layer of the parent.

    Attributes:
        layer: its index in the parent.
        nth: how many layers of its kind come before it.
        block: its config.
        child: what the child has of it; None where the layer is left out, or is one of several that were fused.
        fused: it is one of several layers that became fewer, wider ones.
        share: parameters of the child over those of the layer; of all fused ones together where it is fused.
        kept_in: share of all ways to align the models in which the layer is kept; 1 or 0 where nothing is left open.
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
        """Whether other choices than the one that was taken keep the layer or leave it out."""
        return 0 < self.kept_in < 1

    @property
    def changes(self) -> dict[str, tuple[int, int]]:
        """Sizes that the child has less of, before and after."""
        return {} if self.child is None or self.child is self.block else _changes(self.block, self.child)

    @property
    def treatment(self) -> str:
        """What becomes of the layer, in words."""
        if self.fused:
            return "fused"
        if self.child is None:
            return "left out"
        return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.changes.items()) or "kept"


@dataclass(frozen=True, eq=False)
class Alignment:
    """A smaller model as a cut of a parent.

    Attributes:
        parts: one for each layer of the parent.
        ways: ways to choose the layers that give the child's layers in order; None where layers were fused.
        fused: what fused layers became.
    """

    parent: ModelConfig
    child: ModelConfig
    parts: tuple[Part, ...]
    ways: int | None
    fused: tuple[BlockConfig, ...] = ()

    @property
    def dropped(self) -> list[int]:
        """Indices of the layers that are left out."""
        return [part.layer for part in self.parts if part.child is None and not part.fused]

    def sizes(self) -> dict[str, int]:
        """Sizes for `Cutter.plan`, layer by layer.

        Raises:
            ValueError: layers were fused, which is no cut.
        """
        if self.fused:
            n = sum(part.fused for part in self.parts)
            raise ValueError(f"like: {n} layers became {len(self.fused)} wider ones, and a cut cannot fuse layers")
        sizes = {f"{p.layer}.{name}": new for p in self.parts for name, (_, new) in p.changes.items()}
        narrower = self.child.d_model < self.parent.d_model
        return {"d_model": self.child.d_model, **sizes} if narrower else sizes


def align(parent: ModelConfig, child: ModelConfig) -> Alignment:
    """Finds the layers of a parent that a child can have been cut from.

    A layer of the child fits one of the parent that has the same kind and is in no size smaller. Of several choices the
    one with the earliest layers is taken: which layers were really kept, only the weights could say. Layers of the
    child that are wider than any of the parent's are taken for fused ones: then the layers behind them are aligned from
    the end, and those of the same kind in between are fused.

    Raises:
        ValueError: the child is wider, has other options, or layers that fit none.
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
    """Whether a layer of a child can be a cut of one of its parent; each pair of configs is compared once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], bool] = {}

    def __call__(self, child: BlockConfig, parent: BlockConfig) -> bool:
        pair = (id(child), id(parent))  # layers of one letter are one config
        if pair not in self._known:
            self._known[pair] = self.alike(child, parent) and not _larger(child, parent)
        return self._known[pair]

    @staticmethod
    def alike(child: BlockConfig, parent: BlockConfig) -> bool:
        """Whether two layers differ in their sizes only."""
        return type(child) is type(parent) and _options(child) == _options(parent)


def _earliest(parent: Sequence[BlockConfig], child: Sequence[BlockConfig], fits: _Fit) -> list[int]:
    """Indices of the parent's layers that fit the child's, each as early as it can be."""
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
    """How many choices of the parent's layers give the child's, and the share of them that has each layer."""
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
    """Fields of a block that no cut changes."""
    sizes = fields(block.axes())
    return {name: getattr(block, name) for name in type(block).model_fields if name not in sizes}


def _larger(child: BlockConfig, parent: BlockConfig) -> list[str]:
    """Sizes that a layer of the child has more of."""
    sizes = _sizes(parent)
    return [name for name, n in _sizes(child).items() if n > sizes[name]]


def _distinct(blocks: Sequence[BlockConfig]) -> list[BlockConfig]:
    return list({id(block): block for block in blocks}.values())


def _too_wide(child: Sequence[BlockConfig], parent: Sequence[BlockConfig], fits: _Fit) -> list[int]:
    """Indices of the child's layers that only their sizes keep from all of the parent's of their kind."""
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
