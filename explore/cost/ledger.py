"""The ledger: parameters, FLOPs and bytes of every component of a model, in exact integers.

One convention, called exact: a FLOP is one multiply or one add, and a matrix product of
(m, k) by (k, n) costs 2 m k n. It counts every matrix product that the maths needs: projections,
causal attention, router, latent projections, active and shared experts, short convolution, the
products of the chunked state-space algorithm at its chunk size, the head, and multi-token prediction.
It leaves out norms, activations, softmax, look-ups, dispatch and recomputation. Decoding is counted
separately: the recurrent form of a state space, attention with one query, and the absorbed form of
latent attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from explore.foreign import shorten
from explore.number_formats import ELEMENTS, FORMATS, SCALE_BITS, UNQUANTIZED, FormatName

if TYPE_CHECKING:
    from explore.precision import Recipe

By = Literal["letter", "layer", "component"]
ConventionName = Literal["exact", "megatron", "palm", "6nd"]
Dtype = Literal["float32", "bfloat16", "float16", "float8", "float4", "mxfp8", "mxfp4", "nvfp4", "int8"]
Stored = Dtype | FormatName
StateNumber = Literal["kv_numel", "kv_numel_seq", "ssm_numel", "conv_numel"]
BITS: Mapping[str, float] = {"float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "float4": 4} | {
    name: entry.bits_per_element for name, entry in FORMATS.items()
}
"""Bits per element of a weight; block formats include their scales."""

MTP_LETTER = "/"


class Entry(NamedTuple):
    """One component: its parameters, its matrix products, and the state that decoding keeps.

    Attributes:
        component: name of the component within its block, for example `q_proj`.
        params: total parameters.
        params_active: parameters used by one token.
        params_read: parameters read to decode one token: one embedding row, the chosen experts.
        flops_seq: forward FLOPs of one whole sequence.
        flops_step: FLOPs of decoding one token whose context, itself included, has the length of the sequence.
        kv_numel: elements of keys and values (or of their latent) cached per token of context.
        kv_numel_seq: elements of them cached after the whole sequence; a window limits them.
        ssm_numel: elements of recurrent state per sequence, independent of its length.
        conv_numel: elements of convolution state per sequence, independent of its length.
        all_to_all_numel: elements sent to experts and received back, per token.
        sums_over: widths that forward products with these weights sum over; empty unless a linear layer uses them.
        row: width of one row, if these weights are an embedding.
        weight: format of the weights, if a precision recipe sets one.
        in_rows: blocks of the weights lie along one axis, also in a format whose stored blocks are squares.
        state_rows: widths of the rows that make up its state; blocks of a format lie along a row.
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
    in_rows: bool = False
    state_rows: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """The fields that can be summed."""
        numbers: tuple[int, ...] = self[1:-5]
        return numbers

    @property
    def blocks_along(self) -> tuple[int, ...]:
        """Widths along which a format's blocks lie; empty if these weights cannot be stored in blocks."""
        return self.sums_over or ((self.row,) if self.row else ())

    @property
    def is_quantized(self) -> bool:
        """Whether products with these weights use quantised operands."""
        return self.weight is not None and self.weight not in UNQUANTIZED and bool(self.sums_over)

    def weight_bytes(self, numel: float, dtype: Stored) -> float:
        """Bytes of `numel` of its weights, scales included; `dtype` is that of weights without a recipe."""
        if self.weight is not None and self.in_rows:
            return numel * FORMATS[self.weight].bits_in_rows / 8
        return bytes_of(numel, self.weight or dtype)

    @property
    def flops_prefill(self) -> int:
        """FLOPs of prefill over a whole sequence; the head runs for the last token only."""
        return self.flops_step if self.component == "head" else self.flops_seq


def total_of(entries: Iterable[Entry], component: str = "") -> Entry:
    """Sums the numbers of some entries."""
    return _added_up(component, (entry.numbers for entry in entries))


def _added_up(component: str, rows: Iterable[Iterable[int]]) -> Entry:
    """Returns an entry whose numbers are column sums."""
    columns = list(zip(*rows, strict=True))
    return Entry._make((component, *map(sum, columns), *Entry(component)[-5:])) if columns else Entry(component)


