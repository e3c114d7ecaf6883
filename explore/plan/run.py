"""Settings of a training run except its layout: batch, precision, optimizer, recomputation and offloading."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import PositiveInt, field_validator

from explore.blocks import BLOCKS
from explore.config import Config
from explore.cost import Dtype
from explore.precision import FORMATS, FormatName

PrecisionName = Literal["bf16", "fp8", "fp8-blocks", "mxfp8", "nvfp4"]
AllToAll = Literal["naive", "rank", "node"]
"""Copies of a token that an all-to-all sends: one per expert, one per destination rank, or one per destination domain,
where the fast link forwards it to the ranks."""
MODULES: tuple[str, ...] = (
    "layernorm",
    *sorted({module for block in BLOCKS for module, _ in block.config.ranks.recomputed}),
    "full",
)
"""Modules that Megatron-LM can recompute in the backward pass, as declared by blocks; `full` is whole layers."""


class Precision(NamedTuple):
    """Bytes and compute dtype of a training recipe.

    Attributes:
        weight: bytes per weight used in narrow products.
        narrow: bytes per input element of a narrow product; None when products are in bf16.
        compute: dtype of the products.
        description: formats in words.
        transposed_copy: bytes of the transposed copy of a weight, which some devices do not need.
    """

    weight: float
    narrow: float | None
    compute: Dtype
    description: str
    transposed_copy: float = 0.0


def _bytes(name: FormatName) -> float:
    """Bytes of an element, with its scales."""
    return FORMATS[name].bits_per_element / 8


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "bf16": Precision(2.0, None, "bfloat16", "weights and products in bf16"),
        "fp8": Precision(
            2.0,
            1.0,
            "float8",
            "FP8 with one scale per tensor, and a transposed copy of weights if products need it",
            1.0,
        ),
        "fp8-blocks": Precision(2.0, 1 + 1 / 32, "float8", "FP8 in blocks of 128, rows and columns of weights"),
        "mxfp8": Precision(2 * _bytes("mxfp8"), _bytes("mxfp8"), "float8", "MXFP8, rows and columns of weights"),
        "nvfp4": Precision(2 * _bytes("nvfp4"), _bytes("nvfp4"), "float4", "NVFP4, rows and columns of weights"),
    }
)
"""Embedding, head, router, norms and attention itself stay in bf16 in all of them."""


class Run(Config):
    """A training run.

    Attributes:
        seq_len: tokens per sequence.
        global_batch: sequences per optimizer step.
        precision: recipe of products and weights.
        recompute: modules whose activations are recomputed in the backward pass.
        moments: dtype of Adam's two moments.
        grads: dtype of accumulated gradients.
        zero: state split across data-parallel ranks: 0 none, 1 optimizer, 2 also gradients, 3 also weights (FSDP).
        offload_optimizer: keep main weights and moments in host memory between steps.
        offload_activations: fraction of the activations offloaded to host memory until the backward pass.
        memory_efficient_permutation: apply routing weights before an expert's last matrix, whose output then need
            not be saved; free, and standard in Megatron-LM since 0.13.
        fused_attention: attention scores are not saved.
        dropout: dropout masks are saved.
        sequence_parallel: tensor-parallel ranks split the tokens of norms and of the residual stream.
        all_to_all: which copies of a token are sent to experts.
        expert_groups: number of expert groups, and of groups a token may use; None allows any expert.
        reserve: fraction of memory left free for communication buffers, graphs and fragmentation.
    """

    seq_len: PositiveInt = 4096
    global_batch: PositiveInt = 1024
    precision: PrecisionName = "bf16"
    recompute: tuple[str, ...] = ()
    moments: Literal["float32", "bfloat16"] = "float32"
    grads: Literal["float32", "bfloat16"] = "float32"
    zero: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    offload_activations: float = 0.0
    memory_efficient_permutation: bool = False
    fused_attention: bool = True
    dropout: bool = False
    sequence_parallel: bool = True
    all_to_all: AllToAll = "node"
    expert_groups: tuple[int, int] | None = None
    reserve: float = 0.03

    @field_validator("offload_activations", "reserve")
    @classmethod
    def _share(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError(f"must be at least 0 and below 1, got {value}")
        return value

    @field_validator("recompute")
    @classmethod
    def _modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for module in value:
            if module not in MODULES:
                raise ValueError(f"must be modules among {', '.join(MODULES)}, got {module}")
        return value

    @field_validator("expert_groups")
    @classmethod
    def _groups(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[1] <= value[0]:
            raise ValueError(f"must be groups and how many of them are chosen, got {value}")
        return value

    @property
    def settings(self) -> frozenset[str]:
        """Settings under which saved tensors become unnecessary."""
        names: dict[str, Any] = {
            "memory_efficient_permutation": self.memory_efficient_permutation,
            "fused_attention": self.fused_attention,
            "no_dropout": not self.dropout,
        }
        return frozenset([name for name, on in names.items() if on] + list(self.recompute))

    @property
    def format(self) -> Precision:
        return PRECISIONS[self.precision]
