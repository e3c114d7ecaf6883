"""Decoding state: what a layer keeps between calls.

A block's config makes the state (`BlockConfig.new_state`) and its mixer reads and updates it. A block whose output
depends on the current position alone, such as an MLP, keeps nothing and uses the default `new_state`. Attention
uses a `KVCache` or a `WindowCache`; recurrent mixers use a `RecurrentState` of any shape. Both
also hold the inputs of a short convolution, if there is one. To add a kind of state, subclass `State`, make its tensors
attributes, and round them on writing if `rounding` is set.

Batch size, dtype and device come from the first tokens read, so a new state holds no tensors.
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
    """Base class of decoding states; by itself, the state of a layer that keeps nothing.

    Attributes:
        capacity: maximum number of positions. When given, tensors are written in place, which is faster but
            carries no gradient; otherwise every update creates new tensors.
        rounding: formats to which the state is rounded; no rounding when None.
    """

    capacity: int | None = None
    rounding: StateRounding | None = None

    @property
    def in_place(self) -> bool:
        """Whether an update may write into the existing tensors."""
        return self.capacity is not None

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors held, including unused capacity."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def copy(self) -> State:
        """Returns an independent copy: updating one leaves the other unchanged."""
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
        conv: the last `n_past` inputs of the convolution; None (zero) before the first position.
        length: number of positions read so far.
    """

    n_past: int = 0
    conv: Float[Tensor, "batch n_past channels"] | None = None
    length: int = 0

    def update_conv(self, x: Float[Tensor, "batch seq channels"]) -> Float[Tensor, "batch n_past channels"] | None:
        """Stores the last inputs of the convolution; returns those before `x` (None at the start of a sequence)."""
        before = self.conv
        past = x.new_zeros(len(x), self.n_past, x.shape[2]) if before is None else before.to(x.dtype)
        # The last n_past of n_past + seq positions: the rest of the past, then the end of `x`.
        skipped = max(0, x.shape[1] - self.n_past)
        end = x[:, skipped:]
        if self.rounding is not None:
            end = self.rounding.inputs(end, self.length + skipped)
        self.conv = torch.cat((past[:, x.shape[1] :], end), dim=1)
        return before


@dataclass(eq=False, kw_only=True)
class RecurrentState(ConvState):
    """State of constant size: that of a recurrence and the inputs of a short convolution.

    Attributes:
        shape: shape of one sequence's recurrent state.
        recurrent: recurrent state after the last position; None (zero) before the first.
        length: number of positions read so far; counted only when the state is rounded.
    """

    shape: tuple[int, ...]
    recurrent: Float[Tensor, "batch *shape"] | None = None

    def keep(self, recurrent: Float[Tensor, "batch *shape"], n: int) -> None:
        """Stores the recurrent state after `n` more positions."""
        if self.rounding is not None:
            self.length += n
            recurrent = self.rounding.recurrent(recurrent, self.length)
        self.recurrent = recurrent.contiguous()  # same layout for every path


@dataclass(eq=False, kw_only=True)
class Cache(State):
    """State with one entry per position.

    Attributes:
        length: number of positions read so far.
    """

    length: int = 0

    def _advance(self, n: int) -> int:
        """Counts `n` more positions; returns the index of the first."""
        self._check_capacity(n)
        start, self.length = self.length, self.length + n
        return start

    def _check_capacity(self, n: int) -> None:
        length = self.length + n
        if self.capacity is not None and length > self.capacity:
            raise ValueError(f"capacity must be at least {length}, the positions so far, got {self.capacity}")

    def _rounded(self, new: Tensor, name: str, start: int) -> Tensor:
        """Returns the entries from `start` on, rounded to their storage format."""
        return new if self.rounding is None else self.rounding.entries(new, name, start)

    def _append(self, held: Tensor | None, new: Tensor, start: int, *, by_channel: bool = False) -> Tensor:
        """Returns the tensor to hold, with `new` written from `start` on along dimension 2 (of 4).

        Args:
            by_channel: with a capacity, store memory channel by channel instead of position by position.
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
    """Keys and values of all positions, and the inputs of their short convolution, if there is one."""

    k: Float[Tensor, "batch n_kv_heads held d_head"] | None = None
    v: Float[Tensor, "batch n_kv_heads held d_v"] | None = None

    def update_conv(self, x: Float[Tensor, "batch seq channels"]) -> Float[Tensor, "batch n_past channels"] | None:
        """Updates the convolution's inputs; call it before `update`, which counts the positions.

        Raises:
            ValueError: more positions than `capacity`.
        """
        self._check_capacity(x.shape[1])
        return super().update_conv(x)

    def update(
        self, k: Float[Tensor, "batch n_kv_heads seq d_head"], v: Float[Tensor, "batch n_kv_heads seq d_v"]
    ) -> tuple[Float[Tensor, "batch n_kv_heads context d_head"], Float[Tensor, "batch n_kv_heads context d_v"]]:
        """Appends keys and values; returns all those visible to the new positions, including their own.

        Raises:
            ValueError: more positions than `capacity`.
        """
        start = self._advance(k.shape[2])
        k, v = self._rounded(k, "k", start), self._rounded(v, "v", start)
        # On a CPU a single query loops over the keys channel by channel, so each channel is stored contiguously.
        self.k = self._append(self.k, k, start, by_channel=k.is_cpu)
        self.v = self._append(self.v, v, start)
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


@dataclass(eq=False, kw_only=True)
class WindowCache(KVCache):
    """Keys and values of the last `window` positions.

    With a capacity, all slots exist from the start, so shapes do not change between steps; unused slots
    come first.

    Attributes:
        window: maximum number of positions a query attends to, including its own.
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
        """Returns the tensor to hold, and the entries visible to the new positions."""
        most = self.window if self.capacity is None else min(self.window, self.capacity)
        if held is None:
            held = new.new_zeros(*new.shape[:2], 0 if self.capacity is None else most, new.shape[3])
        # The first new position sees window - 1 earlier ones; later ones see fewer of these.
        both = torch.cat((held[:, :, max(0, held.shape[2] - most + 1) :], new), dim=2)
        n_visible = min(self.window - 1 + new.shape[2], self.length)
        visible = both[:, :, both.shape[2] - n_visible :]
        # A view would keep the dropped entries in memory.
        held = both if both.shape[2] <= most else both[:, :, -most:].clone(memory_format=torch.contiguous_format)
        return held, visible


@dataclass(eq=False, kw_only=True)
class LatentCache(Cache):
    """The latent vector and the rotated key of every position."""

    latent: Float[Tensor, "batch 1 held kv_rank"] | None = None
    k_rope: Float[Tensor, "batch 1 held d_rope"] | None = None

    def update(
        self, latent: Float[Tensor, "batch 1 seq kv_rank"], k_rope: Float[Tensor, "batch 1 seq d_rope"]
    ) -> tuple[Float[Tensor, "batch 1 context kv_rank"], Float[Tensor, "batch 1 context d_rope"]]:
        """Appends latents and keys; returns those of all positions.

        Raises:
            ValueError: more positions than `capacity`.
        """
        start = self._advance(latent.shape[2])
        latent, k_rope = self._rounded(latent, "latent", start), self._rounded(k_rope, "k_rope", start)
        self.latent = self._append(self.latent, latent, start)
        self.k_rope = self._append(self.k_rope, k_rope, start)
        return self.latent[:, :, : self.length], self.k_rope[:, :, : self.length]
