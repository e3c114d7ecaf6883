"""Find the model that the user names on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from explore.cli.app import note
from explore.cost import D_MODEL, VOCAB_SIZE

if TYPE_CHECKING:
    from explore.model import ModelConfig

IN_FOLDERS = ("experiment.json", "model.json", "config.json")
"""Files that hold the model: of a run folder, of a folder that import wrote, and of a transformers checkpoint."""


def load_model(
    target: str, d_model: int | None = None, vocab_size: int | None = None, overrides: list[str] | None = None
) -> ModelConfig:
    """The model of a pattern, a preset, a run or a path."""
    from explore.model import ModelConfig, check_overrides

    model = ModelConfig.model_validate(model_content(target, d_model, vocab_size, overrides or []))
    check_overrides(model, overrides or [])
    return model


def model_content(target: str, d_model: int | None, vocab_size: int | None, overrides: list[str]) -> dict[str, Any]:
    """The fields of the target's model, before defaults are filled in.

    Args:
        d_model: width of a pattern's model; only patterns take it.
        vocab_size: vocabulary of a pattern's model; only patterns take it.
        overrides: `path.to.field=value`.
    """
    from explore.config import set_field
    from explore.foreign import echo
    from explore.presets import preset

    if (path := find_file(target)) is not None:
        content = _read_model(path)
        _note_formats(path)
    elif not is_pattern(target):
        content = preset(target).model_dump(mode="json")
    else:
        content = {"d_model": d_model or D_MODEL, "vocab_size": vocab_size or VOCAB_SIZE, "pattern": target}
    if path is not None or not is_pattern(target):
        for option, value in (("d_model", d_model), ("vocab_size", vocab_size)):
            if value is not None:
                flag = f"--{option.replace('_', '-')}"
                raise ValueError(f"{flag}: must come with a pattern, got {echo(target)}; use --set {option}={value}")
    for override in overrides:
        set_field(content, override.removeprefix("model."))
    if "pattern" not in content:
        raise ValueError(
            f"{target}: must be an experiment, a model (with the field pattern) or a config.json of nemotron_h, "
            f"got the fields {echo(', '.join(content))}"
        )
    return content


def is_pattern(target: str) -> bool:
    """Whether a target that is not a path is a pattern: unlike a preset's name, it has no small letter or digit."""
    return not any(letter.islower() or letter.isdigit() for letter in target)


def find_file(target: str) -> Path | None:
    """The model's file if the target is a file, a folder or a run, else None."""
    from explore.files import exists

    path = Path(target)
    if target.endswith(".json") or (exists(path) and path.is_file()):
        return path
    if not (exists(path) and path.is_dir()) or target in ("", "."):
        return None if is_pattern(target) else _run_file(target)
    if found := [path / name for name in IN_FOLDERS if (path / name).is_file()]:
        return found[0]
    if is_pattern(target):
        return None
    raise ValueError(f"{path}: must be a file, or a folder with one of {', '.join(IN_FOLDERS)}")


def _run_file(target: str) -> Path | None:
    """The experiment file of the run with this name or these first characters of its key; presets take precedence."""
    from explore.presets import PRESETS

    if target in PRESETS:
        return None
    from explore.runs import match_runs, resolve_run

    return resolve_run(target).path / IN_FOLDERS[0] if match_runs(target) else None


def _note_formats(path: Path) -> None:
    """Prints the size of a quantised run if the model's file is its experiment, which lacks the formats."""
    from explore.formatting import size
    from explore.runs import RunFolder

    run = RunFolder(path.parent)
    if path.name == IN_FOLDERS[0] and run.quantized and "bits_per_element" in run.cost:
        bits, n_bytes = run.cost["bits_per_element"], run.cost["weight_bytes"]
        note(
            f"{run.path} is quantised, to {bits:.3f} bits per parameter and {size(n_bytes)} of weights; "
            "counts here are those of its model without formats"
        )


def _read_model(path: Path) -> dict[str, Any]:
    from explore.files import read_json
    from explore.presets import from_released, is_released, language_part

    content = read_json(path)
    if is_released(content):
        if (wrapper := language_part(content)[1]) is not None:
            note(f"{path} is a wrapper; its {wrapper} is read")
        content = from_released(content).model_dump(mode="json")
    for field in ("experiment", "model"):
        content = found if isinstance(found := content.get(field), dict) else content
    return content
