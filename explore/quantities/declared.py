"""All quantities, in the order of the columns of the table of runs."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from typing import Any

from explore.quantities.quantity import Family, Quantity, Records, at

BITS, NATS = "bits per byte", "nats per token"

EVAL_DATA = "eval_data"
"""Column that distinguishes runs evaluated on different data."""

PARENTS = ("parent", "quantized_from", "teacher")
"""Columns with the `run` of another run, from which or with which this run was trained."""


def _layers(pattern: Any) -> str:
    """Letters of the main model: `/` begins multi-token prediction, `|` separates pipeline stages."""
    return pattern.split("/", maxsplit=1)[0].replace("|", "") if isinstance(pattern, str) else ""


def _n_layers(pattern: Any) -> int | None:
    return len(_layers(pattern)) or None


def _size_in(field: str, model: Any) -> Any:
    """A field of the first block in use that has it."""
    used = (at(model, "blocks", letter) for letter in _layers(at(model, "pattern")))
    return next((block[field] for block in used if isinstance(block, Mapping) and field in block), None)


def _numbers(values: Any) -> list[float]:
    """The values of a mapping; empty if one of them is not a finite number."""
    found = list(values.values()) if isinstance(values, Mapping) else []
    return found if all(isinstance(value, int | float) and abs(value) <= sys.float_info.max for value in found) else []


def _mean(values: Any) -> float | None:
    found = _numbers(values)
    return sum(found) / len(found) if found else None


def _largest(values: Any) -> float | None:
    return max(map(abs, _numbers(values)), default=None)


def _state_bytes(cost: Any) -> float | None:
    parts = [at(cost, name) for name in ("kv_bytes", "ssm_state_bytes", "conv_state_bytes")]
    return sum(parts) if all(isinstance(part, int | float) for part in parts) else None


def _word(precision: Any) -> Any:
    """A precision recipe as text: its name, or JSON if it has none."""
    return json.dumps(precision) if isinstance(precision, Mapping) else precision


def _bits_per_element(cost: Any) -> float | None:
    """Bits per element of a quantised run's formats, or else of the dtype of `weight_bytes`."""
    if (bits := at(cost, "bits_per_element")) is not None:
        return bits if isinstance(bits, int | float) else None
    n_bytes, params = at(cost, "weight_bytes"), at(cost, "params_total")
    known = isinstance(n_bytes, int | float) and isinstance(params, int) and params > 0
    return 8 * n_bytes / params if known else None


def _n_steps(records: Records) -> int | None:
    """Optimizer steps within the training budget; equals `explore.experiment.Experiment.n_steps`."""
    train, seq_len = at(records, "experiment", "train"), at(records, "experiment", "data", "seq_len")
    try:
        tokens = train["tokens"] or train["flops"] / records["cost"]["flops_train"]
        n_steps: int = round(tokens / (train["batch_size"] * seq_len))
    except (ArithmeticError, KeyError, TypeError, ValueError):  # a record that is damaged, or written by hand
        return None
    return max(1, n_steps)


def _eval_data(data: Any) -> str | None:
    """Short digest of a run's evaluation data: the texts of its splits, or the settings of a synthetic task."""
    if not isinstance(data, Mapping):
        return None
    splits = [data[name] for name in ("val", "test") if name in data]
    content = splits or sorted((str(name), str(value)) for name, value in data.items())
    return hashlib.sha256(repr(content).encode(errors="replace")).hexdigest()[:8]


def _bits_of_documents(documents: Any) -> float | None:
    """Bits per byte of a split, from the sums of its documents."""
    nats, n_bytes = (_numbers_of(at(documents, name)) for name in ("nats", "n_bytes"))
    return sum(nats) / math.log(2) / sum(n_bytes) if sum(n_bytes) else None


def _n_documents(documents: Any) -> int | None:
    return len(_numbers_of(at(documents, "n_bytes"))) or None


def _numbers_of(values: Any) -> list[float]:
    return _numbers(dict(enumerate(values))) if isinstance(values, list | tuple) else []


def _folder_name(path: Any) -> str | None:
    """The last part of a path: the column `run` of another run."""
    return PurePath(path).name if isinstance(path, str) else None


