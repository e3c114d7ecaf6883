"""Each mixer compared with its equations."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from block_variants import D_MODEL, VARIANTS, built

from explore.blocks import (
    Attention,
    AttentionConfig,
    Mamba2,
    Mamba2Config,
    MoE,
    MoEConfig,
    latent_acc,
    latent_eff,
)
from explore.blocks.moe import _shares


@pytest.mark.parametrize("name", ["M", "one group", "many groups"])
def test_a_mamba_mixer_computes_its_equations_token_by_token(name: str) -> None:
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


def test_balance_loss_has_its_minimum_the_coefficient_at_perfect_balance() -> None:
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
    """The formula in transformers' Nemotron-H and DeepSeek-V3."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def test_router_weights_of_ordinary_scores_equal_the_published_ones_bit_for_bit() -> None:
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
def test_router_weights_that_underflow_sum_to_one_and_keep_their_ratios_where_possible(logit: float) -> None:
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


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_queries_keys_and_values_are_convolved_before_norm_and_rotation(d_conv: int) -> None:
    config = AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, qk_norm=True, rope_theta=1e4, d_conv=d_conv)
    mixer, plain = built(config), built(config.model_copy(update={"d_conv": None}))
    assert isinstance(mixer, Attention)
    assert isinstance(plain, Attention)
    assert mixer.conv1d is not None
    filters = mixer.conv1d.weight[:, 0]  # q, k, v channels, d_conv
    assert filters.shape == (64, d_conv)
    plain.load_state_dict({name: w for name, w in mixer.state_dict().items() if name != "conv1d.weight"})
    x = torch.randn(2, 9, D_MODEL)
    start = 0
    for projection in (plain.q_proj, plain.k_proj, plain.v_proj):
        own = filters[start : start + projection.out_features]
        start += projection.out_features

        def convolve(_: object, __: object, y: torch.Tensor, own: torch.Tensor = own) -> torch.Tensor:
            parts = [
                sum(own[:, -1 - back] * y[:, t - back] for back in range(min(d_conv, t + 1))) for t in range(y.shape[1])
            ]
            return torch.stack(parts, dim=1)

        projection.register_forward_hook(convolve)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0], rtol=1e-5, atol=1e-5)


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
    with pytest.raises(ValueError, match="d_latent must divide d_model=4096, got 1000"):
        latent_acc(standard, 4096, 1000)
