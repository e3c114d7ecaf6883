"""Closed forms: sums of the ledger, conventions, and published counts to the printed digits."""

from __future__ import annotations

import json
import math
from typing import Any

import jaxtyping
import pytest
import torch
from command_line import run
from hypothesis import given
from hypothesis import strategies as st

from explore.blocks import BLOCKS, AttentionConfig, MoEConfig
from explore.cost import (
    BITS,
    CONVENTIONS,
    By,
    Cost,
    Dtypes,
    Entry,
    attended_keys,
    decode_bytes,
    diff,
    flops_train,
    matrix,
    product,
    vector,
    visible_keys,
)
from explore.model import ModelConfig, MTPConfig
from explore.number_formats import ELEMENTS, FORMATS, SCALE_BITS
from explore.ops import StateRounding, state_rounding
from explore.presets import preset
from explore.roofline import Deployment, hardware

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}
LETTERS = "".join(EXAMPLES)
VOCAB = 131_072


@given(seq=st.integers(1, 40), window=st.none() | st.integers(1, 60))
def test_attended_keys_are_counted_by_the_mask(seq: int, window: int | None) -> None:
    pairs = [(q, k) for q in range(seq) for k in range(q + 1) if window is None or q - k < window]
    assert attended_keys(seq, window) == len(pairs)
    assert visible_keys(seq, window) == sum(q == seq - 1 for q, _ in pairs)


def test_a_matrix_spends_two_flops_a_weight_and_token_and_a_vector_none() -> None:
    expected = Entry("a", 15, 15, 15, 2 * 15 * 7, 2 * 15, sums_over=(3,))
    assert matrix("a", 3, 5, 7) == product("a", 15, 7, (3,)) == expected
    assert matrix("a", 3, 5, 7, bias=True) == expected._replace(params=20, params_active=20, params_read=20)
    assert vector("a", 4) == Entry("a", 4, 4, 4)


@given(pattern=st.text(LETTERS, min_size=1, max_size=8), tied=st.booleans(), seq=st.integers(1, 50), mtp=st.booleans())
def test_totals_are_the_sums_of_the_rows_for_every_folding(pattern: str, tied: bool, seq: int, mtp: bool) -> None:
    depths = MTPConfig(pattern="*E", n_depths=2) if mtp else None
    model = ModelConfig(d_model=16, vocab_size=50, pattern=pattern, blocks=EXAMPLES, tie_embeddings=tied, mtp=depths)
    dtypes = Dtypes(weight="float4", kv="float8", state="bfloat16", activation="float32")
    ledger = model.ledger(seq)
    cost = Cost.of(ledger, dtypes)
    assert cost == model.cost(
        seq, weight_dtype="float4", kv_dtype="float8", state_dtype="bfloat16", activation_dtype="float32"
    )
    main = [row.entry for row in ledger if row.letter != "/"]
    extra = [row.entry for row in ledger if row.letter == "/"]
    assert (cost.params_total, cost.params_mtp) == (sum(e.params for e in main), sum(e.params for e in extra))
    assert cost.params_active == sum(e.params_active for e in main)
    assert cost.flops_fwd * seq == pytest.approx(sum(e.flops_seq for e in (*main, *extra)), rel=1e-12)
    assert cost.flops_mtp * seq == pytest.approx(sum(e.flops_seq for e in extra), rel=1e-12)
    assert cost.flops_train == 3 * cost.flops_fwd
    assert cost.flops_decode == sum(e.flops_step for e in main)
    assert cost.flops_prefill == sum(e.flops_step if e.component == "head" else e.flops_seq for e in main)
    assert cost.weight_bytes == cost.params_total / 2
    assert cost.kv_bytes_per_token == sum(e.kv_numel for e in main)
    assert (cost.ssm_state_bytes, cost.conv_state_bytes) == (
        2 * sum(e.ssm_numel for e in main),
        2 * sum(e.conv_numel for e in main),
    )
    foldings: tuple[By, ...] = ("letter", "layer", "component")
    for records in [ledger.fold(by, dtypes) for by in foldings] + [ledger.to_records(dtypes)]:
        assert sum(record["params"] for record in records) == cost.params_total + cost.params_mtp
        for name in ("flops_fwd", "flops_prefill", "flops_decode", "kv_bytes", "decode_bytes", "all_to_all_bytes"):
            assert sum(record[name] for record in records) == pytest.approx(getattr(cost, name), rel=1e-9)
    for by in foldings:
        assert sum(record["share"] for record in ledger.fold(by)) == pytest.approx(1)
    by_letter = {record["letter"]: record["layers"] for record in ledger.fold("letter")}
    assert by_letter == {"": 0} | {letter: pattern.count(letter) for letter in pattern} | ({"/": 0} if mtp else {})


