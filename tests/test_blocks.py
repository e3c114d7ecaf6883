"""Every block: what it computes, what it counts, and that the two agree."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from explore.blocks import (
    BLOCKS,
    STANDARD_LETTERS,
    Attention,
    AttentionConfig,
    BlockConfig,
    BlockKind,
    GatedDeltaNetConfig,
    KVCache,
    LatentCache,
    Mamba2,
    Mamba2Config,
    Mixer,
    MLAConfig,
    MLPConfig,
    MoE,
    MoEConfig,
    RecurrentState,
    State,
    WindowCache,
    latent_acc,
    latent_eff,
)
from explore.blocks.moe import _shares
from explore.proof import count_flops

D_MODEL = 32
VARIANTS: dict[str, BlockConfig] = {kind.letter: kind.example for kind in BLOCKS} | {
    "rope": AttentionConfig(n_heads=4, n_kv_heads=1, d_head=8, rope_theta=10_000.0),
    "window": AttentionConfig(n_heads=2, n_kv_heads=2, d_head=16, window=5),
    "biases": AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, bias="qkv"),
    "norms and sinks": AttentionConfig(
        n_heads=4, n_kv_heads=2, d_head=8, bias="all", qk_norm=True, sinks=True, window=6, rope_theta=1e4
    ),
    "gate": AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, bias="qkv", output_gate=True, rope_theta=1e4, d_rope=4),
    "full-rank queries": MLAConfig(n_heads=2, kv_rank=8, d_nope=8, d_rope=4, d_v=16),
    "swiglu": MLPConfig(d_ff=24, activation="swiglu"),
    "clamped": MLPConfig(d_ff=24, activation="swiglu_clamped"),
    "expert biases": MoEConfig(
        n_experts=4, top_k=2, d_expert=8, n_shared=0, activation="swiglu_clamped", bias=True, router_score="softmax"
    ),
    "one group": Mamba2Config(n_heads=2, d_head=16, d_state=8, n_groups=1, chunk_size=8),
    "softmax": MoEConfig(n_experts=6, top_k=3, d_expert=8, n_shared=0, activation="swiglu", router_score="softmax"),
    "a key head each": GatedDeltaNetConfig(n_heads=3, n_key_heads=3, d_k=12, d_v=8, d_conv=2, chunk_size=8),
    "many groups": Mamba2Config(n_heads=8, d_head=4, d_state=8, n_groups=8, d_conv=2, chunk_size=64),
    "shared gate": MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared=2, d_shared=8, shared_gate=True),
    "latent norm": MoEConfig(n_experts=4, top_k=1, d_expert=8, n_shared=2, d_shared=8, d_latent=8, latent_norm="input"),
    "latent router": MoEConfig(
        n_experts=4, top_k=2, d_expert=8, d_shared=8, d_latent=8, latent_norm="combined", router_input="latent"
    ),
}
BF16_TOLERANCE = 0.02
"""Relative to the norm of a token's output."""

each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def built(config: BlockConfig) -> Mixer:
    torch.manual_seed(0)
    mixer = config.build(D_MODEL)
    mixer.init_weights(0.2, 0.2)
    return mixer


def counted_flops(config: BlockConfig, d_model: int, seq: int) -> int:
    """Matrix-product FLOPs of one forward pass, as the counter sees them."""
    mixer = config.build(d_model)
    mixer.init_weights(0.2, 0.2)
    x = torch.randn(1, seq, d_model)
    return count_flops(lambda: mixer(x))


def expected_flops(config: BlockConfig, d_model: int, seq: int) -> int:
    """The ledger's FLOPs, with attention dense and not causal, as it runs."""
    return sum(entry.flops_seq for entry in config.entries(d_model, seq)) + config.uncounted(seq).forward


