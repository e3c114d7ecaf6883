"""The n-gram floor: textbook formulas, the tokens that a run reads, and the command line."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_runs import tiny, train, write_corpus
from typer.testing import CliRunner

from explore.cli.app import app
from explore.data import TextData, TextSource
from explore.evals import NgramModel, ngram_scores
from explore.evals.ngram import ORDERS
from explore.figures import frontier_table, plot_frontier
from explore.runs import find_runs
from explore.table import load_runs

VOCAB = 16

FIT = """
import json, sys, time
from pathlib import Path
import numpy as np
from explore.evals import NgramModel

def peak() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

n, vocab_size, order = map(int, sys.argv[1:])
shares = 1 / np.arange(1, vocab_size + 1)
ids = np.random.default_rng(0).choice(vocab_size, n, p=shares / shares.sum()).astype(np.uint16)
before, start = peak(), time.process_time()
model = NgramModel(ids, vocab_size, order)
model.log_probs(ids[: 1 << 21])
print(json.dumps([time.process_time() - start, (peak() - before) / n]))
"""
"""Fits tokens of Zipf's law and scores two million; prints CPU seconds, and peak memory in bytes per training token."""


def textbook(stretches: Sequence[Sequence[int]], order: int) -> Callable[[int, tuple[int, ...]], float]:
    """The probability of a token after others, directly from the formulas."""
    grams = {
        n: [tuple(text[i : i + n]) for text in stretches for i in range(len(text) - n + 1)] for n in range(1, order + 1)
    }
    counts = {order: Counter(grams[order])}
    for n in range(1, order):
        before = defaultdict(set)
        for gram in grams[n + 1]:
            before[gram[1:]].add(gram[0])
        counts[n] = Counter({gram: len(tokens) for gram, tokens in before.items()})

    def probability(token: int, context: tuple[int, ...]) -> float:
        n = len(context) + 1
        shorter = probability(token, context[1:]) if context else 1 / VOCAB
        following = {gram[-1]: count for gram, count in counts[n].items() if gram[:-1] == context}
        if not following:
            return shorter
        once, twice = (sum(count == n for count in counts[len(context) + 1].values()) for n in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        left = discount * len(following) * shorter
        return (max(following.get(token, 0) - discount, 0) + left) / sum(following.values())

    return probability


def random_text(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).zipf(1.5, n) % (VOCAB - 2)


@pytest.mark.parametrize("order", ORDERS)
def test_log_probabilities_equal_the_textbook_formula(order: int) -> None:
    text, other = random_text(0, 300), random_text(1, 60) + np.arange(60) % 3
    probability = textbook([text.tolist()], order)
    contexts = [tuple(other[max(0, i - order + 1) : i].tolist()) for i in range(1, len(other))]
    expected = [math.log(probability(int(token), context)) for token, context in zip(other[1:], contexts, strict=True)]
    np.testing.assert_allclose(NgramModel(text, VOCAB, order).log_probs(other), expected, rtol=1e-12)


def test_no_ngram_crosses_the_start_of_a_segment() -> None:
    text, begins = random_text(0, 300), np.zeros(300, bool)
    begins[[0, 120, 121, 250]] = True
    stretches = [part.tolist() for part in np.split(text, [120, 121, 250])]
    probability = textbook(stretches, 3)
    model = NgramModel(text, VOCAB, 3, begins)
    other = random_text(1, 40)
    contexts = [tuple(other[max(0, i - 2) : i].tolist()) for i in range(1, 40)]
    expected = [math.log(probability(int(token), context)) for token, context in zip(other[1:], contexts, strict=True)]
    np.testing.assert_allclose(model.log_probs(other), expected, rtol=1e-12)
    assert not np.allclose(NgramModel(text, VOCAB, 3).log_probs(other), expected, rtol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_probabilities_of_all_tokens_sum_to_one(order: int) -> None:
    text = random_text(0, 300)
    model = NgramModel(text, VOCAB, order)
    for context in (text[40:45], np.array([15, 15, 15, 15, 15]), np.array([text[0], 15, 14, 13, text[9]])):
        probs = [np.exp(model.log_probs(np.append(context, token))[-1]) for token in range(VOCAB)]
        assert math.isclose(sum(probs), 1, rel_tol=1e-12)


def test_scores_do_not_depend_on_the_cuts_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = NgramModel(random_text(0, 300), VOCAB, 4), random_text(1, 50)
    whole = model.log_probs(text)
    monkeypatch.setattr("explore.evals.ngram.CHUNK", 7)
    np.testing.assert_array_equal(model.log_probs(text), whole)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("order", [3, 5])
def test_thirty_million_tokens_are_fitted_in_two_minutes_and_bounded_memory(order: int) -> None:
    arguments = [sys.executable, "-c", FIT, str(30 * 10**6), "4096", str(order)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    seconds, bytes_per_token = json.loads(done.stdout)
    assert seconds < 120
    assert bytes_per_token < 20 * order


@pytest.mark.parametrize(("order", "n", "message"), [(1, 9, "from 2 to 5, got 1"), (3, 2, "at least 3 tokens")])
def test_an_order_that_cannot_be_fitted_is_refused(order: int, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NgramModel(np.zeros(n, np.int64), VOCAB, order)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def opened(corpus: Path) -> TextSource:
    source = TextData(corpus=str(corpus), tokenizer="bytes", seq_len=32).open(0)
    assert isinstance(source, TextSource)
    return source


@pytest.mark.parametrize("n_windows", [1, 5, 40])
def test_the_tokens_of_a_run_are_those_of_its_windows_each_once(corpus: Path, n_windows: int) -> None:
    source = opened(corpus)
    ids, begins = source.tokens_read(n_windows)
    batch = source.batch(0, n_windows)
    windows = np.concatenate([batch.inputs.numpy(), batch.targets.numpy()[:, -1:]], axis=1)
    stretches = np.split(ids, np.flatnonzero(begins)[1:])
    assert all(any(window.tobytes() in part.tobytes() for part in map(np.int64, stretches)) for window in windows)
    assert len(ids) == 32 * n_windows + begins.sum()  # the windows share no target


def test_a_run_of_an_epoch_reads_all_tokens(corpus: Path) -> None:
    source = opened(corpus)
    ids, begins = source.tokens_read(source.windows_per_epoch)
    assert len(ids) == source.n_train_tokens
    assert begins.sum() == 1


def test_scores_are_kept_by_the_content_of_the_texts(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ngram_scores(opened(corpus), 3)
    assert 0 < first["val"].nats / first["val"].n_targets < math.log(257)
    shorter = ngram_scores(opened(corpus), 3, max_tokens=64)
    assert shorter["val"].n_targets == 64
    monkeypatch.setattr("explore.evals.ngram.NgramModel", None)
    assert ngram_scores(opened(corpus), 3) == first
    with pytest.raises(TypeError):
        ngram_scores(opened(corpus), 4)


def digit_changed(text: str) -> str:
    """Another first digit of the first number."""
    return re.sub(r"\d", lambda found: str(9 - int(found[0])), text, count=1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:20],
        lambda text: "\0" * len(text),
        lambda text: text.replace("n_targets", "n_tokens"),
        lambda text: "{}",
        digit_changed,
    ],
    ids=["cut", "zeroed", "renamed", "empty", "digit"],
)
def test_damaged_scores_in_the_cache_are_computed_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[str], str]
) -> None:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path))
    first = ngram_scores(opened(corpus), 2)
    (path,) = (tmp_path / "ngrams").iterdir()
    text = path.read_text()
    path.write_text(damage(text))
    assert ngram_scores(opened(corpus), 2) == first
    assert path.read_text() == text


