"""What the controls of a workbench are set to, which model that is, and what its sliders may be moved to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, PositiveInt, ValidationError

from explore.blocks import STANDARD_LETTERS, BlockConfig
from explore.config import Config, explain
from explore.model import ModelConfig
from explore.pattern import MTP_MARK

Choices = list[int | None]
"""What a slider stops at, in its order; None stands for a size that is left out."""

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "mamba2": ("d_state",),
    "attention": ("n_kv_heads",),
    "mla": ("kv_rank",),
    "mlp": ("d_ff",),
    "moe": ("n_experts", "top_k", "d_expert", "d_latent", "d_shared"),
}
"""Sizes that have a slider, by kind of block; a kind without an entry has none."""


class State(Config):
    """What the controls are set to.

    Attributes:
        model: fields of the model; the sizes of a block that are not given follow `d_model`. Multi-token prediction
            stands in the pattern, after its marks.
        seq_len: tokens of a sequence, and of the context of decoding.
        batch_size: sequences that are decoded at once.
        hardware: name of a device of `explore.roofline`, or `here`.
        home: the fields of the model that was begun with: sliders can return to its sizes.
    """

    model: dict[str, Any]
    seq_len: PositiveInt = 8192
    batch_size: PositiveInt = 1
    hardware: str = "H200"
    home: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> State:
        """A state from JSON.

        Raises:
            ValueError: the first thing that is wrong with it, in one line.
        """
        try:
            return cls.model_validate(dict(state))
        except ValidationError as error:
            raise ValueError(explain(error)) from None

    def build(self) -> ModelConfig:
        """The model.

        Raises:
            ValueError: the first thing that is wrong with it, in one line.
        """
        try:
            return ModelConfig.model_validate(self.fields)
        except ValidationError as error:
            raise ValueError(explain(error)) from None

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the model, in which sizes that cannot stand together in a block are the nearest that can.

        What was asked for stays in the state, and counts again as soon as it can.
        """
        fields = dict(self.model)
        if MTP_MARK not in str(fields.get("pattern", "")):
            fields.pop("mtp", None)
        blocks = {letter: {**block, **_settled(_sizes(fields, letter))} for letter, block in _blocks(fields).items()}
        return {**fields, "blocks": {letter: block for letter, block in blocks.items() if block}}

    def sliders(self, model: ModelConfig) -> list[dict[str, Any]]:
        """The sliders of the model that this state builds.

        Returns:
            Records of `path` in the state, `letter` (empty where it is none's), `label`, `value`, and the `values` it
            may be moved to: each of them builds.
        """
        plain = [
            ("d_model", _ladder(64, 16_384, 64, 8)),
            ("vocab_size", _ladder(256, 262_144, 256, 4)),
            ("seq_len", _ladder(64, 2**20, 16, 4)),
            ("batch_size", _ladder(1, 1024, 1, 2)),
        ]
        records = []
        for name, steps in plain:
            owner = self.model if name in ModelConfig.model_fields else self.model_dump()
            path = ["model", name] if owner is self.model else [name]
            records.append(_slider(path, "", owner[name], steps, self.home.get(name)))
        for letter, block in model.blocks.items():
            home, default = _blocks(self.home).get(letter, {}), _default(model.d_model, letter)
            for name in _FIELDS.get(block.kind, ()):
                value = getattr(block, name)
                if name == "d_shared" and value is None:
                    continue
                stops = _steps(name, block, model.d_model)
                extra = [] if name in ("n_kv_heads", "top_k") else [home.get(name), default.get(name)]
                records.append(_slider(["model", "blocks", letter, name], letter, value, stops, *extra))
        return records


def content_of(model: ModelConfig) -> dict[str, Any]:
    """The fields of a model as a state holds them: what is as it always is goes without saying."""
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
    """Sizes of a standard letter that follow the width; none for other letters, or where no heads divide it."""
    try:
        return STANDARD_LETTERS[letter].default(d_model).model_dump()
    except (KeyError, TypeError, ValueError):
        return {}


def _sizes(fields: Mapping[str, Any], letter: str) -> dict[str, Any]:
    block = _blocks(fields)[letter]
    return dict(block) if "kind" in block else {**_default(fields.get("d_model"), letter), **block}


def _settled(sizes: Mapping[str, Any]) -> dict[str, int]:
    """What has to change in the sizes of one block so that they can stand together."""
    changed = {}
    kv, heads = sizes.get("n_kv_heads"), sizes.get("n_heads")
    if isinstance(kv, int) and isinstance(heads, int) and kv >= 1 and heads >= 1 and heads % kv:
        changed["n_kv_heads"] = max(n for n in _divisors(heads) if n <= kv)
    top_k, experts = sizes.get("top_k"), sizes.get("n_experts")
    if isinstance(top_k, int) and isinstance(experts, int) and top_k > experts:
        changed["top_k"] = experts
    return changed


def _steps(name: str, block: BlockConfig, d_model: int) -> Choices:
    """What a size of a block may be, beside what it is."""
    if name == "n_kv_heads":
        return [*_divisors(block.n_heads)]  # type: ignore[attr-defined]
    if name == "n_experts":
        return [*_ladder(2, 1024, 1, 4)]
    if name == "top_k":
        return [*_ladder(1, min(64, block.n_experts), 1, 8)]  # type: ignore[attr-defined]
    if name == "d_state":
        return [*_ladder(8, 512, 8, 2)]
    if name == "d_latent":
        # The equivalents of a standard MoE, `latent_eff` and `latent_acc`, need a divisor of the width.
        return [None, *_ladder(16, d_model, 16, 8), *(d_model // k for k in (2, 3, 4, 6, 8, 16) if d_model % k == 0)]
    return [*_ladder(16, 8 * d_model if name in ("d_ff", "d_shared") else 4 * d_model, 16, 8)]


def _slider(path: list[str], letter: str, value: int | None, steps: Any, *more: int | None) -> dict[str, Any]:
    values = {*steps, value, *(extra for extra in more if extra is not None)}
    ordered = sorted(values, key=lambda step: -1 if step is None else step)
    return {"path": path, "letter": letter, "label": path[-1], "value": value, "values": ordered}


def _ladder(low: int, high: int, step: int, per_octave: int) -> Iterator[int]:
    """From `low` to `high` in multiples of `step`, and no more than `per_octave` of them to a doubling."""
    value = low
    while value <= high:
        yield value
        value += max(step, 2 ** (value.bit_length() - 1) // per_octave)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