@given(pattern=st.text(LETTERS, min_size=1, max_size=8), seq=st.integers(1, 50))
def test_the_cost_of_a_model_is_its_layers_plus_embedding_and_head(pattern: str, seq: int) -> None:
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
def test_a_nonpositive_length_is_refused(seq_len: int) -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        preset("nemotron-3-nano").ledger(seq_len)


def test_nemotron_3_nano_has_the_state_implied_by_its_sizes() -> None:
    cost = preset("nemotron-3-nano").cost(4096)
    assert cost.kv_bytes_per_token == 6 * 2 * 2 * 128 * BITS["bfloat16"] / 8
    assert cost.ssm_state_bytes == 23 * 64 * 64 * 128 * 4
    assert cost.conv_state_bytes == 23 * (4096 + 2 * 8 * 128) * 3 * 4


@pytest.mark.parametrize(("seq_len", "six_n", "megatron"), [(4096, 0.85, 1.07), (65_536, 0.59, 1.05)])
def test_other_conventions_relate_to_exact_as_computed_from_published_shapes(
    seq_len: int, six_n: float, megatron: float
) -> None:
    ledger = preset("nemotron-3-nano").ledger(seq_len)
    exact = flops_train(ledger, "exact")
    assert exact == pytest.approx(Cost.of(ledger).flops_train)
    assert round(flops_train(ledger, "6nd") / exact, 2) == six_n
    assert round(flops_train(ledger, "megatron") / exact, 2) == megatron


def test_the_megatron_convention_equals_its_formula() -> None:
    d, d_q, seq_len = 2688, 32 * 128, 4096
    d_inner = 2 * d
    attention = 4 * d * d_q * (1 + 2 / 32) + 2 * seq_len * d_q
    mamba = 2 * d * (2 * d_inner + 2 * 8 * 128 + 64) + 7 * d_inner * 128 + 2 * d_inner * d
    experts = 4 * d * 1856 * 6 + 4 * d * 3712
    formula = 6 * attention + 23 * mamba + 23 * experts + 2 * d * VOCAB
    assert flops_train(preset("nemotron-3-nano").ledger(seq_len), "megatron") == pytest.approx(3 * formula)


def test_megatron_counts_latent_experts_and_every_depth_of_multi_token_prediction() -> None:
    d, d_q, seq_len, latent = 4096, 32 * 128, 8192, 1024
    attention = 4 * d * d_q * (1 + 2 / 32) + 2 * seq_len * d_q
    mamba = 2 * d * (4 * d + 2 * 8 * 128 + 128) + 7 * 2 * d * 128 + 4 * d * d
    experts = 4 * latent * 2688 * 22 + 4 * d * latent + 4 * d * 5376
    formula = (8 + 2) * attention + 40 * mamba + (40 + 2) * experts + 2 * d * VOCAB * (1 + 2)
    assert flops_train(preset("nemotron-3-super").ledger(seq_len), "megatron") == pytest.approx(3 * formula)


def test_palm_counts_six_a_parameter_and_attention_not_halved() -> None:
    model, seq_len = preset("llama-3.1-8b"), 8192
    cost = model.cost(seq_len)
    formula = 6 * cost.params_active_no_input_embedding + 12 * 32 * 32 * 128 * seq_len
    assert flops_train(model.ledger(seq_len), "palm") == formula
    assert flops_train(model.ledger(seq_len), "6nd") == 6 * cost.params_active_no_embeddings


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_multi_token_prediction_is_counted_with_products(convention: str) -> None:
    model = preset("nemotron-3-super")
    more, less = (
        flops_train(each.ledger(4096), convention) for each in (model, model.model_copy(update={"mtp": None}))
    )
    assert (more > less) == (convention in ("exact", "megatron"))
    assert more >= less


