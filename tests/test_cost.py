"""Closed forms: sums of the ledger, and published counts to the digits that were printed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explore.blocks import BLOCKS, MoEConfig, latent_acc, latent_eff
from explore.cost import BITS, Entry, attended_keys, matrix, vector
from explore.model import ModelConfig

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}
NUMBERS = [field.name for field in fields(Entry) if field.name != "component"]
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
VOCAB = 131_072


def nemotron(pattern: str, d_model: int, blocks: Any) -> ModelConfig:
    return ModelConfig(d_model=d_model, vocab_size=VOCAB, pattern=pattern, blocks=blocks)


def nano() -> ModelConfig:
    blocks = {
        "M": {"n_heads": 64, "d_head": 64, "d_state": 128, "n_groups": 8, "chunk_size": 128},
        "*": {"n_heads": 32, "n_kv_heads": 2, "d_head": 128},
        "E": {"n_experts": 128, "top_k": 6, "d_expert": 1856, "d_shared": 3712, "routed_scaling_factor": 2.5},
    }
    return nemotron(NANO, 2688, blocks)


@given(seq=st.integers(1, 40), window=st.none() | st.integers(1, 60))
def test_attended_keys_are_those_of_the_mask(seq: int, window: int | None) -> None:
    pairs = [(q, k) for q in range(seq) for k in range(q + 1) if window is None or q - k < window]
    assert attended_keys(seq, window) == len(pairs)


def test_a_matrix_spends_two_flops_a_weight_and_token_and_a_vector_none() -> None:
    assert matrix("a", 3, 5, 7) == Entry("a", params=15, params_active=15, flops_seq=2 * 15 * 7)
    assert matrix("a", 3, 5, 7, bias=True) == Entry("a", params=20, params_active=20, flops_seq=2 * 15 * 7)
    assert vector("a", 4) == Entry("a", params=4, params_active=4)


@given(pattern=st.text("M*-E", min_size=1, max_size=8), tied=st.booleans(), seq=st.integers(1, 50))
def test_totals_are_the_sums_of_the_rows_however_they_are_folded(pattern: str, tied: bool, seq: int) -> None:
    model = ModelConfig(d_model=16, vocab_size=50, pattern=pattern, blocks=EXAMPLES, tie_embeddings=tied)
    ledger, cost = model.ledger(seq), model.cost(seq, kv_dtype="float8", state_dtype="bfloat16")
    sums = {name: sum(getattr(row.entry, name) for row in ledger) for name in NUMBERS}
    assert {name: ledger.total(name) for name in NUMBERS} == sums
    assert (cost.params_total, cost.params_active) == (sums["params"], sums["params_active"])
    assert cost.flops_fwd * seq == pytest.approx(sums["flops_seq"], rel=1e-12)
    assert cost.flops_train == 3 * cost.flops_fwd
    assert cost.kv_bytes_per_token == sums["kv_numel"]
    assert (cost.ssm_state_bytes, cost.conv_state_bytes) == (2 * sums["ssm_numel"], 2 * sums["conv_numel"])
    foldings: tuple[Literal["letter", "layer", "component"], ...] = ("letter", "layer", "component")
    for records in ([ledger.fold(by) for by in foldings]) + [ledger.to_records()]:
        for name in set(NUMBERS) - {"flops_seq"}:
            assert sum(record[name] for record in records) == sums[name]
        assert sum(record["flops_fwd"] for record in records) == pytest.approx(cost.flops_fwd, rel=1e-12)
    for by in foldings:
        assert sum(record["share"] for record in ledger.fold(by)) == pytest.approx(1)
    by_letter = {record["letter"]: record["count"] for record in ledger.fold("letter") if record["letter"]}
    assert by_letter == {letter: pattern.count(letter) for letter in set(pattern)}


@given(pattern=st.text("M*-E", min_size=1, max_size=8), seq=st.integers(1, 50))
def test_a_model_costs_its_layers_and_what_is_around_them(pattern: str, seq: int) -> None:
    d_model, vocab = 16, 50
    model = ModelConfig(d_model=d_model, vocab_size=vocab, pattern=pattern, blocks=EXAMPLES)
    entries = [entry for letter in pattern for entry in EXAMPLES[letter].entries(d_model, seq)]
    cost = model.cost(seq)
    assert cost.params_total == sum(e.params for e in entries) + d_model * (2 * vocab + len(pattern) + 1)
    assert cost.flops_fwd * seq == pytest.approx(sum(e.flops_seq for e in entries) + 2 * d_model * vocab * seq)


def test_tied_embeddings_are_counted_once_and_the_head_still_computes() -> None:
    apart, tied = (
        ModelConfig(d_model=16, vocab_size=50, pattern="M", blocks=EXAMPLES, tie_embeddings=tied).cost(8)
        for tied in (False, True)
    )
    assert apart.params_total - tied.params_total == apart.params_active - tied.params_active == 16 * 50
    assert apart.flops_fwd == tied.flops_fwd


@pytest.mark.parametrize("seq_len", [0, -1])
def test_a_length_that_is_not_positive_is_refused(seq_len: int) -> None:
    with pytest.raises(ValueError, match=f"seq_len: {seq_len} is not allowed"):
        nano().ledger(seq_len)


def test_nemotron_3_nano_counts_to_print() -> None:
    cost = nano().cost(4096)
    assert round(cost.params_total / 1e9, 2) == 31.58
    assert round(cost.params_active / 1e9, 2) == 3.58
    assert round((cost.params_active - 2688 * VOCAB) / 1e9, 2) == 3.23


def test_nemotron_3_nano_keeps_the_state_that_its_sizes_say() -> None:
    cost = nano().cost(4096)
    assert cost.kv_bytes_per_token == 6 * 2 * 2 * 128 * BITS["bfloat16"] / 8
    assert cost.ssm_state_bytes == 23 * 64 * 64 * 128 * 4
    assert cost.conv_state_bytes == 23 * (4096 + 2 * 8 * 128) * 3 * 4


@pytest.mark.parametrize(("seq_len", "six_n", "megatron"), [(4096, 0.85, 1.07), (65_536, 0.59, 1.05)])
def test_other_conventions_stand_to_the_exact_one_as_published_shapes_say(
    seq_len: int, six_n: float, megatron: float
) -> None:
    cost = nano().cost(seq_len)
    d = 2688
    assert round(6 * (cost.params_active - 2 * d * VOCAB) / cost.flops_train, 2) == six_n
    # Megatron's formula, forward per token: d_inner is taken to be 2 d, router and convolution are left out.
    d_inner, d_q = 2 * d, 32 * 128
    attention = 4 * d * d_q * (1 + 2 / 32) + 2 * seq_len * d_q
    mamba = 2 * d * (2 * d_inner + 2 * 8 * 128 + 64) + 7 * d_inner * 128 + 2 * d_inner * d
    experts = 4 * d * 1856 * 6 + 4 * d * 3712
    formula = 6 * attention + 23 * mamba + 23 * experts + 2 * d * VOCAB
    assert round(formula / cost.flops_fwd, 2) == megatron


def test_nemotron_h_8b_counts_to_print() -> None:
    blocks = {
        "M": {"n_heads": 128, "d_head": 64, "d_state": 128, "n_groups": 8},
        "*": {"n_heads": 32, "n_kv_heads": 8, "d_head": 128},
        "-": {"d_ff": 21_504},
    }
    cost = nemotron(H_8B, 4096, blocks).cost(8192)
    assert round(cost.params_total / 1e9, 1) == 8.1
    assert cost.params_active == cost.params_total


@pytest.mark.parametrize(
    ("variant", "total", "active"), [("baseline", 72.6, 8.10), ("acc", 72.8, 8.04), ("eff", 72.8, 5.92)]
)
def test_the_hybrids_of_the_latent_moe_paper_count_to_print(variant: str, total: float, active: float) -> None:
    standard = MoEConfig(n_experts=128, top_k=6, d_expert=2688, n_shared=2, d_shared=2688)
    experts = {
        "baseline": standard,
        "acc": latent_acc(standard, 4096, 1024),
        "eff": latent_eff(standard, 4096, 1024),
    }[variant]
    blocks = {
        "M": {"n_heads": 128, "d_head": 64, "d_state": 128, "n_groups": 8},
        "*": {"n_heads": 32, "n_kv_heads": 8, "d_head": 128},
        "E": experts,
    }
    ledger = nemotron("ME" * 24 + "****", 4096, blocks).ledger(4096)
    # The print leaves out the routers' weights. It does not say the vocabulary: with this one active parameters
    # are 8.10, 8.04 and 5.92 billion, where it says 8.09, 8.02 and 5.91.
    router = sum(row.entry.params for row in ledger if row.entry.component == "router")
    assert round((ledger.total("params") - router) / 1e9, 1) == total
    assert round((ledger.total("params_active") - router) / 1e9, 2) == active
