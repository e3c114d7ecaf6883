"""Every block: what it computes, what it counts, and that the two agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from explore.blocks import (
    BLOCKS,
    AttentionConfig,
    BlockConfig,
    Mamba2Config,
    Mixer,
    MLPConfig,
    MoE,
    MoEConfig,
    latent_acc,
    latent_eff,
)
from explore.cost import attended_keys
from explore.ops import forced_paths

D_MODEL = 32
VARIANTS: dict[str, BlockConfig] = {kind.letter: kind.example for kind in BLOCKS} | {
    "rope": AttentionConfig(n_heads=4, n_kv_heads=1, d_head=8, rope_theta=10_000.0),
    "window": AttentionConfig(n_heads=2, n_kv_heads=2, d_head=16, window=5),
    "swiglu": MLPConfig(d_ff=24, activation="swiglu"),
    "one group": Mamba2Config(n_heads=2, d_head=16, d_state=8, n_groups=1, chunk_size=8),
    "softmax": MoEConfig(n_experts=6, top_k=3, d_expert=8, n_shared=0, activation="swiglu", router_score="softmax"),
    "latent norm": MoEConfig(n_experts=4, top_k=1, d_expert=8, n_shared=2, d_shared=8, d_latent=8, latent_norm="input"),
    "latent router": MoEConfig(
        n_experts=4, top_k=2, d_expert=8, d_shared=8, d_latent=8, latent_norm="combined", router_input="latent"
    ),
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def built(config: BlockConfig) -> Mixer:
    torch.manual_seed(0)
    mixer = config.build(D_MODEL)
    mixer.init_weights(0.2, 0.2)
    return mixer


def counted_flops(config: BlockConfig, d_model: int, seq: int) -> int:
    """Matrix-product FLOPs that torch's op counter sees in one forward pass, on paths whose ops it knows."""
    mixer = config.build(d_model)
    mixer.init_weights(0.2, 0.2)
    paths = forced_paths(conv="conv1d", attention="written_out")
    with paths, torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, seq, d_model))
    return counter.get_total_flops()


def expected_flops(config: BlockConfig, d_model: int, seq: int) -> int:
    """The ledger's FLOPs, with attention dense and not causal, as the counter sees it."""
    total = sum(entry.flops_seq for entry in config.entries(d_model, seq))
    if isinstance(config, AttentionConfig):
        masked = seq * seq - attended_keys(seq, config.window)
        total += 4 * config.n_heads * config.d_head * masked
    return total


@each_variant
def test_shape_and_dtype_are_kept(config: BlockConfig) -> None:
    x = torch.randn(2, 19, D_MODEL)
    y, _ = built(config)(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@each_variant
def test_changing_a_token_leaves_earlier_outputs_alone(config: BlockConfig) -> None:
    x, mixer = torch.randn(1, 19, D_MODEL), built(config)
    changed = x.clone()
    changed[:, 11] += 1
    before, after = mixer(x)[0], mixer(changed)[0]
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 11:], after[:, 11:], rtol=1e-5, atol=1e-5)


@each_variant
def test_batch_rows_are_independent(config: BlockConfig) -> None:
    x, mixer = torch.randn(3, 19, D_MODEL), built(config)
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


@st.composite
def random_blocks(draw: st.DrawFn) -> BlockConfig:
    small = st.integers(1, 4)
    groups, per_group, d_head = draw(small), draw(small), 2 * draw(small)
    kind = draw(st.sampled_from([kind.letter for kind in BLOCKS]))
    activation = draw(st.sampled_from(["relu2", "swiglu"]))
    if kind == "M":
        return Mamba2Config(
            n_heads=groups * per_group, d_head=d_head, d_state=draw(small), n_groups=groups, chunk_size=draw(small) * 4
        )
    if kind == "*":
        window = draw(st.none() | st.integers(1, 30))
        return AttentionConfig(n_heads=groups * per_group, n_kv_heads=groups, d_head=d_head, window=window)
    if kind == "-":
        return MLPConfig(d_ff=draw(st.integers(1, 40)), activation=activation)
    n_experts = draw(st.integers(1, 8))
    return MoEConfig(
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        d_expert=draw(st.integers(1, 12)),
        n_shared=draw(st.integers(0, 2)),
        d_shared=draw(st.integers(1, 12)),
        d_latent=draw(st.none() | st.integers(1, 12)),
        activation=activation,
    )


@given(config=random_blocks(), d_model=st.integers(1, 24), seq=st.integers(1, 40))
def test_counts_are_exact_for_random_sizes(config: BlockConfig, d_model: int, seq: int) -> None:
    with torch.device("meta"):
        built_params = sum(weight.numel() for weight in config.build(d_model).parameters())
    assert sum(entry.params for entry in config.entries(d_model, seq)) == built_params
    assert expected_flops(config, d_model, seq) == counted_flops(config, d_model, seq)


def test_the_op_counter_is_silent_on_cpu_attention_and_the_written_path_is_not() -> None:
    q = torch.randn(1, 2, 8, 4)
    seen = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend), FlopCounterMode(display=False) as counter:
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        seen.append(counter.get_total_flops())
    assert seen == [0, 2 * 2 * 2 * 8 * 8 * 4]
    config = AttentionConfig(n_heads=2, n_kv_heads=2, d_head=4)
    assert counted_flops(config, 8, 8) == sum(2 * 8 * 8 * 8 for _ in range(4)) + seen[1]


@each_variant
def test_json_is_an_identity(config: BlockConfig) -> None:
    assert type(config).model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("seq", [1, 5, 40])
@pytest.mark.parametrize("window", [None, 1, 5, 40, 99])
def test_attended_keys_are_those_of_the_mask(seq: int, window: int | None) -> None:
    pairs = [(q, k) for q in range(seq) for k in range(q + 1) if window is None or q - k < window]
    assert attended_keys(seq, window) == len(pairs)


def test_the_router_works_in_fp32_under_autocast_and_its_weights_sum_to_the_factor() -> None:
    moe = built(MoEConfig(n_experts=8, top_k=3, d_expert=8, d_shared=8, routed_scaling_factor=2.5))
    assert isinstance(moe, MoE)
    x = torch.randn(2, 9, D_MODEL)
    exact = moe._scores(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(moe._scores(x), exact, rtol=0, atol=0)
    _, weights = moe.route(exact)
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 9), 2.5))


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
    assert active[1] == pytest.approx(active[0], rel=0.02)
    with pytest.raises(ValueError, match="d_latent: 1000 does not divide d_model=4096"):
        latent_acc(standard, 4096, 1000)
