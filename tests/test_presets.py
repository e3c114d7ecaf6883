"""Published systems: published counts, an independent implementation, and misspelt names."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

import explore
from explore.blocks import MoEConfig
from explore.cost import attended_keys
from explore.model import ModelConfig, MTPConfig
from explore.presets import PRESETS, from_released, language_part, preset, published_table

LETTERS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


def nemotron(pattern: str, d_model: int, mamba: tuple[int, int, int], heads: tuple[int, int], **sizes: Any) -> Any:
    n_heads, d_head, d_state = mamba
    return transformers.NemotronHConfig(
        layers_block_type=[LETTERS[letter] for letter in pattern],
        hidden_size=d_model,
        vocab_size=131_072,
        mamba_num_heads=n_heads,
        mamba_head_dim=d_head,
        ssm_state_size=d_state,
        n_groups=8,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=128,
        **sizes,
    )


def experts(n: int, top_k: int, d_expert: int, d_shared: int, d_latent: int | None = None) -> dict[str, Any]:
    return {
        "n_routed_experts": n,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": d_expert,
        "moe_shared_expert_intermediate_size": d_shared,
        "moe_latent_size": d_latent,
    }


def pattern_of(name: str) -> str:
    return preset(name).pattern


def llama(d_model: int, n_layers: int, heads: tuple[int, int], d_ff: int) -> Any:
    return transformers.LlamaConfig(
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        intermediate_size=d_ff,
        vocab_size=128_256,
        tie_word_embeddings=False,
    )


def qwen3_moe(d_model: int, n_layers: int, n_heads: int, d_expert: int) -> Any:
    return transformers.Qwen3MoeConfig(
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=d_expert,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151_936,
        tie_word_embeddings=False,
        mlp_only_layers=[],
        decoder_sparse_step=1,
    )


def gpt_oss(n_layers: int, n_experts: int) -> Any:
    return transformers.GptOssConfig(
        hidden_size=2880,
        num_hidden_layers=n_layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=2880,
        num_local_experts=n_experts,
        num_experts_per_tok=4,
        vocab_size=201_088,
        tie_word_embeddings=False,
    )


def deepseek(n_dense: int, n_heads: int, n_experts: int, vocab_size: int) -> Any:
    return transformers.DeepseekV3Config(
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        first_k_dense_replace=n_dense,
        intermediate_size=18_432,
        moe_intermediate_size=2048,
        n_routed_experts=n_experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
    )


BUILDS: dict[str, Any] = {
    "nemotron-h-8b": lambda n: nemotron(pattern_of(n), 4096, (128, 64, 128), (32, 8), intermediate_size=21_504),
    "nemotron-h-56b": lambda n: nemotron(pattern_of(n), 8192, (256, 64, 256), (64, 8), intermediate_size=32_768),
    "nemotron-h-47b": lambda n: nemotron(pattern_of(n), 8192, (256, 64, 256), (64, 8), intermediate_size=30_720),
    "nemotron-nano-2-12b": lambda n: nemotron(pattern_of(n), 5120, (128, 80, 128), (40, 8), intermediate_size=20_480),
    "nemotron-nano-2-9b": lambda n: nemotron(pattern_of(n), 4480, (128, 80, 128), (40, 8), intermediate_size=15_680),
    "nemotron-3-nano": lambda n: nemotron(pattern_of(n), 2688, (64, 64, 128), (32, 2), **experts(128, 6, 1856, 3712)),
    "nemotron-3-super": lambda n: nemotron(
        pattern_of(n), 4096, (128, 64, 128), (32, 2), **experts(512, 22, 2688, 5376, 1024)
    ),
    "nemotron-3-ultra": lambda n: nemotron(
        pattern_of(n), 8192, (256, 64, 128), (64, 2), **experts(512, 22, 5120, 10_240, 2048)
    ),
    "llama-3.1-8b": lambda n: llama(4096, 32, (32, 8), 14_336),
    "llama-3.1-70b": lambda n: llama(8192, 80, (64, 8), 28_672),
    "llama-3.1-405b": lambda n: llama(16_384, 126, (128, 8), 53_248),
    "qwen2.5-72b": lambda n: transformers.Qwen2Config(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=29_568,
        vocab_size=152_064,
        tie_word_embeddings=False,
    ),
    "qwen3-8b": lambda n: transformers.Qwen3Config(
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12_288,
        vocab_size=151_936,
        tie_word_embeddings=False,
    ),
    "qwen3-30b-a3b": lambda n: qwen3_moe(2048, 48, 32, 768),
    "qwen3-235b-a22b": lambda n: qwen3_moe(4096, 94, 64, 1536),
    "gpt-oss-20b": lambda n: gpt_oss(24, 32),
    "gpt-oss-120b": lambda n: gpt_oss(36, 128),
    "deepseek-v3": lambda n: deepseek(3, 128, 256, 129_280),
    "kimi-k2": lambda n: deepseek(1, 64, 384, 163_840),
}
"""The configurations of the released checkpoints, in the words of transformers."""


@pytest.mark.parametrize("name", BUILDS)
def test_an_independent_build_has_exactly_the_same_parameters(name: str) -> None:
    config: PreTrainedConfig = BUILDS[name](name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == preset(name).cost(1).params_total


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].published])
def test_published_counts_are_reproduced_to_the_printed_digits(name: str) -> None:
    rows = [row for row in published_table() if row["preset"] == name]
    assert [row for row in rows if not row["agrees"]] == []
    assert len(rows) == len(PRESETS[name].published)
    assert all(row["source"] for row in rows)


def test_the_published_table_detects_a_wrong_count() -> None:
    number = PRESETS["nemotron-nano-2-9b"].published[0]
    assert number.printed == "8.89"
    assert [number.agrees(params) for params in (8_884_999_999, 8_885_000_001, 8_894_999_999, 8_895_000_001)] == [
        False,
        True,
        True,
        False,
    ]


LAYERS = {
    "nemotron-h-8b": (24, 24, 4),
    "nemotron-h-56b": (54, 54, 10),
    "nemotron-h-47b": (45, 48, 5),
    "nemotron-nano-2-12b": (28, 28, 6),
    "nemotron-nano-2-9b": (27, 25, 4),
    "nemotron-3-nano": (23, 23, 6),
    "nemotron-3-super": (40, 40, 8),
    "nemotron-3-ultra": (48, 48, 12),
    "latentmoe-hybrid-73b-acc": (24, 24, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patterns_have_the_published_layers_and_common_rules(name: str) -> None:
    pattern = preset(name).pattern
    counts = Counter(pattern)
    assert (counts["M"], counts["-"] + counts["E"], counts["*"]) == LAYERS[name]
    assert pattern[0] == "M"
    assert pattern[-1] in "-E"
    assert len(re.findall(r"M\*[-E]", pattern)) == counts["*"]


def test_every_preset_is_a_model_and_reads_back_from_its_json() -> None:
    for name in PRESETS:
        model = preset(name)
        assert ModelConfig.model_validate_json(model.model_dump_json()) == model
        assert model.cost(4096).params_total >= model.cost(4096).params_active
    assert explore.preset("qwen3-8b") is preset("qwen3-8b")


@pytest.mark.parametrize("size", ["16b", "95b", "hybrid-73b"])
def test_latent_variants_follow_their_rules(size: str) -> None:
    base, acc, eff = (preset(f"latentmoe-{size}-{variant}") for variant in ("base", "acc", "eff"))
    moes = [model.blocks["E"] for model in (base, acc, eff)]
    assert all(isinstance(moe, MoEConfig) for moe in moes)
    assert [moe.top_k for moe in moes] == [6, {"16b": 23}.get(size, 22), 6]  # type: ignore[attr-defined]
    assert len({moe.d_expert for moe in moes}) == 1  # type: ignore[attr-defined]
    costs = [model.cost(4096) for model in (base, acc, eff)]
    assert costs[1].params_total == costs[2].params_total == pytest.approx(costs[0].params_total, rel=0.01)
    assert costs[1].params_active == pytest.approx(costs[0].params_active, rel=0.01)
    assert costs[2].params_active < 0.85 * costs[0].params_active


def test_super_and_ultra_predict_two_more_tokens_with_one_set_of_weights() -> None:
    for name in ("nemotron-3-super", "nemotron-3-ultra"):
        model = preset(name)
        assert model.mtp == MTPConfig(pattern="*E", n_depths=2, shared=True)
        with torch.device("meta"):
            built = model.build()
        assert sum(weight.numel() for weight in built.mtp.parameters()) == model.cost(1).params_mtp


def test_llama_nemotron_is_as_heterogeneous_as_released() -> None:
    small, large = preset("llama-nemotron-super-49b"), preset("llama-nemotron-ultra-253b")
    assert (small.pattern.count("*"), large.pattern.count("*")) == (49, 64)
    ffns = [block for block in large.layers if block.kind == "mlp"]
    assert (len(ffns), sum(block.d_ff > 300_000 for block in ffns)) == (162 - 81, 4)  # type: ignore[attr-defined]
    with torch.device("meta"):
        built = small.build()
    assert sum(weight.numel() for weight in built.parameters()) == small.cost(1).params_total


def test_gpt_oss_sees_a_window_on_every_other_layer() -> None:
    cost, seq_len = preset("gpt-oss-20b").ledger(4096), 4096
    attention = [row.entry for row in cost if row.entry.component == "attention"]
    assert [entry.flops_seq for entry in attention] == [
        4 * 64 * 64 * attended_keys(seq_len, window) for window in (128, None)
    ] * 12
    assert [entry.kv_numel_seq for entry in attention] == [2 * 8 * 64 * 128, 2 * 8 * 64 * 4096] * 12


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="preset: 'nemotron-3-nan' is unknown; the nearest are nemotron-3-nano"):
        preset("nemotron-3-nan")
    with pytest.raises(ValueError, match="preset: '###' is unknown \\(explore cost --list shows all\\)"):
        preset("###")


@pytest.mark.parametrize("name", [name for name in BUILDS if name.startswith("nemotron")])
def test_a_released_configuration_is_the_preset(name: str, tmp_path: Path) -> None:
    config = BUILDS[name](name)
    if (mtp := preset(name).mtp) is not None:
        config.num_nextn_predict_layers = mtp.n_depths
        config.mtp_layers_block_type = [LETTERS[letter] for letter in mtp.pattern]
    config.save_pretrained(tmp_path)
    read = preset(str(tmp_path / "config.json"))
    wanted = preset(name)
    assert read.cost(4096) == wanted.cost(4096)
    assert (read.pattern, read.mtp, read.d_model) == (wanted.pattern, wanted.mtp, wanted.d_model)


def test_old_released_configurations_write_their_layers_as_letters() -> None:
    content = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-", "hidden_size": 256, "mamba_num_heads": 8}
    assert from_released(content).pattern == "M-M*-"
    layers = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp"], "hidden_size": 256}
    assert from_released(layers).pattern == "M-"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'nemotron_h', got 'llama'"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act must be 'relu2', .* got 'silu'"),
        ({"use_bias": True}, "use_bias must be False, .*got True"),
        ({"n_group": 8}, "n_group must be 1, .*got 8"),
        ({"layers_block_type": ["mamba", "rnn"]}, "layers_block_type must hold only .*, got 'rnn'"),
        ({"layers_block_type": None}, "layers_block_type: field required, or hybrid_override_pattern"),
        ({"num_experts_per_tok": 99}, "top_k: must be at most n_experts=8, got 99"),
        ({"model_type": None}, "model_type: field required; 'nemotron_h' is the only model that can be read"),
        ({"block_configs": [{"a": 1}]}, "block_configs must be .*, as no other value"),
        ({"num_hidden_layers": 52}, "num_hidden_layers: must be the number of layers in .*, the integer 2, got 52"),
        (
            {"hybrid_override_pattern": "MEM"},
            "layers_block_type: must have the layers of hybrid_override_pattern, got 2 layers and 3",
        ),
        ({"hybrid_override_pattern": "EM"}, "got M and E as layer 0"),
        ({"hybrid_override_pattern": "MM"}, "got E and M as layer 1"),
        ({"head_dim": 64, "attention_head_dim": 128}, "head_dim: must be equal to attention_head_dim, its old name"),
        ({"layers_block_type": "mamba"}, "layers_block_type: must be a list of layer types, got 'mamba'"),
        ({"layers_block_type": [["mamba"]]}, "layers_block_type must hold only "),
        ({"layers_block_type": [], "hybrid_override_pattern": 7}, "hybrid_override_pattern: must be letters, got 7"),
        ({"mlp_hidden_act": "x" * 5000}, "mlp_hidden_act must be 'relu2', .* got 'xxx"),
    ],
)
def test_unsupported_features_of_a_released_configuration_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe"], "hidden_size": 256} | change
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        preset(str(path))
    assert len(str(caught.value)) < 300


def test_layers_in_letters_may_come_as_a_list_and_beside_the_same_layers_by_name() -> None:
    content = {"model_type": "nemotron_h", "hidden_size": 256, "mamba_num_heads": 8, "num_hidden_layers": 4}
    letters = {"hybrid_override_pattern": list("ME|M*")}
    names = {"layers_block_type": ["mamba", "moe", "mamba", "attention"]}
    for fields in (letters, names, {"layer_types": names["layers_block_type"]}, letters | names):
        assert from_released(content | fields).pattern == "MEM*"


def test_old_field_names_mean_the_same_as_new_ones() -> None:
    content = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention"], "hidden_size": 256}
    new = {"head_dim": 32, "n_routed_experts": 16, "n_groups": 4, "conv_kernel": 3, "chunk_size": 64}
    old = {
        "attention_head_dim": 32,
        "num_local_experts": 16,
        "mamba_n_groups": 4,
        "mamba_d_conv": 3,
        "mamba_chunk_size": 64,
    }
    assert from_released(content | new) == from_released(content | old) != from_released(content)
    assert from_released(content | new | old) == from_released(content | new)


@pytest.mark.parametrize("wrapper", ["llm_config", "text_config"])
def test_the_language_model_of_a_vision_language_model_is_read(wrapper: str) -> None:
    content = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp"], "hidden_size": 256}
    wrapped = {"model_type": "Nano_VL", wrapper: content, "vision_config": {"model_type": "radio"}}
    assert language_part(wrapped) == (content, wrapper)
    assert from_released(wrapped) == from_released(content)
    wrapped[wrapper] = content | {"model_type": "llama"}
    with pytest.raises(ValueError, match="model_type must be 'nemotron_h', got 'Nano_VL'"):
        from_released(wrapped)


def test_a_note_says_which_part_of_a_wrapper_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp"], "hidden_size": 256}
    place, printed = tmp_path / "config.json", []
    for record in (content, {"model_type": "Nano_VL", "llm_config": content}):
        place.write_text(json.dumps(record))
        printed.append(command_line.run(capsys, monkeypatch, "cost", place, "--json"))
    (_, plain, silence), (code, wrapped, note) = printed
    assert (code, wrapped, silence) == (0, plain, "")
    assert note == f"note: {place} is a wrapper; its llm_config is read\n"


def test_a_byte_order_mark_before_a_configuration_is_skipped(tmp_path: Path) -> None:
    content = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp"], "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert preset(str(tmp_path / "config.json")) == from_released(content)
