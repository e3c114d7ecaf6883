"""Documents as units of a score: whole splits, sampled windows, and the coverage of intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from command_line import run as run_command
from small_runs import tiny, train

from explore.data import Batch, TextSource
from explore.evals import bits_per_byte, score_documents
from explore.frontier import document_interval
from explore.table import load_documents, load_runs
from explore.train import load_model

N_DOCUMENTS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.txt").write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(300)))
    for split in ("val", "test"):
        lines = [f'{{"text": "Book {i} of {split}: {"sheep and wolves " * (5 + 3 * i)}"}}' for i in range(N_DOCUMENTS)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def source_of(corpus: Path, seed: int = 0) -> TextSource:
    source = tiny(corpus, "-").data.open(seed)
    assert isinstance(source, TextSource)
    return source


def test_documents_add_up_to_the_whole_split_and_have_the_bytes_of_their_texts(corpus: Path, tmp_path: Path) -> None:
    folder = train(tiny(corpus, "-", train__tokens=256), tmp_path)
    model, source = load_model(folder), source_of(corpus)
    scores = score_documents(model, source, "test", batch_size=3)
    whole = bits_per_byte(model, source.eval_batches("test", 4))
    assert len(scores.nats) == N_DOCUMENTS
    assert scores.total.nats == pytest.approx(whole.nats, rel=1e-6)
    assert (scores.total.n_targets, scores.total.n_bytes) == (whole.n_targets, whole.n_bytes)
    texts = [f"Book {i} of test: {'sheep and wolves ' * (5 + 3 * i)}" for i in range(N_DOCUMENTS)]
    assert scores.n_bytes.tolist() == [len(text.encode()) for text in texts]


def test_sampled_windows_lie_over_the_whole_split_each_once_and_are_the_same_for_every_seed(corpus: Path) -> None:
    source, other = source_of(corpus), source_of(corpus, seed=7)
    seq_len, ids = source.seq_len, np.asarray(source.streams["val"].ids)
    batches = list(source.sampled_batches("val", 4, max_tokens=8 * seq_len))
    again = list(other.sampled_batches("val", 4, max_tokens=8 * seq_len))
    windows = np.concatenate([batch.inputs.numpy() for batch in batches])
    assert len(windows) == 8
    assert all((one.inputs == two.inputs).all() for one, two in zip(batches, again, strict=True))
    places = [i for i in range(0, len(ids) - seq_len, seq_len) if (windows == ids[i : i + seq_len]).all(axis=1).any()]
    assert len(places) >= 8
    document = np.cumsum(ids == source.tokenizer.eot_id)
    assert document[places].max() > N_DOCUMENTS / 2  # the opening would have the first documents alone
    assert batches[0].n_bytes == int(source.tokenizer.token_bytes[batches[0].targets.numpy()].sum())  # type: ignore[index]
    whole = [batch.inputs for batch in source.sampled_batches("val", 4)]
    in_order = [batch.inputs for batch in source.eval_batches("val", 4)]
    assert all((one == two).all() for one, two in zip(whole, in_order, strict=True))


def test_evaluation_on_a_whole_split_records_documents(corpus: Path, tmp_path: Path) -> None:
    settings = {"train__tokens": 512, "train__eval_tokens": 64, "train__val_every": 2}
    opening, whole = (tiny(corpus, "-", **settings, **more) for more in ({}, {"train__evaluation": "whole"}))
    assert "evaluation" not in opening.model_dump(mode="json")["train"]
    assert opening.key() != whole.key()
    assert opening.stable_key() == whole.stable_key()
    first, second = train(opening, tmp_path / "runs"), train(whole, tmp_path / "runs")
    rows = load_runs(tmp_path / "runs").set_index("run")
    assert first.evals == {}
    row = rows.loc[second.path.name]
    assert row["test_documents"] == N_DOCUMENTS
    assert row["whole_test_bpb"] == pytest.approx(row["test_bpb"], rel=1e-6)
    assert row["test_bpb"] != pytest.approx(rows.loc[first.path.name, "test_bpb"], rel=1e-6)
    assert first.metrics["val_bpb"].dropna().tolist() != second.metrics["val_bpb"].dropna().tolist()
    table = load_documents(tmp_path / "runs")
    assert table["run"].unique().tolist() == [second.path.name]
    assert table["nats"].sum() / math.log(2) / table["n_bytes"].sum() == pytest.approx(row["whole_test_bpb"])


def test_a_sampled_evaluation_reads_windows_of_the_whole_split_at_the_end_too(corpus: Path, tmp_path: Path) -> None:
    settings = {"train__tokens": 512, "train__eval_tokens": 64, "train__val_every": 2, "train__evaluation": "sampled"}
    folder = train(tiny(corpus, "-", **settings), tmp_path)
    assert folder.evals == {}
    model, source, result = load_model(folder), source_of(corpus), folder.result
    assert result is not None
    for split in ("val", "test"):
        expected, opening = (
            bits_per_byte(model, read(split, 4, 64)).bits_per_byte
            for read in (source.sampled_batches, source.eval_batches)
        )
        assert result[f"{split}_bpb"] == pytest.approx(expected, rel=1e-6)
        assert result[f"{split}_bpb"] != pytest.approx(opening, rel=1e-3)


def test_a_run_that_is_evaluated_whole_reads_each_split_once_at_its_end(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real = [], TextSource.eval_batches

    def counted(self: TextSource, split: Literal["val", "test"], *args: Any, **more: Any) -> Iterator[Batch]:
        read.append(split)
        return real(self, split, *args, **more)

    monkeypatch.setattr(TextSource, "eval_batches", counted)
    folder = train(tiny(corpus, "-", train__tokens=256, train__eval_tokens=64, train__evaluation="whole"), tmp_path)
    assert sorted(read) == ["test", "val"]
    monkeypatch.undo()
    model, source, result = load_model(folder), source_of(corpus), folder.result
    assert result is not None
    for split in ("val", "test"):
        score = bits_per_byte(model, source.eval_batches(split, 4))
        assert (result[f"{split}_bpb"], result[f"{split}_loss"]) == (
            pytest.approx(score.bits_per_byte, rel=1e-6),
            pytest.approx(score.loss, rel=1e-6),
        )


def test_the_command_scores_the_whole_of_a_run_and_adds_it_to_the_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    folder = train(tiny(corpus, "-", train__tokens=256, train__eval_tokens=64), tmp_path / "runs")
    code, out, _ = run_command(capsys, monkeypatch, "eval", str(folder.path), "--whole", "--save")
    assert code == 0
    assert f"whole test, {N_DOCUMENTS} documents, bits per byte" in out
    (row,) = load_runs(tmp_path / "runs").to_dict("records")
    assert row["test_documents"] == N_DOCUMENTS
    assert f"{row['whole_test_bpb']:.4f}" in out


BYTES = np.array([900, 700, 620, 540, 480, 420, 380, 300, 260, 200]) * 1000
"""Ten books of unequal length, about as those of Gutenberg's test split."""