@each_variant
def test_shape_and_dtype_are_kept(config: BlockConfig) -> None:
    x = torch.randn(2, 19, D_MODEL)
    y, _ = built(config)(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@each_variant
def test_changing_a_token_leaves_earlier_outputs_alone(config: BlockConfig) -> None:
    mixer, x = built(config), torch.randn(1, 19, D_MODEL)
    changed = x.clone()
    changed[:, 11] += 1
    before, after = mixer(x)[0], mixer(changed)[0]
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 11:], after[:, 11:], rtol=1e-5, atol=1e-5)


@each_variant
@pytest.mark.parametrize("cuts", [(18,), (1, 2, 3), (7, 8, 15), tuple(range(1, 19))], ids=str)
def test_a_sequence_cut_anywhere_goes_on_where_it_stopped(config: BlockConfig, cuts: tuple[int, ...]) -> None:
    mixer, x = built(config), torch.randn(2, 19, D_MODEL)
    state = config.new_state()
    parts = [mixer(part, state)[0] for part in x.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(x)[0], rtol=1e-4, atol=1e-5)


@each_variant
@pytest.mark.parametrize("cuts", [(18,), (1, 2, 3), (7, 8, 15), tuple(range(1, 19))], ids=str)
def test_a_state_with_capacity_is_written_in_place_and_goes_on_where_it_stopped(
    config: BlockConfig, cuts: tuple[int, ...]
) -> None:
    mixer, x = built(config), torch.randn(2, 19, D_MODEL)
    state = config.new_state(capacity=19)
    parts, places = [], []
    with torch.no_grad():
        for part in x.tensor_split(cuts, dim=1):
            y, stats = mixer(part, state)
            assert stats is None
            parts.append(y)
            places.append({name: value.data_ptr() for name, value in tensors(state).items()})
        y, _ = mixer(x)
        torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-4, atol=1e-5)
        if isinstance(state, RecurrentState):
            mixer(x[:, :1], state)
            assert state.recurrent is not None
            assert state.recurrent.data_ptr() == places[-1]["recurrent"]
        elif not isinstance(state, WindowCache):
            assert all(place == places[0] for place in places)


def tensors(state: State) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


