"""Records of a run folder other than its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from explore.checkpoints import branched_from
from explore.cost import DTYPES, Cost, in_formats, storage
from explore.experiment import Experiment, ParentWeights
from explore.files import write_json
from explore.precision import Recipe
from explore.runs import RunFolder
from explore.train.callbacks import Throughput
from explore.train.environment import environment
from explore.train.start import plan_of


def cost_record(experiment: Experiment, after_training: Recipe | None = None) -> dict[str, Any]:
    """Totals, family and ledger of an experiment's model, as in `cost.json`.

    Where weights are quantised, bytes and bits are those of their formats. A run whose last forward products are in
    bf16, as its recipe's switches or `until` may say, has weights in bf16.

    Args:
        after_training: recipe of a quantised child, which decides the formats of its weights and decoding state.
    """
    train, plain = experiment.train, experiment.model.ledger(experiment.data.seq_len)
    trained = in_formats(plain, train.recipe) if train.quantizes else plain
    stays = train.quantizes and train.recipe.forward and train.recipe.until.forward == 1
    recipe = after_training or (train.recipe if stays else None)
    ledger = plain if recipe is None else in_formats(plain, recipe)
    dtypes = DTYPES if recipe is None else DTYPES.under(recipe)
    totals = Cost.of(ledger, dtypes).to_dict()
    if recipe is not None:
        totals |= {"weight_dtype": None} | storage(ledger)
    if recipe is not None or train.quantizes:
        forward, steps = ledger.flops_quantized(ledger), trained.flops_quantized(trained)
        totals["flops_fwd_quantized"] = forward.get("flops_fwd_quantized", 0.0)
        totals["flops_train_quantized"] = steps.get("flops_train_quantized", 0.0)
    return {"family": experiment.model.family, **totals, "ledger": ledger.to_records(dtypes)}


def describe(path: Path, experiment: Experiment, key: str, settings: Mapping[str, Any]) -> None:
    """Writes the record known before training; adds the `settings` of this run to the environment."""
    write_json(path / "cost.json", cost_record(experiment))
    write_json(path / "environment.json", {**environment(experiment), **settings})
    write_json(path / "experiment.json", {"key": key, "experiment": experiment.model_dump(mode="json")})


def result_of(experiment: Experiment, path: Path, step: int, throughput: Throughput) -> dict[str, Any]:
    """Contents of `result.json` for a run trained for `step` steps, without its scores.

    `flops_run` counts all FLOPs behind its weights, `flops_spent` only those after it branched from another run.
    """
    tokens, branched = step * experiment.batch_tokens, branched_from(path)
    flops_train = experiment.model.cost(experiment.data.seq_len).flops_train
    skipped = 0 if branched is None else branched["step"]
    return {
        "status": "finished",
        "reason": None,
        "step": step,
        "tokens": tokens,
        "flops_run": tokens * flops_train,
        "flops_spent": (tokens - skipped * experiment.batch_tokens) * flops_train,
        "branched_from": branched,
        **_others(experiment, tokens),
        "train_s": throughput.train_s,
        "tokens_per_s": tokens / throughput.train_s if throughput.train_s else None,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _others(experiment: Experiment, tokens: int) -> dict[str, Any]:
    """FLOPs that other models contributed, if the run has a parent or a teacher.

    `flops_teacher` counts the teacher's forward passes. `before` has the training FLOPs of every ancestor model, by
    digest, and the FLOPs of making each plan, by key; `flops_before` is their sum, None if one is unknown.
    """
    if not experiment.trained_models:
        return {}
    before: dict[str, float | None] = {}
    for digest, model in experiment.trained_models.items():
        result = RunFolder(Path(model.path)).result or {}
        spent = result.get("flops_run")
        before |= result.get("before") or {}
        before[digest] = None if spent is None else spent + result.get("flops_teacher", 0)
    if isinstance(experiment.start, ParentWeights) and (plan := plan_of(experiment.start)) is not None and plan.flops:
        before[plan.key()] = plan.flops
    known = [spent for spent in before.values() if spent is not None]
    return {
        "flops_teacher": tokens * experiment.flops_teacher,
        "flops_before": sum(known) if len(known) == len(before) else None,
        "before": before,
    }
