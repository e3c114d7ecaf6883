"""The ledger: what every component of a model holds, computes and moves, in exact integers.

One convention, called exact: a FLOP is one multiply or one add, and a matrix product of
(m, k) by (k, n) spends 2 m k n. Counted is every matrix product that the maths needs: projections,
causal attention, router, latent projections, active and shared experts, short convolution, the
products of the chunked state-space algorithm at its chunk size, the head, and multi-token prediction.
Not counted are norms, activations, softmax, look-ups, dispatch and recomputation. Decoding is a phase
of its own: the recurrent form of a state space, one query of attention, the absorbed form of
latent attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from explore.foreign import shorten
from explore.number_formats import FORMATS, UNQUANTIZED, FormatName

if TYPE_CHECKING:
    from explore.precision import Recipe

By = Literal["letter", "layer", "component"]
ConventionName = Literal["exact", "megatron", "palm", "6nd"]
Dtype = Literal["float32", "bfloat16", "float16", "float8", "float4", "mxfp8", "mxfp4", "nvfp4", "int8"]
Stored = Dtype | FormatName
BITS: Mapping[str, float] = {"float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "float4": 4} | {
    name: entry.bits_per_element for name, entry in FORMATS.items()
}
"""Bits of an element; formats have their scales in them, and the floats have none."""

MTP_LETTER = "/"


class Entry(NamedTuple):
    """One component: its parameters, its matrix products, and the state that decoding keeps.

    Attributes:
        component: name of the component within its block, for example `q_proj`.
        params: parameters that exist.
        params_active: parameters that one token passes through.
        params_read: parameters that decoding one token reads: one row of an embedding, the chosen experts.
        flops_seq: forward FLOPs of one whole sequence.
        flops_step: FLOPs of decoding one token that sees as many tokens as the sequence has, itself included.
        kv_numel: elements of keys and values (or of what they are made from) kept for every token of the context.
        kv_numel_seq: elements of them kept after the whole sequence; fewer where a window forgets.
        ssm_numel: elements of recurrent state kept for a sequence, whatever its length.
        conv_numel: elements of convolution state kept for a sequence, whatever its length.
        all_to_all_numel: elements that a token sends to its experts and gets back from them.
        sums_over: widths that products with these weights sum over in a forward pass; none where there is no product
            of a linear layer.
        row: width of a row that is looked up, where these weights are an embedding.
        weight: format of the weights where a recipe of precision gives one.
    """

    component: str
    params: int = 0
    params_active: int = 0
    params_read: int = 0
    flops_seq: int = 0
    flops_step: int = 0
    kv_numel: int = 0
    kv_numel_seq: int = 0
    ssm_numel: int = 0
    conv_numel: int = 0
    all_to_all_numel: int = 0
    sums_over: tuple[int, ...] = ()
    row: int = 0
    weight: FormatName | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """What adds up."""
        numbers: tuple[int, ...] = self[1:-3]
        return numbers

    @property
    def blocks_along(self) -> tuple[int, ...]:
        """Widths along which blocks of a format lie; none where these weights cannot be in blocks."""
        return self.sums_over or ((self.row,) if self.row else ())

    @property
    def is_quantized(self) -> bool:
        """Whether products with these weights have quantised operands."""
        return self.weight is not None and self.weight not in UNQUANTIZED and bool(self.sums_over)

    @property
    def flops_prefill(self) -> int:
        """FLOPs over a whole sequence that is only read: the head's for its last token."""
        return self.flops_step if self.component == "head" else self.flops_seq


def total_of(entries: Iterable[Entry], component: str = "") -> Entry:
    """Adds up the numbers of some entries."""
    return _added_up(component, (entry.numbers for entry in entries))


def _added_up(component: str, rows: Iterable[Iterable[int]]) -> Entry:
    """An entry whose numbers are the sums of columns."""
    columns = list(zip(*rows, strict=True))
    return Entry._make((component, *map(sum, columns), *Entry(component)[-3:])) if columns else Entry(component)


@dataclass(frozen=True)
class Part:
    """What the ledger says of one block.

    Attributes:
        letter: as in the pattern; empty for embedding, last norm and head, `/` for multi-token prediction.
        conventions: forward FLOPs of one sequence, by convention and component, where a convention does not go by
            its rule.
        lines: components that a comparison of conventions shows as one line, by the name of the line.
    """

    letter: str
    entries: tuple[Entry, ...]
    conventions: Mapping[ConventionName, Mapping[str, int]] = field(default_factory=dict)
    lines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def total(self) -> Entry:
        return total_of(self.entries)

    def line_of(self, component: str) -> str:
        """The line of a comparison that a component is in: its own, where `lines` does not name it."""
        return next((line for line, components in self.lines.items() if component in components), component)


class Row(NamedTuple):
    """An entry with its place: `layer` counts from 0; embedding, head and multi-token prediction have none."""

    layer: int | None
    part: Part
    entry: Entry

    @property
    def letter(self) -> str:
        return self.part.letter


