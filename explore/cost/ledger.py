"""The ledger: what every component of a model holds and computes, in exact integers.

One convention, called exact: a FLOP is one multiply or one add, and a matrix product of
(m, k) by (k, n) spends 2 m k n. Counted is every matrix product that the maths needs: projections,
causal attention, router, latent projections, active and shared experts, short convolution, the
products of the chunked state-space algorithm at its chunk size, and the head. Not counted are norms,
activations, softmax, look-ups, dispatch and recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16", "float8", "float4"]
BITS: Mapping[str, int] = {"float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "float4": 4}


@dataclass(frozen=True, slots=True)
class Entry:
    """One component: its parameters, its forward matrix products, the state that decoding keeps.

    Attributes:
        component: name of the component within its block, for example `q_proj`.
        params: parameters that exist.
        params_active: parameters that one token passes through.
        flops_seq: FLOPs of one forward pass over one whole sequence.
        kv_numel: elements kept for every token of the context (keys and values).
        ssm_numel: elements of recurrent state kept for a sequence, whatever its length.
        conv_numel: elements of convolution state kept for a sequence, whatever its length.
    """

    component: str
    params: int = 0
    params_active: int = 0
    flops_seq: int = 0
    kv_numel: int = 0
    ssm_numel: int = 0
    conv_numel: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """An entry with its place: `layer` counts from 0; embedding and head have no layer."""

    layer: int | None
    letter: str
    entry: Entry


@dataclass(frozen=True)
class Cost:
    """Totals of a model. FLOPs are per token, averaged over a sequence of `seq_len`.

    Attributes:
        params_total: all parameters, MTP apart.
        params_active: parameters one token passes through; embeddings and router counted, MTP apart.
        flops_fwd: forward FLOPs per token.
        flops_train: forward and backward FLOPs per token, 3 * flops_fwd.
        kv_bytes_per_token: bytes of keys and values per token of context, in `kv_dtype`.
        ssm_state_bytes: bytes of recurrent state per sequence, in `state_dtype`.
        conv_state_bytes: bytes of convolution state per sequence, in `state_dtype`.
    """

    seq_len: int
    params_total: int
    params_active: int
    flops_fwd: float
    flops_train: float
    kv_bytes_per_token: float
    ssm_state_bytes: float
    conv_state_bytes: float
    kv_dtype: Dtype
    state_dtype: Dtype

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ledger:
    """Every component of every layer, in the order in which a token meets them."""

    seq_len: int
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def total(self, field: str) -> int:
        return sum(getattr(row.entry, field) for row in self.rows)

    def cost(self, kv_dtype: Dtype = "bfloat16", state_dtype: Dtype = "float32") -> Cost:
        flops_fwd = self.total("flops_seq") / self.seq_len
        return Cost(
            seq_len=self.seq_len,
            params_total=self.total("params"),
            params_active=self.total("params_active"),
            flops_fwd=flops_fwd,
            flops_train=3 * flops_fwd,
            kv_bytes_per_token=self.total("kv_numel") * BITS[kv_dtype] / 8,
            ssm_state_bytes=self.total("ssm_numel") * BITS[state_dtype] / 8,
            conv_state_bytes=self.total("conv_numel") * BITS[state_dtype] / 8,
            kv_dtype=kv_dtype,
            state_dtype=state_dtype,
        )

    def fold(self, by: Literal["letter", "layer", "component"]) -> list[dict[str, Any]]:
        """Sums the ledger into records, in the order of first appearance.

        Returns:
            Records of the group's name, `count` (layers in it), parameters, `flops_fwd` per token and
            its `share`, and the elements of state.
        """
        keys: dict[str, Callable[[Row], tuple[str, ...]]] = {
            "letter": lambda row: (row.letter,),
            "layer": lambda row: ("" if row.layer is None else str(row.layer), row.letter),
            "component": lambda row: (row.letter, row.entry.component),
        }
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(keys[by](row), []).append(row)
        names = {"letter": ("letter",), "layer": ("layer", "letter"), "component": ("letter", "component")}[by]
        everything = self.total("flops_seq") or 1
        records = []
        for key, rows in groups.items():
            entry = sum_entries(rows)
            records.append(
                dict(zip(names, key, strict=True))
                | {"count": len({row.layer for row in rows})}
                | self._numbers(entry)
                | {"share": entry.flops_seq / everything}
            )
        return records

    def to_records(self) -> list[dict[str, Any]]:
        """One record a row: layer, letter, component, parameters, FLOPs per token, state."""
        return [
            {"layer": row.layer, "letter": row.letter, "component": row.entry.component} | self._numbers(row.entry)
            for row in self.rows
        ]

    def _numbers(self, entry: Entry) -> dict[str, Any]:
        numbers = asdict(entry)
        del numbers["component"]
        flops_fwd = numbers.pop("flops_seq") / self.seq_len
        return numbers | {"flops_fwd": flops_fwd, "flops_train": 3 * flops_fwd}


def sum_entries(rows: Iterable[Row]) -> Entry:
    """Adds up the numbers of some rows; the component's name is lost."""
    total = Entry("")
    for row in rows:
        e = row.entry
        total = replace(
            total,
            params=total.params + e.params,
            params_active=total.params_active + e.params_active,
            flops_seq=total.flops_seq + e.flops_seq,
            kv_numel=total.kv_numel + e.kv_numel,
            ssm_numel=total.ssm_numel + e.ssm_numel,
            conv_numel=total.conv_numel + e.conv_numel,
        )
    return total


def matrix(component: str, d_in: int, d_out: int, seq_len: int, *, bias: bool = False) -> Entry:
    """A linear layer that every token passes through."""
    params = d_in * d_out + (d_out if bias else 0)
    return Entry(component, params=params, params_active=params, flops_seq=2 * d_in * d_out * seq_len)


def vector(component: str, numel: int) -> Entry:
    """Parameters that take part in no matrix product: norms, biases, scalars of a head."""
    return Entry(component, params=numel, params_active=numel)


def attended_keys(seq_len: int, window: int | None) -> int:
    """Query-key pairs in a causal sequence, where a query sees itself and the `window` - 1 keys before it."""
    if window is None or window >= seq_len:
        return seq_len * (seq_len + 1) // 2
    return window * (window + 1) // 2 + (seq_len - window) * window