@pytest.mark.parametrize("other", ["megatron", "palm", "6nd"])
@pytest.mark.parametrize("name", ["nemotron-3-super", "gpt-oss-20b", "deepseek-v3"])
def test_a_diff_names_lines_that_add_up_to_the_difference(name: str, other: str) -> None:
    ledger = preset(name).ledger(4096)
    lines = diff(ledger, "exact", other)
    difference = flops_train(ledger, other) - flops_train(ledger, "exact")
    assert sum(line["difference"] for line in lines) == pytest.approx(difference)
    assert all(line["exact"] != line[other] for line in lines)
    sizes = [abs(line["difference"]) for line in lines]
    assert sizes == sorted(sizes, reverse=True)
    assert diff(ledger, "exact", "exact") == []


def test_an_unknown_convention_or_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="convention must be one of exact, megatron, palm, 6nd, got 'flame'"):
        flops_train(preset("nemotron-3-nano").ledger(8), "flame")
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"kv_dtype must be one of float32.*, got 'int3'"):
            Dtypes(kv="int3")  # type: ignore[arg-type]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert set(CONVENTIONS) == {"exact", "megatron", "palm", "6nd"}


def test_definitions_of_active_parameters_differ_as_named() -> None:
    d, cost = 4096, preset("nemotron-3-super").cost(4096)
    assert cost.params_active - cost.params_active_no_input_embedding == d * VOCAB
    assert cost.params_active - cost.params_active_no_embeddings == 2 * d * VOCAB
    assert cost.params_router == cost.params_total - cost.params_total_no_router == 40 * d * 512
    for name in ("params_active", "params_active_no_input_embedding", "params_active_no_embeddings"):
        assert getattr(cost, name) - getattr(cost, f"{name}_no_router") == cost.params_router


def test_a_window_forgets_and_its_bytes_stop_growing() -> None:
    blocks = {"*": AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, window=32)}
    model = ModelConfig(d_model=16, vocab_size=50, pattern="**", blocks=blocks)
    per_token = 2 * 2 * (2 * 8) * 2
    assert [model.cost(seq).kv_bytes for seq in (8, 32, 1000)] == [8 * per_token, 32 * per_token, 32 * per_token]
    assert model.cost(1000).kv_bytes_per_token == per_token


def test_a_batch_reads_dense_weights_once_and_more_experts_as_it_grows() -> None:
    moe = MoEConfig(n_experts=8, top_k=2, d_expert=4, n_shared=0)
    entries = {entry.component: entry for entry in moe.entries(16, 10)}
    one = 2 * 16 * 4 * 2  # bytes of an expert in bf16
    bf16 = Dtypes()
    read = [decode_bytes(entries["experts"], bf16, batch) for batch in (1, 2, 1000)]
    # Two tokens: each expert is missed by both with probability (6/8)^2.
    assert read == pytest.approx([2 * one, 8 * one * (1 - 0.75**2), 8 * one])
    assert decode_bytes(entries["router"], bf16, 1000) == decode_bytes(entries["router"], bf16, 1) == 2 * 16 * 8


def test_a_step_moves_state_both_ways_and_keys_and_values_once() -> None:
    entries = {entry.component: entry for entry in EXAMPLES["M"].entries(16, 10)}
    dtypes = Dtypes(weight="float8", kv="bfloat16", state="float32")
    assert decode_bytes(entries["ssd state update"], dtypes, 3) == 3 * 2 * 4 * (4 * 8 * 16)
    attention = {entry.component: entry for entry in EXAMPLES["*"].entries(16, 10)}["attention"]
    assert decode_bytes(attention, dtypes, 3) == 3 * 2 * 10 * (2 * 2 * 8)


def test_bytes_sent_to_experts_equal_bytes_returned() -> None:
    cost = preset("nemotron-3-super").cost(4096, activation_dtype="float8")
    assert cost.all_to_all_bytes == 40 * 2 * 22 * 1024


@pytest.mark.parametrize("command", ["cost", "roofline"])
@pytest.mark.parametrize(
    ("recipe", "option", "dtype"),
    [
        ("nvfp4", "--weight-dtype", "float8"),
        ("bf16", "--weight-dtype", "bfloat16"),
        ("fp8-ptq", "--kv-dtype", "bfloat16"),
        ("fp8-ptq", "--state-dtype", "bfloat16"),
    ],
)
def test_a_dtype_that_the_recipe_sets_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    recipe: str,
    option: str,
    dtype: str,
) -> None:
    code, out, err = run(capsys, monkeypatch, command, "ME*", "--precision", recipe, option, dtype)
    assert (code, out) == (2, "")
    assert err == f"error: {option}: must not be combined with --precision, whose recipe sets it\n"


