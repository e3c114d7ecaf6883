"""What every config shares: frozen, hashable, strict about its keys, and plain about errors."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator

from explore.foreign import echo, parse_json, shorten
from explore.formatting import COUNT, read_count

K = TypeVar("K")
V = TypeVar("V")
C = TypeVar("C", bound="Config")

DEPTH = 2
"""Configs between a config and a field that may have been meant."""

LARGEST = 2**63 - 1
"""Largest whole number of a config: what counts are made of it stays far below the largest float."""

TAGGED = ("data", "objective", "start")
"""Fields that hold a discriminated union."""


class Config(BaseModel):
    """Base of every config: immutable, hashable, unknown keys refused, JSON in and out.

    Every field counts in the keys of experiments. A field that is added to a config which has keys already gets its
    default from `added_later`; any other new field changes the key of every experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, data: Any) -> Any:
        return read_numbers(cls, data)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Shows the fields that are not at their defaults."""
        for name, field in type(self).model_fields.items():
            if (value := getattr(self, name)) != field.get_default(call_default_factory=True):
                yield name, value

    def __str__(self) -> str:
        return repr(self)

    def replace(self: C, **changes: Any) -> C:  # noqa: PYI019 - the shape checks of the tests cannot read Self
        """A copy with other values, validated."""
        return type(self).model_validate({name: getattr(self, name) for name in type(self).model_fields} | changes)

    def model_copy(self: C, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> C:  # noqa: PYI019
        """A copy; what is updated is validated, as by `replace`."""
        return self.replace(**update) if update else super().model_copy(deep=deep)

    def fingerprint(self) -> dict[str, Any]:
        """What a key hashes of this config: its JSON, and the fingerprints of the configs inside it.

        A config that names files overrides this: files count by their content, never by their path.
        """
        content = self.model_dump(mode="json")
        return {name: _fingerprint(getattr(self, name), part) for name, part in content.items()}


def read_numbers(config: type[BaseModel], data: Any) -> Any:
    """The content of a config with numbers where text such as `200k` or `5M` stands for one.

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
        if isinstance(value, int | float) and largest < value < math.inf:  # infinity is for the field to refuse
            raise ValueError(f"{name} must be at most {largest}, got {echo(value)}")
    return {**data, **numbers} if numbers else data


@cache
def _number_fields(config: type[BaseModel]) -> Mapping[str, float]:
    """The fields that hold a number and never a text, each with the largest that it may hold."""
    types = {name: set(_types(field.annotation)) for name, field in config.model_fields.items()}
    return {
        name: sys.float_info.max if float in found else LARGEST
        for name, found in types.items()
        if found & {int, float} and str not in found
    }


def _types(annotation: Any) -> Iterator[type]:
    """The types that an annotation is made of."""
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _types(part)


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
        `path: reason` of one error, and how many more there are: of an unknown field if there is one, for a field that
        is missing may be the one that was misspelt.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    path, reason = shorten(_path(root, problems[0]["loc"])), _reason(error.title, problems[0])
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
    message = message[0].lower() + message[1:]
    return message if isinstance(value, Mapping | BaseModel) else f"{message}, got {echo(value)}"


def nearest_fields(title: str, loc: list[str], *, is_mapping: bool = False) -> list[str]:
    """The fields that an unknown one may stand for: the same field further inside, or else the nearest name.

    Args:
        title: name of the class of the whole config.
        loc: path of the unknown field in it.
        is_mapping: its value has fields itself, so that it may be an entry of a mapping of configs.

    Returns:
        Paths from where the unknown field is; none where nothing is near.
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
    """The configs that a part of a path leads to: a field, the tag of one of several configs, or a key."""
    if found := [inner for each in configs if part in each.model_fields for inner in _configs_in(each, part)]:
        return found
    tagged = [each for each in configs if "kind" in each.model_fields and each.model_fields["kind"].default == part]
    return tagged or configs


def _configs_in(config: type[Config], field: str) -> list[type[Config]]:
    return [each for each in _types(config.model_fields[field].annotation) if issubclass(each, Config)]


def _paths_to(config: type[Config], name: str, *, is_mapping: bool, depth: int = DEPTH) -> Iterator[str]:
    """Paths of the fields called `name` in the configs inside a config; keys of a mapping of configs are letters."""
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
        ValueError: not of that form, or the path leads through something that has no fields.
    """
    path, equals, text = override.partition("=")
    *parents, field = path.split(".")
    if not equals or not all((*parents, field)):
        raise ValueError(f"--set: {echo(override)} is not of the form path.to.field=value")
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
