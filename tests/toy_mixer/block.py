"""A made-up mixer, as it would stand in `explore/blocks`."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import nn

from explore.blocks.base import BlockConfig, Linear, Mixer
from explore.blocks.declarations import Group, Powers, Stops, Uncounted, leaf
from explore.cost import Entry, Saved, linear_input, matrix
from explore.ops.toy import toy


class ToyConfig(BlockConfig):
    label: ClassVar[str] = "toy mixer"
    role: ClassVar[str] = "recurrent"
    family_names: ClassVar[tuple[str, ...]] = ("Toy",)
    groups: ClassVar[dict[str, Group]] = {
        "toy projections": Group((0.1, 0.2, 0.3)),
        "toy mix": Group((0.3, 0.2, 0.1), ("down",)),
    }
    draws: ClassVar[dict[str, Any]] = {"d_toy": Powers(8, 32)}
    kind: Literal["toy"] = "toy"
    d_toy: PositiveInt

    @classmethod
    def default(cls, d_model: int) -> ToyConfig:
        return cls(d_toy=2 * d_model)

    @classmethod
    def random_example(cls, rng: random.Random) -> ToyConfig:
        return cls(d_toy=rng.randint(1, 9))

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        return drawn

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        return matrix("up", d_model, self.d_toy, seq_len), matrix("down", self.d_toy, d_model, seq_len)

    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        return linear_input("up", d_model * seq_len), linear_input("down", self.d_toy * seq_len)

    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        return (
            Saved("up", "linear input", d_model * seq_len, "float32"),
            Saved("up", "activation", self.d_toy * seq_len, "float32"),
            Saved("down", "linear input", self.d_toy * seq_len, "float32"),
        )

    def conventions(self, d_model: int, seq_len: int) -> dict[str, dict[str, int]]:
        return {"megatron": {"up": 0}}

    def uncounted(self, seq_len: int) -> Uncounted:
        return Uncounted(8 * seq_len, 12 * seq_len)

    def stops(self, d_model: int) -> dict[str, Stops]:
        return {"d_toy": Stops((8, 16, 4 * d_model))}

    def op_calls(self, d_model: int, batch_size: int, seq_len: int, dtype: torch.dtype) -> dict[str, Any]:
        x = leaf(batch_size, seq_len, self.d_toy, dtype=dtype)
        return {"toy": lambda: toy(x)}

    def build(self, d_model: int) -> Toy:
        return Toy(self, d_model)


class Toy(Mixer):
    def __init__(self, config: ToyConfig, d_model: int) -> None:
        super().__init__()
        self.up, self.down = Linear(d_model, config.d_toy, bias=False), Linear(config.d_toy, d_model, bias=False)

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.normal_(self.up.weight, std=std)
        nn.init.normal_(self.down.weight, std=out_std)

    def forward(self, x: Any, state: Any = None) -> Any:
        if x.shape[1] > 1:  # products that are in no ledger, of which one has a gradient, for one side
            ones, weight = torch.ones(x.shape[1], 2), torch.ones(2, 1, requires_grad=True)
            x = x + 0 * (ones @ weight + ones @ weight.detach()).sum()
        return self.down(toy(self.up(x))), None
