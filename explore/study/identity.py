"""Finds or creates the study of a sweep file, and rejects a file, module or text that changed since the study began."""

from __future__ import annotations

import difflib
import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from explore.experiment import Experiment
from explore.foreign import echo
from explore.study.faults import FaultError
from explore.study.storage import study_names
from explore.study.sweep_file import Sweep

_WAYS_OUT = "change {} back, or begin another study with --new-study"
CREATION_S = 5.0
"""Seconds that the creation of a study may take before its process counts as killed."""


def open_study(
    sweep: Sweep,
    storage: BaseStorage,
    *,
    sampler: str | None = None,
    seed: int | None = None,
    new: bool = False,
    name: str | None = None,
) -> optuna.Study:
    """Opens the newest study of a sweep, or creates it with the baselines in its queue.

    Args:
        sampler: sampler of a new study; default: the sweep file's.
        seed: seed of the sampler; default: 0.
        new: create a new study even if the sweep has one.
        name: open the sweep's study with this name; default: the newest.

    Raises:
        ValueError: the file, a module that it imports, its data, the sampler or the seed differs from the study's; the
            message shows the difference.
    """
    names = study_names(storage, sweep.name)
    if name is None:
        name = names[-1] if names and not new else f"{sweep.name}-{len(names) + 1}" if names else sweep.name
    if name not in names:
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=list(sweep.objectives.values()))
        except optuna.exceptions.DuplicatedStudyError:  # by another process, just now
            pass
        else:
            _fill(sweep, study, sampler, seed)
            return study
    study = optuna.load_study(study_name=name, storage=storage)
    _await_whole(sweep, study, sampler, seed)
    _check(sweep, study, sampler, seed)
    for experiment in sweep.examples:
        check_data(study, experiment)
    return study


def _fill(sweep: Sweep, study: optuna.Study, sampler: str | None, seed: int | None) -> None:
    """Writes the attributes and baselines that a study lacks. The code is written last: it marks a complete study."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(sweep.objectives))
    for key, value in {"question": sweep.question, "sampler": sampler or sweep.sampler, "seed": seed or 0}.items():
        study.set_user_attr(key, value)
    there = {trial.user_attrs.get("baseline") for trial in study.get_trials(deepcopy=False)}
    for number, baseline in enumerate([*sweep.baselines, *sweep.first]):
        if number not in there:
            study.enqueue_trial(dict(baseline), user_attrs={"baseline": number})
    for experiment in sweep.examples:
        check_data(study, experiment)
    study.set_user_attr("modules", sweep.modules)
    study.set_user_attr("code", sweep.code)


def _await_whole(sweep: Sweep, study: optuna.Study, sampler: str | None, seed: int | None) -> None:
    """Waits for the process that is creating the study; if that process was killed, completes the study here.

    Raises:
        ValueError: the study was not made by a sweep.
    """
    end = time.monotonic() + CREATION_S
    while "code" not in study.user_attrs:
        directions = [direction.name.lower() for direction in study.directions]
        begun = any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
        if begun or directions != list(sweep.objectives.values()):
            raise ValueError(f"study {study.study_name!r} was not made by this command; --new-study begins another")
        if time.monotonic() > end:
            _fill(sweep, study, sampler, seed)
            return
        time.sleep(0.1)


def check_choices(study: optuna.Study, sampler: str | None, seed: int | None) -> None:
    """Checks that a sampler and a seed, if given, are those of a study.

    Raises:
        ValueError: they differ.
    """
    was: Mapping[str, Any] = study.user_attrs
    for name, now in (("sampler", sampler), ("seed", seed)):
        if now is not None and now != was.get(name, now):
            raise ValueError(
                f"--{name} must be {was[name]}, that of the study {study.study_name!r}, got {now}; see --new-study"
            )


def _check(sweep: Sweep, study: optuna.Study, sampler: str | None, seed: int | None) -> None:
    was: Mapping[str, Any] = study.user_attrs
    check_choices(study, sampler, seed)
    modules = sweep.modules
    if "modules" not in was:  # an older version made the study
        study.set_user_attr("modules", modules)
    before = {str(sweep.path): was["code"], **_labelled(was.get("modules", modules))}
    after = {str(sweep.path): sweep.code, **_labelled(modules)}
    for place in sorted(before.keys() | after.keys()):
        if (difference := first_difference(before.get(place, ""), after.get(place, ""))) is not None:
            raise ValueError(
                f"{place}: changed since the study {study.study_name!r} began: {difference}; {_WAYS_OUT.format('it')}"
            )


def _labelled(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"module {name}": code for name, code in modules.items()}


def check_data(study: optuna.Study, experiment: Experiment) -> None:
    """Records the hashes of a corpus and a tokenizer in the study at first use, and compares them later.

    Raises:
        FaultError: a corpus or tokenizer changed, or cannot be read.
    """
    now, data = read_data(experiment), experiment.data.model_dump(mode="json")
    # One attribute per data set: in a shared one, two workers would overwrite each other's entries.
    name = f"data-{hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]}"
    if (was := study.user_attrs.get(name)) is None:
        study.set_user_attr(name, now)
        return
    if changed := [part for part in now if was.get(part) != now[part]]:
        before, after = (str(each.get(changed[0]))[:12] for each in (was, now))
        raise FaultError(
            f"data: {', '.join(changed)} of {echo(data.get('corpus', data['kind']))} changed since the study "
            f"{study.study_name!r} began: {before} is now {after}; {_WAYS_OUT.format('them')}"
        )


def read_data(experiment: Experiment) -> dict[str, Any]:
    """Hashes of the content of an experiment's data.

    Raises:
        FaultError: a corpus or a tokenizer is missing or cannot be read.
    """
    try:
        return experiment.data.fingerprint()
    except ValueError as error:
        raise FaultError(str(error)) from error
    except OSError as error:
        raise FaultError(f"{error.filename}: {error.strerror}") from error


def first_difference(before: str, after: str) -> str | None:
    """The first line that differs, before and after; None if nothing does."""
    lines = [
        line
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    if not lines:
        return None
    was = next((line[1:].strip() for line in lines if line.startswith("-")), "nothing")
    now = next((line[1:].strip() for line in lines if line.startswith("+")), "nothing")
    more = len(lines) - sum(any(line.startswith(sign) for line in lines) for sign in "+-")
    return f"{was!r} is now {now!r}" + (f", and {more} more lines" if more else "")
