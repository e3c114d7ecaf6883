"""Two halves of a batch in parallel: the gradient equals that of the whole batch for any assignment of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import result, tiny, train, write_corpus
from torch import Tensor

from explore.experiment import TrainConfig
from explore.model import LanguageModel, ModelConfig
from explore.train import build_objective, in_halves

BLOCKS: dict[str, Any] = {
    "M": {"kind": "mamba2", "n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 8},
    "*": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "d_head": 8},
    "E": {"kind": "moe", "n_experts": 8, "top_k": 2, "d_expert": 16, "d_shared": 16},
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def a_model(pattern: str = "ME*") -> LanguageModel:
    torch.manual_seed(0)
    blocks = {letter: block for letter, block in BLOCKS.items() if letter in pattern}
    return ModelConfig.model_validate({"d_model": 32, "vocab_size": 64, "pattern": pattern, "blocks": blocks}).build()


def a_batch(n: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(64, (n, 25), generator=torch.Generator().manual_seed(n))
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -100  # the halves have different numbers of targets
    return tokens[:, :-1], targets


def loss_and_gradients(objective: Any, model: LanguageModel, batch: tuple[Tensor, Tensor], scale: float = 1) -> Any:
    model.zero_grad()
    found = objective(model, *batch)
    total = torch.stack([term.weight * term.value for term in found.terms.values()]).sum()
    (scale * total).backward()
    return found, total, [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize(("n", "pattern"), [(4, "ME*"), (5, "M*"), (4, "*E/*E")])
def test_both_halves_have_the_loss_and_the_gradients_of_the_whole(threads: int, n: int, pattern: str) -> None:
    model, batch = a_model(pattern), a_batch(n)
    objective = build_objective(TrainConfig(tokens=1))
    split = in_halves(objective)
    whole, total, gradients = loss_and_gradients(objective, model, batch)
    for _ in range(2):  # the first time one after the other, then at once
        found, ours, others = loss_and_gradients(split, model, batch)
        assert found.terms.keys() == whole.terms.keys()
        if pattern == "M*":  # a mean over the halves' targets at each depth is not one over all of them
            torch.testing.assert_close(ours, total)
        torch.testing.assert_close(found.terms["loss"].value, whole.terms["loss"].value)
        assert found.n_targets == whole.n_targets
        assert found.stats.keys() == whole.stats.keys()
        for i, stat in whole.stats.items():
            assert torch.equal(found.stats[i].load, stat.load)
            torch.testing.assert_close(found.stats[i].aux_loss, stat.aux_loss)
        if "/" not in pattern:
            for one, other in zip(others, gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert torch.get_num_threads() == threads


def test_the_number_of_threads_changes_no_bit() -> None:
    model, batch = a_model(), a_batch(6)
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        split = in_halves(build_objective(TrainConfig(tokens=1)))
        for _ in range(2):
            _, total, gradients = loss_and_gradients(split, model, batch)
            found.append([total, *gradients])
    torch.set_num_threads(1)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


def test_the_gradient_scales_with_a_factor_of_the_loss() -> None:
    model, batch = a_model(), a_batch(4)
    split = in_halves(build_objective(TrainConfig(tokens=1)))
    once, thrice = (loss_and_gradients(split, model, batch, scale)[2] for scale in (1, 4))
    for one, other in zip(once, thrice, strict=True):
        assert torch.equal(4 * one, other)


def test_an_error_in_one_half_is_raised(threads: int) -> None:
    def broken(model: LanguageModel, tokens: Tensor, targets: Tensor) -> Any:
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        in_halves(broken)(a_model(), *a_batch(4))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 1}, "split_batch must be False with train.batch_size=1, got True"),
        ({"train__precision": "fp8"}, "split_batch must be False with a teacher or emulated low precision, got True"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    one = tiny(write_corpus(tmp_path), "M-", **changes)
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(one, tmp_path / "runs", split_batch=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_in_halves_is_recorded_and_resumes_in_halves_bit_for_bit(tmp_path: Path) -> None:
    one = tiny(write_corpus(tmp_path), "ME*")
    whole, split = train(one, tmp_path / "whole"), train(one, tmp_path / "split", split_batch=True)
    assert (whole.environment["split_batch"], split.environment["split_batch"]) == (False, True)
    losses = [result(folder)["val_loss"] for folder in (whole, split)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    ends = tmp_path / "ends"
    with pytest.raises(KeyboardInterrupt):
        train(one, ends, split_batch=True, checkpoint_every=5, judge=Interrupts(), rungs=(0.5,))
    (folder,) = (each for each in ends.iterdir() if each.name != "rungs")
    assert not (folder / "result.json").exists()
    resumed = train(one, ends)  # without split_batch
    assert resumed.environment["split_batch"] is True
    assert result(resumed)["val_loss"] == losses[1]


class Interrupts:
    """A judge that interrupts the run halfway."""

    def __call__(self, *_: Any) -> None:
        raise KeyboardInterrupt