@dataclass(frozen=True)
class Dtypes:
    """In what a model's weights, decoding state and activations are kept and sent.

    Attributes:
        weight: of the weights in memory.
        kv: of keys and values.
        state: of recurrent and convolution state.
        activation: of what experts are sent and send back.
    """

    weight: Stored = "bfloat16"
    kv: Stored = "bfloat16"
    state: Stored = "float32"
    activation: Stored = "bfloat16"

    def under(self, recipe: Recipe) -> Dtypes:
        """These dtypes with what a recipe of precision says of decoding state."""
        return replace(self, kv=recipe.kv or self.kv, state=recipe.state or self.state)

    def __post_init__(self) -> None:
        for each in fields(self):
            if (dtype := getattr(self, each.name)) not in BITS:
                raise ValueError(f"{each.name}_dtype must be one of {', '.join(BITS)}, got {dtype!r}")


DTYPES = Dtypes()
"""Default dtypes of decoding state: bf16 for keys and values, fp32 for recurrent and convolution state."""


@dataclass(frozen=True)
class Ledger:
    """Every component of every layer, in the order in which a token meets them.

    Attributes:
        seq_len: tokens of the sequence, and the context of decoding.
        d_model: width of the residual stream.
        pattern: one letter a layer.
        blocks: what each letter comes to.
        before: the embedding.
        after: last norm and head.
        mtp: multi-token prediction, depth by depth, in training: it has FLOPs and parameters, and no state.
        recipe: recipe of precision that gave the entries the formats of their weights; see `in_formats`.
    """

    seq_len: int
    d_model: int
    pattern: str
    blocks: Mapping[str, Part]
    before: Part
    after: Part
    mtp: tuple[Part, ...] = ()
    recipe: Recipe | None = None

    def __iter__(self) -> Iterator[Row]:
        for layer, part in self._placed():
            for entry in part.entries:
                yield Row(layer, part, entry)

    def __repr__(self) -> str:
        n_entries = sum(len(part.entries) for _, part in self._placed())
        return f"Ledger({shorten(self.pattern, 40)}, seq_len={self.seq_len}, {n_entries} entries)"

    def _repr_html_(self) -> str:
        from explore.cost.display import ledger_html

        return ledger_html(self)

    def _placed(self) -> Iterator[tuple[int | None, Part]]:
        yield None, self.before
        for layer, letter in enumerate(self.pattern):
            yield layer, self.blocks[letter]
        yield None, self.after
        for part in self.mtp:
            yield None, part

    def counted(self) -> Iterator[tuple[int, Part]]:
        """Every part once and how often it stands in the model, multi-token prediction apart."""
        yield 1, self.before
        for letter, part in self.blocks.items():
            yield self.pattern.count(letter), part
        yield 1, self.after

    @cached_property
    def main(self) -> Entry:
        """Everything added up, multi-token prediction apart. It does not walk the layers: it counts letters."""
        return _added_up("", ([n * number for number in part.total.numbers] for n, part in self.counted()))

    @cached_property
    def extra(self) -> Entry:
        """Multi-token prediction added up."""
        return total_of(part.total for part in self.mtp)

    @cached_property
    def router(self) -> int:
        """Parameters of all routers, multi-token prediction apart."""
        return sum(n * e.params for n, part in self.counted() for e in part.entries if e.component == "router")

    @property
    def flops_prefill(self) -> int:
        """FLOPs of reading a whole context of `seq_len`: the head computes for its last token only."""
        return sum(n * entry.flops_prefill for n, part in self.counted() for entry in part.entries)

    def weight_bytes(self, dtypes: Dtypes = DTYPES) -> float:
        """Bytes of the weights, multi-token prediction apart."""
        return sum(n * weight_bytes(entry, dtypes) for n, part in self.counted() for entry in part.entries)

    def decode_bytes(self, dtypes: Dtypes, batch_size: float = 1) -> float:
        """Bytes that one decoding step of a batch reads and writes."""
        return sum(n * decode_bytes(e, dtypes, batch_size) for n, part in self.counted() for e in part.entries)

    def fold(self, by: By, dtypes: Dtypes = DTYPES) -> list[dict[str, Any]]:
        """Sums the ledger into records, in the order of first appearance.

        Returns:
            Records of the group's name, `layers` in it, the numbers of `to_records`, and `share`: its part of
            `flops_fwd`.
        """
        keys: dict[By, Callable[[Row], tuple[str, ...]]] = {
            "letter": lambda row: (row.letter,),
            "layer": lambda row: ("" if row.layer is None else str(row.layer), row.letter),
            "component": lambda row: (row.letter, row.entry.component),
        }
        names = {"letter": ("letter",), "layer": ("layer", "letter"), "component": ("letter", "component")}[by]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self:
            groups.setdefault(keys[by](row), []).append(row)
        everything = (self.main.flops_seq + self.extra.flops_seq) or 1
        return [
            dict(zip(names, key, strict=True))
            | {"layers": len({row.layer for row in rows} - {None})}
            | self._numbers(rows, dtypes)
            | {"share": sum(row.entry.flops_seq for row in rows) / everything}
            for key, rows in groups.items()
        ]

    def to_records(self, dtypes: Dtypes = DTYPES) -> list[dict[str, Any]]:
        """One record a row: layer, letter, component, and its numbers.

        Parameters; FLOPs of a forward and a training pass per token, of the prefill of a whole context and of one
        decoding step; bytes of weights, of the state after `seq_len` tokens, of what one decoding step of one
        sequence moves, and of what a token sends through an all-to-all. Under a recipe of precision also `format`, and
        FLOPs of products with quantised operands.
        """
        return [
            {"layer": row.layer, "letter": row.letter, "component": row.entry.component}
            | ({} if self.recipe is None else {"format": row.entry.weight})
            | self._numbers([row], dtypes)
            for row in self
        ]

    def _numbers(self, rows: list[Row], dtypes: Dtypes) -> dict[str, Any]:
        entry = total_of(row.entry for row in rows)
        flops_fwd = entry.flops_seq / self.seq_len
        return {
            "params": entry.params,
            "params_active": entry.params_active,
            "flops_fwd": flops_fwd,
            "flops_train": 3 * flops_fwd,
            "flops_prefill": sum(row.entry.flops_prefill for row in rows if row.letter != MTP_LETTER),
            "flops_decode": entry.flops_step,
            "weight_bytes": sum(weight_bytes(row.entry, dtypes) for row in rows),
            "kv_bytes": bytes_of(entry.kv_numel_seq, dtypes.kv),
            "ssm_state_bytes": bytes_of(entry.ssm_numel, dtypes.state),
            "conv_state_bytes": bytes_of(entry.conv_numel, dtypes.state),
            "decode_bytes": sum(decode_bytes(row.entry, dtypes) for row in rows),
            "all_to_all_bytes": bytes_of(entry.all_to_all_numel, dtypes.activation),
        } | self.flops_quantized(rows)

    def flops_quantized(self, rows: Iterable[Row]) -> dict[str, float]:
        """FLOPs per token in products with quantised operands, where a recipe says which they are."""
        if (recipe := self.recipe) is None:
            return {}
        flops_fwd = sum(row.entry.flops_seq for row in rows if row.entry.is_quantized) / self.seq_len
        n_products = recipe.forward + recipe.input_gradient + recipe.weight_gradient
        return {"flops_fwd_quantized": flops_fwd * recipe.forward, "flops_train_quantized": flops_fwd * n_products}


