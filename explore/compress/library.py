"""The library of a trained parent: replacements of every layer, and the effect of each alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from explore.blocks import AnyBlock
from explore.compress.plan import LayerCut, LibraryBlock, Plan
from explore.compress.variants import How, Offer, variants
from explore.config import Config, FrozenJson
from explore.files import read_json, replacing
from explore.model import LanguageModel, ModelConfig
from explore.weights import read_block


class LibraryRequest(Config):
    """Settings for building a library.

    Attributes:
        offer: replacements to build.
        tokens: training tokens per replacement.
        lr: peak learning rate; None uses a fraction of the parent's.
        val_tokens: validation tokens for measuring each replacement in the parent.
        seed: seed of the reading order of the training split.
        by: ranking method that selects the initial indices of smaller blocks.
    """

    offer: Offer = Offer()
    tokens: PositiveInt = 524_288
    lr: PositiveFloat | None = None
    val_tokens: PositiveInt = 16_384
    seed: NonNegativeInt = 0
    by: str = "activation"


class Replacement(Config):
    """A trained and measured variant of a layer.

    Attributes:
        name: name in tables, such as `n_experts=4`.
        how: kind of change to the layer.
        block: its config; None if the layer is removed.
        digest: digest of its weights; None if it has none of its own.
        mse: squared error of its output relative to a zero output, on the validation split.
        kl: KL(parent || parent with only this replacement), on the validation split, in nats per token.
    """

    name: str
    how: How
    block: AnyBlock | None = None
    digest: str | None = None
    mse: float
    kl: float

    @property
    def layer_cut(self) -> LayerCut:
        """Returns the plan entry of a layer with this replacement."""
        if self.block is None:
            return LayerCut(drop=True)
        if self.digest is None:
            return LayerCut()
        return LayerCut(block=LibraryBlock(config=self.block, digest=self.digest))


class Library(Config):
    """Replacements for the layers of one parent.

    Attributes:
        key: hash (64 hexadecimal digits) of everything that affects the library.
        parent: digest of the parent's weights.
        parent_model: the parent's config.
        layers: replacements of every layer; the layer itself comes first.
        flops: FLOPs spent on scoring the parent and on training and measuring replacements.
        about: settings it was built with.
    """

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    parent: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    parent_model: ModelConfig
    layers: tuple[tuple[Replacement, ...], ...]
    flops: float
    about: FrozenJson

    @classmethod
    def load(cls, path: str | Path) -> Library:
        """Reads a library from JSON.

        Raises:
            ValueError: no such file, or an invalid field, named by its path.
        """
        return cls.validated(read_json(Path(path)), path)

    def save(self, path: str | Path) -> None:
        """Writes the library as JSON; its blocks are already stored beside it."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def sketch(cls, model: ModelConfig, offer: Offer) -> Library:
        """Returns an untrained, unmeasured library; its costs are exact."""
        nothing, pairs = "0" * 64, zip(model.pattern, model.layers, strict=True)
        layers = [
            [
                Replacement(
                    name=each.name,
                    how=each.how,
                    block=each.block,
                    digest=nothing if each.is_trained else None,
                    mse=0,
                    kl=0,
                )
                for each in variants(letter, block, offer)
            ]
            for letter, block in pairs
        ]
        about = {"run": "", "seq_len": 1}
        return cls.model_validate(
            {"key": nothing, "parent": nothing, "parent_model": model, "layers": layers, "flops": 0, "about": about}
        )

    def names(self, options: Sequence[int]) -> list[str]:
        """Names the replaced layers, such as `3 E: n_experts=4`."""
        letters = self.parent_model.pattern
        return [
            f"{i} {letters[i]}: {layer[k].name}" for i, (layer, k) in enumerate(zip(self.layers, options, strict=True))
        ]

    def plan(self, options: Sequence[int], **origin: str | bool | float | tuple[str, ...]) -> Plan:
        """Returns the plan of a child.

        Args:
            options: replacement index per layer.
            origin: how the choice was made.
        """
        chosen = [layer[option] for layer, option in zip(self.layers, options, strict=True)]
        names = tuple(name for name, each in zip(self.names(options), chosen, strict=True) if each.how != "whole")
        about = {"run": str(self.about["run"]), "by": "puzzle", "library": self.key, "replaced": names}
        return Plan.model_validate(
            {
                "parent": self.parent,
                "parent_model": self.parent_model,
                "layers": [each.layer_cut for each in chosen],
                "origin": {**about, "flops": self.flops, **origin},
            }
        )

    def child(self, parent: LanguageModel, options: Sequence[int], folder: Path) -> LanguageModel:
        """Builds the model of a choice.

        Args:
            parent: the library's parent model.
            folder: folder of the parent.
        """
        plan = self.plan(options)
        child = plan.model().build()
        child.load_state_dict(plan.cut_weights(parent.state_dict(), folder))
        return child.eval().to(parent.embedding.weight.device)


def mixer_of(replacement: Replacement, d_model: int, folder: Path) -> Any:
    """Loads the module of a replacement with its own weights."""
    assert replacement.block is not None
    assert replacement.digest is not None
    mixer = replacement.block.build(d_model)
    mixer.load_state_dict(read_block(folder, replacement.digest))
    return mixer.eval()


def find_library(folder: Path, key: str | None = None) -> Library:
    """Reads the library in the folder of a run.

    Args:
        key: key of the library or a prefix of it; required if there are several.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = {path.stem.removeprefix("library-"): path for path in sorted(folder.glob("library-*.json"))}
    fitting = [path for short, path in found.items() if key is None or short.startswith(key[:8])]
    if not fitting:
        raise ValueError(f"{folder}: has no library{'' if key is None else f' {key[:8]}'}; explore puzzle makes one")
    if len(fitting) > 1:
        raise ValueError(f"{folder}: has several libraries; name one of {', '.join(found)}")
    return Library.load(fitting[0])
