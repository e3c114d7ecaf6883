"""What every config shares: frozen, hashable, strict about its keys, and plain about errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError
from pydantic.functional_validators import AfterValidator

from explore.foreign import echo, parse_json

K = TypeVar("K")
V = TypeVar("V")

TAGGED = ("data", "objective", "start")
"""Fields that hold a discriminated union."""


class Config(BaseModel):
    """Base of every config: immutable, hashable, unknown keys refused, JSON in and out.

    Every field counts in the keys of experiments. A field that is added to a config which has keys already gets its
    default from `added_later`; any other new field changes the key of every experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def fingerprint(self) -> dict[str, Any]:
        """What a key hashes of this config: its JSON, and the fingerprints of the configs inside it.

        A config that names files overrides this: files count by their content, never by their path.
        """
        content = self.model_dump(mode="json")
        return {name: _fingerprint(getattr(self, name), part) for name, part in content.items()}


def added_later(default: Any) -> Any:
    """Default of a field that is added to a config whose experiments have keys.

        output_gate: bool = added_later(False)

    While the field has this default it is left out of `model_dump` and JSON, so experiments keep the keys that they
    had, and records of runs look as before. The default must therefore mean what the code did without the field, and
    must never change.
    """
    return Field(default=default, exclude_if=lambda value: value == default)


def _fingerprint(value: Any, content: Any) -> Any:
    """Replaces the JSON of every config within a value by the config's fingerprint."""
    match value:
        case Config():
            return value.fingerprint()
        case Mapping():
            return {name: _fingerprint(value[name], part) for name, part in content.items()}
        case tuple():
            return [_fingerprint(*pair) for pair in zip(value, content, strict=True)]
    return content


class FrozenMapping(Mapping[K, V]):
    """A mapping that can neither be changed nor depend on insertion order, so it can be hashed."""

    __slots__ = ("_items",)
    _items: dict[K, V]

    def __init__(self, items: Mapping[K, V]) -> None:
        object.__setattr__(self, "_items", dict(sorted(items.items(), key=lambda item: str(item[0]))))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("FrozenMapping is immutable")

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[type[FrozenMapping[K, V]], tuple[dict[K, V]]]:
        return type(self), (dict(self._items),)


Frozen = Annotated[Mapping[K, V], AfterValidator(FrozenMapping), PlainSerializer(dict)]
"""Field type of a mapping inside a config: any mapping goes in, a `FrozenMapping` comes out."""


def thaw(value: Any) -> Any:
    """Frozen JSON as dictionaries and lists."""
    match value:
        case Mapping():
            return {name: thaw(part) for name, part in value.items()}
        case list() | tuple():
            return [thaw(part) for part in value]
    return value


def _freeze(value: Any) -> Any:
    match value:
        case Mapping():
            return FrozenMapping({name: _freeze(part) for name, part in value.items()})
        case list() | tuple():
            return tuple(_freeze(part) for part in value)
    return value


FrozenJson = Annotated[Mapping[str, Any], AfterValidator(_freeze), PlainSerializer(thaw)]
"""Field type of a JSON object that another module reads: immutable and hashable however deep it is."""


def explain(error: ValidationError, root: str = "") -> str:
    """Says in one line what is wrong with a config.

    Args:
        root: what the config is called in the path, for example `model`.

    Returns:
        `path: reason` of the first error, and how many more there are.
    """
    problems = error.errors(include_url=False)
    path, reason = _path(root, problems[0]["loc"]), _reason(problems[0])
    # A check of a whole config begins with the field that it is about.
    line = path + ("." if re.match(r"[\w.]+: ", reason) else ": ") + reason if path else reason
    return line if len(problems) == 1 else f"{line} (and {len(problems) - 1} more)"


def _path(root: str, loc: tuple[int | str, ...]) -> str:
    parts = [root] if root else []
    for i, part in enumerate(loc):
        # After a letter or one of `TAGGED` comes the tag of a discriminated union, which the user did not write.
        if not ((i >= 2 and loc[i - 2] == "blocks") or (i >= 1 and loc[i - 1] in TAGGED)):
            parts.append(str(part))
    return ".".join(parts)


def _reason(problem: Any) -> str:
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "missing":
        return "field required"
    if kind == "union_tag_not_found":
        return "kind: field required"
    if kind == "union_tag_invalid":
        allowed = problem["ctx"]["expected_tags"].replace("'", "").rsplit(", ", 1)
        return f"kind: must be {' or '.join(allowed)}, got {echo(problem['ctx']['tag'])}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return message
    message = message[0].lower() + message[1:]
    return message if isinstance(value, Mapping | BaseModel) else f"{message}, got {echo(value)}"


def set_field(content: dict[str, Any], override: str) -> None:
    """Writes `path.to.field=value` into nested dictionaries; validation happens later.

    Raises:
        ValueError: not of that form, or the path leads through something that has no fields.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"--set: {echo(override)} is not of the form path.to.field=value")
    try:
        value = parse_json(text)
    except ValueError:
        value = text
    *parents, field = path.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ValueError(f"--set: {echo(parent)} in {echo(path)} has no fields")
    content[field] = value
