"""Inference regimes: what prefill and decoding cost in time and memory at the least.

A roofline is a bound, not a forecast. Every component of every layer takes the longer of its FLOPs at the peak rate
and its bytes at the peak bandwidth, one component after another. Left out are: kernels that reach less than the
peak, launches, norms and activations, the traffic of activations, attention's softmax, sampling, scheduling,
communication between tensor-parallel devices, and imbalance between experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from explore.cost import DTYPES, Dtypes, Entry, Ledger, Stored, bytes_of, decode_bytes, in_formats, params_touched
from explore.model import ModelConfig
from explore.precision import Recipe
from explore.roofline.hardware import Hardware
from explore.roofline.hardware import hardware as device_named

if TYPE_CHECKING:
    import pandas as pd

USABLE = 0.95
"""Part of a device's memory that weights and state may fill."""


@dataclass(frozen=True)
class Deployment:
    """A model on devices.

    Attributes:
        dtypes: of weights, state and what experts are sent.
        compute_dtype: of the operands of matrix products; that of the weights when absent.
        tensor_parallel: devices that share every matrix and every sequence, at no cost of communication.
        expert_parallel: devices that each keep a part of the experts and all else whole, and decode a batch each.
        reserved_bytes: memory of a device that is taken by something else.
        recipe: formats of weights and of operands, in place of one dtype for all.
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
        """Peak of products that no recipe speaks of."""
        return self.tensor_parallel * self.device.peak(self.compute_dtype or self.dtypes.weight)

    @cached_property
    def bandwidth(self) -> float:
        return self.tensor_parallel * self.device.bandwidth

    @cached_property
    def memory_bytes(self) -> float:
        """Memory for weights and state, of all devices that share a batch."""
        return self.tensor_parallel * (USABLE * self.device.memory_bytes - self.reserved_bytes)

    @cached_property
    def weight_bytes(self) -> float:
        """Weights on the devices that share a batch."""
        total = 0.0
        for n, entry in components(self._ledger(1)):
            total += n * bytes_of(entry.params / self._shares(entry), entry.weight or self.dtypes.weight)
        return total

    def state_bytes(self, context: int) -> float:
        """State of one sequence after `context` tokens."""
        main = self.model.ledger(_positive("context", context)).main
        fixed = bytes_of(main.ssm_numel + main.conv_numel, self.dtypes.state)
        return fixed + bytes_of(main.kv_numel_seq, self.dtypes.kv)

    def largest_batch(self, context: int) -> int:
        """Sequences of `context` tokens that fit beside the weights.

        Raises:
            ValueError: not one does; by how much.
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
        """Seconds of decoding one token of every sequence of a batch, all of which see `context` tokens."""
        _positive("batch_size", batch_size)
        seconds = 0.0
        for n, entry in components(self._ledger(_positive("context", context))):
            flops = batch_size * entry.flops_step
            moved = decode_bytes(entry, self.dtypes, batch_size, self._shares(entry))
            seconds += n * max(flops / self._peak(entry), moved / self.bandwidth)
        return seconds + self.all_to_all_s(batch_size)

    def prefill_s(self, context: int, batch_size: int = 1) -> float:
        """Seconds of reading a context of every sequence of a batch."""
        _positive("batch_size", batch_size)
        seconds = 0.0
        for n, entry in components(self._ledger(_positive("context", context))):
            flops = batch_size * entry.flops_prefill
            weights = bytes_of(params_touched(entry, batch_size * context), entry.weight or self.dtypes.weight)
            written = bytes_of(entry.kv_numel_seq, self.dtypes.kv) + bytes_of(
                entry.ssm_numel + entry.conv_numel, self.dtypes.state
            )
            seconds += n * max(flops / self._peak(entry), (weights + batch_size * written) / self.bandwidth)
        return seconds + self.all_to_all_s(batch_size * context)

    def all_to_all_s(self, n_tokens: int) -> float:
        """Seconds that a device needs to send its tokens to experts elsewhere and to get them back."""
        if self.expert_parallel == 1:
            return 0.0
        numel = self.model.ledger(1).main.all_to_all_numel / 2  # one way; the other is as long, and comes after it
        elsewhere = 1 - 1 / self.expert_parallel
        return 2 * n_tokens * elsewhere * bytes_of(numel, self.dtypes.activation) / self.device.link

    def request_s(self, n_in: int, n_out: int, batch_size: int) -> float:
        """Seconds in which a batch reads `n_in` tokens and writes `n_out` tokens a sequence.

        The context grows while decoding; a step's time is taken in the middles of eight equal stretches.
        """
        stretches = 8
        middles = [n_in + max(1, round(n_out * (i + 0.5) / stretches)) for i in range(stretches)]
        steps = n_out * sum(self.decode_s(context, batch_size) for context in middles) / stretches
        return self.prefill_s(n_in, batch_size) + steps

    def throughput(self, n_in: int, n_out: int, batch_size: int) -> float:
        """Tokens written per second and device."""
        return batch_size * n_out / self.request_s(n_in, n_out, batch_size) / self.tensor_parallel

    def _ledger(self, context: int) -> Ledger:
        ledger = self.model.ledger(context)
        return ledger if self.recipe is None else in_formats(ledger, self.recipe)

    def _peak(self, entry: Entry) -> float:
        """Peak FLOP/s of the products of a component."""
        if entry.weight is None or self.compute_dtype is not None:
            return self.flops_per_s
        return self.tensor_parallel * self.device.peak(entry.weight)

    def _shares(self, entry: Entry) -> int:
        """Devices that share the weights of a component: those that tokens are sent to."""
        return self.expert_parallel if entry.all_to_all_numel else 1


def components(ledger: Ledger) -> Iterator[tuple[int, Entry]]:
    """Every component that decoding runs, and how many layers have it."""
    return ((n, entry) for n, part in ledger.counted() for entry in part.entries)


def decode_table(
    models: Mapping[str, ModelConfig],
    hardware: str = "H100",
    context: int = 65_536,
    batch_sizes: Sequence[int] = (1, 4, 16, 64, 256),
    **deployment: Any,
) -> pd.DataFrame:
    """Decode latency and throughput of models against batch.

    Args:
        deployment: further fields of `Deployment`.

    Returns:
        One row a model and batch size: model, batch_size, context, step_s, tokens_per_s (per device), and whether the
        batch `fits` into memory.
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
    """FLOPs per element of one matrix of an expert that `n_tokens` tokens go through: 2 t d m / (d m + t (d + m)).

    Source: LatentMoE, arXiv 2601.18089, where an element is taken to be one byte.
    """
    return 2 * n_tokens * d_model * d_expert / (d_model * d_expert + n_tokens * (d_model + d_expert))


def tokens_at_ridge(ridge: float, d_model: int, d_expert: int) -> float:
    """Tokens per expert at which `expert_intensity` reaches a ridge; infinite where it never does."""
    room = 2 * d_model * d_expert - ridge * (d_model + d_expert)
    return ridge * d_model * d_expert / room if room > 0 else math.inf


def all_to_all_ratio(flops_per_s: float, d_expert: int, link: float) -> float:
    """Time of sending tokens over time of one product of their experts: 5 F / (4 m BW).

    An element goes out in 4 bits and comes back in 16, 2.5 bytes together, against 2 d m FLOPs for d elements.

    Source: LatentMoE, arXiv 2601.18089; its example has a ratio of about 9.
    """
    return 5 * flops_per_s / (4 * d_expert * link)