def bytes_of(numel: float, dtype: Stored) -> float:
    """Bytes of `numel` elements, with the scales of a format."""
    return numel * BITS[dtype] / 8


def weight_bytes(entry: Entry, dtypes: Dtypes) -> float:
    """Bytes of the weights of a component."""
    return bytes_of(entry.params, entry.weight or dtypes.weight)


def params_touched(entry: Entry, batch_size: float) -> float:
    """Parameters that one decoding step of a batch reads, on average.

    Of weights that a token reads in part, such as experts and embedding rows, every token is taken to choose
    its share at random, apart from the others: n (1 - (1 - k / n)^batch).
    """
    if not 0 < entry.params_read < entry.params:
        return entry.params_read
    return entry.params * (1 - float((1 - entry.params_read / entry.params) ** batch_size))


def decode_bytes(entry: Entry, dtypes: Dtypes, batch_size: float = 1, n_shares: int = 1) -> float:
    """Bytes that one decoding step of a batch reads and writes: weights once, the state of every sequence.

    Keys and values are read but for the newest, which is written; recurrent and convolution state is read and written.

    Args:
        n_shares: devices with such a batch each that share the weights; the bytes are those of one.
    """
    state = 2 * (entry.ssm_numel + entry.conv_numel)
    return (
        bytes_of(params_touched(entry, batch_size * n_shares) / n_shares, entry.weight or dtypes.weight)
        + batch_size * bytes_of(entry.kv_numel_seq, dtypes.kv)
        + batch_size * bytes_of(state, dtypes.state)
    )


def product(component: str, params: int, seq_len: int, sums_over: tuple[int, ...]) -> Entry:
    """Weights that take part in one matrix product for every token, each once.

    Args:
        sums_over: widths that the products sum over.
    """
    flops = 2 * params
    return Entry(component, params, params, params, flops_seq=flops * seq_len, flops_step=flops, sums_over=sums_over)


def matrix(component: str, d_in: int, d_out: int, seq_len: int, *, bias: bool = False) -> Entry:
    """A linear layer that every token passes through."""
    entry = product(component, d_in * d_out, seq_len, (d_in,))
    params = entry.params + (d_out if bias else 0)
    return entry._replace(params=params, params_active=params, params_read=params)


def vector(component: str, numel: int) -> Entry:
    """Parameters that take part in no matrix product: norms, biases, scalars of a head."""
    return Entry(component, numel, numel, numel)


def attended_keys(seq_len: int, window: int | None) -> int:
    """Query-key pairs in a causal sequence, where a query sees itself and the `window` - 1 keys before it."""
    if window is None or window >= seq_len:
        return seq_len * (seq_len + 1) // 2
    return window * (window + 1) // 2 + (seq_len - window) * window


def visible_keys(seq_len: int, window: int | None) -> int:
    """Keys that the last query of a sequence sees, and that a cache keeps."""
    return seq_len if window is None else min(seq_len, window)
