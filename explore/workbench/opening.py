"""Reads the model that a workbench opens: a pattern, a published system, a model, an experiment, a run or its row."""

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
    """Returns the fields of the model that a workbench opens.

    Args:
        given: a pattern; the name of a published system; a `ModelConfig` or an `Experiment`; a run, its folder, or its
            row in the table of runs.
        runs: folder of run folders that holds the run of a row.
        changes: fields of `ModelConfig` that replace those of the model.

    Raises:
        TypeError: `given` is none of these.
        ValueError: the model is not valid; the message is one line.
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
    """Name of the model that a workbench opened: its own name if it has one, else its pattern."""
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
    """The model of `given`, or None if it is a pattern."""
    given = getattr(given, "folder", given)  # a run opened by `explore.load` has a folder
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
    """Converts configs to dictionaries, also inside dictionaries."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