@dataclass(frozen=True)
class Part:
    """The ledger of one block.

    Attributes:
        letter: as in the pattern; empty for embedding, last norm and head, `/` for multi-token prediction.
        conventions: forward FLOPs of one sequence, by convention and component, where they differ from the
            convention's general rule.
        lines: components merged into one line when conventions are compared, by line name.
    """

    letter: str
    entries: tuple[Entry, ...]
    conventions: Mapping[ConventionName, Mapping[str, int]] = field(default_factory=dict)
    lines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def total(self) -> Entry:
        return total_of(self.entries)

    def line_of(self, component: str) -> str:
        """Returns the comparison line of a component: an entry of `lines`, or its own name."""
        return next((line for line, components in self.lines.items() if component in components), component)


class Row(NamedTuple):
    """An entry and its layer, counted from 0; None for embedding, head and multi-token prediction."""

    layer: int | None
    part: Part
    entry: Entry

    @property
    def letter(self) -> str:
        return self.part.letter


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of a model's weights, decoding state and transmitted activations.

    Attributes:
        weight: dtype of the weights in memory.
        kv: dtype of keys and values.
        state: dtype of recurrent and convolution state.
        activation: dtype of activations sent to experts and back.
    """

    weight: Stored = "bfloat16"
    kv: Stored = "bfloat16"
    state: Stored = "float32"
    activation: Stored = "bfloat16"

    def under(self, recipe: Recipe) -> Dtypes:
        """Returns these dtypes with a precision recipe's formats of decoding state."""
        return replace(self, kv=recipe.kv or self.kv, state=recipe.state or self.state)

    def __post_init__(self) -> None:
        for each in fields(self):
            if (dtype := getattr(self, each.name)) not in BITS:
                raise ValueError(f"{each.name}_dtype must be one of {', '.join(BITS)}, got {dtype!r}")


DTYPES = Dtypes()
"""Default dtypes of decoding state: bf16 for keys and values, fp32 for recurrent and convolution state."""


@dataclass(frozen=True)
class Ledger:
    """Every component of every layer, in the order of the forward pass.

    Attributes:
        seq_len: tokens per sequence, also the context length of decoding.
        d_model: width of the residual stream.
        pattern: one letter per layer.
        blocks: ledger of the block of each letter.
        before: the embedding.
        after: final norm and head.
        mtp: multi-token prediction in training, depth by depth: FLOPs and parameters, no state.
        recipe: precision recipe that set the entries' weight formats; see `in_formats`.
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
        """Every distinct part and how often the model contains it, without multi-token prediction."""
        yield 1, self.before
        for letter, part in self.blocks.items():
            yield self.pattern.count(letter), part
        yield 1, self.after

    @cached_property
    def main(self) -> Entry:
        """Sums of everything except multi-token prediction. It counts letters instead of visiting every layer."""
        return _added_up("", ([n * number for number in part.total.numbers] for n, part in self.counted()))

    @cached_property
    def extra(self) -> Entry:
        """Sums of multi-token prediction."""
        return total_of(part.total for part in self.mtp)

    @cached_property
    def router(self) -> int:
        """Parameters of all routers except those of multi-token prediction."""
        return sum(n * e.params for n, part in self.counted() for e in part.entries if e.component == "router")

    @property
    def flops_prefill(self) -> int:
        """FLOPs of prefilling a context of `seq_len` tokens; the head runs for the last token only."""
        return sum(n * entry.flops_prefill for n, part in self.counted() for entry in part.entries)

    def weight_bytes(self, dtypes: Dtypes = DTYPES) -> float:
        """Bytes of the weights, without multi-token prediction."""
        return sum(n * weight_bytes(entry, dtypes) for n, part in self.counted() for entry in part.entries)

    def state_bytes(self, dtype: Stored, *numbers: StateNumber) -> float:
        """Bytes of one sequence's decoding state: of these numbers of elements, in one dtype."""
        return sum(
            n * state_bytes(entry, getattr(entry, number), dtype)
            for n, part in self.counted()
            for entry in part.entries
            for number in numbers
        )

    def decode_bytes(self, dtypes: Dtypes, batch_size: float = 1) -> float:
        """Bytes read and written by one decoding step of a batch."""
        return sum(n * decode_bytes(e, dtypes, batch_size) for n, part in self.counted() for e in part.entries)

    def fold(self, by: By, dtypes: Dtypes = DTYPES) -> list[dict[str, Any]]:
        """Sums the ledger into records, in the order of first appearance.

        Returns:
            Records of the group's name, `layers` in it, the numbers of `to_records`, and `share`: its fraction of
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
        """Returns one record per row: layer, letter, component and numbers.

        The numbers are parameters; FLOPs per token of a forward and a training pass, of the prefill of a whole context,
        and of one decoding step; bytes of weights, of the state after `seq_len` tokens, moved by one decoding step of
        one sequence, and sent per token through an all-to-all. With a precision recipe there are also `format` and the
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
            "kv_bytes": sum(state_bytes(row.entry, row.entry.kv_numel_seq, dtypes.kv) for row in rows),
            "ssm_state_bytes": sum(state_bytes(row.entry, row.entry.ssm_numel, dtypes.state) for row in rows),
            "conv_state_bytes": sum(state_bytes(row.entry, row.entry.conv_numel, dtypes.state) for row in rows),
            "decode_bytes": sum(decode_bytes(row.entry, dtypes) for row in rows),
            "all_to_all_bytes": bytes_of(entry.all_to_all_numel, dtypes.activation),
        } | self.flops_quantized(rows)

    def flops_quantized(self, rows: Iterable[Row]) -> dict[str, float]:
        """FLOPs per token of products with quantised operands; they need a recipe.

        In training they are a mean over the schedule, since products may be in bf16 at its beginning or end.
        """
        if (recipe := self.recipe) is None:
            return {}
        flops_fwd = sum(row.entry.flops_seq for row in rows if row.entry.is_quantized) / self.seq_len
        gradients, until = recipe.input_gradient + recipe.weight_gradient, recipe.until
        forward, backward = until.forward - recipe.since, until.backward - recipe.since
        n_products = recipe.forward * forward + gradients * backward
        return {"flops_fwd_quantized": flops_fwd * recipe.forward, "flops_train_quantized": flops_fwd * n_products}


