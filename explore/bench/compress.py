"""Cost of compression: scores, a distillation step, the library of a puzzle and its integer program."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from explore.bench.training import in_a_process
from explore.compress.observing import Observer
from explore.compress.program import Budget, solve
from explore.compress.scores import SPARSE, TOKENS
from explore.compress.variants import Offer, variants
from explore.data import Batch
from explore.experiment import TrainConfig
from explore.interop import save_model_folder
from explore.model import ModelConfig
from explore.objective import Distillation
from explore.ops import forced_paths
from explore.train import build_optimizer, keep_freed_memory
from explore.train.block_training import Part, by_layer, compute_gradients
from explore.train.objectives import build_objective

SEQ_LEN, BATCH_SIZE, VOCAB_SIZE = 256, 8, 8192
"""Vocabulary of the distilled model; scores use a quarter of it."""

SCORE_S, STEP_RATIO = 30.0, 1.55
"""Bounds: seconds of scores on two cores; and ratio of a distillation step without the teacher to a plain step."""

LIBRARY_RATIO, PROGRAM_S = 4.0, 2.0
"""Bounds: ratio of a training step of a whole library to one of its parent; seconds of an integer program."""

N_LAYERS, N_VARIANTS, N_PROGRAMS = 88, 60, 5
"""Size of the integer programs, and their number; the slowest counts."""


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
    """Measures scores, distillation, a library and integer programs, each in its own process.

    Args:
        seconds: duration of the timing of distillation steps, and of steps of a library.

    Yields:
        Records of what, value, bound, unit, and whether it `holds`. Time bounds are for two idle cores.
    """
    scored = in_a_process(what="scores")
    millions = scored["params"] / 1e6
    yield _record(
        f"scores of {millions:.1f}M parameters on {scored['tokens']:,} tokens", scored["seconds"], SCORE_S, "s"
    )
    step = in_a_process(what="distil", seconds=seconds)
    yield _record(
        "distillation step minus the teacher's pass, relative to a plain step", step["ratio"], STEP_RATIO, "times"
    )
    sliced, whole = (in_a_process(what="distil_memory", path=path) for path in ("sliced", "whole"))
    both = 2 * BATCH_SIZE * SEQ_LEN * VOCAB_SIZE * 4
    saved = whole["peak_bytes"] - sliced["peak_bytes"]
    yield {**_record("memory saved because no logits exist in full", saved, both, "bytes"), "holds": saved >= both}
    library = in_a_process(what="library", seconds=seconds)
    what = f"training step of a library of {library['n_parts']} replacements, over one of the parent"
    yield _record(what, library["ratio"], LIBRARY_RATIO, "times")
    what = f"integer program of {N_LAYERS} layers with {N_VARIANTS} variants"
    yield _record(what, in_a_process(what="program")["seconds"], PROGRAM_S, "s")


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
    found = _medians(works, _batch(parent_model()), seconds)
    return {**found, "ratio": (found["distil_s"] - found["teacher_s"]) / found["own_s"]}


def time_library(seconds: float) -> dict[str, Any]:
    """Median times of a parent's training step and of a step that trains all replacements of its layers, in turn.

    Returns:
        Their seconds, `n_parts`, the number of replacements, and `ratio`, of the second to the first.
    """
    keep_freed_memory()
    config = parent_model(VOCAB_SIZE // 4)
    parts = _parts(config)
    works = {"own_s": _step(TrainConfig(tokens=1), config), "library_s": _library_step(config, parts)}
    found = _medians(works, _batch(config), seconds)
    return {**found, "n_parts": len(parts), "ratio": found["library_s"] / found["own_s"]}


def time_program() -> dict[str, Any]:
    """Seconds of the slowest of several integer programs."""
    times = []
    for seed in range(N_PROGRAMS):
        program = random_program(seed)
        began = time.perf_counter()
        solve(**program)
        times.append(time.perf_counter() - began)
    return {"seconds": max(times)}


def random_program(seed: int, n_layers: int = N_LAYERS, n_variants: int = N_VARIANTS) -> dict[str, Any]:
    """Arguments of `solve` as in a puzzle: each layer is offered smaller and smaller variants, under two budgets."""
    rng = random.Random(seed)
    middle = range(n_variants - 2)
    shares = [[1.0, *sorted((rng.random() for _ in middle), reverse=True), 0.0] for _ in range(n_layers)]
    scale = [rng.choice([4e6, 9e6, 2e7]) for _ in shares]
    costs = [[share * n for share in row] for row, n in zip(shares, scale, strict=True)]
    memory = [[share * rng.uniform(0.5, 1) for share in row] for row in shares]
    values = [[(1 - share) ** 2 * rng.lognormvariate(-3, 1.5) for share in row] for row in shares]
    budgets = [Budget(costs, 0.5 * sum(scale)), Budget(memory, 0.4 * sum(max(row) for row in memory))]
    return {"values": values, "ties": costs, "budgets": budgets}


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


def _medians(
    works: Mapping[str, Callable[[Tensor, Tensor], object]], batch: tuple[Tensor, Tensor], seconds: float
) -> dict[str, float]:
    """Median seconds of each work on a batch; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    while min(map(len, times.values())) < 4 or sum(map(sum, times.values())) < seconds:
        for name, work in works.items():  # in turn, since the machine may be busy at times
            began = time.perf_counter()
            work(*batch)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def _parts(config: ModelConfig) -> list[Part]:
    """All replacements with weights of their own that `explore puzzle` offers, with random weights."""
    torch.manual_seed(2)
    parts = []
    for i, (letter, block) in enumerate(zip(config.pattern, config.layers, strict=True)):
        for variant in variants(letter, block, Offer()):
            if variant.is_trained and variant.block is not None:
                mixer = variant.block.build(config.d_model)
                mixer.init_weights(0.02, 0.02)
                parts.append(Part(i, variant, mixer))
    return parts


def _library_step(config: ModelConfig, parts: list[Part]) -> Callable[[Tensor, Tensor], object]:
    """Gradients, clip and optimizer step of all parts."""
    model, grouped = config.build().requires_grad_(False), by_layer(parts)
    optimizer = AdamW([weight for part in parts for weight in part.parameters()], lr=1e-4, weight_decay=0.0, fused=True)

    def step(tokens: Tensor, _targets: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        compute_gradients(model, grouped, tokens, 1.0)
        optimizer.step()

    return step


def _step(train: TrainConfig, config: ModelConfig | None = None) -> Callable[[Tensor, Tensor], float]:
    """Forward, backward, clip and optimizer step of a model; by default a student of half the parent's width."""
    torch.manual_seed(1)
    student = (config or parent_model(d_model=96)).build()
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
