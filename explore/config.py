"""Base of all configs: frozen, hashable, unknown keys rejected, one-line errors."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator

from explore.foreign import echo, parse_json, shorten
from explore.formatting import COUNT, read_count

K = TypeVar("K")
V = TypeVar("V")
C = TypeVar("C", bound="Config")

DEPTH = 2
"""Levels of nested configs searched for the field a user may have meant."""

LARGEST = 2**63 - 1
"""Largest whole number in a config; counts derived from it stay far below the largest float."""

TAGGED = ("data", "objective", "start")
"""Names of fields that hold a discriminated union."""

_BOUNDS = {
    "greater than or equal to": "at least", "greater than": "above",
    "less than or equal to": "at most", "less than": "below",
}  # fmt: skip
"""Words for the bound of a number, by those of pydantic; the longer ones first."""
_BOUND = re.compile(f"Input should be ({'|'.join(_BOUNDS)}) ")


class Config(BaseModel):
    """Base of every config: immutable, hashable, unknown keys rejected, JSON in and out.

    Every field is part of experiment keys. A new field of an existing config must take its default from
    `added_later`; any other new field changes the key of every experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, data: Any) -> Any:
        return read_numbers(cls, data)

    @classmethod
    def validated(cls: type[C], content: Any, path: str | Path) -> C:  # noqa: PYI019 - as in `replace`
        """Validates the content of a file; a ValueError names the file and the field."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{path}: {explain(error)}") from None

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Shows only fields that differ from their defaults."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            derived = field.default_factory is not None and field.default_factory_takes_validated_data
            if derived or value != field.get_default(call_default_factory=True):
                yield name, value

    def __str__(self) -> str:
        return repr(self)

    def replace(self: C, **changes: Any) -> C:  # noqa: PYI019 - the shape checks of the tests cannot read Self
        """Returns a validated copy with some values changed."""
        return type(self).model_validate({name: getattr(self, name) for name in type(self).model_fields} | changes)

    def model_copy(self: C, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> C:  # noqa: PYI019
        """Returns a copy; updates are validated as in `replace`."""
        return self.replace(**update) if update else super().model_copy(deep=deep)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the content that a key hashes: this config's JSON, with fingerprints of nested configs.

        A config that names files overrides this, so that files are hashed by content, not by path.
        """
        content = self.model_dump(mode="json")
        return {name: _fingerprint(getattr(self, name), part) for name, part in content.items()}


def read_numbers(config: type[BaseModel], data: Any) -> Any:
    """Converts text such as `200k` or `5M` in a config's content to numbers.

    Raises:
        ValueError: a whole number is too large to count with.
    """
    if not isinstance(data, Mapping):
        return data
    numbers = {}
    for name, largest in _number_fields(config).items():
        value = data.get(name)
        if isinstance(value, str) and COUNT.fullmatch(value):
            value = numbers[name] = read_count(value)
        if isinstance(value, int | float) and largest < value < math.inf:  # the field itself rejects infinity
            raise ValueError(f"{name} must be at most {largest}, got {echo(value)}")
    return {**data, **numbers} if numbers else data


@cache
def _number_fields(config: type[BaseModel]) -> Mapping[str, float]:
    """Returns the fields that hold a number and never text, with the largest value of each."""
    types = {name: set(_types(field.annotation)) for name, field in config.model_fields.items()}
    return {
        name: sys.float_info.max if float in found else LARGEST
        for name, found in types.items()
        if found & {int, float} and str not in found
    }


def _types(annotation: Any) -> Iterator[type]:
    """Yields the types inside an annotation."""
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def added_later(default: Any) -> Any:
    """Default for a field added to a config that existing experiment keys already cover.

        output_gate: bool = added_later(False)

    While the field has this default, `model_dump` and JSON omit it, so existing experiments keep their keys and run
    records do not change. The default must therefore reproduce the behaviour from before the field existed, and must
    never change.
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
    """An immutable, hashable mapping that ignores insertion order."""

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
"""Field type for a mapping inside a config: accepts any mapping and stores a `FrozenMapping`."""


def thaw(value: Any) -> Any:
    """Converts frozen JSON to dictionaries and lists."""
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
"""Field type for a JSON object interpreted by another module; immutable and hashable at any depth."""


def explain(error: ValidationError, root: str = "") -> str:
    """Describes in one line what is wrong with a config.

    Args:
        root: name of the config at the start of the path, for example `model`.

    Returns:
        `path: reason` of one error, and the number of further errors. An unknown field comes first, since a missing
        field may be the misspelt one.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    path, reason = shorten(_path(root, problems[0]["loc"])), _reason(error.title, problems[0])
    # Errors from checks of a whole config start with the field concerned.
    line = path + ("." if re.match(r"[\w.]+: ", reason) else ": ") + reason if path else reason
    return line if len(problems) == 1 else f"{line} (and {len(problems) - 1} more)"