def test_commands_show_the_floor_and_keep_it_in_the_record(corpus: Path, tmp_path: Path) -> None:
    run = train(tiny(corpus, "-", train__eval_tokens=128), tmp_path)
    shown = CliRunner().invoke(app, ["data", str(corpus), "--tokenizer", "bytes", "--ngram", "2", "--json"])
    splits = {row["split"]: row["2gram_bits_per_byte"] for row in json.loads(shown.stdout)["splits"]}
    assert splits["train"] is None
    assert 0 < splits["val"] < 8
    done = CliRunner().invoke(app, ["eval", str(run.path), "--ngram", "3", "--save", "--json"])
    assert done.exit_code == 0, done.output
    floor = json.loads(done.stdout)["ngram"]
    row = load_runs(tmp_path).iloc[0]
    assert (row["ngram_val_bpb"], row["ngram_test_bpb"]) == (floor["val_bpb"], floor["test_bpb"])
    assert [each.evals["ngram"]["order"] for each in find_runs(tmp_path)] == [3]


def test_a_frontier_draws_the_recorded_floor_of_its_runs() -> None:
    runs = pd.DataFrame(
        {
            "run": ["a", "b", "c"],
            "family": "dense",
            "pattern": "*-",
            "flops_run": [1e9, 2e9, 4e9],
            "val_bpb": [2.5, 2.3, 2.2],
            "ngram_val_bpb": [2.6, 2.0, None],
        }
    )
    assert frontier_table(runs)["floor"].tolist()[:2] == [2.6, 2.0]
    assert "floor" not in frontier_table(runs.drop(columns="ngram_val_bpb"))
    axes = plot_frontier(runs).axes[0]
    low, high = axes.get_ylim()
    assert low < 2.0 < 2.6 < high
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "n-gram model" in labels