def _flops_with_parent(result: Any) -> float | None:
    """FLOPs of a run, its teacher, and all that came before it; None if the FLOPs of a parent are unknown."""
    if not isinstance(result, Mapping):
        return None
    parts = [result.get("flops_run"), *(result[name] for name in ("flops_teacher", "flops_before") if name in result)]
    return sum(parts) if all(isinstance(part, int | float) for part in parts) else None


def _about(name: str, label: str, *source: str, **more: Any) -> Quantity:
    return Quantity(name, label, source, "about", dtype="str", **more)


def _setting(name: str, label: str, *source: str, **more: Any) -> Quantity:
    return Quantity(name, label, source, "setting", **more)


def _size(name: str, label: str) -> Quantity:
    take = partial(_size_in, name)
    return _setting(name, label, "experiment", "model", dtype="Int64", take=take, log=True)


def _cost(name: str, label: str, unit: str, *source: str, **more: Any) -> Quantity:
    """A total of `explore.cost.Cost` as in `cost.json`: contexts have the sequence length of training."""
    return Quantity(name, label, source or ("cost", name), "cost", unit, better="lower", log=True, **more)


def _params(name: str, label: str, **more: Any) -> Quantity:
    return _cost(name, label, "parameters", dtype="Int64", **more)


def _quantized_flops(name: str, label: str, **more: Any) -> Quantity:
    """FLOPs of products with quantised operands; runs in fp32 and bf16 have none on record."""
    return Quantity(name, label, ("cost", name), "cost", "FLOPs/token", log=True, **more)


def _loss(name: str, label: str, unit: str, **more: Any) -> Quantity:
    return Quantity(name, label, ("result", name), "loss", unit, better="lower", spec=".4f", **more)


def _score(name: str, label: str, *source: str, **more: Any) -> Quantity:
    return Quantity(name, label, source, "score", spec=".4f", **more)


def _result(name: str, label: str, unit: str = "", **more: Any) -> Quantity:
    return Quantity(name, label, ("result", name), unit=unit, **more)


def _metric(name: str, label: str, unit: str = "", **more: Any) -> Quantity:
    return Quantity(name, label, ("metrics", name), unit=unit, **more)


def _averages() -> tuple[Quantity, ...]:
    """Scores of averaged last checkpoints, one set for each decay shape that an average imitates."""
    return tuple(
        _score(f"{name}_{shape}", f"{label}, {words} average", "merged", shape, name, unit=BITS, better="lower")
        for shape, words in (("flat", "flat"), ("minus_sqrt", "minus sqrt"))
        for name, label in (("val_bpb", "Validation bits per byte"), ("test_bpb", "Test bits per byte"))
    )