def test_a_dtype_that_the_recipe_leaves_open_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--precision", "nvfp4", "--kv-dtype", "float8", "--state-dtype", "bfloat16")
    plain, narrow = (
        json.loads(run(capsys, monkeypatch, "cost", "ME*", *options, "--json")[1]) for options in ((), given)
    )
    for name in ("kv_bytes", "ssm_state_bytes", "conv_state_bytes"):
        assert narrow[name] == plain[name] / 2


@pytest.mark.parametrize(
    "args",
    [
        ("cost", "--list"),
        ("cost", "--published"),
        ("cost", "ME*", "--saved"),
        ("cost", "ME*", "--saved", "--json"),
        ("cost", "ME*", "--diff", "exact,megatron"),
        ("roofline", "--published"),
    ],
)
@pytest.mark.parametrize("recipe", ["nvfp4", "nonsense"])
def test_a_recipe_that_an_answer_does_not_use_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], recipe: str
) -> None:
    code, out, err = run(capsys, monkeypatch, *args, "--precision", recipe)
    (option,) = (arg for arg in args if arg in ("--list", "--published", "--saved", "--diff"))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --precision: must not be combined with {option}, which takes only ")


@pytest.mark.parametrize("format", ["int8", "fp8-blocks", "mxfp8", "nvfp4", "fp8", "bf16"])
def test_the_scales_of_state_are_those_with_which_it_is_rounded(monkeypatch: pytest.MonkeyPatch, format: Any) -> None:
    """Counts the blocks of every tensor that a state rounds, in blocks that do and do not fill the width."""
    sizes: dict[str, Any] = {
        "M": {"n_heads": 2, "d_head": 16, "d_state": 48, "n_groups": 1},
        "G": {"n_heads": 2, "n_key_heads": 1, "d_k": 40, "d_v": 16},
        "*": {"n_heads": 2, "n_kv_heads": 1, "d_head": 160},
        "L": {"n_heads": 2, "kv_rank": 72, "d_nope": 16, "d_rope": 16, "d_v": 16},
    }
    rows: list[int] = []
    real = state_rounding._rounded

    def counted(x: torch.Tensor, *more: Any) -> torch.Tensor:
        rows.extend([x.shape[-1]] * (x.numel() // x.shape[-1]))
        return real(x, *more)

    monkeypatch.setattr(state_rounding, "_rounded", counted)
    for letter, block in sizes.items():
        content = {"d_model": 32, "vocab_size": 12, "pattern": letter, "blocks": {letter: block}}
        config, seq_len = ModelConfig.model_validate(content), 9
        model = config.build().eval()
        model.state_rounding = StateRounding(kv=format, state=format)
        rows.clear()
        with torch.inference_mode():
            model(torch.zeros(1, seq_len, dtype=torch.int64), model.new_state())
        ledger, dtypes = config.ledger(seq_len), Dtypes(kv=format, state=format)
        cost = Cost.of(ledger, dtypes)
        entry = FORMATS[format]
        bits = sum(width * ELEMENTS[entry.element].bits for width in rows)
        bits += sum(SCALE_BITS[entry.scaling] * math.ceil(width / entry.block) for width in rows if entry.block)
        assert cost.kv_bytes + cost.ssm_state_bytes + cost.conv_state_bytes == bits / 8, letter
        for name in ("kv_bytes", "ssm_state_bytes", "conv_state_bytes", "decode_bytes"):
            assert sum(record[name] for record in ledger.to_records(dtypes)) == pytest.approx(getattr(cost, name))
        assert Deployment(config, hardware("H100"), dtypes).state_bytes(seq_len) == bits / 8


def test_scales_of_narrow_keys_and_wide_keys() -> None:
    """An int8 head of 16 elements has one fp32 scale, and one of 256 elements has two."""

    def kv_bytes(d_head: int, format: Any) -> float:
        blocks = {"*": AttentionConfig(n_heads=1, n_kv_heads=1, d_head=d_head)}
        model = ModelConfig(d_model=32, vocab_size=12, pattern="*", blocks=blocks)
        return Cost.of(model.ledger(8), Dtypes(kv=format)).kv_bytes_per_token

    for format in ("int8", "fp8-blocks"):
        assert kv_bytes(16, format) == 2 * (16 + 4)
        assert kv_bytes(256, format) == 2 * (256 + 2 * 4)
    assert kv_bytes(16, "mxfp8") == 2 * (16 + 1)
    assert kv_bytes(48, "mxfp8") == 2 * (48 + 2)
