"""Inference bounds: the minimum time and memory of prefill and decoding.

A roofline is a bound, not a forecast. Every component of every layer takes the longer of its FLOPs at the peak rate
and its bytes at the peak bandwidth, one component after another. The bound ignores kernels below the peak, launches,
norms and activations, the traffic of activations, attention's softmax, sampling, scheduling, communication between
tensor-parallel devices, and imbalance between experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from explore.cost import (
    DTYPES,
    HARDWARE,
    Dtypes,
    Entry,
    Ledger,
    Stored,
    bytes_of,
    decode_bytes,
    in_formats,
    params_touched,
    state_bytes,
)
from explore.model import ModelConfig
from explore.precision import Recipe
from explore.roofline.hardware import Hardware
from explore.roofline.hardware import hardware as device_named

if TYPE_CHECKING:
    import pandas as pd

USABLE = 0.95
"""Fraction of a device's memory available for weights and state."""


@dataclass(frozen=True)
class Deployment:
    """A model on devices.

    Attributes:
        dtypes: dtypes of weights, state, and activations sent to experts.
        compute_dtype: dtype of the operands of matrix products; default: the weights'.
        tensor_parallel: number of devices that share every matrix and every sequence; communication is free.
        expert_parallel: number of devices that each hold a part of the experts and a copy of all else, and each decode
            a batch.
        reserved_bytes: memory per device used by something else.
        recipe: number formats of weights and operands by component, instead of one dtype for all.
    """

    model: ModelConfig
    device: Hardware
    dtypes: Dtypes = DTYPES
    compute_dtype: Stored | None = None
    tensor_parallel: int = 1
    expert_parallel: int = 1
    reserved_bytes: float = 0
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "expert_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def n_devices(self) -> int:
        return self.tensor_parallel * self.expert_parallel

    @cached_property
    def flops_per_s(self) -> float:
        """Peak FLOP/s of matrix products not covered by a recipe."""
        return self.tensor_parallel * self.device.peak(self.compute_dtype or self.dtypes.weight)

    @cached_property
    def bandwidth(self) -> float:
        return self.tensor_parallel * self.device.bandwidth

    @cached_property
    def memory_bytes(self) -> float:
        """Bytes available for weights and state on the devices that share a batch."""
        return self.tensor_parallel * (USABLE * self.device.memory_bytes - self.reserved_bytes)

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of weights on the devices that share a batch."""
        total = 0.0
        for n, entry in components(self._ledger(1)):
            total += n * entry.weight_bytes(entry.params / self._shares(entry), self.dtypes.weight)
        return total

    def state_bytes(self, context: int) -> float:
        """Bytes of state of one sequence after `context` tokens."""
        ledger = self.model.ledger(_positive("context", context))
        fixed = ledger.state_bytes(self.dtypes.state, "ssm_numel", "conv_numel")
        return fixed + ledger.state_bytes(self.dtypes.kv, "kv_numel_seq")

    def largest_batch(self, context: int) -> int:
        """Number of sequences of `context` tokens that fit in memory with the weights.

        Raises:
            ValueError: none fits; the message says how much memory is missing.
        """
        left = self.memory_bytes - self.weight_bytes
        state = self.state_bytes(context)
        if left < state:
            where = f"{self.tensor_parallel} {self.device.name}" if self.tensor_parallel > 1 else self.device.name
            raise ValueError(
                f"memory: {(self.weight_bytes + state) / 2**30:.2f} GiB are needed for weights and one sequence of "
                f"{context:,} tokens, and {where} has {self.memory_bytes / 2**30:.2f} GiB for them: "
                f"{(state - left) / 2**30:.2f} GiB too little"
            )
        return int(left / state) if state else 1_000_000

    def decode_s(self, context: int, batch_size: int) -> float:
        """Seconds to decode one token for each sequence of a batch, each with `context` tokens of context."""
        _positive("batch_size", batch_size)
        seconds = 0.0
        for n, entry in components(self._ledger(_positive("context", context))):
            flops = batch_size * entry.flops_step
            moved = decode_bytes(entry, self.dtypes, batch_size, self._shares(entry))
            seconds += n * max(flops / self._peak(entry), moved / self.bandwidth)
        return seconds + self.all_to_all_s(batch_size)

    def prefill_s(self, context: int, batch_size: int = 1) -> float:
        """Seconds to prefill the contexts of a batch of sequences."""
        _positive("batch_size", batch_size)
        seconds = 0.0
        for n, entry in components(self._ledger(_positive("context", context))):
            flops = batch_size * entry.flops_prefill
            weights = entry.weight_bytes(params_touched(entry, batch_size * context), self.dtypes.weight)
            written = state_bytes(entry, entry.kv_numel_seq, self.dtypes.kv) + state_bytes(
                entry, entry.ssm_numel + entry.conv_numel, self.dtypes.state
            )
            seconds += n * max(flops / self._peak(entry), (weights + batch_size * written) / self.bandwidth)
        return seconds + self.all_to_all_s(batch_size * context)

    def all_to_all_s(self, n_tokens: int) -> float:
        """Seconds for a device to send its tokens to experts on other devices and to get the results back."""
        if self.expert_parallel == 1:
            return 0.0
        numel = self.model.ledger(1).main.all_to_all_numel / 2  # one way; the way back takes as long and follows it
        elsewhere = 1 - 1 / self.expert_parallel
        return 2 * n_tokens * elsewhere * bytes_of(numel, self.dtypes.activation) / self.device.link

    def request_s(self, n_in: int, n_out: int, batch_size: int) -> float:
        """Seconds for a batch to prefill `n_in` tokens and decode `n_out` tokens per sequence.

        The context grows while decoding; step times are sampled at the middles of eight equal stretches.
        """
        stretches = 8
        middles = [n_in + max(1, round(n_out * (i + 0.5) / stretches)) for i in range(stretches)]
        steps = n_out * sum(self.decode_s(context, batch_size) for context in middles) / stretches
        return self.prefill_s(n_in, batch_size) + steps

    def throughput(self, n_in: int, n_out: int, batch_size: int) -> float:
        """Tokens decoded per second and device."""
        return batch_size * n_out / self.request_s(n_in, n_out, batch_size) / self.tensor_parallel

    def _ledger(self, context: int) -> Ledger:
        ledger = self.model.ledger(context)
        return ledger if self.recipe is None else in_formats(ledger, self.recipe)

    def _peak(self, entry: Entry) -> float:
        """Peak FLOP/s of a component's matrix products."""
        if entry.weight is None or self.compute_dtype is not None:
            return self.flops_per_s
        return self.tensor_parallel * self.device.peak(entry.weight)

    def _shares(self, entry: Entry) -> int:
        """Number of devices that share the weights of a component; more than one only for experts."""
        return self.expert_parallel if entry.all_to_all_numel else 1


