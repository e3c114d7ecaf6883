"""Start and objective of a run are passed to the training loop, which builds neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import TOKENS, tiny, train, write_corpus
from torch import Tensor

from explore.experiment import Experiment
from explore.model import LanguageModel
from explore.train import load_model, loop
from explore.train.objectives import BatchLoss, Term, build_objective
from explore.train.start import STARTS, starting_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def first_batch(one: Experiment) -> tuple[Tensor, Tensor]:
    batch = one.data.open(one.seed).batch(0, one.train.batch_size)
    return batch.inputs, batch.targets


@pytest.mark.parametrize(
    ("pattern", "names"), [("*-", {"loss"}), ("E", {"loss", "aux_loss"}), ("E/*-", {"loss", "aux_loss", "mtp_loss"})]
)
def test_the_default_objective_has_the_terms_of_the_model(corpus: Path, pattern: str, names: set[str]) -> None:
    one = tiny(corpus, pattern, train__mtp_weight=0.7)
    model, batch = starting_model(one), first_batch(one)
    found, truth = build_objective(one.train)(model, *batch), model.loss(*batch, mtp=True)
    assert found.terms.keys() == names
    assert found.terms["loss"] == Term(truth.cross_entropy, 1.0, over_targets=True)
    assert found.stats.keys() == truth.stats.keys()
    assert found.n_targets == truth.n_targets == TOKENS
    if truth.mtp is not None:
        assert found.terms["mtp_loss"] == Term(truth.mtp.mean(), 0.7)


def test_a_run_minimises_the_weighted_sum_of_the_terms_and_logs_each_by_itself(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(model: LanguageModel, tokens: Tensor, targets: Tensor) -> BatchLoss:
        loss = model.loss(tokens, targets)
        terms = {"loss": Term(loss.cross_entropy, 0.5), "mtp_loss": Term(model.head.weight.square().sum(), 3.0)}
        return BatchLoss(terms, loss.n_targets, loss.stats)

    one = tiny(corpus, "*-", train__tokens=TOKENS)
    monkeypatch.setattr(loop, "build_objective", lambda _: objective)
    (row,) = train(one, tmp_path).metrics.dropna(subset="loss").to_dict("records")
    model = starting_model(one)
    cross_entropy, squares = model.loss(*first_batch(one)).cross_entropy, model.head.weight.square().sum()
    (0.5 * cross_entropy + 3 * squares).backward()
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]).norm()
    assert row["loss"] == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert row["mtp_loss"] == pytest.approx(squares.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_a_run_starts_from_the_model_of_its_start(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = train(tiny(corpus, "*-"), tmp_path / "parent")
    monkeypatch.setitem(STARTS, "fresh", lambda _: load_model(parent).train())  # type: ignore[arg-type]
    one = tiny(corpus, "*-", seed=1, train__tokens=TOKENS)
    (row,) = train(one, tmp_path / "child").metrics.dropna(subset="loss").to_dict("records")
    expected = load_model(parent).loss(*first_batch(one)).cross_entropy
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_fresh_weights_are_those_of_the_seed(corpus: Path) -> None:
    one, again, other = (starting_model(tiny(corpus, "*-", seed=seed)).head.weight for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