@each_variant
@pytest.mark.parametrize(("capacity", "grad"), [(None, False), (None, True), (12, False)])
def test_a_copy_of_a_state_goes_on_as_if_the_other_had_not(
    config: BlockConfig, capacity: int | None, grad: bool
) -> None:
    mixer, x = built(config), torch.randn(2, 19, D_MODEL)
    with torch.set_grad_enabled(grad):
        state = config.new_state(capacity)
        mixer(x[:, :7], state)
        copy = state.copy()
        assert type(copy) is type(state)
        for part in (-x[:, 7:8], -x[:, 8:9], -x[:, 9:12]):
            mixer(part, state)
        y = torch.cat([mixer(part, copy)[0] for part in (x[:, 7:8], x[:, 8:12])], dim=1)
        torch.testing.assert_close(y, mixer(x[:, :12])[0][:, 7:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["*", "L", "window"])
def test_more_positions_than_the_capacity_are_refused_and_leave_the_state_alone(name: str) -> None:
    mixer, x = built(VARIANTS[name]), torch.randn(2, 9, D_MODEL)
    state = VARIANTS[name].new_state(capacity=8)
    with torch.no_grad():
        y = mixer(x[:, :7], state)[0]
        with pytest.raises(ValueError, match="capacity must be at least 9, the positions so far, got 8"):
            mixer(x[:, 7:], state)
        y = torch.cat((y, mixer(x[:, 7:8], state)[0]), dim=1)
        torch.testing.assert_close(y, mixer(x)[0][:, :8], rtol=1e-4, atol=1e-5)


@each_variant
@pytest.mark.parametrize("capacity", [None, 19])
def test_a_filled_state_has_the_bytes_that_the_ledger_says(config: BlockConfig, capacity: int | None) -> None:
    mixer, batch, seq = built(config), 3, 19
    entries = config.entries(D_MODEL, seq)
    kv, ssm, conv = (sum(getattr(e, name) for e in entries) for name in ("kv_numel_seq", "ssm_numel", "conv_numel"))
    state = config.new_state(capacity)
    assert state.n_bytes == 0
    with torch.no_grad():
        for part in torch.randn(batch, seq, D_MODEL).split((7, 11, 1), dim=1):
            mixer(part, state)
            held = tensors(state)
            # No tensor is a view that keeps more memory than it shows.
            assert state.n_bytes == sum(value.untyped_storage().nbytes() for value in held.values())
    assert state.n_bytes == 4 * batch * (kv + ssm + conv)
    numel = {name: value.numel() // batch for name, value in held.items()}
    match state:
        case KVCache():
            assert numel["k"] + numel["v"] == kv > ssm + conv == 0
        case LatentCache():
            assert numel["latent"] + numel["k_rope"] == kv > ssm + conv == 0
        case RecurrentState():
            assert numel == {"recurrent": ssm, "conv": conv}
            assert kv == 0
        case _:
            assert kv + ssm + conv == 0


@pytest.mark.parametrize(
    ("capacity", "parts"),
    [(None, (1, 1, 8, 1, 1, 5, 2)), (19, (1, 1, 8, 1, 1, 5, 2)), (19, (17, 1, 1)), (5, (1, 2, 2)), (4, (1, 1, 1, 1))],
)
@pytest.mark.parametrize("window", [1, 5, 30])
def test_a_window_cache_never_keeps_more_than_its_window(
    window: int, capacity: int | None, parts: tuple[int, ...]
) -> None:
    config = AttentionConfig(n_heads=2, n_kv_heads=1, d_head=8, window=window, rope_theta=1e4)
    mixer, x = built(config), torch.randn(2, sum(parts), D_MODEL)
    state, length = config.new_state(capacity), 0
    outputs = []
    with torch.no_grad():
        for part in x.split(parts, dim=1):
            outputs.append(mixer(part, state)[0])
            length += part.shape[1]
            assert isinstance(state, WindowCache)
            assert state.length == length
            most = min(window, length if capacity is None else capacity)
            for held in tensors(state).values():
                assert held.shape == (2, 1, most, 8)
                assert held.untyped_storage().nbytes() == held.nbytes
        torch.testing.assert_close(torch.cat(outputs, dim=1), mixer(x)[0], rtol=1e-4, atol=1e-5)


def test_a_cache_returns_what_was_put_in() -> None:
    k, v = torch.randn(2, 2, 3, 9, 4)
    for capacity, window in ((None, None), (12, None), (None, 5), (12, 5)):
        state = KVCache(capacity=capacity) if window is None else WindowCache(capacity=capacity, window=window)
        for start, end in ((0, 2), (2, 3), (3, 8), (8, 9)):
            # A window shows the first new query itself and window - 1 before it.
            first = 0 if window is None else max(0, start + 1 - window)
            for found, put in zip(state.update(k[:, :, start:end], v[:, :, start:end]), (k, v), strict=True):
                assert torch.equal(found, put[:, :, first:end])
            assert state.k is not None
            assert state.k.stride(2) == 1 or capacity is None or window is not None  # channel by channel
    latent, k_rope = k[:, :1], v[:, :1, :, :2]
    for capacity in (None, 9):
        cache = LatentCache(capacity=capacity)
        cache.update(latent[:, :, :4], k_rope[:, :, :4])
        for found, put in zip(cache.update(latent[:, :, 4:], k_rope[:, :, 4:]), (latent, k_rope), strict=True):
            assert torch.equal(found, put)


@each_variant
@pytest.mark.parametrize("seq", [2, 5, 19])
def test_one_step_of_decoding_spends_what_the_ledger_says(config: BlockConfig, seq: int) -> None:
    mixer, x = built(config), torch.randn(1, seq, D_MODEL)
    state = config.new_state()
    mixer(x[:, :-1], state)
    spent = count_flops(lambda: mixer(x[:, -1:], state))
    assert spent == sum(entry.flops_step for entry in config.entries(D_MODEL, seq))


@each_variant
def test_batch_rows_are_independent(config: BlockConfig) -> None:
    mixer, x = built(config), torch.randn(3, 19, D_MODEL)
    torch.testing.assert_close(mixer(x)[0][1:2], mixer(x[1:2])[0], rtol=1e-4, atol=1e-5)


@each_variant
def test_every_parameter_gets_a_finite_gradient(config: BlockConfig) -> None:
    mixer = built(config)
    y, stats = mixer(torch.randn(4, 33, D_MODEL))
    (y.square().mean() + (0 if stats is None else stats.aux_loss)).backward()
    for name, weight in mixer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0 or (name == "router.weight" and config.top_k == 1), name  # type: ignore[attr-defined]


@each_variant
def test_the_config_counts_the_parameters_that_are_built(config: BlockConfig) -> None:
    with torch.device("meta"):
        mixer = config.build(D_MODEL)
    assert sum(entry.params for entry in config.entries(D_MODEL, 7)) == sum(w.numel() for w in mixer.parameters())


@each_variant
@pytest.mark.parametrize("seq", [1, 16, 37])
def test_the_config_counts_the_flops_that_the_op_counter_sees(config: BlockConfig, seq: int) -> None:
    assert expected_flops(config, D_MODEL, seq) == counted_flops(config, D_MODEL, seq)


@given(seed=st.integers(0), letter=st.sampled_from(sorted(STANDARD_LETTERS)))
def test_counts_are_exact_for_random_sizes(seed: int, letter: str) -> None:
    rng = random.Random(seed)
    config, d_model, seq = STANDARD_LETTERS[letter].random_example(rng), rng.randint(1, 24), rng.randint(1, 40)
    with torch.device("meta"):
        built_params = sum(weight.numel() for weight in config.build(d_model).parameters())
    assert sum(entry.params for entry in config.entries(d_model, seq)) == built_params
    assert expected_flops(config, d_model, seq) == counted_flops(config, d_model, seq)


@each_variant
def test_json_is_an_identity(config: BlockConfig) -> None:
    assert type(config).model_validate_json(config.model_dump_json()) == config


@given(seed=st.integers(0), letter=st.sampled_from(sorted(STANDARD_LETTERS)))
def test_json_is_an_identity_for_random_sizes(seed: int, letter: str) -> None:
    config = STANDARD_LETTERS[letter].random_example(random.Random(seed))
    again = type(config).model_validate_json(config.model_dump_json())
    assert (again, hash(again)) == (config, hash(config))


@pytest.mark.parametrize("d_model", [64, 96, 256, 2688])
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.letter)
def test_default_sizes_count_what_they_build(kind: BlockKind, d_model: int) -> None:
    config = kind.config.default(d_model)
    with torch.device("meta"):
        mixer = config.build(d_model)
    assert sum(e.params for e in config.entries(d_model, 5)) == sum(w.numel() for w in mixer.parameters())


@pytest.mark.parametrize(
    "kind", [kind for kind in BLOCKS if kind.config.role in ("recurrent", "attention")], ids=lambda kind: kind.letter
)
def test_default_heads_refuse_a_width_that_they_do_not_divide(kind: BlockKind) -> None:
    with pytest.raises(ValueError, match="d_model: 100 is not divisible into heads; allowed are multiples of 16"):
        kind.config.default(100)


@each_variant
def test_bf16_autocast_stays_close_to_fp32_without_a_warning(config: BlockConfig) -> None:
    mixer, x = built(config), torch.randn(2, 19, D_MODEL)
    exact = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)[0]
    errors = (y.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.median() < BF16_TOLERANCE  # a router that reads a bf16 latent may decide a near tie otherwise


@each_variant
def test_a_token_passes_through_all_parameters_but_those_of_unchosen_experts(config: BlockConfig) -> None:
    entries = config.entries(D_MODEL, 7)
    unchosen = 0
    if isinstance(config, MoEConfig):
        with torch.device("meta"):
            moe = config.build(D_MODEL)
        weights = (moe.up, moe.gate, moe.down, moe.up_bias, moe.gate_bias, moe.down_bias)
        one = sum(w[0].numel() for w in weights if w is not None)
        unchosen = (config.n_experts - config.top_k) * one
    assert sum(e.params - e.params_active for e in entries) == unchosen


@pytest.mark.parametrize("name", ["M", "one group", "many groups"])
def test_a_mamba_mixer_is_its_equations_token_by_token(name: str) -> None:
    c, mixer = VARIANTS[name], built(VARIANTS[name])
    assert isinstance(c, Mamba2Config)
    assert isinstance(mixer, Mamba2)
    assert mixer.conv1d.bias is not None
    torch.nn.init.normal_(mixer.D)
    torch.nn.init.normal_(mixer.norm.weight)
    x, d_BC = torch.randn(19, D_MODEL), c.n_groups * c.d_state
    parts = (x @ mixer.in_proj.weight.T).split((c.d_inner, c.d_inner, d_BC, d_BC, c.n_heads), dim=-1)
    z, dt = parts[0], (parts[4] + mixer.dt_bias).exp().log1p()
    xBC = torch.cat((torch.zeros(c.d_conv - 1, c.d_conv_channels), torch.cat(parts[1:4], dim=-1)))
    filters = mixer.conv1d.weight[:, 0].T
    state = torch.zeros(c.n_heads, c.d_head, c.d_state)
    outputs = []
    for t in range(19):
        mixed = (filters * xBC[t : t + c.d_conv]).sum(0) + mixer.conv1d.bias
        X, B, C = (mixed * mixed.sigmoid()).split((c.d_inner, d_BC, d_BC))
        y = torch.empty(c.n_heads, c.d_head)
        for h, head in enumerate(X.view(c.n_heads, c.d_head)):
            group = h * c.n_groups // c.n_heads
            decay = (-dt[t, h] * mixer.A_log[h].exp()).exp()
            state[h] = decay * state[h].clone() + torch.outer(dt[t, h] * head, B.view(c.n_groups, -1)[group])
            y[h] = state[h].clone() @ C.view(c.n_groups, -1)[group] + mixer.D[h] * head
        gated = (y.flatten() * z[t] * z[t].sigmoid()).view(c.n_groups, -1)
        outputs.append(torch.cat([rms_norm(group) for group in gated]) * mixer.norm.weight)
    truth = torch.stack(outputs) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x[None])[0][0], truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["E", "softmax", "latent norm", "latent router"])