def bytes_of(numel: float, dtype: Stored) -> float:
    """Bytes of `numel` elements, including the scales of a block format as weights have them."""
    return numel * BITS[dtype] / 8


def state_bytes(entry: Entry, numel: float, dtype: Stored) -> float:
    """Bytes of `numel` elements of a component's decoding state, including their scales.

    Every row has scales of its own: one per block, and one for the rest of the row that is shorter than a block.
    """
    format = FORMATS.get(dtype)
    if format is None or not format.block or not entry.state_rows:
        return bytes_of(numel, dtype)
    n_scales = sum(-(-width // format.block) for width in entry.state_rows) * numel / sum(entry.state_rows)
    return (numel * ELEMENTS[format.element].bits + n_scales * SCALE_BITS[format.scaling]) / 8


def weight_bytes(entry: Entry, dtypes: Dtypes) -> float:
    """Bytes of the weights of a component."""
    return entry.weight_bytes(entry.params, dtypes.weight)


def params_touched(entry: Entry, batch_size: float) -> float:
    """Expected parameters read by one decoding step of a batch.

    Weights read in part, such as experts and embedding rows: each token is assumed to choose its share independently
    at random, so a batch reads n (1 - (1 - k / n)^batch) of them.
    """
    if not 0 < entry.params_read < entry.params:
        return entry.params_read
    return entry.params * (1 - float((1 - entry.params_read / entry.params) ** batch_size))


def decode_bytes(entry: Entry, dtypes: Dtypes, batch_size: float = 1, n_shares: int = 1) -> float:
    """Bytes read and written by one decoding step of a batch: weights once, state per sequence.

    Old keys and values are read and the newest are written; recurrent and convolution state is read and written.

    Args:
        n_shares: devices that split the weights, each with such a batch; the result is per device.
    """
    state = 2 * (entry.ssm_numel + entry.conv_numel)
    return (
        entry.weight_bytes(params_touched(entry, batch_size * n_shares) / n_shares, dtypes.weight)
        + batch_size * state_bytes(entry, entry.kv_numel_seq, dtypes.kv)
        + batch_size * state_bytes(entry, state, dtypes.state)
    )
