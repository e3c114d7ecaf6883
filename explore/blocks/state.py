"""What decoding keeps of a layer between calls.

A block's config makes the state (`BlockConfig.new_state`) and its mixer reads and updates it. A block whose output
depends on the current position alone, such as an MLP, keeps nothing: the default of `new_state` serves it. Attention
takes a `KVCache` or a `WindowCache`; a recurrent mixer takes a `RecurrentState`, whatever the shape of its state. Both
hold the inputs of a short convolution where there is one. Another kind of state is a subclass of `State` whose tensors
are attributes, and that rounds them when it writes them, where it has a `rounding`.

Batch size, dtype and device are those of the first tokens that are read, so a new state holds no tensors.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from explore.ops import StateRounding


@dataclass(eq=False, kw_only=True)
class State:
    """The state of a layer that keeps nothing, and the base of those that keep something.

    Attributes:
        capacity: positions that there will be at most. With it tensors are written in place, which is faster and
            passes no gradient; without it every update makes new tensors.
        rounding: formats of what is kept; it stays as computed when absent.
    """

    capacity: int | None = None
    rounding: StateRounding | None = None

    @property
    def in_place(self) -> bool:
        """Whether an update may write into the tensors that are held."""
        return self.capacity is not None

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors that are held, unused capacity included."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def copy(self) -> State:
        """A state that goes on from here by itself: updates of one leave the other alone."""
        other = copy.copy(self)
        if self.in_place:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(other, name, value.clone())
        return other


@dataclass(eq=False, kw_only=True)
class ConvState(State):
    """The inputs of a short convolution.

    Attributes:
        n_past: positions before the current one that the convolution reads, `d_conv` - 1.
        conv: the last `n_past` inputs of the convolution; none (zero) before the first position.
        length: positions so far.
    """

    n_past: int = 0
    conv: Float[Tensor, "batch n_past channels"] | None = None
    length: int = 0

    def update_conv(self, x: Float[Tensor, "batch seq channels"]) -> Float[Tensor, "batch n_past channels"] | None:
        """Keeps the last inputs of the convolution; returns those before `x`, none at the start of a sequence."""
        before = self.conv
        past = x.new_zeros(len(x), self.n_past, x.shape[2]) if before is None else before.to(x.dtype)
        # Of n_past + seq positions the last n_past: what `x` leaves of the past, then the end of `x`.
        skipped = max(0, x.shape[1] - self.n_past)
        end = x[:, skipped:]
        if self.rounding is not None:
            end = self.rounding.inputs(end, self.length + skipped)
        self.conv = torch.cat((past[:, x.shape[1] :], end), dim=1)
        return before


@dataclass(eq=False, kw_only=True)
class RecurrentState(ConvState):
    """State of a size that does not depend on the length: a recurrence's, and the inputs of a short convolution.

    Attributes:
        shape: of the recurrent state of one sequence.
        recurrent: recurrent state after the last position; none (zero) before the first.
        length: positions so far, counted where state is rounded.
    """

    shape: tuple[int, ...]
    recurrent: Float[Tensor, "batch *shape"] | None = None

    def keep(self, recurrent: Float[Tensor, "batch *shape"], n: int) -> None:
        """Keeps the recurrent state after `n` more positions."""
        if self.rounding is not None:
            self.length += n
            recurrent = self.rounding.recurrent(recurrent, self.length)
        self.recurrent = recurrent.contiguous()  # one layout, whichever path made it


@dataclass(eq=False, kw_only=True)
class Cache(State):
    """State with an entry for each position.

    Attributes:
        length: positions so far.
    """

    length: int = 0

    def _advance(self, n: int) -> int:
        """Counts `n` more positions; returns the place of the first."""
        self._check_capacity(n)
        start, self.length = self.length, self.length + n
        return start

    def _check_capacity(self, n: int) -> None:
        length = self.length + n
        if self.capacity is not None and length > self.capacity:
            raise ValueError(f"capacity must be at least {length}, the positions so far, got {self.capacity}")

    def _rounded(self, new: Tensor, name: str, start: int) -> Tensor:
        """Entries from `start` on, in the format in which they are kept."""
        return new if self.rounding is None else self.rounding.entries(new, name, start)

    def _append(self, held: Tensor | None, new: Tensor, start: int, *, by_channel: bool = False) -> Tensor:
        """The tensor to hold: `new` stands from `start` on, along dimension 2 of four.

        Args:
            by_channel: a tensor with capacity lies in memory channel by channel, not position by position.
        """
        if self.capacity is None:
            return new if held is None else torch.cat((held, new), dim=2)
        if held is None:
            size = (*new.shape[:2], self.capacity, new.shape[3])
            order = (0, 1, 3, 2) if by_channel else (0, 1, 2, 3)
            held = torch.empty_permuted(size, order, dtype=new.dtype, device=new.device)
        held[:, :, start : self.length] = new
        return held


@dataclass(eq=False, kw_only=True)
class KVCache(ConvState, Cache):
    """Keys and values of all positions, and what a convolution reads that makes them, where there is one."""

    k: Float[Tensor, "batch n_kv_heads held d_head"] | None = None
    v: Float[Tensor, "batch n_kv_heads held d_v"] | None = None

    def update_conv(self, x: Float[Tensor, "batch seq channels"]) -> Float[Tensor, "batch n_past channels"] | None:
        """As of any convolution; call it before `update`, which counts the positions.

        Raises:
            ValueError: more positions than `capacity`.
        """
        self._check_capacity(x.shape[1])
        return super().update_conv(x)

    def update(
        self, k: Float[Tensor, "batch n_kv_heads seq d_head"], v: Float[Tensor, "batch n_kv_heads seq d_v"]
    ) -> tuple[Float[Tensor, "batch n_kv_heads context d_head"], Float[Tensor, "batch n_kv_heads context d_v"]]:
        """Adds keys and values; returns those that the new positions see, their own included.

        Raises:
            ValueError: more positions than `capacity`.
        """
        start = self._advance(k.shape[2])
        k, v = self._rounded(k, "k", start), self._rounded(v, "v", start)
        # On a CPU one query is a loop over the keys, channel by channel: those of a channel lie side by side.
        self.k = self._append(self.k, k, start, by_channel=k.is_cpu)
        self.v = self._append(self.v, v, start)
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


@dataclass(eq=False, kw_only=True)
class WindowCache(KVCache):
    """Keys and values of the last `window` positions, never of more.

    With a capacity it holds all of its places from the start, so that no shape changes from step to step; those that
    are not used yet come first.

    Attributes:
        window: positions that a query sees at most, itself included.
    """

    window: int

    def update(
        self, k: Float[Tensor, "batch n_kv_heads seq d_head"], v: Float[Tensor, "batch n_kv_heads seq d_v"]
    ) -> tuple[Float[Tensor, "batch n_kv_heads context d_head"], Float[Tensor, "batch n_kv_heads context d_v"]]:
        start = self._advance(k.shape[2])
        k, v = self._rounded(k, "k", start), self._rounded(v, "v", start)
        (self.k, k), (self.v, v) = self._shift(self.k, k), self._shift(self.v, v)
        return k, v

    def _shift(self, held: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor to hold, and what the new positions see."""
        most = self.window if self.capacity is None else min(self.window, self.capacity)
        if held is None:
            held = new.new_zeros(*new.shape[:2], 0 if self.capacity is None else most, new.shape[3])
        # The first of the new positions sees window - 1 before it, and the others no more of them.
        both = torch.cat((held[:, :, max(0, held.shape[2] - most + 1) :], new), dim=2)
        n_visible = min(self.window - 1 + new.shape[2], self.length)
        visible = both[:, :, both.shape[2] - n_visible :]
        # A view would keep the memory of what it leaves out.
        held = both if both.shape[2] <= most else both[:, :, -most:].clone(memory_format=torch.contiguous_format)
        return held, visible


@dataclass(eq=False, kw_only=True)
class LatentCache(Cache):
    """The narrow vector of every position that its keys and values are made from, and its rotated key."""

    latent: Float[Tensor, "batch 1 held kv_rank"] | None = None
    k_rope: Float[Tensor, "batch 1 held d_rope"] | None = None

    def update(
        self, latent: Float[Tensor, "batch 1 seq kv_rank"], k_rope: Float[Tensor, "batch 1 seq d_rope"]
    ) -> tuple[Float[Tensor, "batch 1 context kv_rank"], Float[Tensor, "batch 1 context d_rope"]]:
        """Adds vectors and keys; returns those of all positions.

        Raises:
            ValueError: more positions than `capacity`.
        """
        start = self._advance(latent.shape[2])
        latent, k_rope = self._rounded(latent, "latent", start), self._rounded(k_rope, "k_rope", start)
        self.latent = self._append(self.latent, latent, start)
        self.k_rope = self._append(self.k_rope, k_rope, start)
        return self.latent[:, :, : self.length], self.k_rope[:, :, : self.length]