def test_a_mixture_is_a_dense_sum_over_its_experts(name: str) -> None:
    config = VARIANTS[name]
    moe = built(config).double()
    assert isinstance(moe, MoE)
    assert isinstance(config, MoEConfig)
    moe.expert_bias.copy_(torch.linspace(0, 0.1, config.n_experts))
    x = torch.randn(9, D_MODEL, dtype=torch.float64)
    y, stats = moe(x[None])
    for t, token in enumerate(x):
        latent = token if moe.latent_down is None else moe.latent_down.weight @ token
        logits = moe.router.weight.float() @ (latent if config.router_input == "latent" else token).float()
        scores = logits.softmax(0) if config.router_score == "softmax" else logits.sigmoid()
        chosen = sorted(range(config.n_experts), key=lambda e: -float((scores[e] + moe.expert_bias[e]).detach()))[
            : config.top_k
        ]
        read = rms_norm(latent) if config.latent_norm == "input" else latent
        routed = sum(
            scores[e]
            / scores[chosen].sum()
            * expert(read, moe.up[e], None if moe.gate is None else moe.gate[e], moe.down[e])
            for e in chosen
        )
        assert isinstance(routed, torch.Tensor)
        routed = rms_norm(routed) if config.latent_norm == "combined" else routed
        truth = routed if moe.latent_up is None else moe.latent_up.weight @ routed
        if moe.shared is not None:
            width = config.d_shared or 0
            for start in range(0, config.n_shared * width, width):
                part = slice(start, start + width)
                truth = truth + expert(token, moe.shared.up.weight[part].T, None, moe.shared.down.weight[:, part].T)
        torch.testing.assert_close(y[0, t], truth, rtol=1e-5, atol=1e-6)
    assert int(stats.load.sum()) == 9 * config.top_k


