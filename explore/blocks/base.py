"""What a block is: a config that knows its cost and builds its module."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from explore.blocks.declarations import Axis, Draw, FusedNorm, Group, Layout, Region, Role, Stops, Uncounted
from explore.blocks.saved import Ranks
from explore.blocks.state import State
from explore.config import Config
from explore.cost import ConventionName, Entry, Saved
from explore.ops import Quantizer, Visit, linear, rms_norm


class RouterStats(NamedTuple):
    """What a mixture of experts tells about one forward pass.

    Attributes:
        load: tokens that went to each expert.
        aux_loss: balance loss to be added to the training loss, coefficient included.
    """

    load: Float[Tensor, " n_experts"]
    aux_loss: Float[Tensor, ""]


S = TypeVar("S", bound=State)


class Mixer(nn.Module, ABC, Generic[S]):
    """The inside of a residual layer: (batch, seq, d_model) in, the same out; `S` is its decoding state."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: S | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], RouterStats | None]:
        """Mixes a sequence, or goes on with one.

        Args:
            state: what its config's `new_state` made, updated here; without one the sequence begins with `x`.

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

    def linear_map(self) -> Float[Tensor, "d_model d_model"] | None:
        """The matrix with which a linear map that replaces this mixer begins; None where there is no such product."""
        return None


class RoutedMixer(Mixer[State]):
    """A mixer that sends every token to some of its experts; its `forward` returns the router's statistics.

    Attributes:
        quantizer: of the products of its routed experts, which are the component `experts` of the ledger.
    """

    quantizer: Quantizer | None = None

    @abstractmethod
    def update_bias(self, load: Float[Tensor, " n_experts"]) -> None:
        """Moves the experts towards an even load; called once per optimizer step.

        Args:
            load: tokens that went to each expert in the step.
        """

    @abstractmethod
    def visits(self, x: Float[Tensor, "batch seq d_model"]) -> Iterator[Visit]:
        """What each expert computes of a sequence, one expert after another."""


class BlockConfig(Config, ABC):
    """Sizes of one kind of block, and all that is known of the kind; `d_model` belongs to the model and is passed in.

    Costs, figures, families, search, workbench, proof and timing read what is declared here, and none of them asks
    which kind it has. A new kind is a file beside this one and an entry of `BLOCKS`. It must declare what has no
    default here; the rest is for kinds that have such a thing.

    Attributes:
        label: name of the kind in tables and figures.
        role: what the block is for, whichever way it does it.
        family_names: what the name of a family calls such layers, the plainest first; of recurrent mixers and experts.
        groups: parts that figures show, in the order in which a bar stacks them.
        colored_as: group whose colour the letter has; the first when empty.
        lines: components that a comparison of conventions shows as one line, by the name of the line.
        draws: what a search draws, by name; `sized` makes sizes of it.
        ranks: how weights and products are divided where a model is trained on many devices.
        fused_norms: norms that no module computes, by the name of their weight.
    """

    label: ClassVar[str]
    role: ClassVar[Role]
    family_names: ClassVar[tuple[str, ...]] = ()
    groups: ClassVar[Mapping[str, Group]]
    colored_as: ClassVar[str] = ""
    lines: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    draws: ClassVar[Mapping[str, Draw]] = {}
    ranks: ClassVar[Ranks] = Ranks()
    fused_norms: ClassVar[Mapping[str, FusedNorm]] = {}

    kind: str

    @classmethod
    @abstractmethod
    def default(cls, d_model: int) -> BlockConfig:
        """Sizes for a width, in the proportions of the Nemotron models.

        Raises:
            ValueError: no such sizes divide `d_model`.
        """

    @classmethod
    @abstractmethod
    def random_example(cls, rng: random.Random) -> BlockConfig:
        """Small sizes and any options, for the proof; they fit any width."""

    @abstractmethod
    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        """The ledger of one block over one sequence, norm before the mixer not included."""

    @abstractmethod
    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        """What Megatron-LM keeps of one sequence for the backward pass, the input of the norm before not included.

        That is with Transformer Engine's fused kernels. A tensor says by which of Megatron's recomputed modules, or by
        which of `fused_attention`, `memory_efficient_permutation` and `no_dropout`, it becomes unnecessary.
        """

    @abstractmethod
    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        """What this kit keeps of one sequence, in fp32 on a CPU by the default paths; the same is not included."""

    @abstractmethod
    def build(self, d_model: int) -> Mixer[Any]:
        """The module, uninitialised until `init_weights`."""

    def new_state(self, capacity: int | None = None) -> State:
        """What decoding keeps of one layer, before the first token; nothing unless a block says otherwise.

        Args:
            capacity: positions that there will be at most; with it the state is written in place.
        """
        return State(capacity=capacity)

    @property
    def family_name(self) -> str:
        """The one of `family_names` that these sizes give; empty where there is none."""
        return self.family_names[0] if self.family_names else ""

    @classmethod
    def group_of(cls, component: str) -> str:
        """The group of a component of the ledger."""
        named = (name for name, group in cls.groups.items() if component in group.components)
        return next(named, next(iter(cls.groups)))

    def conventions(self, d_model: int, seq_len: int) -> Mapping[ConventionName, Mapping[str, int]]:
        """Forward FLOPs of one sequence, by convention and component, where a convention does not go by its rule."""
        return {}

    def routing(self) -> tuple[int, int]:
        """Routed experts, and how many of them a token goes to; zeros where there are none."""
        return 0, 0

    def context_numel(self, cp: int) -> float:
        """Elements that a context-parallel rank sends in a forward pass for each of its tokens."""
        return 0.0

    def check_parallel(self, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1) -> None:
        """Refuses sizes that tensor, context, expert or expert-tensor ranks cannot divide.

        Raises:
            ValueError: which ranks do not divide which size, and which would.
        """

    def uncounted(self, seq_len: int) -> Uncounted:
        """What the op counter finds in this block beside the ledger's FLOPs, on the paths that it can count."""
        return Uncounted()

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """Fields that come of what was drawn from `draws`; what must divide divides, at any width."""
        return {}

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        """The fields that have a slider in the workbench, and where it stops."""
        return {}

    @classmethod
    def settled(cls, sizes: Mapping[str, Any]) -> dict[str, int]:
        """What has to change in fields, of any values, so that they can stand together."""
        return {}

    def regions(self, seq_len: int) -> Mapping[str, Region]:
        """The ops that it can pay to compile, by the name that `explore.ops.paths` has for them."""
        return {}

    def axes(self) -> tuple[Axis, ...]:
        """What can be cut away from a trained block apart from `d_model`, each axis after the one it lies within."""
        return ()

    def layout(self) -> Layout:
        """The axes of the weights of the module; a block that does not say them cannot be cut."""
        return {}

    def op_calls(self, d_model: int, batch_size: int, seq_len: int, dtype: torch.dtype) -> Mapping[str, Call]:
        """The ops between the projections at these sizes, to be timed: by name of the op and, after a comma, sizes."""
        return {}


Call = Callable[[], Tensor]
"""A call of an op with all its inputs; the result has a gradient."""


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter."""
    return nn.Parameter(torch.empty(*shape))


class Linear(nn.Linear):
    """A linear layer, by the path in use, or by its quantiser where it has one."""

    quantizer: Quantizer | None = None

    def forward(self, x: Float[Tensor, "*dims d_in"]) -> Float[Tensor, "*dims d_out"]:
        if self.quantizer is not None:
            return self.quantizer.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """RMS normalisation in the dtype of its weight; the result is in that of what it reads."""

    def forward(self, x: Float[Tensor, "*dims width"]) -> Float[Tensor, "*dims width"]:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)
