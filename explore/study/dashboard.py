"""Notes and figures for optuna-dashboard: a note on the study, and a note and figures on each trial.

Notes are written as the attributes that optuna-dashboard reads, so it is needed only where somebody views the study,
not where a sweep runs: `optuna-dashboard runs/NAME/study.journal --artifact-dir runs/NAME/artifacts`.
"""

from __future__ import annotations

import inspect
import logging
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import FrozenTrial

from explore.experiment import Experiment
from explore.figures import COLUMN_HEIGHT, COLUMN_WIDTH, RunFigure, plot_curves, plot_receipts, receipts_table
from explore.formatting import count, flops
from explore.formatting.markdown import code, inline
from explore.quantities import headlines, quantity
from explore.runs import RunFolder
from explore.study.storage import objectives_of
from explore.table import load_metrics

DOTS_PER_INCH = 200
PIECE = 2045
"""Characters of a note per attribute, as in optuna-dashboard; databases limit the length of attributes."""

Say = Callable[[str], None]


def _warn(line: str) -> None:
    logging.getLogger("explore.study").warning(line)


def describe_study(study: optuna.Study, question: str) -> None:
    """Writes the note of a study: its question and its objectives. An existing note, perhaps edited, is kept."""
    if _version(study, None):
        return
    better = {"minimize": "lower", "maximize": "higher"}
    objectives = ", ".join(
        f"{code(name)}: {inline(quantity(name).axis_label)} ({better.get(direction, '?')} is better)"
        for name, direction in objectives_of(study).items()
    )
    _save_note(study, None, f"{inspect.cleandoc(question)}\n\n**Objectives:** {objectives}\n")


def annotate(study: optuna.Study, trial: FrozenTrial, folder: RunFolder, artifacts: Path, say: Say = _warn) -> None:
    """Writes the note of a trial before its result is reported, and attaches its learning curve and cost as figures.

    Errors here do not end a trial: each is reported in one line, and the rest is written.

    Args:
        folder: the run of the trial.
        artifacts: folder of the figures, optuna-dashboard's `--artifact-dir`; created if missing.
        say: receives a line for each piece that could not be written.
    """
    try:
        experiment: Experiment | None = folder.load_experiment()
    except Exception:  # its records are damaged: the note shows what is readable
        experiment = None
    pieces: dict[str, Callable[[], None]] = {
        "note": lambda: _save_note(study, trial, trial_note(trial, folder, experiment)),
        "learning curve": lambda: _attach(study, trial, artifacts, "learning_curve.png", _curve(folder)),
    }
    if experiment is not None:
        pieces["cost"] = lambda: _attach(study, trial, artifacts, "cost.png", _cost(experiment))
    for name, write in pieces.items():
        try:
            write()
        except optuna.exceptions.UpdateFinishedTrialError:  # reaped: another trial has its parameters
            return
        except Exception as error:
            say(f"trial {trial.number}: no {name} for optuna-dashboard: {' '.join(str(error).split())}")


def note_rejection(study: optuna.Study, trial: FrozenTrial, why: str | None, say: Say = _warn) -> None:
    """Writes the note of a trial that was rejected before training, which optuna-dashboard lists as pruned.

    There may be hundreds of such trials, so existing notes are not read first, unlike in `_save_note`.
    """
    text = f"**rejected before training**, not pruned: {inline(why or 'no reason was given')}\n"[:PIECE]
    try:
        for name, value in (("note_str:0", text), ("note_ver", 1)):
            study._storage.set_study_system_attr(study._study_id, f"{_prefix(trial)}{name}", value)
    except optuna.exceptions.UpdateFinishedTrialError:
        return
    except Exception as error:
        say(f"trial {trial.number}: no note for optuna-dashboard: {' '.join(str(error).split())}")


def trial_note(trial: FrozenTrial, folder: RunFolder, experiment: Experiment | None) -> str:
    """The note of a trial in Markdown: outcome, settings, costs and the commands to use its run."""
    row, result, about = folder.row(), folder.result or {}, trial.user_attrs
    shown = [each for each in headlines(row) if each.is_quality and _is_number(row[each.name])]
    scores = [f"{each.name} {each.text(row[each.name])}" for each in shown]
    if _is_number(result.get("stopped_val_bpb")):
        scores = [f"val_bpb {result['stopped_val_bpb']:.4f} when it was stopped"]
    outcome = " · ".join([f"**{inline(str(row['status']))}**", *scores])
    reason = about.get("reason") or row["reason"]
    texts = {name: quantity(name).text(value) or "?" for name, value in row.items()}
    lines = {
        "name": _code(row["name"]),
        "pattern": _code(row["pattern"]),
        "family": None if row["family"] is None else inline(str(row["family"])),
        "parameters": f"{texts['params_total']}, of which {texts['params_active']} are active",
        "training FLOPs": f"{texts['flops_run']}, {texts['flops_train']} per token",
        "learning rate": _learning_rate(
            row["lr"], about, about.get("lr_by") or ("val_loss" if _is_number(row["recall"]) else "val_bpb")
        ),
        "training": f"{texts['tokens']} tokens in {texts['train_s']}" if row["train_s"] else None,
        "seed": None if row["seed"] is None else inline(str(row["seed"])),
        "run": _code(str(folder.path)),
    }
    table = [f"| {name} | {text} |" for name, text in lines.items() if text is not None]
    parts = [outcome + (f": {inline(str(reason))}" if reason else ""), "\n".join(["| | |", "|---|---|", *table])]
    if experiment is not None:
        parts.append(_components(experiment))
        if row["status"] == "finished":
            parts.append(f"```sh\n{_command(folder.path, experiment)}\n```")
    return "\n\n".join(parts) + "\n"