def expert(x: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None, down: torch.Tensor) -> torch.Tensor:
    hidden = x @ up
    hidden = hidden.clamp(min=0) ** 2 if gate is None else (x @ gate) * torch.sigmoid(x @ gate) * hidden
    return hidden @ down


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + 1e-5).sqrt()


def test_balance_loss_is_its_coefficient_at_perfect_balance_and_is_least_there() -> None:
    config = MoEConfig(n_experts=4, top_k=1, d_expert=8, n_shared=0, aux_loss_coef=0.5)
    moe = built(config)
    assert isinstance(moe, MoE)
    chosen = torch.arange(8) % 4
    scores = torch.nn.functional.one_hot(chosen, 4).float()[None]
    stats = moe._stats(scores, chosen[None, :, None])
    assert stats.load.tolist() == [2.0] * 4
    assert float(stats.aux_loss) == 0.5
    collapsed = moe._stats(scores[:, :1].expand(1, 8, 4), torch.zeros(1, 8, 1, dtype=torch.int64))
    assert float(collapsed.aux_loss) == 4 * 0.5


def test_the_router_works_in_fp32_under_autocast_and_its_weights_sum_to_the_factor() -> None:
    moe = built(MoEConfig(n_experts=8, top_k=3, d_expert=8, d_shared=8, routed_scaling_factor=2.5))
    assert isinstance(moe, MoE)
    x = torch.randn(2, 9, D_MODEL)
    exact = moe._scores(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(moe._scores(x), exact, rtol=0, atol=0)
    _, weights = moe.route(exact)
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 9), 2.5))


