"""How commands find the model that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explore.model import ModelConfig


def load_model(
    target: str, d_model: int = 256, vocab_size: int = 2048, overrides: list[str] | None = None
) -> ModelConfig:
    """The model that a pattern, a preset's name or a path stands for."""
    from explore.model import ModelConfig

    return ModelConfig.model_validate(model_content(target, d_model, vocab_size, overrides or []))


def model_content(target: str, d_model: int, vocab_size: int, overrides: list[str]) -> dict[str, Any]:
    """Fields of that model, before sizes that are not given are filled in."""
    from explore.config import set_field
    from explore.files import read_json
    from explore.presets import from_released, is_released, preset

    content: dict[str, Any] = {"d_model": d_model, "vocab_size": vocab_size, "pattern": target}
    if target.endswith(".json") or Path(target).is_file():
        content = read_json(Path(target))
        if is_released(content):
            content = from_released(content).model_dump(mode="json")
        content = content.get("experiment", content)
        content = content.get("model", content)
    elif any(letter.islower() or letter.isdigit() for letter in target):  # a pattern has neither
        content = preset(target).model_dump(mode="json")
    for override in overrides:
        set_field(content, override.removeprefix("model."))
    return content
