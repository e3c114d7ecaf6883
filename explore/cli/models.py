"""How commands find the model that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from explore.cli.app import note

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
    from explore.files import exists, read_json
    from explore.foreign import echo
    from explore.presets import from_released, is_released, language_part, preset

    content: dict[str, Any] = {"d_model": d_model, "vocab_size": vocab_size, "pattern": target}
    if target.endswith(".json") or (exists(Path(target)) and Path(target).is_file()):
        content = read_json(Path(target))
        if is_released(content):
            if (wrapper := language_part(content)[1]) is not None:
                note(f"{target} is a wrapper; its {wrapper} is read")
            content = from_released(content).model_dump(mode="json")
        for field in ("experiment", "model"):
            content = found if isinstance(found := content.get(field), dict) else content
    elif any(letter.islower() or letter.isdigit() for letter in target):  # a pattern has neither
        content = preset(target).model_dump(mode="json")
    for override in overrides:
        set_field(content, override.removeprefix("model."))
    if "pattern" not in content:
        raise ValueError(
            f"{target}: must be an experiment, a model (with the field pattern) or a config.json of nemotron_h, "
            f"got the fields {echo(', '.join(content))}"
        )
    return content
