"""Base classes of blocks: a config that computes its cost and builds its module."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from explore.blocks.declarations import Axis, Draw, FusedNorm, Group, Layout, Role, Stops, Uncounted
from explore.blocks.saved import Ranks
from explore.blocks.state import State
from explore.config import Config
from explore.cost import ConventionName, Entry, Saved
from explore.ops import Quantizer, Visit, linear, rms_norm


class RouterStats(NamedTuple):
    """Router statistics of one forward pass of a mixture of experts.

    Attributes:
        load: number of tokens routed to each expert.
        aux_loss: balance loss to add to the training loss, already multiplied by its coefficient.
    """

    load: Float[Tensor, " n_experts"]
    aux_loss: Float[Tensor, ""]


S = TypeVar("S", bound=State)


class Mixer(nn.Module, ABC, Generic[S]):
    """The inside of a residual layer: maps (batch, seq, d_model) to the same shape; `S` is its decoding state."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: S | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], RouterStats | None]:
        """Processes a sequence, or continues one from `state`.

        Args:
            state: from the config's `new_state`, and updated here; without it the sequence starts at `x`.

        Returns:
            The output, and the router's statistics if there is a router and no state (only training needs them).
        """

    @abstractmethod
    def init_weights(self, std: float, out_std: float) -> None:
        """Draws all parameters at random.

        Args:
            std: standard deviation of matrices that read the residual stream.
            out_std: standard deviation of matrices that write to it.
        """

    def linear_map(self) -> Float[Tensor, "d_model d_model"] | None:
        """Initial matrix for a linear map that replaces this mixer; None if the mixer has no such product."""
        return None


class RoutedMixer(Mixer[State]):
    """A mixer that sends every token to some of its experts; its `forward` returns the router's statistics.

    Attributes:
        quantizer: quantiser of the routed experts' products (ledger component `experts`).
    """

    quantizer: Quantizer | None = None

    @abstractmethod
    def update_bias(self, load: Float[Tensor, " n_experts"]) -> None:
        """Adjusts the routing bias towards an even load; called once per optimizer step.

        Args:
            load: number of tokens routed to each expert in the step.
        """

    @abstractmethod
    def visits(self, x: Float[Tensor, "batch seq d_model"]) -> Iterator[Visit]:
        """Yields the computation of each expert on a sequence, expert by expert."""


class BlockConfig(Config, ABC):
    """Sizes and declarations of one kind of block; `d_model` belongs to the model and is passed in.

    Costs, figures, families, search, workbench, proof and timing use only these declarations and never test for a
    kind. To add a kind, write a file beside this one and add it to `BLOCKS`. Members without a default are
    required; override the others if they apply.

    Attributes:
        label: name of the kind in tables and figures.
        role: the block's purpose, such as mixing tokens.
        family_names: names of such layers in a family name, plainest first; only for recurrent mixers and experts.
        groups: parts shown in figures, in the order a bar stacks them.
        colored_as: group that gives the letter its colour; the first group when empty.
        lines: components merged into one line when conventions are compared, by line name.
        draws: quantities that a search samples, by name; `sized` turns them into sizes.
        ranks: how weights and products are split across devices in training.
        fused_norms: norms computed inside an op rather than by a module, by weight name.
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
        """Returns sizes for a width, in the proportions of the Nemotron models.

        Raises:
            ValueError: no such sizes divide `d_model`.
        """

    @classmethod
    @abstractmethod
    def random_example(cls, rng: random.Random) -> BlockConfig:
        """Returns random small sizes and options for the proof; they are valid at any width."""

    @abstractmethod
    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        """The ledger of one block over one sequence, without the norm before the mixer."""

    @abstractmethod
    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        """Tensors of one sequence that Megatron-LM saves for backward, without the input of the preceding norm.

        Assumes Transformer Engine's fused kernels. Each tensor names the option that makes it unnecessary: one of
        Megatron's recomputed modules, `fused_attention`, `memory_efficient_permutation` or `no_dropout`.
        """

    @abstractmethod
    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        """Tensors of one sequence that this kit saves (fp32, CPU, default paths), without the norm's input."""

    @abstractmethod
    def build(self, d_model: int) -> Mixer[Any]:
        """The module, uninitialised until `init_weights`."""

    def new_state(self, capacity: int | None = None) -> State:
        """Returns the empty decoding state of one layer; stateless unless overridden.

        Args:
            capacity: maximum number of positions; when given, the state is written in place.
        """
        return State(capacity=capacity)

    @property
    def family_name(self) -> str:
        """The entry of `family_names` for these sizes, or an empty string."""
        return self.family_names[0] if self.family_names else ""

    @classmethod
    def group_of(cls, component: str) -> str:
        """Returns the name of the group that contains a ledger component."""
        named = (name for name, group in cls.groups.items() if component in group.components)
        return next(named, next(iter(cls.groups)))

    def conventions(self, d_model: int, seq_len: int) -> Mapping[ConventionName, Mapping[str, int]]:
        """Forward FLOPs of one sequence by convention and component, where they differ from the general rule."""
        return {}

    @property
    def orders_tokens(self) -> bool:
        """Whether the output depends on the order of the earlier tokens."""
        return self.role == "recurrent"

    def routing(self) -> tuple[int, int]:
        """Number of routed experts and number of experts per token; (0, 0) without experts."""
        return 0, 0

    def context_numel(self, cp: int) -> float:
        """Elements per token that a context-parallel rank sends in a forward pass."""
        return 0.0

    def check_parallel(self, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1) -> None:
        """Checks that tensor, context, expert and expert-tensor ranks divide the sizes.

        Raises:
            ValueError: a rank count does not divide a size; the message lists those that do.
        """

    def uncounted(self, seq_len: int) -> Uncounted:
        """FLOPs that the op counter measures in this block but the ledger leaves out, on the paths it can count."""
        return Uncounted()

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """Converts values sampled from `draws` into fields that satisfy all divisibility rules at any width."""
        return {}

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        """Fields with a slider in the workbench, and the stops of each slider."""
        return {}

    @classmethod
    def settled(cls, sizes: Mapping[str, Any]) -> dict[str, int]:
        """Returns the changes that make a set of field values consistent."""
        return {}

    def regions(self, seq_len: int) -> Mapping[str, int]:
        """Elements per token of ops worth compiling, by their name in `explore.ops.paths`; time is proportional."""
        return {}

    def axes(self) -> tuple[Axis, ...]:
        """Axes along which a trained block can be cut, besides `d_model`; outer axes come before inner ones."""
        return ()

    def layout(self) -> Layout:
        """Axes of every weight of the module; a block without a layout cannot be cut."""
        return {}

    def op_calls(self, d_model: int, batch_size: int, seq_len: int, dtype: torch.dtype) -> Mapping[str, Call]:
        """Calls of the ops between the projections, for timing; keys are "op, sizes"."""
        return {}


Call = Callable[[], Tensor]
"""A call of an op with all its inputs; the result has a gradient."""


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter."""
    return nn.Parameter(torch.empty(*shape))


class Linear(nn.Linear):
    """A linear layer; it uses its quantiser if it has one, otherwise the selected path."""

    quantizer: Quantizer | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the quantiser makes the product at this step."""
        return self.quantizer is not None and not self.quantizer.emulation.is_off

    def forward(self, x: Float[Tensor, "*dims d_in"]) -> Float[Tensor, "*dims d_out"]:
        if self.quantizer is not None:
            return self.quantizer.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """RMS normalisation computed in the dtype of its weight and returned in the dtype of its input."""

    def forward(self, x: Float[Tensor, "*dims width"]) -> Float[Tensor, "*dims width"]:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)
