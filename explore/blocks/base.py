"""What a block is: a config that knows its cost and builds its module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from explore.config import Config
from explore.cost import Entry
from explore.ops import linear, rms_norm


class RouterStats(NamedTuple):
    """What a mixture of experts tells about one forward pass.

    Attributes:
        load: tokens that went to each expert.
        aux_loss: balance loss to be added to the training loss, coefficient included.
    """

    load: Float[Tensor, " n_experts"]
    aux_loss: Float[Tensor, ""]


State = dict[str, Any]
"""What decoding keeps of a layer between calls, by name; empty before the first token.

Its tensors are replaced and never written to, so that a copy of the dictionary is a second state. One that begins with
`room`, a number of positions, is written in place instead, which is several times as fast and cannot be copied so; in
it `seen`, the positions so far, is a plain number as well.
"""


class Mixer(nn.Module, ABC):
    """The inside of a residual layer: (batch, seq, d_model) in, the same out."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], RouterStats | None]:
        """Mixes a sequence, or goes on with one.

        Args:
            state: what came before, brought up to date in place; the sequence begins with `x` when absent.

        Returns:
            The output, and the router's statistics where there is a router and no state: they are for training.
        """

    @abstractmethod
    def init_weights(self, std: float, out_std: float) -> None:
        """Draws all parameters anew.

        Args:
            std: standard deviation of matrices that read the residual stream.
            out_std: standard deviation of matrices that write to it.
        """


class BlockConfig(Config, ABC):
    """Sizes of one kind of block; `d_model` belongs to the model and is passed in."""

    role: ClassVar[Literal["ssm", "attention", "mlp", "moe"]]
    """What the block is for, whichever way it does it."""

    kind: str

    @classmethod
    @abstractmethod
    def default(cls, d_model: int) -> BlockConfig:
        """Sizes for a width, in the proportions of the Nemotron models.

        Raises:
            ValueError: no such sizes divide `d_model`.
        """

    @abstractmethod
    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        """The ledger of one block over one sequence, norm before the mixer not included."""

    @abstractmethod
    def build(self, d_model: int) -> Mixer:
        """The module, uninitialised until `init_weights`."""


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter."""
    return nn.Parameter(torch.empty(*shape))


class Linear(nn.Linear):
    """A linear layer, by the path in use."""

    def forward(self, x: Float[Tensor, "*dims d_in"]) -> Float[Tensor, "*dims d_out"]:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """RMS normalisation in the dtype of its weight; the result is in that of what it reads."""

    def forward(self, x: Float[Tensor, "*dims width"]) -> Float[Tensor, "*dims width"]:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def head_width(d_model: int, widths: tuple[int, ...], at_least: int) -> int:
    """The largest of `widths` that divides `d_model` into `at_least` heads.

    Raises:
        ValueError: none does.
    """
    for width in widths:
        if d_model % width == 0 and d_model // width >= at_least:
            return width
    smallest = widths[-1]
    raise ValueError(
        f"d_model: {d_model} is not divisible into heads; "
        f"allowed are multiples of {smallest}, at least {smallest * at_least}"
    )
