"""One measurement in a separate process, to isolate its memory: `python -m explore.bench.worker JSON`."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.profiler import record_function

from explore.bench.compress import distillation_peak, time_distillation, time_library, time_program, time_scores
from explore.bench.families import SHAPES, VOCAB_SIZE, families, size_of
from explore.bench.ops import op_calls, timed
from explore.bench.profile import OPTIMIZER, profiled
from explore.bench.training import RUN_TOKENS
from explore.data import TextData
from explore.experiment import Experiment, TrainConfig
from explore.interop import to_hf
from explore.model import generate, quantize_products
from explore.ops import forced_paths, path_of, paths_in_use, rounding_generator
from explore.ops.quantize import Blocks, quantize_blocks, quantize_compiled
from explore.ops.rounding import rounding_noise
from explore.precision import FORMATS, FormatName
from explore.train import QUANTIZE, build_objective, build_optimizer, fit, in_halves, keep_freed_memory, processor

DECODED, PROMPT_TOKENS = 16, 16
"""Sequences decoded at once, and tokens of their prompts."""

DECODE_S = 10.0
"""Seconds of alternating decoding, after a first round for compilation."""

REPEATS = 9
"""Number of measurements of a region."""


def train_step(
    family: str, shape: str, side: str, precision: str, nudge: float = 0.0, device: str = "cpu", split: bool = False
) -> Callable[[Tensor, Tensor], float]:
    """Builds a training step (forward, backward, clip, AdamW) of one model, ours or transformers'.

    Ours then balances its experts, as in a run; transformers leaves their biases unchanged.

    Args:
        nudge: standard deviation of a random perturbation of every initial weight.
        device: device of the model and the batches.
        split: whether ours trains on both halves of a batch at once, as `fit` with `split_batch`.

    Returns:
        A function from inputs and targets to the loss before the step; transformers shifts the inputs itself.
    """
    torch.manual_seed(0)
    model = families(size_of(shape).d_model)[family].build().to(device)
    if nudge:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + nudge * torch.randn_like(weight))
    config = TrainConfig(tokens=1, precision=precision)
    autocast = torch.autocast(device, torch.bfloat16, enabled=config.recipe.high == "bf16")
    emulation = quantize_products(model, config.recipe)
    loads: dict[int, Tensor] = {}
    if side == "ours":
        keep_freed_memory()  # as `fit` does
        optimizer, experts = build_optimizer(model, config), model.moe_layers()

        objective = in_halves(build_objective(config)) if split else build_objective(config)

        def loss(inputs: Tensor, targets: Tensor) -> Tensor:
            found = objective(model, inputs, targets)
            loads.update((i, stats.load) for i, stats in found.stats.items())
            return torch.stack([term.weight * term.value for term in found.terms.values()]).sum()

        module: torch.nn.Module = model
    else:
        module, experts = to_hf(model).train(), {}
        del model
        fused = {"fused": True} if device == "cuda" else {}
        optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, betas=config.betas, weight_decay=0.1, **fused)

        def loss(inputs: Tensor, targets: Tensor) -> Tensor:
            out: Tensor = module(input_ids=inputs, labels=inputs, use_cache=False).loss
            return out

    def step(inputs: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        emulation.step += 1
        with autocast:
            value = loss(inputs, targets)
        value.backward()
        with record_function(OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            for i, load in loads.items():
                experts[i].update_bias(load)
        return float(value.detach())

    return step


def measure(
    family: str, shape: str, side: str, precision: str, seconds: float, paths: dict[str, str], split: bool = False
) -> dict[str, Any]:
    """Tokens per second of the median step, and peak memory above the level before the model was built."""
    size = SHAPES[shape]
    tokens = torch.randint(0, VOCAB_SIZE, (size.batch_size, size.seq_len + 1))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    before = peak_bytes(reset=True)
    with forced_paths(**paths):
        step = train_step(family, shape, side, precision, split=split)
        times: list[float] = []
        began = time.perf_counter()
        step(*batch)
        first_step_s = time.perf_counter() - began
        began = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            step(*batch)
            times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    return {
        "tokens_per_s": size.batch_tokens / median,
        "first_step_s": first_step_s,
        "n_steps": len(times),
        "peak_bytes": peak_bytes() - before,
    }


def end_to_end(family: str, shape: str, side: str, seconds: float, device: str) -> dict[str, Any]:
    """Like `measure`, in bf16 on a device, with the peak memory that the device reports."""
    size = size_of(shape)
    tokens = torch.randint(0, VOCAB_SIZE, (size.batch_size, size.seq_len + 1), device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    step = train_step(family, shape, side, "bf16", device=device)
    for _ in range(3):  # compiles and selects kernels
        step(*batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        step(*batch)  # waits for the device, since it returns the loss as a number
        times.append(time.perf_counter() - start)
    return {
        "tokens_per_s": size.batch_tokens / statistics.median(times),
        "n_steps": len(times),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes(),
        "ops": paths_in_use(device),
    }


def profile(family: str, shape: str, precision: str, seconds: float, paths: dict[str, str]) -> dict[str, Any]:
    """Profiles a step on the bytes of the embedded text."""
    size = SHAPES[shape]
    source = TextData(tokenizer="bytes", seq_len=size.seq_len).open(0)
    drawn = (source.batch(i, size.batch_size) for i in count())
    batches = ((batch.inputs, batch.targets) for batch in drawn)
    with forced_paths(**paths):
        return profiled(train_step(family, shape, "ours", precision), batches, seconds)


def region(shape: str, op: str, precision: str) -> dict[str, Any]:
    """Nanoseconds per element of an op, and seconds of its compilation with an empty cache."""
    size = SHAPES[shape]
    blocks = (block for model in families(size.d_model).values() for block in model.layers)
    around = {"norm": size.d_model, "loss": 4 * size.d_model}  # as in `op_calls`
    n_elements = next(
        found[op] for found in (around, *(block.regions(size.seq_len) for block in blocks)) if op in found
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    calls = op_calls(size.d_model, size.batch_tokens, size.seq_len, dtype)
    call = next(call for name, call in calls.items() if name.partition(",")[0] == op)
    with forced_paths(**{op: "compiled"}):
        first = timed(call, precision == "bf16")
    times: dict[str, list[float]] = {path_of(op): [], "compiled": []}
    for _ in range(REPEATS):
        for path, found in times.items():  # in turn, since the machine may be busy at times
            with forced_paths(**{op: path}):
                found.append(timed(call, precision == "bf16"))
    default, compiled = (sorted(found)[REPEATS // 2] for found in times.values())
    n_elements *= size.batch_tokens
    return {
        "op": op,
        "precision": precision,
        "default_ns": round(1e9 * default / n_elements, 3),
        "compiled_ns": round(1e9 * compiled / n_elements, 3),
        "compile_s": round(first - compiled, 1),
        "threads": torch.get_num_threads(),
        "device": processor(),
    }


def quantizer(shape: str, format: FormatName) -> dict[str, Any]:
    """Like `region`, for the quantisers of activations and gradients: along both axes, nearest and stochastic."""
    size = SHAPES[shape]
    x = torch.randn(size.batch_tokens, size.d_model).to(torch.bfloat16)
    noise, amax = rounding_noise(x, rounding_generator(0, 0, 0, "x")), x.abs().amax().float().view(1, 1)
    calls = [(x, drawn, Blocks(FORMATS[format], axis), amax) for axis in (0, 1) for drawn in (None, noise)]

    def seconds(function: Callable[..., Tensor]) -> float:
        began = time.perf_counter()
        for call in calls:
            function(*call)
        return time.perf_counter() - began

    first = seconds(quantize_compiled)
    times = [(seconds(quantize_blocks), seconds(quantize_compiled)) for _ in range(REPEATS)]
    default, compiled = (statistics.median(found) for found in zip(*times, strict=True))
    n_elements = len(calls) * x.numel()
    return {
        "op": QUANTIZE,
        "precision": format,
        "default_ns": round(1e9 * default / n_elements, 3),
        "compiled_ns": round(1e9 * compiled / n_elements, 3),
        "compile_s": round((first - compiled) / len(calls), 1),
        "threads": torch.get_num_threads(),
        "device": processor(),
    }


def curve(
    family: str,
    shape: str,
    precision: str,
    n_steps: int,
    paths: dict[str, str],
    nudge: float = 0.0,
    split: bool = False,
) -> dict[str, Any]:
    """The loss before each of several steps on the bytes of the embedded text."""
    size = SHAPES[shape]
    source = TextData(tokenizer="bytes", seq_len=size.seq_len).open(0)
    with forced_paths(**paths):
        step = train_step(family, shape, "ours", precision, nudge, split=split)
        batches = (source.batch(i, size.batch_size) for i in range(n_steps))
        return {"losses": [step(batch.inputs, batch.targets) for batch in batches]}


class _Begun(Exception):
    """A step has begun."""


def set_up(family: str, shape: str, n_trials: int = 6) -> dict[str, Any]:
    """Seconds from requesting a trial to its first step: for the first in a process, and the median of later ones."""
    size = SHAPES[shape]

    def stop(*_: Any) -> None:
        raise _Begun

    times: list[float] = []
    for seed in range(n_trials):
        experiment = Experiment(
            name="trial",
            seed=seed,
            model=families(size.d_model)[family],
            data=TextData(tokenizer="bytes", seq_len=size.seq_len),
            train=TrainConfig(tokens=RUN_TOKENS, batch_size=size.batch_size),
        )
        hook = register_module_forward_pre_hook(stop)
        began = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as runs:
                fit(experiment, runs, accelerator="cpu")
        except _Begun:
            times.append(time.perf_counter() - began)
        finally:
            hook.remove()
    return {"first_s": times[0], "set_up_s": statistics.median(times[1:])}


def run(shape: str, seconds: float, family: str = "hybrid LatentMoE") -> dict[str, Any]:
    """Speed and number of threads of a run by `fit`; a short run first determines the length of the timed one."""
    size, found = SHAPES[shape], {"tokens_per_s": 0.0}
    n_steps = 4
    for seed in range(2):
        experiment = Experiment(
            name="run",
            seed=seed,
            model=families(size.d_model)[family],
            data=TextData(tokenizer="bytes", seq_len=size.seq_len),
            train=TrainConfig(tokens=n_steps * size.batch_tokens, batch_size=size.batch_size, eval_tokens=1),
        )
        with tempfile.TemporaryDirectory() as runs:
            found = fit(experiment, runs, accelerator="cpu").result or found
        n_steps = max(4, round(seconds * found["tokens_per_s"] / size.batch_tokens))
    return {"tokens_per_s": found["tokens_per_s"], "threads": torch.get_num_threads(), "device": processor()}


def decode(family: str, shape: str, n_new: int, compiled: bool = False) -> dict[str, Any]:
    """Tokens per second of greedy decoding of 16 sequences in fp32, prompt included, ours and transformers' in turn.

    The fastest time of each side counts; `compile_s` is the extra time of our first round.
    """
    torch.manual_seed(0)
    model = families(SHAPES[shape].d_model)[family].build().eval()
    theirs: Any = to_hf(model)
    theirs.eval()
    prompt = torch.randint(0, model.config.vocab_size, (DECODED, PROMPT_TOKENS))
    cached = model.config.cost(1).kv_bytes_per_token > 0  # transformers has no cache without attention
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: generate(model, prompt, n_new, compiled=compiled),
        "theirs": lambda: theirs.generate(
            prompt, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, use_cache=cached, pad_token_id=0
        ),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    while sum(times["ours"][1:] + times["theirs"][1:]) < DECODE_S:
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - start)
    ours, baseline = min(times["ours"]), min(times["theirs"])
    return {
        "tokens_per_s": DECODED * n_new / ours,
        "baseline_tokens_per_s": DECODED * n_new / baseline,
        "ratio": baseline / ours,
        "baseline_cached": cached,
        **({"compile_s": times["ours"][0] - ours} if compiled else {}),
    }


def peak_bytes(*, reset: bool = False) -> int:
    """The largest resident memory of this process, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    works: dict[str, Callable[..., dict[str, Any]]] = {
        "train": measure,
        "profile": profile,
        "end_to_end": end_to_end,
        "region": region,
        "quantizer": quantizer,
        "curve": curve,
        "decode": decode,
        "trials": set_up,
        "run": run,
        "scores": time_scores,
        "distil": time_distillation,
        "distil_memory": partial(distillation_peak, peak=peak_bytes),
        "library": time_library,
        "program": time_program,
    }
    with tempfile.TemporaryDirectory() as cache:  # so that nothing is compiled already
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        print(json.dumps(works[task.pop("what")](**task)))