def _components(experiment: Experiment) -> str:
    """A Markdown table of the model's components with their parameters and FLOPs, as in the cost figure."""
    quantities = ("params_total", "flops_fwd")
    receipt = receipts_table({"": experiment.model}, experiment.data.seq_len, quantities)
    by_group = receipt.pivot(index="group", columns="quantity", values="value")
    by_group = by_group.loc[list(dict.fromkeys(receipt["group"]))]
    total = float(by_group["flops_fwd"].sum())
    rows = [f"Cost at {experiment.data.seq_len:,} tokens a sequence:", ""]
    rows += ["| component | parameters | forward FLOPs per token | share |", "|---|--:|--:|--:|"]
    for group, params, fwd in by_group[list(quantities)].itertuples():
        if params or fwd:
            rows.append(f"| {inline(group)} | {count(params) if params else ''} | {flops(fwd)} | {fwd / total:.1%} |")
    rows.append(f"| **total** | {count(by_group['params_total'].sum())} | {flops(total)} | |")
    return "\n".join(rows)


def _learning_rate(lr: Any, about: dict[str, Any], score: str) -> str | None:
    if not _is_number(lr):
        return None
    if not about.get("lr_pilots"):
        return f"{lr:.3g}, tuned" if about.get("tuned") else f"{lr:.3g}, not tuned"
    pilots = ", ".join(f"{float(pilot):.3g} → {reached:.4f}" for pilot, reached in about["lr_pilots"].items())
    found = "tuned" if about.get("tuned") else "at the edge of what was tried"
    lost = about.get("lr_sensitivity")
    costs = "" if lost is None else f", half or twice of it costs {lost:.4f}"
    return f"{lr:.3g}, {found}{costs}; {score} of pilots: {pilots}"


def _command(path: Path, experiment: Experiment) -> str:
    run = shlex.quote(str(path))
    if experiment.data.kind != "text":
        return f"explore table {run}"
    lines = [f"explore eval {run} --pairs PAIRS.jsonl", f'explore generate {run} --prompt "It was"']
    return "\n".join(lines)


def _curve(folder: RunFolder) -> RunFigure:
    """The validation curve, or the training loss if there are fewer than two validations."""
    metrics = load_metrics(folder.path)
    x = "flops_run" if "flops_run" in metrics else "tokens"
    validated = "val_bpb" in metrics and metrics["val_bpb"].notna().sum() > 1
    y = "val_bpb" if validated else "loss"
    return plot_curves(metrics, x, y, width=COLUMN_WIDTH, height=COLUMN_HEIGHT)


def _cost(experiment: Experiment) -> RunFigure:
    models, quantities = {experiment.model.pattern: experiment.model}, ("params_active", "flops_fwd")
    return plot_receipts(models, experiment.data.seq_len, quantities, width=COLUMN_WIDTH, height=COLUMN_HEIGHT)


def _attach(study: optuna.Study, trial: FrozenTrial, artifacts: Path, name: str, figure: RunFigure) -> None:
    artifacts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        figure.savefig(path, dpi=DOTS_PER_INCH)
        upload_artifact(
            artifact_store=FileSystemArtifactStore(artifacts),
            file_path=str(path),
            study_or_trial=trial,
            storage=study._storage,
        )


def _version(study: optuna.Study, trial: FrozenTrial | None) -> int:
    """How often a note was saved, by anyone; 0 if there is none."""
    return int(study._storage.get_study_system_attrs(study._study_id).get(f"{_prefix(trial)}note_ver", 0))


def _save_note(study: optuna.Study, trial: FrozenTrial | None, body: str) -> None:
    """Writes a note in pieces, as `optuna_dashboard.save_note` does, and clears leftover pieces of a longer one."""
    version, storage, prefix = _version(study, trial), study._storage, _prefix(trial)
    pieces = [body[start : start + PIECE] for start in range(0, len(body), PIECE)]
    old = sum(name.startswith(f"{prefix}note_str:") for name in storage.get_study_system_attrs(study._study_id))
    for i in range(max(len(pieces), old)):
        storage.set_study_system_attr(study._study_id, f"{prefix}note_str:{i}", pieces[i] if i < len(pieces) else "")
    storage.set_study_system_attr(study._study_id, f"{prefix}note_ver", version + 1)


def _prefix(trial: FrozenTrial | None) -> str:
    return "dashboard:" if trial is None else f"dashboard:{trial._trial_id}:"


def _code(text: Any) -> str | None:
    """A name as inline code in a table; None if it is unknown."""
    return None if text is None else code(str(text))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
