"""Evaluations compared with sums by hand: bits per byte, minimal pairs, recall."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from explore.blocks import Linear
from explore.data import Batch, RecallData, TextData, load_tokenizer
from explore.evals import (
    MinimalPair,
    Score,
    bits_per_byte,
    minimal_pair_accuracy,
    read_minimal_pairs,
    recall_accuracy,
    recall_score,
)
from explore.model import LanguageModel, ModelConfig

PAIRS = [
    MinimalPair("agreement", "The cats sleep.", "The cats sleeps."),
    MinimalPair("agreement", "A dog that sees us barks at night.", "A dog that sees us bark at night."),
    MinimalPair("order", "She has left.", "She left has."),
    MinimalPair("order", "It rained for hours and hours, they say.", "It for rained hours."),
]


def model(vocab_size: int, pattern: str = "M*E-") -> LanguageModel:
    torch.manual_seed(0)
    return ModelConfig.model_validate({"d_model": 64, "vocab_size": vocab_size, "pattern": pattern}).build().eval()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, n in (("train", 60), ("val", 61), ("test", 47)):
        (folder / f"{split}.txt").write_text("".join(f"In {split}, the {i}th café was closed.\n" for i in range(n)))
    return folder


@pytest.mark.parametrize("tokenizer", ["bytes", "austen-bpe-2048"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_uniform_model_needs_the_log_of_the_vocabulary_for_every_token(
    corpus: Path, tokenizer: str, split: Any
) -> None:
    vocab = load_tokenizer(tokenizer)
    uniform = model(vocab.vocab_size, "-")
    nn.init.zeros_(uniform.head.weight)
    source = TextData(corpus=str(corpus), tokenizer=tokenizer, seq_len=32).open(0)
    text = (corpus / f"{split}.txt").read_text()
    n_tokens, n_bytes = len(vocab.encode(text)), len(text.encode())
    score = bits_per_byte(uniform, source.eval_batches(split, 4))
    assert (score.n_targets, score.n_bytes) == (n_tokens, n_bytes)
    assert score.bits_per_byte == pytest.approx(math.log2(vocab.vocab_size) * n_tokens / n_bytes, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_score_of_a_split_does_not_depend_on_the_batch_size(corpus: Path, batch_size: int) -> None:
    lm = model(257)
    source = TextData(corpus=str(corpus), tokenizer="bytes", seq_len=32).open(0)
    with torch.no_grad():
        logits = [(lm(b.inputs).double(), b.targets) for b in source.eval_batches("val", 1)]
    nats = sum(float(nn.functional.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum")) for x, y in logits)
    score = bits_per_byte(lm, source.eval_batches("val", batch_size))
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.loss == score.nats / score.n_targets


def test_data_without_bytes_has_no_bits_per_byte() -> None:
    score = bits_per_byte(model(256, "-"), RecallData(n_eval=4).open(0).eval_batches("val", 2))
    assert score.n_bytes is None
    assert score.bits_per_byte is None
    assert Score().bits_per_byte is None


def log_probability(lm: LanguageModel, tokenizer: Any, sentence: str) -> float:
    ids = tokenizer.encode(sentence)
    logits = lm(torch.tensor([[tokenizer.eot_id, *ids[:-1]]])).double().log_softmax(-1)[0]
    return sum(float(logits[i, token]) for i, token in enumerate(ids))


@pytest.mark.parametrize("tokenizer", ["bytes", "austen-bpe-2048"])
@pytest.mark.parametrize("batch_size", [1, 3, 128])
def test_minimal_pairs_agree_with_sentences_scored_one_by_one(tokenizer: str, batch_size: int) -> None:
    vocab = load_tokenizer(tokenizer)
    lm = model(vocab.vocab_size)
    nn.init.normal_(lm.head.weight)  # so that no two sentences are close
    wins: dict[str, list[float]] = {}
    with torch.no_grad():
        for uid, good, bad in PAIRS:
            a, b = log_probability(lm, vocab, good), log_probability(lm, vocab, bad)
            assert abs(a - b) > 1e-2
            wins.setdefault(uid, []).append(float(a > b))
    expected = {uid: sum(won) / len(won) for uid, won in wins.items()}
    assert minimal_pair_accuracy(lm, vocab, PAIRS, batch_size=batch_size) == expected


def test_swapped_pairs_turn_every_win_into_a_loss() -> None:
    vocab = load_tokenizer("bytes")
    lm = model(vocab.vocab_size)
    straight = minimal_pair_accuracy(lm, vocab, PAIRS)
    swapped = minimal_pair_accuracy(lm, vocab, [MinimalPair(uid, bad, good) for uid, good, bad in PAIRS])
    assert swapped == {uid: 1 - share for uid, share in straight.items()}


def test_a_tie_counts_one_half() -> None:
    vocab = load_tokenizer("bytes")
    uniform = model(vocab.vocab_size, "-")
    nn.init.zeros_(uniform.head.weight)
    pairs = [
        MinimalPair("same", "One sentence.", "One sentence."),
        MinimalPair("as likely", "abc", "xyz"),
        MinimalPair("shorter", "abc", "abcd"),
        MinimalPair("mixed", "abc", "xyz"),
        MinimalPair("mixed", "abc", "abcd"),
    ]
    expected = {"same": 0.5, "as likely": 0.5, "shorter": 1.0, "mixed": 0.75}
    assert minimal_pair_accuracy(uniform, vocab, pairs) == expected


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs must hold at least one pair, got none"):
        minimal_pair_accuracy(model(257, "-"), load_tokenizer("bytes"), [])


def lines() -> str:
    records = [{"uid": uid, "good": good, "bad": bad, "more": 1} for uid, good, bad in PAIRS]
    return "\n".join(json.dumps(record) for record in records) + "\n\n"


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_pairs_are_read_plain_and_compressed(tmp_path: Path, suffix: str, opener: Any) -> None:
    path = tmp_path / f"pairs.jsonl{suffix}"
    with opener(path, "wt") as file:
        file.write(lines())
    assert read_minimal_pairs(path) == PAIRS
    assert read_minimal_pairs(path, limit=1) == [PAIRS[0], PAIRS[2]]


def published(layout: str, folder: Path) -> Path:
    """The pairs in the layout of BLiMP and Zorro: a folder with one file per paradigm."""
    folder.mkdir()
    for uid in dict.fromkeys(pair.uid for pair in PAIRS):
        some = [pair for pair in PAIRS if pair.uid == uid]
        if layout == "blimp":
            records = [
                {"sentence_good": good, "sentence_bad": bad, "field": "syntax", "UID": uid, "pairID": str(i)}
                for i, (uid, good, bad) in enumerate(some)
            ]
            (folder / f"{uid}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            (folder / f"{uid}.txt").write_text("".join(f"{bad}\n{good}\n" for _, good, bad in some))
    return folder


@pytest.mark.parametrize("layout", ["blimp", "zorro"])
def test_the_published_layouts_are_read_as_files_and_as_folders(layout: str, tmp_path: Path) -> None:
    folder = published(layout, tmp_path / layout)
    assert read_minimal_pairs(folder) == PAIRS
    assert read_minimal_pairs(folder, limit=1) == [PAIRS[0], PAIRS[2]]
    files = sorted(folder.iterdir())
    assert [pair for file in files for pair in read_minimal_pairs(file)] == PAIRS
    packed = folder / f"{files[0].name}.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + files[0].read_bytes().replace(b"\n", b"\r\n")))
    files[0].unlink()
    assert read_minimal_pairs(folder) == PAIRS


def test_an_error_for_an_invalid_suite_of_pairs_gives_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .jsonl or .txt file"):
        read_minimal_pairs(tmp_path)
    (tmp_path / "order.txt").write_text("She left has.\nShe has left.\n\nIt for rained hours.\n")
    with pytest.raises(ValueError, match="must have bad and good sentences on alternate lines, got 3 lines"):
        read_minimal_pairs(tmp_path)
    (tmp_path / "order.txt").write_text("\n")
    with pytest.raises(ValueError, match="must hold at least one minimal pair, got none"):
        read_minimal_pairs(tmp_path / "order.txt")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1, 2]",
        '"text"',
        '{"uid": "a", "good": "b"}',
        '{"uid": "a", "good": "b", "bad": 3}',
        '{"uid": "a", "good": "b", "bad": ""}',
        '{"UID": "a", "sentence_good": "b", "bad": "c"}',
        "[" * 100_000,
        '{"uid": "a", "good": "b", "bad": ' + "9" * 5000 + "}",
        '{"uid": "a", "good": "' + "b" * 5000 + '"}',
    ],
    ids=lambda line: line[:60],
)
def test_an_invalid_line_of_pairs_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines() + line + "\n")
    with pytest.raises(ValueError, match=f"line {len(PAIRS) + 2} is not a record") as caught:
        read_minimal_pairs(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 250


@pytest.mark.parametrize("name", ["absent.jsonl", "cut.jsonl.gz", "text.jsonl.gz", "text.jsonl.xz", "latin.jsonl"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    contents = {"cut": gzip.compress(lines().encode())[:60], "text": b"not packed\n", "latin": b'{"uid": "\xe9"}\n'}
    if (content := contents.get(name.split(".", maxsplit=1)[0])) is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read|must be UTF-8, byte 9") as caught:
        read_minimal_pairs(path)
    assert str(caught.value).startswith(f"{path}: ")


class Oracle(LanguageModel):
    """A model that predicts the given answers at every position."""

    def __init__(self, answers: torch.Tensor, vocab_size: int) -> None:
        super().__init__(model(vocab_size, "-").config)
        self.answers = answers

        self.head = Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.head.weight)

    def hidden(self, tokens: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, dict[int, Any]]:
        return nn.functional.one_hot(self.answers, self.config.vocab_size).float(), {}


def test_recall_is_the_share_of_targets_that_come_first() -> None:
    targets = torch.tensor([[-100, 5, -100, 7], [6, -100, -100, 4]])
    answers = torch.tensor([[0, 5, 1, 6], [6, 2, 3, 4]])
    batch = Batch(torch.zeros_like(targets), targets)
    assert recall_accuracy(Oracle(answers, 8), [batch]) == 3 / 4


def test_recall_is_counted_by_the_pairs_of_each_sequence() -> None:
    targets = torch.tensor([[-100, 5, -100, 7], [6, -100, -100, 4], [-100, 3, -100, -100]])
    answers = torch.tensor([[0, 5, 1, 6], [6, 2, 3, 4], [0, 1, 2, 3]])
    one = Batch(torch.zeros_like(targets), targets, n_pairs=(2, 8, 4))
    oracle = Oracle(answers, 8)
    assert recall_score(oracle, [one]).by_pairs == {2: 1 / 2, 4: 0.0, 8: 1.0}
    other = replace(one, n_pairs=(4, 8, 4))
    both = recall_score(oracle, [one, other])
    assert both.by_pairs == {2: 1 / 2, 4: 1 / 4, 8: 1.0}
    assert both.accuracy == recall_accuracy(oracle, [one, other]) == 6 / 10


def test_recall_weighs_every_target_equally_for_every_batching() -> None:
    lm = model(256, "M*")
    source = RecallData(n_eval=10).open(0)
    with torch.no_grad():
        hits = [
            bool(lm(b.inputs)[row, place].argmax() == b.targets[row, place])
            for b in source.eval_batches("test", 1)
            for row, place in (b.targets != -100).nonzero().tolist()
        ]
    assert len(hits) == 10 * 8
    assert recall_accuracy(lm, source.eval_batches("test", 4)) == sum(hits) / len(hits)


def test_recall_without_targets_is_refused() -> None:
    nothing = Batch(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), -100))
    with pytest.raises(ValueError, match="no target"):
        recall_accuracy(model(8, "-"), [nothing])
