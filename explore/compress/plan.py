"""Plans: what a child keeps of its parent, as data to publish, replay and compare."""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from explore.blocks import STANDARD_LETTERS, AnyBlock, Axis, BlockConfig
from explore.checkpoints import load_model
from explore.compress.surgery import Indices, complete, cut, resized
from explore.config import Config, Frozen, added_later, explain
from explore.files import read_json, replacing
from explore.model import LanguageModel, ModelConfig
from explore.model.layout import model_layout
from explore.runs import RunFolder
from explore.weights import read_block, weights_digest

Matrix = tuple[tuple[float, ...], ...]
"""Rows of numbers."""

FRESH_LETTERS = string.ascii_lowercase + string.ascii_uppercase + "".join(map(chr, range(0x00C0, 0x0250)))
"""Extra letters for layers of one letter that now differ; letters in use are skipped."""


class LibraryBlock(Config):
    """A trained block that replaces a layer's mixer; the layer keeps the parent's norm.

    Attributes:
        config: config of the block.
        digest: `weights_digest` of its weights.
    """

    config: AnyBlock
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LayerCut(Config):
    """The part of one layer that is kept.

    Attributes:
        keep: kept indices by axis, ascending; unnamed axes are kept whole.
        rotate: matrix (size, kept) by axis; its columns are the directions that become the kept indices.
        drop: the layer is removed.
        block: library block that replaces the layer; excludes the other fields.
    """

    keep: Frozen[str, Indices] = Field(default_factory=dict, validate_default=True)
    rotate: Frozen[str, Matrix] = Field(default_factory=dict, validate_default=True)
    drop: bool = False
    block: LibraryBlock | None = added_later(None)

    @model_validator(mode="after")
    def _check(self) -> LayerCut:
        if self.block is not None and (self.drop or self.keep or self.rotate):
            raise ValueError("block: a layer that a block replaces must be neither left out nor cut")
        if self.drop and (self.keep or self.rotate):
            raise ValueError("drop: a layer that is left out must keep nothing")
        return self


