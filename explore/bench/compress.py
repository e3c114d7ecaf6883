"""Cost of compression: time of scores, and time and memory of a distillation step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explore.bench.training import in_a_process
from explore.compress.observing import Observer
from explore.compress.scores import SPARSE, TOKENS
from explore.data import Batch
from explore.experiment import TrainConfig
from explore.interop import save_model_folder
from explore.model import ModelConfig
from explore.objective import Distillation
from explore.ops import forced_paths
from explore.train import build_optimizer
from explore.train.objectives import build_objective

SEQ_LEN, BATCH_SIZE, VOCAB_SIZE = 256, 8, 8192
"""Vocabulary of the distilled model; scores use a quarter of it."""

SCORE_S, STEP_RATIO = 30.0, 1.55
"""Bounds: seconds of scores on two cores; and ratio of a distillation step without the teacher to a plain step."""


def parent_model(vocab_size: int = VOCAB_SIZE, d_model: int = 192) -> ModelConfig:
    """A hybrid of three million parameters with a vocabulary of 2048; other widths keep its proportions."""
    blocks: Any = {
        "M": {"n_heads": d_model // 16, "d_head": 32, "d_state": 64, "n_groups": 1, "chunk_size": 64},
        "*": {"n_heads": d_model // 32, "n_kv_heads": 1, "d_head": 32},
        "-": {"d_ff": 4 * d_model},
    }
    return ModelConfig(
        d_model=d_model, vocab_size=vocab_size, pattern="M-M-M*-M-M-", blocks=blocks, tie_embeddings=True
    )


def compare_compression(seconds: float = 10) -> Iterator[dict[str, Any]]:
    """Measures scores and distillation, each in its own process.

    Args:
        seconds: duration of the timing of distillation steps.

    Yields:
        Records of what, value, bound, unit, and whether it `holds`. Time bounds are for two idle cores.
    """
    scored = in_a_process(what="scores")
    millions = scored["params"] / 1e6
    yield _record(
        f"scores of {millions:.1f}M parameters on {scored['tokens']:,} tokens", scored["seconds"], SCORE_S, "s"
    )
    step = in_a_process(what="distil", seconds=seconds)
    yield _record("distillation step without the teacher, over the student's own", step["ratio"], STEP_RATIO, "times")
    sliced, whole = (in_a_process(what="distil_memory", path=path) for path in ("sliced", "whole"))
    both = 2 * BATCH_SIZE * SEQ_LEN * VOCAB_SIZE * 4
    saved = whole["peak_bytes"] - sliced["peak_bytes"]
    yield {**_record("memory that no logits of either side save", saved, both, "bytes"), "holds": saved >= both}


def _record(what: str, value: float, bound: float, unit: str) -> dict[str, Any]:
    return {"what": what, "value": value, "bound": bound, "unit": unit, "holds": value <= bound}


def time_scores(tokens: int = TOKENS) -> dict[str, Any]:
    """Seconds to accumulate the sums behind scores, over random tokens."""
    torch.manual_seed(0)
    config = parent_model(VOCAB_SIZE // 4)
    observer = Observer(config.build().eval())
    n_batches = tokens // (BATCH_SIZE * SEQ_LEN)
    batches = [_batch(config) for _ in range(4)]
    began = time.perf_counter()
    for step in range(n_batches):
        inputs, targets = batches[step % len(batches)]
        observer.observe(Batch(inputs, targets), effects=step % SPARSE == 0)
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "params": config.cost(1).params_total}


def time_distillation(seconds: float) -> dict[str, Any]:
    """Median times of a plain student step, a distillation step, and a teacher's forward pass, timed in turn.

    Returns:
        Their seconds, and `ratio`: the distillation step without the teacher's pass, divided by the plain step.
    """
    from explore.train.distillation import Teacher

    with tempfile.TemporaryDirectory() as folder:
        config = _distillation(Path(folder))
        teacher = Teacher(config)
        works: dict[str, Callable[[Tensor, Tensor], object]] = {
            "own_s": _step(TrainConfig(tokens=1)),
            "teacher_s": lambda tokens, _targets: teacher(tokens),
            "distil_s": _step(TrainConfig(tokens=1, objective=config)),
        }
    times: dict[str, list[float]] = {name: [] for name in works}
    batch = _batch(parent_model())
    while len(times["own_s"]) < 4 or sum(map(sum, times.values())) < seconds:
        for name, work in works.items():  # in turn, since the machine may be busy at times
            began = time.perf_counter()
            work(*batch)
            times[name].append(time.perf_counter() - began)
    found = {name: statistics.median(each[1:]) for name, each in times.items()}
    return {**found, "ratio": (found["distil_s"] - found["teacher_s"]) / found["own_s"]}


def distillation_peak(path: str, peak: Callable[..., int]) -> dict[str, Any]:
    """Bytes of memory that distillation steps add, for one implementation of the divergence.

    Args:
        peak: a function that returns the largest resident memory, as `explore.bench.worker.peak_bytes` gives it.
    """
    with tempfile.TemporaryDirectory() as folder, forced_paths(divergence=path):
        step = _step(TrainConfig(tokens=1, objective=_distillation(Path(folder))))
        batch = _batch(parent_model())
        before = peak(reset=True)
        for _ in range(2):
            step(*batch)
    return {"peak_bytes": peak() - before}


def _distillation(folder: Path) -> Distillation:
    """The objective of distilling a parent that is written to a folder and read back."""
    torch.manual_seed(0)
    save_model_folder(parent_model().build(), folder / "parent")
    return Distillation.model_validate({"kind": "distillation", "teacher": str(folder / "parent")})


def _step(train: TrainConfig) -> Callable[[Tensor, Tensor], float]:
    """Forward, backward, clip and optimizer step of a student of half the parent's width."""
    torch.manual_seed(1)
    student = parent_model(d_model=96).build()
    optimizer, objective = build_optimizer(student, train), build_objective(train)

    def step(tokens: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        terms = objective(student, tokens, targets).terms.values()
        value = sum((term.weight * term.value for term in terms if term.weight), torch.zeros(()))
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return float(value.detach())

    return step


def _batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, config.vocab_size, (BATCH_SIZE, SEQ_LEN + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