def published_shares(scores: torch.Tensor) -> torch.Tensor:
    """As transformers' Nemotron-H and DeepSeek-V3 write it."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def test_shares_of_ordinary_scores_are_the_published_ones_to_the_last_bit() -> None:
    logits = 6 * torch.randn(500, 22, generator=torch.Generator().manual_seed(0))
    for score in (torch.sigmoid, partial(torch.softmax, dim=-1)):
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        shares = [_shares(score(ours)), published_shares(score(theirs))]
        assert torch.equal(*shares)
        for each in shares:
            each.square().sum().backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("logit", [-20.0, -50.0, -68.0, -88.0, -100.0, -200.0])
def test_scores_that_underflow_still_sum_to_one_and_keep_their_ratios_while_they_can(logit: float) -> None:
    moe = built(MoEConfig(n_experts=8, top_k=3, d_expert=8, d_shared=8, routed_scaling_factor=2.5, aux_loss_coef=0.5))
    assert isinstance(moe, MoE)
    spread = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    logits = (logit + spread).requires_grad_()
    scores = logits.sigmoid()
    chosen, weights = moe.route(scores)
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 9), 2.5))
    if logit >= -68:
        exact = torch.nn.functional.logsigmoid(logits.double()).gather(-1, chosen).softmax(-1)
        torch.testing.assert_close(weights.double() / 2.5, exact, rtol=1e-4, atol=0)
    loss = moe._stats(scores, chosen).aux_loss
    assert 0.4 < float(loss.detach()) < 1.5  # 0.5 where all experts are alike
    (loss + weights.square().sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_output_of_attention_is_multiplied_by_a_sigmoid_of_the_input() -> None:
    config = AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, output_gate=True)
    mixer, plain = built(config), built(config.model_copy(update={"output_gate": False}))
    assert isinstance(mixer, Attention)
    assert isinstance(plain, Attention)
    assert mixer.gate_proj is not None
    plain.load_state_dict({name: w for name, w in mixer.state_dict().items() if name != "gate_proj.weight"})
    heads: list[torch.Tensor] = []
    plain.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    x = torch.randn(2, 9, D_MODEL)
    plain(x)
    truth = (heads[0] * (x @ mixer.gate_proj.weight.T).sigmoid()) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], truth, rtol=1e-5, atol=1e-5)


def test_only_the_first_channels_of_a_head_are_rotated() -> None:
    sizes: dict[str, Any] = {"n_heads": 2, "n_kv_heads": 2, "d_head": 8, "rope_theta": 1e4}
    whole, part = (built(AttentionConfig(**sizes, d_rope=d_rope)) for d_rope in (8, 4))
    same = built(AttentionConfig(**sizes))
    x = torch.randn(1, 9, D_MODEL)
    assert torch.equal(whole(x)[0], same(x)[0])
    # Where the rotated channels are zero, positions have no influence: equal to attention without them.
    assert isinstance(part, Attention)
    for projection in (part.q_proj, part.k_proj):
        projection.weight.data.view(2, 8, D_MODEL)[:, :4] = 0
    nope = built(AttentionConfig(**{**sizes, "rope_theta": None}))
    nope.load_state_dict(part.state_dict())
    torch.testing.assert_close(part(x)[0], nope(x)[0], rtol=1e-5, atol=1e-5)
    for projection in (part.q_proj, part.k_proj):
        projection.weight.data.view(2, 8, D_MODEL)[:, :2] = 0.3
    nope.load_state_dict(part.state_dict())
    assert not torch.allclose(part(x)[0], nope(x)[0], rtol=1e-3, atol=1e-3)


def test_the_shared_experts_are_multiplied_by_a_sigmoid_of_one_number_a_token() -> None:
    config = MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared=2, d_shared=8, shared_gate=True)
    mixer = built(config)
    assert isinstance(mixer, MoE)
    assert mixer.shared is not None
    assert mixer.shared_gate is not None
    x = torch.randn(2, 9, D_MODEL)
    shared, gate = mixer.shared(x)[0], (x @ mixer.shared_gate.weight.T).sigmoid()
    mixer.shared_gate.register_forward_hook(lambda *_: torch.full((2, 9, 1), -torch.inf))
    routed = mixer(x)[0]
    assert gate.shape == (2, 9, 1)
    torch.testing.assert_close(built(config)(x)[0], routed + gate * shared, rtol=1e-5, atol=1e-5)


def test_the_expert_bias_moves_towards_balance_and_changes_the_choice_but_not_the_weights() -> None:
    moe = built(MoEConfig(n_experts=4, top_k=1, d_expert=8, d_shared=8, normalize_weights=False, bias_update_rate=0.5))
    assert isinstance(moe, MoE)
    moe.update_bias(torch.tensor([8.0, 4.0, 4.0, 0.0]))
    assert moe.expert_bias.tolist() == [-0.5, 0.0, 0.0, 0.5]
    moe.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0]))
    scores = torch.rand(1, 6, 4)
    chosen, weights = moe.route(scores)
    assert (chosen == 3).all()
    torch.testing.assert_close(weights[..., 0], scores[..., 3])


def test_latent_variants_of_super_have_its_released_sizes() -> None:
    standard = MoEConfig(n_experts=128, top_k=6, d_expert=2688, n_shared=2, d_shared=2688)
    acc, eff = latent_acc(standard, 4096, 1024), latent_eff(standard, 4096, 1024)
    assert (acc.n_experts, acc.top_k, eff.n_experts, eff.top_k) == (512, 22, 512, 6)
    assert latent_acc(standard, 4096, 1024, pay_projections=False).top_k == 24
    active = [sum(e.params_active for e in config.entries(4096, 1)) for config in (standard, acc)]
    assert active[1] == pytest.approx(active[0], rel=0.01)
    with pytest.raises(ValueError, match="d_latent: 1000 does not divide d_model=4096"):
        latent_acc(standard, 4096, 1000)
