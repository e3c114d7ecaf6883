"""Formatting of numbers: one form for each kind, with three digits everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from explore import formatting


@pytest.mark.parametrize(
    ("value", "count", "flops"),
    [
        (0, "0", "0"),
        (999, "999", "999"),
        (999.7, "1k", "1k"),
        (1_234, "1.23k", "1.23k"),
        (999_400, "999k", "999k"),
        (999_600, "1M", "1M"),
        (84.6e9, "84.6B", "84.6G"),
        (-84.6e9, "-84.6B", "-84.6G"),
        (1.2e13, "12T", "12T"),
        (3e15, "3P", "3P"),
        (2.5e18, "2.5E", "2.5E"),
        (4e21, "4000E", "4000E"),
        (None, "", ""),
        (math.nan, "", ""),
        (math.inf, "inf", "inf"),
    ],
)
def test_a_billion_is_B_for_counts_and_G_for_flops(value: float | None, count: str, flops: str) -> None:
    assert (formatting.count(value), formatting.flops(value)) == (count, flops)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1000, "1000 B"), (1023.7, "1 KiB"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (3 * 2**50, "3072 TiB")],
)
def test_bytes_are_in_binary_units(value: float, text: str) -> None:
    assert formatting.size(value) == text


def test_times_have_suitable_units() -> None:
    assert [formatting.seconds(value) for value in (2.5, 0.0123, 4.5e-5, 2e-8)] == [
        "2.5 s",
        "12.3 ms",
        "45 µs",
        "0.02 µs",
    ]
    assert [formatting.duration(value) for value in (89, 90, 5399, 5400)] == ["89 s", "2 min", "90 min", "1.5 h"]


def test_round_binary_tokens_are_in_multiples_of_1024() -> None:
    assert [formatting.tokens(value) for value in (1000, 1024, 3 * 2**20, 1025)] == [
        "1,000",
        "1k",
        "3M",
        "1,025",
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2e9, "FLOPs/token", "2G"),
        (2e9, "parameters", "2B"),
        (np.int64(2048), "bytes per token", "2 KiB"),
        (120.0, "s", "2 min"),
        (12345, "", "12,345"),
        (0.123456, "", "0.1235"),
        (True, "", "yes"),
        ("a name", "", "a name"),
        (None, "FLOPs", ""),
        (math.nan, "s", ""),
    ],
)
def test_a_unit_decides_how_a_value_is_written(value: object, unit: str, text: str) -> None:
    assert formatting.with_unit(value, unit) == text


@pytest.mark.parametrize(
    ("largest", "unit", "scale", "scaled"),
    [
        (8e9, "parameters", 1e9, "billions"),
        (5.0, "parameters", 1.0, "count"),
        (8e9, "FLOPs/token", 1e9, "GFLOPs/token"),
        (8e17, "FLOPs", 1e12, "TFLOPs"),
        (2**31, "bytes per sequence", 2**30, "GiB"),
        (0.0, "bytes", 1.0, "B"),
    ],
)
def test_an_axis_is_in_a_unit_of_its_largest_value(largest: float, unit: str, scale: float, scaled: str) -> None:
    assert formatting.axis_scale(largest, unit) == (scale, scaled)


def test_written_counts_can_be_read_back() -> None:
    for text, value in (("200k", 2e5), ("5M", 5e6), ("30B", 3e10), ("30G", 3e10), ("1.5e6", 1.5e6), ("7", 7.0)):
        assert formatting.read_count(text) == value
    for value in (1_230, 84.6e9, 2e12):
        assert formatting.read_count(formatting.count(value)) == formatting.read_count(formatting.flops(value)) == value
    for text in ("", "k", "5 apples", "nan", "infB"):
        with pytest.raises(ValueError, match=f"count must be a number .* got '{text}'"):
            formatting.read_count(text)
