"""Decoding state in narrow formats: rounded once, when written, for any batch and any split of the sequence."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from explore.blocks import BLOCKS, RecurrentState, State
from explore.model import LanguageModel, ModelConfig, generate, speculate
from explore.ops import StateRounding, quantize
from explore.quantizing import rounding_errors

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}
STATES = [kind.letter for kind in BLOCKS if type(kind.example.new_state()) is not State]
FORMATS = ["fp16", "bf16", "fp8", "int8", "nvfp4", "mxfp8"]


def built(pattern: str, rounding: StateRounding | None = None) -> LanguageModel:
    torch.manual_seed(0)
    content = {"d_model": 16, "vocab_size": 12, "pattern": pattern, "blocks": EXAMPLES, "init_std": 0.3}
    model = ModelConfig.model_validate(content).build().eval()
    model.state_rounding = rounding
    return model


def tokens(batch: int, seq: int) -> Tensor:
    return torch.randint(0, 12, (batch, seq), generator=torch.Generator().manual_seed(1))


def kept(state: list[State]) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": value
        for i, layer in enumerate(state)
        for name, value in vars(layer).items()
        if isinstance(value, Tensor)
    }


@torch.inference_mode()
def read(model: LanguageModel, ids: Tensor, *lengths: int, capacity: int | None = None) -> tuple[Tensor, list[State]]:
    """Logits, and the state after reading tokens in parts."""
    state = model.new_state(capacity)
    parts = ids.split(list(lengths) or [1] * ids.shape[1], dim=1)
    return torch.cat([model(part, state) for part in parts], dim=1), state


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("capacity", [None, 9])
def test_every_kind_stores_values_of_the_format(format: Any, capacity: int | None) -> None:
    pattern = "".join(STATES)
    plain, state = (
        read(built(pattern, rounding), tokens(2, 9), 9, capacity=capacity)[1]
        for rounding in (None, StateRounding(kv=format, state=format))
    )
    exact, rounded = kept(plain), kept(state)
    assert set(exact) == set(rounded)
    assert {name.split(".")[1] for name in exact} >= {"k", "v", "recurrent", "conv", "latent", "k_rope"}
    # Only the first layer has the same inputs as without rounding.
    wanted = torch.stack([quantize(row, format) for row in exact["0.recurrent"]])
    assert torch.equal(rounded["0.recurrent"], wanted)
    wanted = torch.stack([torch.stack([quantize(each, format) for each in row]) for row in exact["0.conv"]])
    assert torch.equal(rounded["0.conv"], wanted)
    for name, value in rounded.items():
        assert not torch.equal(value, exact[name]), name


@pytest.mark.parametrize("letter", [letter for letter in STATES if "k" in vars(EXAMPLES[letter].new_state())])
def test_keys_have_a_scale_for_each_position_of_a_sequence(letter: str) -> None:
    ids = tokens(2, 6)
    exact = kept(read(built(letter), ids, 6)[1])["0.k"]
    rounded = kept(read(built(letter, StateRounding(kv="fp8")), ids, 6)[1])["0.k"]
    wanted = torch.stack(
        [torch.stack([quantize(row[:, i], "fp8") for i in range(exact.shape[2])], dim=1) for row in exact]
    )
    assert torch.equal(rounded, wanted)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("letter", STATES)
def test_keys_and_values_do_not_depend_on_how_a_sequence_is_read(letter: str, stochastic: bool) -> None:
    model = built(f"-{letter}", StateRounding(kv="fp8", stochastic_kv=stochastic, seed=3))
    ids = tokens(2, 12)
    by_one, state = read(model, ids)
    for logits, other in (read(model, ids, 12), read(model, ids, 5, 7), read(model, ids, 4, 1, 7, capacity=16)):
        torch.testing.assert_close(logits, by_one, atol=2e-5, rtol=1e-4)
        if "1.k" in kept(state) and letter != "W":
            torch.testing.assert_close(kept(other)["1.k"][:, :, :12], kept(state)["1.k"], atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), by_one, atol=2e-5, rtol=1e-4)  # without state: as with it


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_rows_of_a_batch_do_not_depend_on_one_another(format: Any, stochastic: bool) -> None:
    rounding = StateRounding(format, format, stochastic, stochastic, seed=5)
    x = torch.randn(3, 2, 4, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 100]).view(
        3, 1, 1, 1
    )
    for write in (
        lambda x: rounding.entries(x, "k", 2),
        lambda x: rounding.inputs(x[:, 0], 2),
        lambda x: rounding.recurrent(x, 2),
    ):
        assert torch.equal(write(x), torch.cat([write(row) for row in x.split(1)]))


def test_recurrent_state_is_rounded_at_every_token_with_new_random_numbers() -> None:
    model = built("M", StateRounding(state="int8", stochastic_state=True))
    ids = tokens(1, 8)
    one, again = read(model, ids)[1], read(model, ids)[1]
    assert all(torch.equal(kept(one)[name], kept(again)[name]) for name in kept(one))
    model.state_rounding = StateRounding(state="int8", stochastic_state=True, seed=1)
    assert not torch.equal(kept(read(model, ids)[1])["0.recurrent"], kept(one)["0.recurrent"])
    assert isinstance(one[0], RecurrentState)
    assert one[0].length == 8
    x = torch.full((1, 2, 4, 4), 0.3)
    x[..., 0] = 1.0
    rounding = StateRounding(state="int8", stochastic_state=True)
    draws = [rounding.recurrent(x, length) for length in range(5)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 5
    conv = rounding.inputs(torch.cat([x[0], x[0]], dim=1), 0)  # two positions of one value
    assert not torch.equal(conv[:, :4], conv[:, 4:])


def test_stochastic_rounding_of_a_state_has_its_mean() -> None:
    x = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    draws = [StateRounding(state="int8", stochastic_state=True, seed=seed).recurrent(x, 1) for seed in range(400)]
    error = torch.stack(draws).mean(0) - x
    step = x.abs().amax(-1, keepdim=True) / 127
    assert (error.abs() < 5 * step / 2 / 400**0.5).all()
    nearest = StateRounding(state="int8").recurrent(x, 1) - x
    assert nearest.abs().mean() > 5 * error.abs().mean()


def test_text_is_the_same_with_and_without_speculation_in_formats_of_keys_and_values() -> None:
    torch.manual_seed(0)
    content = {"d_model": 16, "vocab_size": 12, "pattern": "*-/*-", "blocks": EXAMPLES, "init_std": 0.3}
    model = ModelConfig.model_validate(content).build().eval()
    plain = generate(model, tokens(1, 5), 40)
    model.state_rounding = StateRounding(kv="nvfp4")
    rounded = generate(model, tokens(1, 5), 40)
    assert not torch.equal(rounded, plain)
    assert speculate(model, tokens(1, 5)[0], 40).tokens == rounded[0].tolist()


def test_a_compiled_step_of_a_quantised_model_is_refused() -> None:
    with pytest.raises(ValueError, match="compiled must be False for a quantised model, got True"):
        generate(built("M", StateRounding(state="int8")), tokens(1, 3), 2, compiled=True)


# When stochastic rounding of a recurrence wins


def ratios(table: pd.DataFrame, format: str) -> list[float]:
    """Stochastic error over that of nearest rounding, by decay."""
    rows = table[table["format"] == format].sort_values("decay")
    return (rows["stochastic"] / rows["nearest"]).tolist()


def test_errors_of_updates_above_a_quantum_are_those_of_independent_roundings() -> None:
    """Each rounding to a grid of q has variance q^2 / 12 to nearest, q^2 / 6 at random, and fades as the state does."""
    decay, table = 0.9, rounding_errors((0.9,), (128,), ("int8",))
    x = 2.8  # about the largest of 128 Gaussian numbers, in standard deviations
    per_step = x / 127 / 12**0.5
    assert table["update"].iloc[0] > 5
    # q is a share of the size of the state, and the error of a step fades as the state does.
    size = (1 - decay**2) ** -0.5
    assert table["nearest"].iloc[0] == pytest.approx(per_step * size, rel=0.2)
    assert table["stochastic"].iloc[0] == pytest.approx(2**0.5 * per_step * size, rel=0.2)


@pytest.mark.slow
def test_stochastic_rounding_wins_below_half_a_quantum_and_loses_above() -> None:
    table = rounding_errors((0.9, 0.99, 0.9999), (2048,), ("fp16", "fp8"))
    fp8 = table[table["format"] == "fp8"]
    assert fp8["better"].tolist() == ["nearest", "nearest", "stochastic"]
    assert (fp8["update"] > 0.5).tolist() == [True, True, False]
    assert ratios(table, "fp8")[:2] == pytest.approx([2**0.5] * 2, rel=0.2)
    assert fp8["nearest"].iloc[2] > 2 > 1.5 > fp8["stochastic"].iloc[2]  # the state no longer fades
    assert ratios(table, "fp16") == pytest.approx([2**0.5] * 3, rel=0.2)  # never that small here


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp16", "int8", "fp8"])
def test_inputs_that_stay_the_same_make_stochastic_rounding_win_earlier(format: Any) -> None:
    fresh, held = (rounding_errors((0.99, 0.999), (512,), (format,), hold=hold) for hold in (1, 128))
    assert min(ratios(fresh, format)) > 1.1
    assert max(ratios(held, format)) < 0.7


def test_a_recurrence_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="hold must be at least 1, got 0"):
        rounding_errors(hold=0)
    with pytest.raises(ValueError, match="formats must be fp16, bf16, fp8 or int8, got 'nvfp4'"):
        rounding_errors(formats=("nvfp4",))