def _path(root: str, loc: tuple[int | str, ...]) -> str:
    parts = [root] if root else []
    for i, part in enumerate(loc):
        # Skip the tag of a discriminated union after a letter or one of `TAGGED`: the user did not write it.
        if not ((i >= 2 and loc[i - 2] == "blocks") or (i >= 1 and loc[i - 1] in TAGGED)):
            parts.append(str(part))
    return ".".join(parts)


def _reason(title: str, problem: Any) -> str:
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        near = nearest_fields(title, [str(part) for part in problem["loc"]], is_mapping=isinstance(value, Mapping))
        return "unknown field" + (f"; did you mean {' or '.join(near)}?" if near else "")
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
    message = bound(message) or message[0].lower() + message[1:]
    return message if isinstance(value, Mapping | BaseModel) else f"{message}, got {echo(value)}"


def bound(message: str) -> str | None:
    """Pydantic's message about a number out of range in our words, `must be at least 1`; None for other messages."""
    found = _BOUND.match(message)
    return None if found is None else f"must be {_BOUNDS[found[1]]} {message[found.end() :]}"


def nearest_fields(title: str, loc: list[str], *, is_mapping: bool = False) -> list[str]:
    """Suggests fields for an unknown one: the same name in a nested config, or else the nearest name.

    Args:
        title: name of the class of the whole config.
        loc: path of the unknown field in it.
        is_mapping: the value itself has fields, so it may be an entry of a mapping of configs.

    Returns:
        Paths relative to the unknown field's parent; empty if nothing is near.
    """
    *outer, name = loc
    configs = [each for each in _all_configs(Config) if each.__name__ == title]
    for part in outer:
        configs = _configs_at(configs, part)
    if inside := [path for each in configs for path in _paths_to(each, name, is_mapping=is_mapping)]:
        return inside[:2]
    fields = {field for each in configs for field in each.model_fields}
    return get_close_matches(name, sorted(fields), 1)


def _all_configs(config: type[Config]) -> Iterator[type[Config]]:
    yield config
    for each in config.__subclasses__():
        yield from _all_configs(each)


def _configs_at(configs: list[type[Config]], part: str) -> list[type[Config]]:
    """Returns the configs one step along a path; the part is a field, a union tag, or a key."""
    if found := [inner for each in configs if part in each.model_fields for inner in _configs_in(each, part)]:
        return found
    tagged = [each for each in configs if "kind" in each.model_fields and each.model_fields["kind"].default == part]
    return tagged or configs


def _configs_in(config: type[Config], field: str) -> list[type[Config]]:
    return [each for each in _types(config.model_fields[field].annotation) if issubclass(each, Config)]


def _paths_to(config: type[Config], name: str, *, is_mapping: bool, depth: int = DEPTH) -> Iterator[str]:
    """Yields paths of fields called `name` in nested configs; keys of a mapping of configs are letters."""
    for field, info in config.model_fields.items():
        inner = _configs_in(config, field)
        if any(name in each.model_fields for each in inner) or (
            inner and is_mapping and len(name) == 1 and get_origin(info.annotation) is Mapping
        ):
            yield f"{field}.{name}"
        for each in inner if depth else ():
            yield from (f"{field}.{path}" for path in _paths_to(each, name, is_mapping=is_mapping, depth=depth - 1))


def set_field(content: dict[str, Any], override: str) -> None:
    """Writes `path.to.field=value` into nested dictionaries; validation happens later.

    Raises:
        ValueError: the override has another form, or its path goes through a value without fields.
    """
    path, equals, text = override.partition("=")
    *parents, field = path.split(".")
    if not equals or not all((*parents, field)):
        raise ValueError(f"--set: must have the form path.to.field=value, got {echo(override)}")
    try:
        value = parse_json(text)
    except ValueError:
        value = text
    for parent in parents:
        if content.get(parent) is None:
            content[parent] = {}
        content = content[parent]
        if not isinstance(content, dict):
            raise ValueError(f"--set: {echo(parent)} in {echo(path)} has no fields")
    content[field] = value
