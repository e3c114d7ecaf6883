"""Multi-layer perceptron: squared ReLU or SwiGLU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from explore.blocks.base import BlockConfig, Linear, Mixer
from explore.blocks.declarations import D_MODEL, Axis, Dim, Draw, Group, Layout, Probe, Role, Stops, ladder, width
from explore.blocks.saved import Ranks, check_divides, dropout_mask, inner_kept, inner_saved
from explore.blocks.state import State
from explore.cost import Entry, Saved, linear_input, matrix
from explore.ops import Activation, activate, is_gated


class MLPConfig(BlockConfig):
    """Two matrices around a squared ReLU, or three in a SwiGLU."""

    label: ClassVar[str] = "MLP"
    role: ClassVar[Role] = "mlp"
    groups: ClassVar[Mapping[str, Group]] = {"MLP": Group((0.95, 0.90, 0.25))}
    draws: ClassVar[Mapping[str, Draw]] = {"ratio": (1.0, 2.0, 3.0, 4.0, 6.0)}
    ranks: ClassVar[Ranks] = Ranks(recomputed=(("mlp", ("up", "gate", "down")),))

    kind: Literal["mlp"] = "mlp"
    d_ff: PositiveInt
    activation: Activation = "relu2"

    @classmethod
    def default(cls, d_model: int) -> MLPConfig:
        return cls(d_ff=4 * d_model)

    @classmethod
    def random_example(cls, rng: random.Random) -> MLPConfig:
        return cls(d_ff=rng.randint(1, 40), activation=rng.choice(get_args(Activation)))

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """The inner width is `ratio` times the model's width."""
        return {"d_ff": width(d_model, drawn["ratio"])}

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        return {"d_ff": Stops(tuple(ladder(16, 8 * d_model, 16, 8)))}

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        up = matrix("up", d_model, self.d_ff, seq_len)
        gate = (matrix("gate", d_model, self.d_ff, seq_len),) if is_gated(self.activation) else ()
        return (up, *gate, matrix("down", self.d_ff, d_model, seq_len))

    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        inner = inner_saved("up", self.d_ff * seq_len, self.activation, cut="width", dropped_by=("mlp",))
        return (linear_input("up", d_model * seq_len), *inner, dropout_mask("down", d_model, seq_len))

    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        inner = inner_kept("up", self.d_ff * seq_len, self.activation)
        return (Saved("up", "linear input", d_model * seq_len, "float32"), *inner)

    def check_parallel(self, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1) -> None:
        check_divides("tp", tp, "d_ff", self.d_ff)

    def axes(self) -> tuple[Axis, ...]:
        powers = powers_of(self.activation, "up.weight", "down.weight")
        return (Axis("d_ff", self.d_ff, probe=Probe("down", "input"), powers=powers),)

    def layout(self) -> Layout:
        return mlp_layout((("d_ff",),))

    def build(self, d_model: int) -> MLP:
        return MLP(self, d_model)


def mlp_layout(inner: Dim) -> Layout:
    """The layout of an MLP's weights with inner dimension `inner`."""
    return {"up.weight": (inner, D_MODEL), "gate.weight": (inner, D_MODEL), "down.weight": (D_MODEL, inner)}


def powers_of(activation: Activation, up: str, down: str) -> tuple[tuple[str, int], ...]:
    """Exponents of the weight norms in the magnitude of an inner channel.

    Squared ReLU is unchanged when a row of `up` is multiplied by c and its column of `down` divided by c^2.
    """
    return () if is_gated(activation) else ((up, 2), (down, 1))


class MLP(Mixer[State]):
    """W_down relu(W_up x)^2 (arXiv 2109.08668), or W_down (SiLU(W_gate x) * W_up x) (arXiv 2002.05202)."""

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.up = Linear(d_model, config.d_ff, bias=False)
        self.gate = Linear(d_model, config.d_ff, bias=False) if is_gated(config.activation) else None
        self.down = Linear(config.d_ff, d_model, bias=False)

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.normal_(self.up.weight, std=std)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=std)
        nn.init.normal_(self.down.weight, std=out_std)

    def linear_map(self) -> Float[Tensor, "d_model d_model"]:
        """W_down W_up: the MLP without its activation (Puzzle, arXiv 2411.19146, section 3.2)."""
        return self.down.weight @ self.up.weight

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], None]:
        gate = None if self.gate is None else self.gate(x)
        return self.down(activate(self.up(x), gate, self.config.activation)), None