_DECLARED: tuple[Quantity | Family, ...] = (
    _about("run", "Run", "folder", "run"),
    _about("key", "Key of the experiment", "folder", "key"),
    _about("name", "Name", "experiment", "name"),
    _about("family", "Family", "cost", "family"),
    _about("pattern", "Pattern", "experiment", "model", "pattern"),
    _about("parent", "Parent", "experiment", "start", "parent", "path", take=_folder_name),
    _about("quantized_from", "Run that was quantised", "quantized", "parent", "run"),
    _about("teacher", "Teacher", "experiment", "train", "objective", "teacher", "path", take=_folder_name),
    _setting("seed", "Seed", "experiment", "seed", dtype="Int64"),
    _about("status", "Status", "folder", "status"),
    _params("params_total", "Parameters", short="params", headline=True, budget=True),
    _params("params_active", "Active parameters", short="active", headline=True, budget=True),
    _params("params_total_no_router", "Parameters without routers"),
    _params("params_active_no_input_embedding", "Active parameters without the input embedding"),
    _params("params_active_no_embeddings", "Active parameters without embeddings and head", budget=True),
    _params("params_active_no_router", "Active parameters without routers"),
    _params("params_active_no_input_embedding_no_router", "Active parameters without the input embedding and routers"),
    _params("params_active_no_embeddings_no_router", "Active parameters without embeddings, head and routers"),
    _params("params_router", "Parameters of routers"),
    _params("params_mtp", "Parameters of multi-token prediction"),
    _cost("flops_fwd", "Forward pass", "FLOPs/token", short="forward", tied_to="flops_train"),
    _cost("flops_train", "Training", "FLOPs/token", short="training", budget=True),
    _quantized_flops("flops_fwd_quantized", "Forward pass with quantised operands"),
    _quantized_flops("flops_train_quantized", "Training with quantised operands", short="quantised"),
    _cost("flops_mtp", "Forward pass of multi-token prediction", "FLOPs/token"),
    _cost("flops_prefill", "Prefill", "FLOPs", short="prefill"),
    _cost("flops_decode", "Decoding", "FLOPs/token", short="decode"),
    _cost(
        "flops_run", "Training FLOPs", "FLOPs", "result", "flops_run",
        short="FLOPs", headline=True, tied_to="flops_train",
    ),
    Family(Quantity("flops_run_{}", "Training FLOPs as {} counts them", unit="FLOPs", better="lower", log=True)),
    _result("flops_spent", "Training FLOPs without those of a shared trunk", "FLOPs", better="lower", log=True),
    _result("flops_teacher", "Forward passes of the teacher", "FLOPs", better="lower", log=True),
    _result("flops_before", "FLOPs of parent, teacher and compression search", "FLOPs", better="lower", log=True),
    Quantity(
        "flops_with_parent", "Training FLOPs, with those of parent, teacher and compression search", ("result",),
        take=_flops_with_parent, unit="FLOPs", better="lower", log=True,
    ),
    _result("tokens", "Training tokens", "tokens", dtype="Int64", better="lower", log=True),
    _loss("val_bpb", "Validation bits per byte", BITS, short="val bpb", headline=True),
    _loss("test_bpb", "Test bits per byte", BITS, short="test bpb", headline=True),
    _score("recall", "Recall accuracy", "result", "recall", better="higher", headline=True),
    Family(
        _score("recall_{}_pairs", "Recall accuracy of {} pairs", "result", "recall_by_pairs", "{}", better="higher")
    ),
    _score(
        "recall_over_steps", "Validation recall, mean over all steps", "result", "recall_over_steps", better="higher"
    ),
    _result(
        "steps_to_90", "Steps to a validation recall of 90%", "steps", dtype="Int64", better="lower", log=True,
    ),
    Family(
        _score(
            "{}_bpb", "Bits per byte on {}", "evals", "bpb", "{}",
            unit=BITS, short="{} bpb", better="lower", headline=True,
        )
    ),
    _score(
        "ngram_val_bpb", "N-gram model of the same tokens, validation bits per byte", "evals", "ngram", "val_bpb",
        unit=BITS, short="n-gram val bpb", better="lower", headline=True,
    ),
    _score(
        "ngram_test_bpb", "N-gram model of the same tokens, test bits per byte", "evals", "ngram", "test_bpb",
        unit=BITS, better="lower",
    ),
    _score(
        "whole_val_bpb", "Bits per byte on the whole of validation", "evals", "documents", "val",
        take=_bits_of_documents, unit=BITS, better="lower",
    ),
    _score(
        "whole_test_bpb", "Bits per byte on the whole of the test text", "evals", "documents", "test",
        take=_bits_of_documents, unit=BITS, better="lower",
    ),
    Quantity(
        "test_documents", "Test documents that are scored one by one", ("evals", "documents", "test"), "setting",
        dtype="Int64", take=_n_documents,
    ),
    Family(_score("{}_accuracy", "Accuracy on {}", "evals", "pairs", "{}", take=_mean, better="higher")),
    _score("acceptance_length", "Acceptance length, greedy", "evals", "acceptance_length", "greedy", better="higher"),
    _score(
        "acceptance_length_sampled", "Acceptance length, temperature 1", "evals", "acceptance_length", "temperature 1",
        better="higher",
    ),
    _score("kl", "Divergence from the unquantised model", "result", "kl", unit=NATS, better="lower"),
    _score("kl_decoded", "Divergence when read token by token", "result", "kl_decoded", unit=NATS, better="lower"),
    _loss("val_loss", "Validation loss", NATS, short="val loss"),
    _loss("test_loss", "Test loss", NATS, short="test loss"),
    *_averages(),
    _setting("lr", "Peak learning rate", "experiment", "train", "lr", spec=".3g", log=True, headline=True),
    _setting("tuned", "Learning rate was tuned", "trial", "tuned", dtype="boolean"),
    Quantity(
        "lr_sensitivity", "Added loss at half or twice the learning rate", ("trial", "lr_sensitivity"),
        better="lower", spec=".4f",
    ),
    _setting(
        "residual", "Largest residual of a tied budget", "trial", "residuals",
        take=_largest, short="off", better="lower", spec=".2%", headline=True,
    ),
    _result("train_s", "Training time", "s", better="lower", log=True),
    _result("tokens_per_s", "Training throughput", "tokens/s", better="higher", log=True, spec=",.0f"),
    _setting("precision", "Precision", "experiment", "train", "precision", dtype="str", take=_word),
    _setting("scales", "Scales of weights", "quantized", "scales", dtype="str"),
    _setting("kv_format", "Format of keys and values", "quantized", "recipe", "kv", dtype="str"),
    _setting("state_format", "Format of recurrent state", "quantized", "recipe", "state", dtype="str"),
    _setting("state_rounding", "Rounding of recurrent state", "quantized", "recipe", "state_rounding", dtype="str"),
    _setting("n_steps", "Optimizer steps of the schedule", dtype="Int64", take=_n_steps, log=True),
    _setting("decay", "Share of steps with learning-rate decay", "experiment", "train", "decay"),
    _setting("seq_len", "Sequence length", "experiment", "data", "seq_len", unit="tokens", dtype="Int64", log=True),
    _setting("d_model", "Width of the model", "experiment", "model", "d_model", dtype="Int64", log=True, headline=True),
    _setting("n_layers", "Layers", "experiment", "model", "pattern", dtype="Int64", take=_n_layers, log=True),
    _size("n_experts", "Experts of a layer"),
    _size("top_k", "Active experts of a layer"),
    _size("d_latent", "Width of the latent"),
    _cost("weight_bytes", "Weights", "bytes", short="weights"),
    Quantity(
        "bits_per_element", "Bits per parameter", ("cost",), "cost", "bits",
        take=_bits_per_element, better="lower", short="bits", spec=".2f",
    ),
    _cost("kv_bytes_per_token", "KV cache", "bytes per token", tied_to="kv_bytes"),
    _cost("kv_bytes", "KV cache", "bytes per sequence", short="KV", budget=True),
    _cost("ssm_state_bytes", "Recurrent state", "bytes per sequence", short="recurrent"),
    _cost("conv_state_bytes", "Convolution state", "bytes per sequence", short="conv"),
    _cost("state_bytes", "Decoding state", "bytes per sequence", "cost", take=_state_bytes, budget=True),
    _cost("decode_bytes", "Decoding step moves", "bytes", short="moved"),
    Family(Quantity("decode_bytes_{}", "Decoding step at {} tokens moves", unit="bytes", better="lower", log=True)),
    _cost("all_to_all_bytes", "All-to-all of experts", "bytes per token", short="all-to-all"),
    _about("corpus", "Corpus", "experiment", "data", "corpus"),
    Quantity(EVAL_DATA, "Evaluation data", ("environment", "data"), "about", dtype="str", take=_eval_data),
    _about("commit", "Commit of the code", "environment", "commit"),
    _about("finished_at", "Finished", "result", "finished_at"),
    _result("step", "Optimizer steps", dtype="Int64", log=True),
    _result("max_violation", "Load of the fullest expert over the mean, minus 1", better="lower"),
    _about("device", "Device", "environment", "device"),
    _about("reason", "Reason", "result", "reason"),
    _result("stopped_val_bpb", "Validation bits per byte when stopped", BITS, better="lower", spec=".4f"),
    _metric("loss", "Training loss", NATS, better="lower"),
    _metric("aux_loss", "Auxiliary loss of routers", better="lower"),
    _metric("mtp_loss", "Training loss of multi-token prediction", NATS, better="lower"),
    _metric("kl_loss", "Divergence from the teacher", NATS, better="lower"),
    _metric("hidden_loss", "Mean of 1 - cosine to layers of the teacher", better="lower"),
    _metric("grad_norm", "Norm of the gradient"),
    _metric("val_recall", "Validation recall accuracy", better="higher"),
)  # fmt: skip

QUANTITIES: Mapping[str, Quantity | Family] = {
    each.template.name if isinstance(each, Family) else each.name: each for each in _DECLARED
}
"""All quantities by name, families by the form of their names. A score with a name that another quantity has, such as
that of a corpus called `val`, is not read."""

METRICS = (
    "step", "tokens", "loss", "aux_loss", "mtp_loss", "lr", "grad_norm", "max_violation", "tokens_per_s", "val_loss",
    "val_bpb", "kl_loss", "hidden_loss", "val_recall",
)  # fmt: skip
"""Columns of `metrics.csv`, in order; a row is about one step."""
