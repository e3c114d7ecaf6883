"""What a workbench can begin with: letters, a published system, a model, an experiment, a run, a row of a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ValidationError

from explore.config import explain
from explore.cost import D_MODEL, VOCAB_SIZE
from explore.experiment import Experiment
from explore.foreign import check_type, shorten
from explore.model import ModelConfig
from explore.presets import PRESETS, preset
from explore.runs import RunFolder, resolve_run
from explore.workbench.state import content_of

Opened = str | Path | ModelConfig | Experiment | RunFolder | Mapping[str, Any] | pd.Series


def fields_of(given: Any, runs: str | Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the model that a workbench begins with.

    Args:
        given: letters; the name of a published system; a `ModelConfig` or an `Experiment`; a run, its folder, or its
            row in the table of runs.
        runs: folder of run folders, in which a row is looked up.
        changes: fields of `ModelConfig` that are set instead.

    Raises:
        TypeError: `given` is none of these.
        ValueError: the first thing that is wrong, in one line.
    """
    model = _model_of(given, runs)
    if model is not None:
        fields = {**content_of(model), **_plain(changes)}
    else:
        fields = {"d_model": D_MODEL, "vocab_size": VOCAB_SIZE, "pattern": given, **_plain(changes)}
    try:
        built = ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    if built.mtp is not None:
        fields |= {name: content_of(built)[name] for name in ("pattern", "mtp")}
    return fields


def name_of(given: Any, pattern: str) -> str:
    """What to call what a workbench was given: its name where it has one, else its letters."""
    given = getattr(given, "folder", given)
    match given:
        case Experiment():
            return given.name
        case RunFolder():
            return given.path.resolve().name
        case Mapping() | pd.Series():
            return str(given["run"])
        case Path():
            return given.resolve().name
        case str() if given in PRESETS or Path(given).is_dir():
            return Path(given).name
    return shorten(pattern, 40)


def _model_of(given: Any, runs: str | Path) -> ModelConfig | None:
    """The model of everything but letters."""
    given = getattr(given, "folder", given)  # of a run that `explore.load` opened
    match given:
        case ModelConfig():
            return given
        case Experiment():
            return given.model
        case RunFolder():
            return given.load_experiment().model
        case Path():
            return RunFolder(given).load_experiment().model
        case str() if given in PRESETS:
            return preset(given)
        case str():
            folder = RunFolder(Path(given))
            return folder.load_experiment().model if given and folder.text("experiment.json") is not None else None
        case Mapping() | pd.Series() if isinstance(given.get("run"), str):
            return resolve_run(given["run"], runs).load_experiment().model
    check_type(given, (), "pattern must be a pattern, a model, or a run")
    return None


def _plain(value: Any) -> Any:
    """The same in dictionaries, without configs."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
