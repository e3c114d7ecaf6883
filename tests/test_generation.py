"""Decoding: equal with and without state and drafts, and sampling from the right distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional as F

from explore.blocks import BLOCKS, Linear
from explore.model import (
    LanguageModel,
    ModelConfig,
    MTPDepth,
    Sampling,
    generate,
    speculate,
)
from explore.model.generation import _Drafter
from explore.ops import StateRounding, forced_paths

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}
WITH_MTP = ["M*/*E/*E", "ME*L-/M/M/M", "*E/*-", "M/L*/L*"]


def built(pattern: str, vocab_size: int = 12, *, shared: bool = True) -> LanguageModel:
    torch.manual_seed(0)
    content = {"d_model": 16, "vocab_size": vocab_size, "pattern": pattern, "blocks": EXAMPLES, "init_std": 0.3}
    config = ModelConfig.model_validate(content | ({"mtp": {"shared": shared}} if "/" in pattern else {}))
    return config.build().eval()


def test_greedy_decoding_takes_the_most_probable_token_of_a_whole_forward() -> None:
    model, tokens = built("ME*L-"), torch.randint(0, 12, (3, 7))
    new = generate(model, tokens, 20)
    whole = torch.cat((tokens, new), dim=1)
    assert torch.equal(model(whole)[:, 6:-1].argmax(-1), new)


def test_products_of_few_rows_change_no_token_and_cover_every_linear_layer() -> None:
    model, tokens = built("ME*L-/*-"), torch.randint(0, 12, (3, 7))
    with forced_paths(linear="plain"):
        plain = generate(model, tokens, 20)
    assert torch.equal(generate(model, tokens, 20), plain)
    assert {type(layer) for layer in model.modules() if isinstance(layer, torch.nn.Linear)} == {Linear}


def test_greedy_decoding_draws_no_random_numbers() -> None:
    logits, generator = torch.randn(5, 12), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(Sampling(temperature=0).draw(logits, generator), logits.argmax(-1))
    assert torch.equal(generator.get_state(), before)
    Sampling().draw(logits, generator)
    assert not torch.equal(generator.get_state(), before)


def test_a_batch_is_decoded_like_its_single_rows() -> None:
    model, tokens = built("ME*L-"), torch.randint(0, 12, (3, 7))
    rows = [generate(model, row[None], 10) for row in tokens]
    assert torch.equal(generate(model, tokens, 10), torch.cat(rows))


def test_the_decoding_state_has_the_bytes_in_the_ledger() -> None:
    model, batch, seq = built("ME*L-M*"), 3, 19
    state = model.new_state()
    model(torch.randint(0, 12, (batch, seq)), state)
    cost = model.config.cost(seq, kv_dtype="float32", state_dtype="float32")
    assert sum(layer.n_bytes for layer in state) == batch * (
        cost.kv_bytes + cost.ssm_state_bytes + cost.conv_state_bytes
    )


def test_an_ended_row_is_padded_and_decoding_stops_after_the_last_row() -> None:
    model, tokens = built("M*", 4), torch.randint(0, 4, (5, 3))
    free = generate(model, tokens, 40, Sampling(seed=1))
    ended = generate(model, tokens, 40, Sampling(seed=1), eot_id=2)
    assert ended.shape[1] <= 40
    assert bool((ended == 2).any())
    for row, other in zip(ended.tolist(), free.tolist(), strict=True):
        end = row.index(2) if 2 in row else len(row)
        assert set(row[end:]) <= {2}
        assert row[:end] == other[:end]


def test_the_same_seed_draws_the_same_tokens() -> None:
    model, tokens = built("M*"), torch.randint(0, 12, (2, 7))
    one, same, other = (generate(model, tokens, 30, Sampling(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_probabilities_are_renormalised_over_the_remaining_tokens() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p = logits.softmax(-1)
    torch.testing.assert_close(Sampling().probabilities(logits), p)
    torch.testing.assert_close(Sampling(temperature=0.5).probabilities(logits), (2 * logits).softmax(-1))
    assert Sampling(temperature=0).probabilities(logits).tolist() == [1, 0, 0, 0]
    two = torch.tensor([p[0], p[1], 0, 0]) / (p[0] + p[1])
    torch.testing.assert_close(Sampling(top_k=2).probabilities(logits), two)
    # 0.644 and 0.237: the second reaches 0.7, so nothing after it is kept.
    torch.testing.assert_close(Sampling(top_p=0.7).probabilities(logits), two)
    assert Sampling(top_p=0.1).probabilities(logits).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(Sampling(top_p=1.0, top_k=9).probabilities(logits), p)


@pytest.mark.parametrize("pattern", WITH_MTP)
@pytest.mark.parametrize("shared", [True, False])
def test_greedy_text_is_the_same_with_and_without_speculation(pattern: str, shared: bool) -> None:
    model, tokens = built(pattern, shared=shared), torch.randint(0, 12, (7,))
    drafted = speculate(model, tokens, 40)
    assert drafted.tokens == generate(model, tokens[None], 40)[0].tolist()
    assert len(drafted.tokens) == 40
    assert model.config.mtp is not None
    assert max(drafted.accepted) <= model.config.mtp.n_depths
    assert 1 <= drafted.acceptance_length <= 1 + model.config.mtp.n_depths


def test_a_model_that_always_predicts_itself_accepts_every_draft() -> None:
    model = built("M/M/M", 5)
    with torch.no_grad():
        model.head.weight.zero_()
    drafted = speculate(model, torch.tensor([1, 2]), 13)
    assert drafted.tokens == [0] * 13
    assert set(drafted.accepted) == {2}
    assert drafted.acceptance_length == 3


def test_speculation_stops_at_the_end_of_the_text() -> None:
    model, tokens = built("M*/*E/*E"), torch.randint(0, 12, (7,))
    plain = generate(model, tokens[None], 40)[0].tolist()
    eot_id = plain[11]
    assert speculate(model, tokens, 40, eot_id=eot_id).tokens == plain[: plain.index(eot_id) + 1]


@pytest.mark.parametrize("letter", ["M", "G"])
def test_speculation_with_a_rounded_recurrent_state_is_refused(letter: str) -> None:
    """Speculation reads several tokens at once, and recurrent state is rounded once per read."""
    model, tokens = built(f"{letter}*/*"), torch.randint(0, 12, (7,))
    model.state_rounding = StateRounding(kv="int8", state="int8")
    with torch.inference_mode():
        whole, parts = model.new_state(), model.new_state()
        model(tokens[None], whole)
        for token in tokens.view(7, 1, 1):
            model(token, parts)
    assert not torch.allclose(vars(whole[0])["recurrent"], vars(parts[0])["recurrent"])
    with pytest.raises(ValueError, match=r"state: recurrent state must be in fp32 for speculation, .*, got 'int8'"):
        speculate(model, tokens, 3)
    model.state_rounding = StateRounding(kv="int8", state="fp32")
    assert speculate(model, tokens, 20).tokens == generate(model, tokens[None], 20)[0].tolist()


@pytest.mark.parametrize("pattern", WITH_MTP)
def test_drafts_equal_multi_token_prediction_over_the_whole_text(pattern: str) -> None:
    model, n = built(pattern, shared=False), 9
    assert model.config.mtp is not None
    tokens = torch.randint(0, 12, (n,))
    generator, greedy = torch.Generator().manual_seed(0), Sampling(temperature=0.7)
    drafter = _Drafter(model, tokens[:6])
    with torch.no_grad():
        hidden = model.hidden(tokens[None])[0]
        drafter.read(hidden[:, :6], tokens[6:7].tolist())
        drafter.draft(greedy, generator)
        drafter.read(hidden[:, 3:8], tokens[7:9].tolist())  # three of these positions are read again
        drafts, q = drafter.draft(greedy, generator)
        text, before = torch.tensor([*tokens.tolist(), *drafts]), hidden[:, :8]
        for k in range(1, model.config.mtp.n_depths + 1):
            before, _ = model.mtp_depth(k)(model.embedding(text[None, k : k + 8]), before)
            expected = greedy.probabilities(model.head(before[0, -1]))
            torch.testing.assert_close(q[k - 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sampled_text_has_the_same_distribution_with_and_without_speculation() -> None:
    vocab, length, n_draws = 3, 3, 600
    model, prompt = built("M*/*E/*E", vocab), torch.tensor([0, 2, 1])
    sampling = Sampling(temperature=1.5)
    texts = list(itertools.product(range(vocab), repeat=length))
    with torch.no_grad():
        whole = torch.tensor([[*prompt.tolist(), *text] for text in texts])
        p = sampling.probabilities(model(whole))[:, 2:-1]
    exact = p.gather(-1, torch.tensor(texts)[..., None]).squeeze(-1).prod(-1)
    assert math.isclose(float(exact.sum()), 1, rel_tol=1e-4)
    counts = dict.fromkeys(texts, 0)
    accepted = []
    for seed in range(n_draws):
        drafted = speculate(model, prompt, length, Sampling(temperature=1.5, seed=seed))
        counts[tuple(drafted.tokens)] += 1
        accepted += drafted.accepted
    assert 0.1 < sum(accepted) / len(accepted) < 1.9  # both outcomes happen
    expected = (exact.double() / exact.double().sum() * n_draws).numpy()
    assert chisquare([counts[text] for text in texts], expected).pvalue > 1e-3
    wrong = expected[::-1] / expected.sum() * n_draws
    assert chisquare([counts[text] for text in texts], wrong).pvalue < 1e-6


def test_the_loss_of_a_depth_is_the_cross_entropy_of_later_tokens() -> None:
    model = built("M*/*E/*E", shared=False)
    tokens, targets = torch.randint(0, 12, (2, 2, 9))
    targets[0, :3] = -100
    loss = model.loss(tokens, targets, mtp=True)
    hidden, _ = model.hidden(tokens)
    assert loss.mtp is not None
    for k, found in enumerate(loss.mtp, start=1):
        depth = model.mtp[k - 1]
        assert isinstance(depth, MTPDepth)
        hidden, _ = depth(model.embedding(tokens[:, k:]), hidden[:, :-1])
        torch.testing.assert_close(found, F.cross_entropy(model.head(hidden).flatten(0, 1), targets[:, k:].flatten()))
    assert model.loss(tokens, targets).mtp is None
    torch.testing.assert_close(loss.cross_entropy, model.loss(tokens, targets).cross_entropy)


def test_multi_token_prediction_stays_close_to_fp32_under_bf16_autocast_without_a_warning() -> None:
    model = built("M*/*E/*E")
    tokens, targets = torch.randint(0, 12, (2, 8, 64))  # enough that one token's rounding is averaged out
    exact = model.loss(tokens, targets, mtp=True).mtp
    with torch.autocast("cpu", torch.bfloat16):
        found = model.loss(tokens, targets, mtp=True).mtp
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize(("shared", "routers"), [(True, [1, 4]), (False, [1, 4, 6])])
def test_routers_of_multi_token_prediction_count_every_depth_that_they_serve(shared: bool, routers: list[int]) -> None:
    model = built("MEM/*E/*E", shared=shared)
    tokens, targets = torch.randint(0, 12, (2, 2, 9))
    stats = model.loss(tokens, targets, mtp=True).stats
    assert list(stats) == list(model.moe_layers()) == routers
    top_k = EXAMPLES["E"].top_k  # type: ignore[attr-defined]
    served = [[2 * 9], *([[2 * 8, 2 * 7]] if shared else [[2 * 8], [2 * 7]])]
    assert [int(found.load.sum()) for found in stats.values()] == [top_k * sum(tokens) for tokens in served]
    assert list(model.loss(tokens, targets).stats) == [1]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_invalid_sampling_options_are_refused(sampling: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**sampling)  # type: ignore[arg-type]


def test_invalid_prompts_and_lengths_are_refused() -> None:
    model = built("M")
    with pytest.raises(ValueError, match="prompt: must have at least 1 token, got 0"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate(model, torch.zeros(1, 3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"model\.mtp: must be set for speculation"):
        speculate(model, torch.zeros(3, dtype=torch.int64), 3)
