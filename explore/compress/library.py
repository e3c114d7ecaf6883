"""The library of a trained parent: what can replace every layer, and what each replacement alone does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from explore.blocks import AnyBlock
from explore.compress.plan import LayerCut, LibraryBlock, Plan
from explore.compress.variants import How, Offer, variants
from explore.config import Config, FrozenJson, explain
from explore.files import read_json, replacing
from explore.model import LanguageModel, ModelConfig
from explore.weights import read_block


class LibraryRequest(Config):
    """How a library is made.

    Attributes:
        offer: which replacements there are.
        tokens: of the training split on which every replacement is trained.
        lr: peak learning rate; a share of the parent's when absent.
        val_tokens: of the validation split on which each is measured in the parent.
        seed: of the order in which the training split is read.
        by: what ranks the indices with which smaller blocks begin.
    """

    offer: Offer = Offer()
    tokens: PositiveInt = 524_288
    lr: PositiveFloat | None = None
    val_tokens: PositiveInt = 16_384
    seed: NonNegativeInt = 0
    by: str = "activation"


class Replacement(Config):
    """A variant of a layer, trained and measured.

    Attributes:
        name: for tables, such as `n_experts=4`.
        how: what is done to the layer.
        block: its config; None where the layer is left out.
        digest: of its weights; None where it has none of its own.
        mse: squared error of its output over that of no output at all, on the validation split.
        kl: of the parent from the parent with this replacement alone, on the validation split, in nats per token.
    """

    name: str
    how: How
    block: AnyBlock | None = None
    digest: str | None = None
    mse: float
    kl: float

    @property
    def layer_cut(self) -> LayerCut:
        """What a plan says of a layer that this stands for."""
        if self.block is None:
            return LayerCut(drop=True)
        if self.digest is None:
            return LayerCut()
        return LayerCut(block=LibraryBlock(config=self.block, digest=self.digest))


class Library(Config):
    """What can replace the layers of one parent.

    Attributes:
        key: 64 hexadecimal digits over everything that decides the library.
        parent: digest of the parent's weights.
        parent_model: the parent's config.
        layers: the replacements of every layer, the layer itself first.
        flops: that were spent on the scores of the parent, on training the replacements, and on measuring them.
        about: how it was made.
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
            ValueError: no such file, or a field that is not allowed, by its path.
        """
        try:
            return cls.model_validate(read_json(Path(path)))
        except ValidationError as error:
            raise ValueError(f"{path}: {explain(error)}") from None

    def save(self, path: str | Path) -> None:
        """Writes the library as JSON; its blocks lie beside it already."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def sketch(cls, model: ModelConfig, offer: Offer) -> Library:
        """A library that was neither trained nor measured: it has the costs of one that is."""
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
        """What stands for each layer, as `3 E: n_experts=4`."""
        letters = self.parent_model.pattern
        return [
            f"{i} {letters[i]}: {layer[k].name}" for i, (layer, k) in enumerate(zip(self.layers, options, strict=True))
        ]

    def plan(self, options: Sequence[int], **origin: str | bool | float | tuple[str, ...]) -> Plan:
        """The plan of a child.

        Args:
            options: index of the replacement of every layer.
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
        """The model of a choice.

        Args:
            parent: with the weights that the library is for.
            folder: of the parent.
        """
        plan = self.plan(options)
        child = plan.model().build()
        child.load_state_dict(plan.cut_weights(parent.state_dict(), folder))
        return child.eval().to(parent.embedding.weight.device)


def mixer_of(replacement: Replacement, d_model: int, folder: Path) -> Any:
    """The module of a replacement that has weights of its own."""
    assert replacement.block is not None
    assert replacement.digest is not None
    mixer = replacement.block.build(d_model)
    mixer.load_state_dict(read_block(folder, replacement.digest))
    return mixer.eval()


def find_library(folder: Path, key: str | None = None) -> Library:
    """The library in the folder of a run.

    Args:
        key: of the library, or how it begins; required where there are several.

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