class Plan(Config):
    """A child of a trained parent: kept layers, kept indices of their axes, and replacements of layers.

    Attributes:
        parent: digest of the parent's weights.
        parent_model: the parent's config.
        d_model: kept channels of the residual stream, shared by all weights; None keeps all.
        layers: one entry per layer of the parent.
        drop_mtp: remove multi-token prediction. If kept, its layers are cut only along `d_model`.
        norm_scales: factors on norm weights by name, one each or one per kept channel group. They compensate for
            the changed mean square over fewer channels.
        origin: how the plan was made, including `flops`. It affects nothing and is not in `fingerprint`.
    """

    parent: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    parent_model: ModelConfig
    d_model: Indices | None = None
    layers: tuple[LayerCut, ...]
    drop_mtp: bool = False
    norm_scales: Frozen[str, tuple[float, ...]] = Field(default_factory=dict, validate_default=True)
    origin: Frozen[str, str | bool | int | float | tuple[str, ...]] = Field(default_factory=dict, validate_default=True)

    @model_validator(mode="after")
    def _check(self) -> Plan:
        n_layers = self.parent_model.n_layers
        if len(self.layers) != n_layers:
            raise ValueError(f"layers: must have {n_layers} entries, one for each layer, got {len(self.layers)}")
        if all(layer.drop for layer in self.layers):
            raise ValueError(f"layers: at least 1 of {n_layers} must be kept, got none")
        self.model()
        return self

    def __repr__(self) -> str:
        kept = [layer for layer in self.layers if not layer.drop]
        cut = sum(bool(layer.keep) for layer in kept)
        width = self.parent_model.d_model if self.d_model is None else len(self.d_model)
        return (
            f"Plan(of {self.parent[:8]}, keeps {len(kept)} of {len(self.layers)} layers, {cut} of them cut, "
            f"d_model {width} of {self.parent_model.d_model})"
        )

    @classmethod
    def keep_all(cls, parent: RunFolder | str | Path | LanguageModel, **origin: str | bool | float) -> Plan:
        """Returns the plan that keeps everything.

        Args:
            parent: a trained run, or its model.
        """
        model = parent if isinstance(parent, LanguageModel) else load_model(parent)
        layers = (LayerCut(),) * model.config.n_layers
        digest = weights_digest(model.state_dict())
        return cls(parent=digest, parent_model=model.config, layers=layers, origin=origin)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan from JSON.

        Raises:
            ValueError: no such file, or an invalid field, named by its path.
        """
        return cls.validated(read_json(Path(path)), path)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, one line per layer."""
        content = self.model_dump(mode="json")
        layers = ",\n    ".join(map(_compact, content.pop("layers")))
        fields = [f"{json.dumps(name)}: {_compact(value)}" for name, value in content.items()]
        with replacing(path) as temporary:
            text = ",\n  ".join([*fields, f'"layers": [\n    {layers}\n  ]'])
            temporary.write_text(f"{{\n  {text}\n}}\n", encoding="utf-8")

    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that affects the child; omits how the plan was made."""
        content = super().fingerprint()
        del content["origin"]
        return content

    def key(self) -> str:
        """Hash (64 hexadecimal digits) of everything that affects the child."""
        return hashlib.sha256(json.dumps(self.fingerprint(), sort_keys=True).encode()).hexdigest()

    @property
    def flops(self) -> float:
        """FLOPs spent on making the plan: scores of the parent and candidates."""
        spent = self.origin.get("flops", 0)
        return float(spent) if isinstance(spent, int | float) else 0.0

    def model(self, parent: ModelConfig | None = None) -> ModelConfig:
        """Returns the child's config. Layers of one letter that now differ get new letters.

        Args:
            parent: config of the model to cut, to check that the plan is for it.

        Raises:
            ValueError: the plan is for another model, or the child is impossible.
        """
        whole = self.parent_model
        if parent is not None and parent != whole:
            raise ValueError("plan: must be for this model, and is for one of other sizes")
        kept = [(self._letter(i, block), block) for i, block in enumerate(self._blocks()) if block is not None]
        mtp = None if self.drop_mtp else whole.mtp
        fixed = dict.fromkeys([] if mtp is None else mtp.pattern)
        blocks = {letter: whole.blocks[letter] for letter in fixed}
        names: dict[tuple[str, BlockConfig], str] = {(letter, block): letter for letter, block in blocks.items()}
        counts = Counter(kept)
        free = (letter for letter in FRESH_LETTERS if letter not in {*STANDARD_LETTERS, *whole.blocks})
        for each in sorted(counts, key=lambda each: -counts[each]):  # the most frequent one keeps the letter
            if each not in names:
                letter, block = each
                name = letter if letter not in blocks else next(free)
                names[each], blocks[name] = name, block
        return ModelConfig.model_validate(
            {
                **{name: getattr(whole, name) for name in ModelConfig.model_fields},
                "d_model": whole.d_model if self.d_model is None else len(self._d_model()),
                "pattern": "".join(names[each] for each in kept),
                "blocks": blocks,
                "mtp": mtp,
            }
        )

    def apply(self, weights: Mapping[str, Tensor], folder: Path | None = None) -> dict[str, Tensor]:
        """Returns the child's weights, which load strictly into `self.model().build()`.

        Args:
            weights: all weights and buffers of the parent.
            folder: folder of the parent with its library blocks; required if blocks replace layers.

        Raises:
            ValueError: the weights are not the plan's parent, or a block is missing.
        """
        if (digest := weights_digest(weights)) != self.parent:
            raise ValueError(
                f"plan: is for a parent whose weights have the digest {self.parent[:12]}, got {digest[:12]}"
            )
        return self.cut_weights(weights, folder)

    def cut_weights(self, weights: Mapping[str, Tensor], folder: Path | None = None) -> dict[str, Tensor]:
        """Like `apply`, without checking the weights' digest."""
        whole, layout = self.parent_model, model_layout(self.parent_model)
        stream = Axis("d_model", whole.d_model)
        kept = [complete(block.axes(), layer.keep) for block, layer in zip(whole.layers, self.layers, strict=True)]
        new_index = iter(range(whole.n_layers))
        indices = {i: next(new_index) for i, layer in enumerate(self.layers) if not layer.drop}
        child: dict[str, Tensor] = {}
        for name, weight in weights.items():
            place = layout[name]
            if (place.layer is not None and place.layer not in indices) or (self.drop_mtp and name.startswith("mtp.")):
                continue
            if place.layer is not None and self.layers[place.layer].block is not None and ".mixer." in name:
                continue
            axes = () if place.block is None else place.block.axes()
            of_layer = complete(axes, {}) if place.layer is None else kept[place.layer]
            rotations = {} if place.layer is None else self._rotations(place.layer)
            remaining = {**of_layer, "d_model": self._d_model()}
            part = cut(weight, place.dims, (*axes, stream), remaining, rotations)
            if (factors := self.norm_scales.get(name)) is not None:
                part = part * torch.tensor(factors, dtype=part.dtype).repeat_interleave(len(part) // len(factors))
            if place.layer is not None:
                name = name.replace(f"layers.{place.layer}.", f"layers.{indices[place.layer]}.", 1)
            child[name] = part
        for i, layer in enumerate(self.layers):
            if layer.block is not None:
                if folder is None:
                    raise ValueError(
                        f"layers.{i}: the folder of the parent is required, for the block that replaces it"
                    )
                block, mixer = layer.block.config, f"layers.{indices[i]}.mixer."
                dims, axes = block.layout(), (*block.axes(), stream)
                whole_block = {**complete(block.axes(), {}), "d_model": self._d_model()}
                for name, weight in read_block(folder, layer.block.digest).items():
                    child[mixer + name] = cut(weight, dims[name], axes, whole_block)
        if whole.tie_embeddings and "embedding.weight" in child:
            child["head.weight"] = child["embedding.weight"]
        return child

    def _d_model(self) -> Indices:
        stream = Axis("d_model", self.parent_model.d_model)
        return complete((stream,), {} if self.d_model is None else {"d_model": self.d_model})["d_model"]

    def _letter(self, layer: int, block: BlockConfig) -> str:
        """Returns a layer's letter: the parent's, or the standard letter of a replacement of another kind."""
        kinds = {config: letter for letter, config in STANDARD_LETTERS.items()}
        is_of_kind = type(block) is type(self.parent_model.layers[layer])
        return self.parent_model.pattern[layer] if is_of_kind else kinds[type(block)]

    def _blocks(self) -> Iterator[BlockConfig | None]:
        """Returns the child's block at each parent layer; None if the layer is removed."""
        for i, (block, layer) in enumerate(zip(self.parent_model.layers, self.layers, strict=True)):
            if layer.drop:
                yield None
                continue
            if layer.block is not None:
                yield layer.block.config
                continue
            try:
                kept = complete(block.axes(), layer.keep)
                _check_rotations(block, layer, kept)
                yield resized(block, kept)
            except ValidationError as error:
                raise ValueError(f"layers.{i}: {explain(error)}") from None
            except ValueError as error:
                raise ValueError(f"layers.{i}: {error}") from None

    def _rotations(self, layer: int) -> dict[str, Tensor]:
        return {axis: torch.tensor(rows) for axis, rows in self.layers[layer].rotate.items()}


def _check_rotations(block: BlockConfig, layer: LayerCut, kept: Mapping[str, Indices]) -> None:
    axes = {axis.name: axis for axis in block.axes()}
    for name, rows in layer.rotate.items():
        axis = axes.get(name)
        if axis is None or not axis.rotatable:
            raise ValueError(f"rotate: {name} cannot be rotated without a change, because a norm or more reads it")
        shape = (axis.size, len(kept[name]))
        if len(rows) != shape[0] or {len(row) for row in rows} != {shape[1]}:
            raise ValueError(f"rotate: the matrix of {name} must have {shape[0]} rows of {shape[1]} numbers")


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