def components(ledger: Ledger) -> Iterator[tuple[int, Entry]]:
    """Iterates over the components of decoding, each with the number of layers that have it."""
    return ((n, entry) for n, part in ledger.counted() for entry in part.entries)


def decode_table(
    models: Mapping[str, ModelConfig],
    hardware: str = HARDWARE,
    context: int = 65_536,
    batch_sizes: Sequence[int] = (1, 4, 16, 64, 256),
    **deployment: Any,
) -> pd.DataFrame:
    """Tabulates decode latency and throughput of models against batch size.

    Args:
        deployment: further fields of `Deployment`.

    Returns:
        One row per model and batch size: model, batch_size, context, step_s, tokens_per_s (per device), and `fits`,
        whether the batch fits in memory.
    """
    import pandas as pd

    device = device_named(hardware)
    rows = []
    for name, model in models.items():
        deployed = Deployment(model, device, **deployment)
        for batch_size in batch_sizes:
            step_s = deployed.decode_s(context, batch_size)
            needed = deployed.weight_bytes + batch_size * deployed.state_bytes(context)
            rows.append(
                {
                    "model": name,
                    "batch_size": batch_size,
                    "context": context,
                    "step_s": step_s,
                    "tokens_per_s": batch_size / step_s / deployed.tensor_parallel,
                    "fits": needed <= deployed.memory_bytes,
                }
            )
    return pd.DataFrame(rows, columns=["model", "batch_size", "context", "step_s", "tokens_per_s", "fits"])


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def expert_intensity(n_tokens: float, d_model: int, d_expert: int) -> float:
    """FLOPs per element moved, for one expert matrix applied to `n_tokens` tokens: 2 t d m / (d m + t (d + m)).

    Source: LatentMoE, arXiv 2601.18089, which assumes one byte per element.
    """
    return 2 * n_tokens * d_model * d_expert / (d_model * d_expert + n_tokens * (d_model + d_expert))


def tokens_at_ridge(ridge: float, d_model: int, d_expert: int) -> float:
    """Tokens per expert at which `expert_intensity` reaches a ridge; infinite if it never does."""
    margin = 2 * d_model * d_expert - ridge * (d_model + d_expert)
    return ridge * d_model * d_expert / margin if margin > 0 else math.inf


def all_to_all_ratio(flops_per_s: float, d_expert: int, link: float) -> float:
    """Ratio of the time to send tokens to the time of one expert matrix product: 5 F / (4 m BW).

    An element is sent in 4 bits and returned in 16, together 2.5 bytes, against 2 d m FLOPs for d elements.

    Source: LatentMoE, arXiv 2601.18089; its example has a ratio of about 9.
    """
    return 5 * flops_per_s / (4 * d_expert * link)