def scores(
    rng: np.random.Generator, seeds: int, gap: float, by_seed: float, by_document: float, noise: float
) -> pd.DataFrame:
    """Documents of two arms that differ by `gap`, with noise by document and by seed."""
    hard = 0.2 * rng.standard_normal(len(BYTES))
    shifts = gap + by_document * rng.standard_normal(len(BYTES))
    rows = []
    for seed in range(seeds):
        moves = by_seed * rng.standard_normal(2)
        for i, arm in enumerate(("base", "new")):
            bits = 2 + hard + i * shifts + moves[i] + noise * rng.standard_normal(len(BYTES))
            rows += [(arm, seed, k, bits[k] * BYTES[k] * math.log(2), BYTES[k]) for k in range(len(BYTES))]
    return pd.DataFrame(rows, columns=["arm", "seed", "document", "nats", "n_bytes"])


def test_the_estimate_is_the_difference_of_bits_per_byte_of_the_whole() -> None:
    table = scores(np.random.default_rng(0), 3, 0.01, 0.002, 0.005, 0.001)
    sums = table.groupby(["arm", "seed"])[["nats", "n_bytes"]].sum()
    bits = (sums["nats"] / sums["n_bytes"] / math.log(2)).groupby("arm").mean()
    assert document_interval(table, "new", "base").estimate == pytest.approx(bits["new"] - bits["base"])
    assert document_interval(table, "new").estimate == pytest.approx(bits["new"])
    with pytest.raises(ValueError, match="seed, document: need at least 2 of each, got 1 and 10"):
        document_interval(table[table["seed"] == 0], "new", "base")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_document", "noise"),
    [(3, 0.004, 0.004, 0.001), (4, 0.001, 0.006, 0.001), (8, 0.004, 0.001, 0.001), (5, 0.0, 0.0, 0.004)],
    ids=["both", "documents", "seeds", "neither"],
)
def test_95_percent_of_intervals_hold_the_truth_for_other_documents_and_seeds(
    seeds: int, by_seed: float, by_document: float, noise: float
) -> None:
    rng, held = np.random.default_rng(5), []
    for _ in range(300):
        interval = document_interval(scores(rng, seeds, 0.01, by_seed, by_document, noise), "new", "base")
        held.append(interval.low <= 0.01 <= interval.high)
    print(f"{seeds} seeds: {np.mean(held):.1%} of 300 intervals hold the truth")
    assert 0.9 <= np.mean(held) <= 0.98


def test_seeds_alone_claim_too_much_of_other_documents() -> None:
    rng, held = np.random.default_rng(5), []
    for _ in range(300):
        table = scores(rng, 4, 0.01, 0.001, 0.006, 0.001)
        sums = table.groupby(["arm", "seed"])[["nats", "n_bytes"]].sum()
        bits = (sums["nats"] / sums["n_bytes"] / math.log(2)).unstack("arm")
        gaps = bits["new"] - bits["base"]
        half = 3.182 * gaps.std(ddof=1) / 2  # t of 3 degrees of freedom, from a table
        held.append(abs(gaps.mean() - 0.01) <= half)
    assert np.mean(held) < 0.75
