"""Entries of common components, and the keys that attention reads."""

from __future__ import annotations

from explore.cost.ledger import Entry


def product(component: str, params: int, seq_len: int, sums_over: tuple[int, ...]) -> Entry:
    """Entry of weights that each take part in one multiply-add per token.

    Args:
        sums_over: widths that the products sum over.
    """
    flops = 2 * params
    return Entry(component, params, params, params, flops_seq=flops * seq_len, flops_step=flops, sums_over=sums_over)


def matrix(component: str, d_in: int, d_out: int, seq_len: int, *, bias: bool = False) -> Entry:
    """Entry of a linear layer that every token passes through."""
    entry = product(component, d_in * d_out, seq_len, (d_in,))
    params = entry.params + (d_out if bias else 0)
    return entry._replace(params=params, params_active=params, params_read=params)


def convolution(component: str, channels: int, width: int, seq_len: int, *, bias: bool = False) -> Entry:
    """Entry of a causal convolution with a filter of `width` per channel; decoding keeps `width` - 1 inputs."""
    weights = channels * width
    params, flops = weights + (channels if bias else 0), 2 * weights
    kept, rows = weights - channels, (channels,)
    return Entry(component, params, params, params, flops * seq_len, flops, conv_numel=kept, state_rows=rows)


def vector(component: str, numel: int) -> Entry:
    """Entry of parameters outside matrix products: norms, biases, per-head scalars."""
    return Entry(component, numel, numel, numel)


def attended_keys(seq_len: int, window: int | None) -> int:
    """Query-key pairs of a causal sequence; a query sees its own key and the `window` - 1 before it."""
    if window is None or window >= seq_len:
        return seq_len * (seq_len + 1) // 2
    return window * (window + 1) // 2 + (seq_len - window) * window


def visible_keys(seq_len: int, window: int | None) -> int:
    """Keys visible to the last query of a sequence, which are those the cache holds."""
    return seq_len if window is None else min(seq_len, window)
