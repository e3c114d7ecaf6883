"""Recall: every answer can be looked up in the sequence itself."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from explore.data import IGNORED, Batch, RecallData


@st.composite
def configs(draw: st.DrawFn) -> RecallData:
    n_pairs = draw(st.integers(1, 8))
    n_queries = draw(st.integers(1, n_pairs))
    seq_len = 2 * (n_pairs + n_queries) + draw(st.integers(0, 21))
    vocab_size = 2 * (n_pairs + 1) + draw(st.integers(0, 41))
    fewer_pairs = sorted(draw(st.sets(st.integers(1, n_pairs - 1)))) if n_pairs > 1 else []
    return RecallData(
        seq_len=seq_len,
        n_pairs=n_pairs,
        n_queries=n_queries,
        vocab_size=vocab_size,
        n_eval=7,
        fewer_pairs=tuple(fewer_pairs),
    )


def check(config: RecallData, batch: Batch) -> None:
    """Looks up the answers, sequence by sequence, and checks that sequences hold nothing else."""
    half = config.vocab_size // 2
    assert batch.n_pairs is not None
    for inputs, targets, n_pairs in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.n_pairs, strict=True):
        context = inputs[: 2 * n_pairs]
        book = dict(zip(context[::2], context[1::2], strict=True))
        assert len(book) == len(set(book.values())) == n_pairs
        assert all(1 <= key < half <= value < config.vocab_size for key, value in book.items())
        assert targets[: 2 * n_pairs] == [IGNORED] * (2 * n_pairs)
        asked = {key for key in inputs[2 * n_pairs :] if key != 0}
        assert len(asked) == min(config.n_queries, n_pairs)
        assert targets[2 * n_pairs :] == [book.get(key, IGNORED) for key in inputs[2 * n_pairs :]]


@given(config=configs(), seed=st.integers(0, 9), step=st.integers(0, 2**40))
def test_every_answer_follows_its_key(config: RecallData, seed: int, step: int) -> None:
    check(config, config.open(seed).batch(step, 5))
    for batch in config.open(seed).eval_batches("test", 3):
        check(config, batch)


def test_batches_equal_those_of_committed_runs() -> None:
    source = RecallData(seq_len=24, n_pairs=6, vocab_size=32).open(3)
    batch = source.batch(7, 5)
    text = repr((batch.inputs.tolist(), batch.targets.tolist()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "915ef45761bf9e0d"


def test_every_batch_of_a_mixture_alternates_all_numbers_of_pairs() -> None:
    source = RecallData(seq_len=128, n_pairs=32, fewer_pairs=(4, 8, 16), vocab_size=512, n_eval=10).open(0)
    assert source.batch(0, 8).n_pairs == (4, 8, 16, 32) * 2
    parts = [batch.n_pairs for batch in source.eval_batches("val", 3)]
    assert parts == [(4, 8, 16), (32, 4, 8), (16, 32, 4), (8,)]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    config = RecallData()
    seen = {(seed, step): config.open(seed).batch(step, 4).inputs for seed in (0, 1) for step in (0, 1, 2)}
    again = {(seed, step): config.open(seed).batch(step, 4).inputs for step in (2, 1, 0) for seed in (1, 0)}
    assert all(torch.equal(seen[key], again[key]) for key in seen)
    assert len({tuple(inputs.flatten().tolist()) for inputs in seen.values()}) == 6


def test_evaluation_is_the_same_for_every_seed_and_batch_size_and_disjoint_from_training() -> None:
    config = RecallData(n_eval=50)

    def rows(seed: int, split: str, batch_size: int) -> list[tuple[int, ...]]:
        batches = config.open(seed).eval_batches(split, batch_size)
        return [tuple(row) for batch in batches for row in batch.inputs.tolist()]

    val, test = rows(0, "val", 8), rows(0, "test", 8)
    assert len(val) == len(test) == 50
    assert rows(3, "val", 50) == val
    train = [tuple(row) for step in range(10) for row in config.open(0).batch(step, 50).inputs.tolist()]
    assert len({*val, *test, *train}) == 600


@pytest.mark.parametrize(("max_tokens", "n"), [(1, 1), (64, 1), (200, 3), (10**6, 50)])
def test_max_tokens_takes_the_first_sequences(max_tokens: int, n: int) -> None:
    source = RecallData(n_eval=50).open(0)
    full = torch.cat([batch.inputs for batch in source.eval_batches("val", 50)])
    part = torch.cat([batch.inputs for batch in source.eval_batches("val", 2, max_tokens)])
    assert torch.equal(part, full[:n])


def test_the_places_of_queries_follow_the_power_law() -> None:
    def first_place(power_a: float) -> float:
        """Share of sequences whose only query is at the first of eight places."""
        config = RecallData(n_pairs=1, seq_len=18, power_a=power_a)
        return float((config.open(0).batch(0, 20_000).targets[:, 2] != IGNORED).double().mean())

    weights = np.arange(1, 9) ** (0.25 - 1)
    assert first_place(0.25) == pytest.approx(weights[0] / weights.sum(), abs=0.01)
    assert first_place(1.0) == pytest.approx(1 / 8, abs=0.01)


def test_every_pair_is_queried_equally_often() -> None:
    config = RecallData(n_pairs=4, n_queries=1)
    batch = config.open(0).batch(0, 8000)
    answers = batch.targets.max(dim=1).values
    places = (batch.inputs[:, 1:8:2] == answers[:, None]).double().mean(dim=0)
    assert places.tolist() == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_pairs": 4, "n_queries": 5}, "n_queries: 5 must be at most n_pairs, 4"),
        ({"seq_len": 31}, "seq_len: 31 must be at least 32"),
        ({"vocab_size": 17}, "vocab_size: 17 must be at least 18"),
        ({"fewer_pairs": (8,)}, r"fewer_pairs: must be in rising order and below n_pairs, 8, got \[8\]"),
        ({"fewer_pairs": (4, 2)}, r"got \[4, 2\]"),
        ({"fewer_pairs": (2, 2)}, r"got \[2, 2\]"),
    ],
)
def test_invalid_sizes_of_recall_are_named_with_the_allowed_ones(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecallData(**fields)


def test_all_pairs_are_queried_by_default() -> None:
    assert RecallData(n_pairs=5).n_queries == 5
