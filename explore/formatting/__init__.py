"""Formats numbers: counts, FLOPs, bytes and seconds, each in one form everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import groupby
from numbers import Real
from typing import Any

from explore.foreign import echo

_SI = ("", "k", "M", "G", "T", "P", "E")
_COUNTS = ("", "k", "M", "B", "T", "P", "E")
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_WORDS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
_SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}

DIGITS = 18
"""Maximum number of digits of an integer in input."""

COUNT = re.compile(r"\d[\d.]*[kMGBTPE]?")
"""A number as `read_count` reads it, without sign or exponent."""


def count(value: float | None) -> str:
    """Formats parameters, tokens and other counts with three digits and k, M, B or T; a missing value as ""."""
    return _prefixed(value, 1000, _COUNTS)


def flops(value: float | None) -> str:
    """Formats FLOPs, FLOP/s and bytes per second with three digits and an SI prefix; a missing value as ""."""
    return _prefixed(value, 1000, _SI)


def size(value: float | None) -> str:
    """Formats bytes with three digits in binary units; a missing value as ""."""
    return _prefixed(value, 1024, _BYTES, " ")


def ranges(indices: Iterable[int]) -> str:
    """Increasing numbers as ranges, such as `0-3 7 9-10`."""
    runs = (list(run) for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]))
    ends = ((run[0][1], run[-1][1]) for run in runs)
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def seconds(value: float) -> str:
    """Formats a short time with three digits in s, ms or µs."""
    scale, unit = next((each for each in _SECONDS if value >= each[0]), _SECONDS[-1])
    return f"{value / scale:.3g} {unit}"


def duration(value: float) -> str:
    """Formats a long time in seconds, minutes or hours."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def number(value: Any, spec: str) -> str:
    """Formats a number by a format specification; a missing value as "", and text unchanged."""
    if _is_missing(value):
        return ""
    return format(value, spec) if isinstance(value, Real) else str(value)


def plain(value: float) -> str:
    """Formats a number without powers of ten, with commas."""
    return f"{value:,.6g}"


def milliseconds(value: float) -> str:
    """Formats seconds as a number of milliseconds."""
    return plain(1e3 * value)


def tokens(value: float) -> str:
    """Formats a number of tokens; a multiple of 2^10 or 2^20 as k or M."""
    for unit, scale in (("M", 2**20), ("k", 2**10)):
        if value >= scale and value % scale == 0:
            return f"{value / scale:g}{unit}"
    return plain(value)


def with_unit(value: Any, unit: str) -> str:
    """Formats a value in the form of its unit; a missing value as ""."""
    if _is_missing(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, Real):
        return str(value)
    value = float(value)
    if unit.startswith("FLOPs"):
        return flops(value)
    if unit.startswith("bytes"):
        return size(value)
    if unit in ("parameters", "tokens"):
        return count(value)
    if unit == "s":
        return duration(value)
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def axis_scale(largest: float, unit: str) -> tuple[float, str]:
    """Returns the factor by which values on an axis are divided, and their unit after that.

    The unit suits the largest value. Parameters are in words (`billions`), bytes in binary units, everything else with
    an SI prefix (`GFLOPs/token`).
    """
    if unit.startswith("bytes"):
        power = _power(largest, 1024, len(_BYTES))
        return 1024.0**power, _BYTES[power]
    if unit == "parameters":
        return next(((scale, word) for scale, word in _WORDS if largest >= scale), (1.0, "count"))
    power = _power(largest, 1000, _SI.index("T") + 1)
    return 1000.0**power, _SI[power] + unit


def read_count(text: str) -> float:
    """Reads a number with or without a suffix: `2e6`, `128k`, `5M`, `30B` or `30G`; an integer is exact.

    Raises:
        ValueError: the text is not a number of this form.
    """
    if text.isdecimal() and len(text) < DIGITS:
        return int(text)
    scale = _SUFFIXES.get(text[-1:], 1.0)
    try:
        value = float(text[:-1] if scale != 1 else text) * scale
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"count must be a number with or without k, M, B (or G) or T, got {echo(text)}")
    return value


def read_whole_count(text: str | int) -> int:
    """Reads a positive whole number: `4096`, `128k`, `1.5M`.

    Raises:
        ValueError: the text is not a positive whole number.
    """
    value = read_count(str(text))
    if not (1 <= value < 10**DIGITS and float(value).is_integer()):
        raise ValueError(f"count must be a positive whole number with or without k, M or B, got {echo(text)}")
    return int(value)


def _prefixed(value: float | None, base: int, units: tuple[str, ...], space: str = "") -> str:
    if value is None or _is_missing(value):
        return ""
    if math.isinf(value):
        return str(value)
    size = abs(value)
    power = _power(size, base, len(units))
    if power + 1 < len(units) and size >= 0.9995 * base ** (power + 1):  # three digits would round it up
        power += 1
    scaled = value / base**power
    digits = f"{scaled:.3g}" if abs(scaled) < 999.5 else f"{scaled:.0f}"
    return digits + space + units[power]


def _power(value: float, base: int, n: int) -> int:
    """The largest exponent below `n` with base^exponent at most the value; at least 0."""
    return next((power for power in range(n - 1, 0, -1) if value >= base**power), 0)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
