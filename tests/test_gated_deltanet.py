"""Gated DeltaNet: its equations, transformers' layer, and the FLOPs that Megatron-LM counts."""

from __future__ import annotations

import pytest
import torch
from qwen3_next import gated_deltanet_weights
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from explore.blocks import GatedDeltaNet, GatedDeltaNetConfig
from explore.cost import diff, flops_train
from explore.model import ModelConfig

D_MODEL = 32
CONFIG = GatedDeltaNetConfig(n_heads=6, n_key_heads=2, d_k=8, d_v=12, chunk_size=16)


def drawn(config: GatedDeltaNetConfig) -> GatedDeltaNet:
    """A mixer in which no weight is a special value."""
    torch.manual_seed(0)
    mixer = config.build(D_MODEL)
    mixer.init_weights(0.2, 0.2)
    torch.nn.init.normal_(mixer.norm.weight)
    torch.nn.init.uniform_(mixer.A_log, -2, 1)
    return mixer


def test_the_mixer_computes_its_equations_token_by_token() -> None:
    c, mixer = CONFIG, drawn(CONFIG)
    x, r = torch.randn(37, D_MODEL), c.n_heads // c.n_key_heads
    widths = (c.d_keys, c.d_keys, c.d_values, c.d_values, c.n_heads, c.n_heads)
    *qkv, z, b, a = (x @ mixer.in_proj.weight.T).split(widths, dim=-1)
    before = torch.cat((torch.zeros(c.d_conv - 1, c.d_conv_channels), torch.cat(qkv, dim=-1)))
    filters = mixer.conv1d.weight[:, 0].T
    S = torch.zeros(c.n_heads, c.d_v, c.d_k)
    outputs = []
    for t in range(37):
        mixed = (filters * before[t : t + c.d_conv]).sum(0)
        q, k, v = (mixed * mixed.sigmoid()).split(widths[:3])
        heads = []
        for h in range(c.n_heads):
            query, key = (each.view(-1, c.d_k)[h // r] for each in (q, k))
            query, key = query / query.norm() / c.d_k**0.5, key / key.norm()
            alpha = (-mixer.A_log[h].exp() * (a[t, h] + mixer.dt_bias[h]).exp().log1p()).exp()
            beta = b[t, h].sigmoid()
            decayed = alpha * S[h].clone()
            S[h] = decayed + beta * torch.outer(v.view(-1, c.d_v)[h] - decayed @ key, key)
            y = S[h].clone() @ query
            gate = z[t].view(-1, c.d_v)[h]
            heads.append(y / (y.square().mean() + c.norm_eps).sqrt() * mixer.norm.weight * gate * gate.sigmoid())
        outputs.append(torch.cat(heads))
    truth = torch.stack(outputs) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x[None])[0][0], truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seq", [1, 64, 150])
def test_transformers_layer_computes_the_same_and_its_gradients(seq: int) -> None:
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=D_MODEL,
            num_hidden_layers=1,
            linear_num_key_heads=2,
            linear_num_value_heads=6,
            linear_key_head_dim=8,
            linear_value_head_dim=12,
        ),
        0,
    )
    torch.manual_seed(0)
    for name, weight in theirs.named_parameters():
        torch.nn.init.uniform_(weight, -2, 1) if name == "A_log" else torch.nn.init.normal_(weight, std=0.2)
    ours, x = CONFIG.build(D_MODEL), torch.randn(2, seq, D_MODEL)
    ours.load_state_dict(gated_deltanet_weights(theirs.state_dict(), CONFIG))

    def results(mixer: torch.nn.Module, y: Tensor) -> dict[str, Tensor]:
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        return {name: weight.grad for name, weight in mixer.named_parameters() if weight.grad is not None}

    expected, found = theirs(x), ours(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = gated_deltanet_weights(results(theirs, expected), CONFIG)
    for name, gradient in results(ours, found).items():
        assert (gradient - gradients.pop(name)).norm() <= 1e-4 * gradient.norm(), name
    assert gradients == {}


def test_step_sizes_and_decays_start_in_their_ranges() -> None:
    mixer = GatedDeltaNetConfig(n_heads=4096, n_key_heads=4096, d_k=1, d_v=1, dt_min=0.01, dt_max=0.05).build(1)
    mixer.init_weights(0.02, 0.02)
    dt, A = F.softplus(mixer.dt_bias).detach(), mixer.A_log.detach().exp()
    assert 0.0099 < float(dt.min()) < 0.0105
    assert 0.0475 < float(dt.max()) < 0.0505
    assert 0.0099 < float(A.min()) < 0.1
    assert 15.5 < float(A.max()) < 16.001


def test_the_megatron_convention_equals_its_formula() -> None:
    d, seq_len, c = 64, 100, GatedDeltaNetConfig(n_heads=4, n_key_heads=2, d_k=32, d_v=16)
    model = ModelConfig(d_model=d, vocab_size=10, pattern="GG", blocks={"G": c})
    qk, v = 2 * 32, 4 * 16
    layer = 2 * (d * (2 * qk + 2 * v + 2 * 4) + 4 * (2 * qk + v) + 4 * 16**2 * 4 + d * v)
    ledger = model.ledger(seq_len)
    assert flops_train(ledger, "megatron") == pytest.approx(3 * (2 * layer + 2 * d * 10))
    assert [line["component"] for line in diff(ledger, "exact", "megatron")] == ["delta rule"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_key_heads", 4, "n_key_heads: must divide n_heads=6, got 4"),
        ("dt_min", 1.0, r"dt_min: must be at most dt_max=0\.1, got 1\.0"),
    ],
)
def test_incompatible_sizes_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedDeltaNetConfig.model_validate(CONFIG.model_dump() | {field: value})
