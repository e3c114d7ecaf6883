"""The module: its results, and that it has the counts of its config."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from explore.blocks import BLOCKS
from explore.model import LanguageModel, ModelConfig, MTPConfig, MTPDepth

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}
LETTERS = "".join(EXAMPLES)


def built(pattern: str = "M*-E", *, tied: bool = False) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, vocab_size=50, pattern=pattern, blocks=EXAMPLES, tie_embeddings=tied, init_std=0.2)
    return config.build()


@given(pattern=st.text(LETTERS, min_size=1, max_size=12), tied=st.booleans(), seq=st.integers(1, 9))
def test_the_ledger_equals_the_counts_of_the_built_model(pattern: str, tied: bool, seq: int) -> None:
    config = ModelConfig(d_model=16, vocab_size=50, pattern=pattern, blocks=EXAMPLES, tie_embeddings=tied)
    with torch.device("meta"):
        model = config.build()
    cost = config.cost(seq)
    assert cost.params_total == sum(weight.numel() for weight in model.parameters())
    assert cost.params_active <= cost.params_total
    assert list(model.moe_layers()) == [i for i, letter in enumerate(pattern) if letter == "E"]


def test_a_model_adds_its_layers_to_the_residual_stream_in_order() -> None:
    model = built("ME*-")
    tokens = torch.randint(0, 50, (2, 21))
    x = model.embedding.weight[tokens]
    for layer in model.layers:
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x + layer.mixer(normed)[0]  # type: ignore[operator]
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model(tokens), x @ model.head.weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [*LETTERS, "M*-E"])
def test_changing_a_token_leaves_earlier_logits_alone(pattern: str) -> None:
    model = built(pattern)
    tokens = torch.randint(0, 50, (1, 21))
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 13], after[:, 13], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_its_gradients_are_those_of_the_cross_entropy_of_the_logits(tied: bool) -> None:
    model = built(tied=tied)
    tokens, targets = torch.randint(0, 50, (2, 2, 21))
    targets[0, :5] = -100
    loss = model.loss(tokens, targets)
    truth = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.cross_entropy, truth)
    assert int(loss.n_targets) == 2 * 21 - 5
    weights = list(model.parameters())
    for fast, slow in zip(*(torch.autograd.grad(value, weights) for value in (loss.cross_entropy, truth)), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_loss_adds_up_the_balance_losses_of_the_layers() -> None:
    model = built("EM-E")
    tokens, targets = torch.randint(0, 50, (2, 2, 21))
    loss = model.loss(tokens, targets)
    assert sorted(loss.stats) == [0, 3]
    torch.testing.assert_close(loss.aux_loss, loss.stats[0].aux_loss + loss.stats[3].aux_loss)
    top_k = EXAMPLES["E"].top_k  # type: ignore[attr-defined]
    assert [int(stats.load.sum()) for stats in loss.stats.values()] == [2 * 21 * top_k] * 2


def test_tied_embeddings_are_one_matrix_and_one_parameter() -> None:
    model = built(tied=True)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_weights_start_at_the_published_deviation_and_smaller_for_outputs_of_layers() -> None:
    torch.manual_seed(0)
    config = ModelConfig(d_model=256, vocab_size=500, pattern="M*-E" * 4, blocks=EXAMPLES)
    model = config.build()
    std = 0.896 / math.sqrt(256)
    assert config.std == pytest.approx(std)
    writers = ("out_proj.weight", "o_proj.weight", "mixer.down.weight", "latent_up.weight", "shared.down.weight")
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            wanted = std / math.sqrt(16) if name.endswith(writers) else std
            assert float(weight.detach().std()) == pytest.approx(wanted, rel=0.1), name


def test_only_the_embedding_has_its_own_initial_deviation() -> None:
    config = ModelConfig(d_model=64, vocab_size=500, pattern="M*-", blocks=EXAMPLES)
    torch.manual_seed(0)
    one = dict(config.build().named_parameters())
    torch.manual_seed(0)
    other = dict(config.replace(embedding_std=1.0).build().named_parameters())
    assert float(other["embedding.weight"].detach().std()) == pytest.approx(1.0, rel=0.05)
    torch.testing.assert_close(other.pop("embedding.weight"), one.pop("embedding.weight") / config.std)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert "embedding_std" not in config.model_dump()


def test_the_same_seed_draws_the_same_weights_and_drawing_again_changes_them() -> None:
    one, other = built(), built()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    other.init_weights()
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_the_family_is_that_of_the_pattern() -> None:
    assert built("ME*E").config.family == "hybrid LatentMoE"


def test_a_pattern_with_slashes_is_a_model_with_depths() -> None:
    pasted = ModelConfig(d_model=16, vocab_size=50, pattern="M-|M/*E/*E", blocks=EXAMPLES)
    assert (pasted.pattern, pasted.mtp) == ("M-M", MTPConfig(pattern="*E", n_depths=2))
    assert set(pasted.blocks) == set("M-*E")
    assert ModelConfig.model_validate_json(pasted.model_dump_json()) == pasted
    apart = ModelConfig.model_validate(
        {**pasted.model_dump(), "mtp": {"pattern": "*E", "n_depths": 2, "shared": False}}
    )
    assert apart.cost(8).params_mtp == 2 * pasted.cost(8).params_mtp
    assert apart.cost(8).flops_fwd == pasted.cost(8).flops_fwd
    assert (
        pasted.cost(8).params_total
        == ModelConfig(d_model=16, vocab_size=50, pattern="M-M", blocks=EXAMPLES).cost(8).params_total
    )
    with pytest.raises(ValidationError, match="unknown letter 'X' at position 2 of 'EX'"):
        ModelConfig(d_model=16, vocab_size=50, pattern="M/EX", blocks=EXAMPLES)


def test_a_depth_reads_the_next_embedding_and_the_hidden_state_before() -> None:
    torch.manual_seed(0)
    model = ModelConfig(d_model=16, vocab_size=50, pattern="M/*E/*E", blocks=EXAMPLES, init_std=0.2).build()
    (depth,) = model.mtp
    assert isinstance(depth, MTPDepth)
    embedding, hidden = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    y, stats = depth(embedding, hidden)
    x = torch.cat([v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() for v in (embedding, hidden)], dim=-1)
    x = x @ depth.eh_proj.weight.T
    for layer in depth.layers:
        x, _ = layer(x)
    torch.testing.assert_close(y, x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), rtol=1e-4, atol=1e-4)
    assert len(stats) == 1


def test_decoding_token_by_token_gives_the_logits_of_one_forward() -> None:
    model = built("ME*L-")
    tokens = torch.randint(0, 50, (2, 21))
    state = model.new_state()
    parts = [model(part, state) for part in tokens.tensor_split((8, *range(9, 21)), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)
