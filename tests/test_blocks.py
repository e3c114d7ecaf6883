"""Every block: its results, its counts, and that the two agree."""

from __future__ import annotations

import random

import pytest
import torch
from block_variants import D_MODEL, VARIANTS, built
from hypothesis import given
from hypothesis import strategies as st

from explore.blocks import (
    BLOCKS,
    STANDARD_LETTERS,
    AttentionConfig,
    BlockConfig,
    BlockKind,
    KVCache,
    LatentCache,
    MoEConfig,
    RecurrentState,
    State,
    WindowCache,
)
from explore.proof import count_flops

BF16_TOLERANCE = 0.02
"""Relative to the norm of a token's output."""

each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def counted_flops(config: BlockConfig, d_model: int, seq: int) -> int:
    """Matrix-product FLOPs of one forward pass, from the op counter."""
    mixer = config.build(d_model)
    mixer.init_weights(0.2, 0.2)
    x = torch.randn(1, seq, d_model)
    return count_flops(lambda: mixer(x))


def expected_flops(config: BlockConfig, d_model: int, seq: int) -> int:
    """The ledger's FLOPs with dense instead of causal attention, as it is computed."""
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
def test_a_sequence_split_anywhere_continues_from_its_state(config: BlockConfig, cuts: tuple[int, ...]) -> None:
    mixer, x = built(config), torch.randn(2, 19, D_MODEL)
    state = config.new_state()
    parts = [mixer(part, state)[0] for part in x.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(x)[0], rtol=1e-4, atol=1e-5)


@each_variant
@pytest.mark.parametrize("cuts", [(18,), (1, 2, 3), (7, 8, 15), tuple(range(1, 19))], ids=str)
def test_a_state_with_capacity_is_written_in_place_and_continues_the_sequence(
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
            kept = [{name: place for name, place in each.items() if name != "conv"} for each in places]
            assert all(each == kept[0] for each in kept)


def tensors(state: State) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


@each_variant
@pytest.mark.parametrize(("capacity", "grad"), [(None, False), (None, True), (12, False)])
def test_a_copied_state_is_independent_of_the_original(config: BlockConfig, capacity: int | None, grad: bool) -> None:
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


@pytest.mark.parametrize("name", ["*", "L", "window", "convolution"])
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
def test_a_filled_state_has_the_bytes_in_the_ledger(config: BlockConfig, capacity: int | None) -> None:
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
            assert numel["k"] + numel["v"] == kv > ssm == 0
            assert numel.get("conv", 0) == conv
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


def test_a_cache_returns_the_entries_written_to_it() -> None:
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
def test_a_decoding_step_spends_the_flops_in_the_ledger(config: BlockConfig, seq: int) -> None:
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
def test_counts_of_default_sizes_equal_those_of_the_built_module(kind: BlockKind, d_model: int) -> None:
    config = kind.config.default(d_model)
    with torch.device("meta"):
        mixer = config.build(d_model)
    assert sum(e.params for e in config.entries(d_model, 5)) == sum(w.numel() for w in mixer.parameters())


@pytest.mark.parametrize(
    "kind", [kind for kind in BLOCKS if "n_heads" in kind.config.model_fields], ids=lambda kind: kind.letter
)
def test_a_width_that_default_heads_do_not_divide_is_refused(kind: BlockKind) -> None:
    with pytest.raises(ValueError, match="d_model: must be a multiple of 16"):
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
def test_a_token_uses_all_parameters_except_those_of_unchosen_experts(config: BlockConfig) -> None:
    entries = config.entries(D_MODEL, 7)
    unchosen = 0
    if isinstance(config, MoEConfig):
        with torch.device("meta"):
            moe = config.build(D_MODEL)
        weights = (moe.up, moe.gate, moe.down, moe.up_bias, moe.gate_bias, moe.down_bias)
        one = sum(w[0].numel() for w in weights if w is not None)
        unchosen = (config.n_experts - config.top_k) * one
    assert sum(e.params - e.params_active for e in entries) == unchosen
