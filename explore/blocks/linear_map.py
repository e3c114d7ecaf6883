"""A linear map applied to every token; compression replaces a block by it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from explore.blocks.base import BlockConfig, Linear, Mixer
from explore.blocks.declarations import D_MODEL, Group, Layout, Role
from explore.blocks.state import State
from explore.cost import Entry, Saved, linear_input, matrix


class LinearMapConfig(BlockConfig):
    """One square matrix of the model's width.

    Source: the linear replacements of Puzzle, arXiv 2411.19146, section 2.1.
    """

    label: ClassVar[str] = "linear map"
    role: ClassVar[Role] = "mlp"
    groups: ClassVar[Mapping[str, Group]] = {"linear map": Group((0.31, 0.00, 0.00))}

    kind: Literal["linear_map"] = "linear_map"

    @classmethod
    def default(cls, d_model: int) -> LinearMapConfig:
        return cls()

    @classmethod
    def random_example(cls, rng: random.Random) -> LinearMapConfig:
        return cls()

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        return (matrix("map", d_model, d_model, seq_len),)

    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        return (linear_input("map", d_model * seq_len),)

    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        return (Saved("map", "linear input", d_model * seq_len, "float32"),)

    def layout(self) -> Layout:
        return {"map.weight": (D_MODEL, D_MODEL)}

    def build(self, d_model: int) -> LinearMap:
        return LinearMap(d_model)


class LinearMap(Mixer[State]):
    """W x."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.map = Linear(d_model, d_model, bias=False)

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.normal_(self.map.weight, std=out_std)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], None]:
        return self.map(x), None
