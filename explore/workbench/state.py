"""The state of the controls of a workbench, the model that they describe, and the values of the sliders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from explore.blocks import KINDS, STANDARD_LETTERS, Stops, ladder
from explore.config import Config, explain
from explore.cost import HARDWARE, SEQ_LEN
from explore.model import ModelConfig
from explore.pattern import MTP_MARK
from explore.workbench.training import Training


class Controls(Config):
    """The values of the controls.

    Attributes:
        model: fields of the model; sizes of a block that are not given follow `d_model`. Multi-token prediction is part
            of the pattern, after its mark.
        seq_len: tokens per sequence, and in the context of decoding.
        batch_size: number of sequences decoded at once.
        hardware: name of a device of `explore.roofline`, or `here`.
        tab: the visible tab, decoding on one device or training on many.
        training: the training run.
        home: fields of the initial model, so that sliders can return to its sizes.
    """

    model: dict[str, Any]
    seq_len: PositiveInt = SEQ_LEN
    batch_size: PositiveInt = 1
    hardware: str = HARDWARE
    tab: Literal["decoding", "training"] = "decoding"
    training: Training = Field(default_factory=Training)
    home: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Controls:
        """Reads a state from JSON.

        Raises:
            ValueError: the state is not valid; the message is one line.
        """
        try:
            return cls.model_validate(dict(state))
        except ValidationError as error:
            raise ValueError(explain(error)) from None

    def build(self) -> ModelConfig:
        """Builds the model.

        Raises:
            ValueError: the model is not valid; the message is one line.
        """
        try:
            return ModelConfig.model_validate(self.fields)
        except ValidationError as error:
            raise ValueError(explain(error)) from None

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the model. Sizes of a block that do not fit together are replaced by the nearest that do.

        The state keeps the requested sizes and uses them again as soon as they fit.
        """
        fields = dict(self.model)
        if MTP_MARK not in str(fields.get("pattern", "")):
            fields.pop("mtp", None)
        blocks = {
            letter: {**block, **_settled(_sizes(fields, letter), letter)} for letter, block in _blocks(fields).items()
        }
        return {**fields, "blocks": {letter: block for letter, block in blocks.items() if block}}

    def sliders(self, model: ModelConfig) -> list[dict[str, Any]]:
        """Returns the sliders of the model that this state builds.

        Returns:
            Records of `path` in the state, `letter` (empty if the slider belongs to no block), `label`, `value`, and
            the possible `values`; each of them gives a valid model.
        """
        plain = {"d_model": ladder(64, 16_384, 64, 8), "vocab_size": ladder(256, 262_144, 256, 4)}
        if self.tab == "decoding":
            plain |= {"seq_len": ladder(64, 2**20, 16, 4), "batch_size": ladder(1, 1024, 1, 2)}
        records = []
        for name, steps in plain.items():
            owner = self.model if name in ModelConfig.model_fields else self.model_dump()
            path = ["model", name] if owner is self.model else [name]
            records.append(_slider(path, "", owner[name], Stops(tuple(steps)), self.home.get(name)))
        if self.tab == "training":
            for name, values in self.training.stops().items():
                value = getattr(self.training, name)
                records.append(_slider(["training", name], "", value, Stops(tuple(values))))
        for letter, block in model.blocks.items():
            home, default = _blocks(self.home).get(letter, {}), _default(model.d_model, letter)
            for name, stops in block.stops(model.d_model).items():
                path = ["model", "blocks", letter, name]
                records.append(_slider(path, letter, getattr(block, name), stops, home.get(name), default.get(name)))
        return records


def content_of(model: ModelConfig) -> dict[str, Any]:
    """The fields of a model for a state, without those that have their default value."""
    fields = model.model_dump(mode="json", exclude_defaults=True)
    fields["blocks"] = {
        letter: {"kind": block.kind, **block.model_dump(mode="json", exclude_defaults=True)}
        for letter, block in model.blocks.items()
    }
    if model.mtp is not None:
        fields["pattern"] += (MTP_MARK + model.mtp.pattern) * model.mtp.n_depths
        fields["mtp"] = {"shared": model.mtp.shared}
    return fields


def _blocks(fields: Mapping[str, Any]) -> dict[str, Any]:
    return dict(fields.get("blocks") or {})


def _default(d_model: Any, letter: str) -> dict[str, Any]:
    """Default sizes of a standard letter at a width; empty for other letters, or if no heads divide the width."""
    try:
        return STANDARD_LETTERS[letter].default(d_model).model_dump()
    except (KeyError, TypeError, ValueError):
        return {}


def _sizes(fields: Mapping[str, Any], letter: str) -> dict[str, Any]:
    block = _blocks(fields)[letter]
    return dict(block) if "kind" in block else {**_default(fields.get("d_model"), letter), **block}


def _settled(sizes: Mapping[str, Any], letter: str) -> dict[str, int]:
    """Changes to the sizes of one block that make them fit together."""
    config = KINDS.get(sizes["kind"]) if isinstance(sizes.get("kind"), str) else STANDARD_LETTERS.get(letter)
    return config.settled(sizes) if config is not None else {}


def _slider(path: list[str], letter: str, value: int | None, stops: Stops, *more: int | None) -> dict[str, Any]:
    values = {*stops.values, value, *(extra for extra in more if stops.open and extra is not None)}
    ordered = sorted(values, key=lambda step: -1 if step is None else step)
    return {"path": path, "letter": letter, "label": path[-1], "value": value, "values": ordered}
