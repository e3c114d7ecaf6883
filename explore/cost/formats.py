"""A ledger under a precision recipe: the format of every entry, and the resulting bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from explore.cost.ledger import DTYPES, MTP_LETTER, Dtypes, Ledger, Part, Row, weight_bytes
from explore.foreign import did_you_mean
from explore.number_formats import FORMATS, UNQUANTIZED, FormatName

if TYPE_CHECKING:
    from explore.precision import Place, Recipe, Rule

COMPONENTS = (
    "embedding", "input norm", "in_proj", "conv1d", "A_log, D, dt_bias", "A_log, dt_bias", "norm", "out_proj", "q_proj",
    "k_proj", "v_proj", "gate_proj", "qk_norm", "sinks", "o_proj", "q_down", "q_norm", "q_up", "kv_down", "kv_norm",
    "kv_up", "up", "gate", "down", "router", "latent_down", "latent_norm", "experts", "latent_up", "shared",
    "shared_gate", "map", "head", "embedding norm, hidden norm", "eh_proj",
)  # fmt: skip
"""Components with weights of all block kinds: optional rules may name those that a model lacks."""

FIRST_VARIANT = 0xE000
"""First of the private code points used as letters for layers of one letter whose formats differ."""


def in_formats(ledger: Ledger, recipe: Recipe) -> Ledger:
    """Returns the ledger with the weight formats of a recipe, layer by layer.

    A format's blocks must divide the widths that products sum over. Other widths are padded with zeros.

    Raises:
        ValueError: a rule with an unknown component, or that matches or decides nothing, also in a part; a format that
            a component cannot have; a width that a block does not divide.
    """
    places = [(row, _place(row, ledger)) for row in ledger] if recipe.rules else []
    decided = set[int]()
    for i, rule in enumerate(recipe.rules):
        found = {k for k, (_, place) in enumerate(places) if rule.matches(place)}
        _check_rule(rule, f"precision.rules.{i}", ledger, places, found)
        if found and found <= decided and not rule.optional:
            raise ValueError(
                f"precision.rules.{i} must match a component that no earlier rule matches, or be optional, "
                f"got {_conditions(rule)}"
            )
        decided |= found
    pattern, blocks = "", dict[str, Part]()
    for layer, letter in enumerate(ledger.pattern):
        part = _in_formats(ledger.blocks[letter], layer, ledger, recipe)
        variants = (each for each, known in blocks.items() if known == part)
        key = next(variants, letter if letter not in blocks else chr(FIRST_VARIANT + len(blocks)))
        blocks[key] = part
        pattern += key
    return replace(
        ledger,
        pattern=pattern,
        blocks=blocks,
        before=_in_formats(ledger.before, None, ledger, recipe),
        after=_in_formats(ledger.after, None, ledger, recipe),
        mtp=tuple(_in_formats(part, None, ledger, recipe) for part in ledger.mtp),
        recipe=recipe,
    )


def _in_formats(part: Part, layer: int | None, ledger: Ledger, recipe: Recipe) -> Part:
    rows = [Row(layer, part, entry) for entry in part.entries]
    formats = [recipe.format_of(_place(row, ledger)) for row in rows]
    entries = tuple(
        row.entry._replace(weight=format, in_rows=_lies_in_rows(recipe, format))
        for row, format in zip(rows, formats, strict=True)
    )
    for row, entry in zip(rows, entries, strict=True):
        if entry.weight not in UNQUANTIZED:
            _check_widths(row._replace(entry=entry))
    return replace(part, entries=entries)


def _lies_in_rows(recipe: Recipe, format: FormatName) -> bool:
    """Whether weights in a format whose stored blocks are squares have blocks along one axis."""
    from explore.precision import products_of

    entry = FORMATS[format]
    if entry.stored_block == entry.block:
        return False
    return not products_of(recipe.model_copy(update={"forward": True}), format)["forward"][1].square


def _place(row: Row, ledger: Ledger) -> Place:
    from explore.precision import Place

    following = "" if row.layer is None else ledger.pattern[row.layer + 1 : row.layer + 2]
    after = ledger.blocks[following].letter if following else ""
    return Place(row.layer, len(ledger.pattern), row.letter, row.entry.component, bool(row.entry.sums_over), after)


def _check_rule(rule: Rule, field: str, ledger: Ledger, places: list[tuple[Row, Place]], found: set[int]) -> None:
    """Rejects a rule that matches nothing, or has a layer, a letter or a component that does, or an unfit format."""
    known = dict.fromkeys(row.entry.component for row, _ in places)
    for component in rule.components:
        if component not in known and not rule.optional:
            hint = did_you_mean(component, known)
            names = f"{hint}choose from {', '.join(known)}"
            raise ValueError(f"{field}.components must be components of the model, got {component!r}; {names}")
        if component not in known and component not in COMPONENTS:
            hint = did_you_mean(component, COMPONENTS).strip() or f"choose from {', '.join(COMPONENTS)}"
            raise ValueError(f"{field}.components must be components of some block, got {component!r}; {hint}")
    if not rule.optional:
        letters = "".join(dict.fromkeys(row.letter for row, _ in places))
        has = f"has layers 0 to {len(ledger.pattern) - 1} and letters {letters}"
        if not found:
            raise ValueError(f"{field} must match a component of the model, got {_conditions(rule)}; it {has}")
        for name, value, alone in _parts(rule):
            if not any(alone.matches(places[k][1]) for k in found):
                raise ValueError(f"{field}.{name} must all match a component of the model, got {value!r}; it {has}")
    for row in (places[k][0] for k in found):
        if rule.format not in UNQUANTIZED and not row.entry.blocks_along:
            raise ValueError(
                f"{field}.format must be one of {', '.join(sorted(UNQUANTIZED))} for {row.entry.component}, "
                f"which is neither a linear layer nor an embedding, got {rule.format!r}"
            )


def _conditions(rule: Rule) -> str:
    given = rule.model_dump(exclude_defaults=True, exclude={"format"}, mode="json")
    return ", ".join(f"{name} {value!r}" for name, value in given.items())


def _parts(rule: Rule) -> Iterator[tuple[str, int | str, Rule]]:
    """Yields every listed layer, letter and component, with its field and the rule with that value alone."""
    for layer in rule.layers:
        yield "layers", layer, rule.model_copy(update={"layers": (layer,), "first": 0, "last": 0})
    for name in ("letters", "before"):
        for letter in getattr(rule, name):
            yield name, letter, rule.model_copy(update={name: letter})
    for component in rule.components:
        yield "components", component, rule.model_copy(update={"components": (component,)})


def _check_widths(row: Row) -> None:
    entry, block = row.entry, FORMATS[row.entry.weight or ""].block
    for width in entry.blocks_along:
        if block and width % block:
            outside = "MTP" if row.letter == MTP_LETTER else "the model"
            where = outside if row.layer is None else f"layer {row.layer} ({row.letter})"
            near = " or ".join(str(n) for n in (width // block * block, -(-width // block) * block) if n)
            raise ValueError(
                f"precision: {entry.weight} needs widths that are multiples of {block}, got {width} in "
                f"{entry.component} of {where}; {near} would fit"
            )


def storage(ledger: Ledger, dtypes: Dtypes = DTYPES) -> dict[str, float]:
    """Size of a checkpoint, including multi-token prediction.

    Returns:
        `bits_per_element` with the scales of blocks, and `weight_bytes`.
    """
    params, n_bytes = 0, 0.0
    for row in ledger:
        params += row.entry.params
        n_bytes += weight_bytes(row.entry, dtypes)
    return {"bits_per_element": 8 * n_bytes / params, "weight_bytes": n_bytes}


def formats_of(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yields the format of every component, grouped by the layers that share it.

    Yields:
        Records of letter, component, format, `layers` (indices) and parameters, for components that have some.
    """
    groups: dict[tuple[str, str], dict[FormatName | None, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in ledger:
        if row.entry.params:
            groups[row.letter, row.entry.component][row.entry.weight].append(row)
    for (letter, component), by_format in groups.items():
        for weight, rows in by_format.items():
            layers = [row.layer for row in rows if row.layer is not None]
            params = sum(row.entry.params for row in rows)
            yield {"letter": letter, "component": component, "format": weight, "layers": layers, "params": params}
