"""Import and export: supported models are unchanged, and unsupported features are refused by name."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exchanged_models import config, drawn, edit, same
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import explore.interop.folder
from explore.blocks import BLOCKS, BlockKind, Mamba2Config
from explore.data import load_tokenizer
from explore.data.tokenizer import Tokenizer
from explore.interop import (
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    check,
    from_hf,
    load_model_folder,
    random_config,
    save_hf,
    save_model_folder,
    to_hf,
)
from explore.interop.megatron import megatron_arguments
from explore.interop.names import to_ours, to_theirs
from explore.interop.nemotron_h import KINDS as NEMOTRON_H
from explore.model import LanguageModel, ModelConfig

TEXT = "Emma Woodhouse,\n\n handsome <|endoftext|> clever, né 1816 ☃"


def tokens(model: LanguageModel, seq_len: int = 21) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, seq_len), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("number", range(8))
def test_transformers_computes_the_same_logits_and_gradients(number: int) -> None:
    case = check(0, number)
    assert case.logits <= LOGIT_TOLERANCE
    assert case.gradients <= GRADIENT_TOLERANCE, case.parameter


@pytest.mark.slow
def test_transformers_computes_the_same_logits_for_a_hundred_random_models() -> None:
    cases = [check(1, number) for number in range(100)]
    assert max(case.logits for case in cases) <= LOGIT_TOLERANCE
    assert max(case.gradients for case in cases) <= GRADIENT_TOLERANCE


def test_the_random_models_have_everything_that_can_be_exchanged() -> None:
    models = [random_config(random.Random(f"0 {number}")) for number in range(50)]
    assert all(set(model.pattern) == set("M*-E") for model in models)
    for of in (
        lambda m: m.tie_embeddings,
        lambda m: m.blocks["E"].d_latent is None,
        lambda m: m.blocks["E"].normalize_weights,
        lambda m: m.blocks["E"].routed_scaling_factor == 1,
        lambda m: m.blocks["E"].n_shared > 1,
        lambda m: m.blocks["E"].top_k == 1,
        lambda m: m.blocks["M"].n_groups > 1,
        lambda m: m.blocks["*"].n_kv_heads < m.blocks["*"].n_heads,
    ):
        assert {bool(of(model)) for model in models} == {False, True}


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_an_exported_model_is_imported_unchanged(tie_embeddings: bool) -> None:
    model = drawn(config(tie_embeddings=tie_embeddings))
    back = from_hf(to_hf(model))
    assert back.config == model.config
    assert same(back, model)
    assert (back.head.weight is back.embedding.weight) == tie_embeddings


def test_the_exported_model_shares_no_memory_with_ours() -> None:
    model = drawn(config())
    theirs, before = to_hf(model), model.head.weight.clone()
    with torch.no_grad():
        theirs.lm_head.weight.zero_()
    assert torch.equal(model.head.weight, before)


def test_half_precision_weights_are_read_as_fp32() -> None:
    theirs = to_hf(drawn(config())).to(torch.bfloat16)
    model = from_hf(theirs)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.head.weight, theirs.lm_head.weight.float())


def test_renaming_to_transformers_and_back_changes_nothing() -> None:
    model = drawn(config("ME*-/*E/*E", mtp={"shared": False, "pattern": "*E", "n_depths": 2}))
    theirs = to_theirs(model.state_dict(), model.config)
    assert {name for name in theirs if "enorm" in name or "final" in name} == {
        *("mtp.layers.0.enorm.weight", "mtp.layers.1.final_layernorm.weight"),
        *("mtp.layers.2.enorm.weight", "mtp.layers.3.final_layernorm.weight"),
    }
    back = to_ours(theirs, model.config)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        config(),
        config(tie_embeddings=True, norm_eps=1e-6, blocks={"M": {"norm_eps": 1e-6}}),
        config("ME*-/*E/*E"),
        config("MM*", blocks={"E": {"d_latent": None}}),
        config("MX", blocks={"X": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1, "d_head": 4}}),
        config(mtp={"pattern": "-*", "n_depths": 3, "shared": False}),
    ],
    ids=lambda model: f"{model.pattern} {model.mtp and model.mtp.n_depths} {model.tie_embeddings}",
)
def test_an_exported_folder_loads_in_transformers_and_is_imported_unchanged(model: ModelConfig, tmp_path: Path) -> None:
    ours = drawn(model)
    save_hf(ours, tmp_path / "hf")
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(theirs(tokens(ours)).logits, ours(tokens(ours)), rtol=0, atol=1e-4)
    back = from_hf(tmp_path / "hf")
    assert back.config == model
    assert same(back, ours)


def test_a_folder_that_transformers_wrote_is_read(tmp_path: Path) -> None:
    ours = drawn(config())
    for original in (True, False):  # experts one by one, and stacked
        to_hf(ours).save_pretrained(tmp_path / str(original), save_original_format=original)
        assert same(from_hf(tmp_path / str(original)), ours)
    to_hf(ours).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert same(from_hf(tmp_path / "sharded"), ours)


def test_a_checkpoint_without_our_config_gives_the_same_model(tmp_path: Path) -> None:
    ours = drawn(config("ME*-/*E/*E"))
    save_hf(ours, tmp_path / "hf")
    edit(tmp_path / "hf", explore_model=None)
    back = from_hf(tmp_path / "hf")
    assert same(back, ours)
    assert torch.equal(back(tokens(ours)), ours(tokens(ours)))


@pytest.mark.parametrize("name", ["bytes", "austen-bpe-2048"])
def test_the_exported_tokenizer_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(name)
    save_hf(drawn(config(vocab_size=2048)), tmp_path / "hf", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eot_id
    again = load_tokenizer(str(tmp_path / "hf" / "tokenizer.json"))
    assert (again.encode(TEXT), again.eot_id) == (tokenizer.encode(TEXT), tokenizer.eot_id)


def test_a_tokenizer_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    class Odd(Tokenizer):
        name, vocab_size, eot_id, content_hash, token_bytes = "odd", 300, 0, "", None

        def encode_batch(self, texts: Any) -> Any: ...

        def decode(self, ids: Any) -> str:
            return ""

    with pytest.raises(ValueError, match="tokenizer: 'odd' cannot be written"):
        save_hf(drawn(config()), tmp_path / "hf", Odd())
    assert not list(tmp_path.iterdir())


def test_the_model_card_has_the_values_of_the_record(tmp_path: Path) -> None:
    record = {
        "name": "small",
        "key": "abc",
        "seed": 3,
        "corpus": "austen",
        "val_bpb": 1.25,
        "tokens": 10**6,
        "lr": None,
    }
    save_hf(drawn(config("ME*-/*E/*E", tie_embeddings=True)), tmp_path / "hf", load_tokenizer("bytes"), record)
    card = (tmp_path / "hf" / "README.md").read_text()
    for part in ("# small", "`ME*-`", "| abc |", "| 1.2500 |", "| 1,000,000 |", "public domain", "mtp.*", "twice"):
        assert part in card
    assert "learning rate" not in card


def test_names_in_the_model_card_are_escaped(tmp_path: Path) -> None:
    name = "a|b\n# c <script>alert(1)</script> [x](javascript:y) ![z](http://w) `code`"
    save_hf(drawn(config()), tmp_path / "hf", load_tokenizer("bytes"), {"name": name, "corpus": name, "run": name})
    card = (tmp_path / "hf" / "README.md").read_text()
    shown = r"a\|b # c &lt;script&gt;alert(1)&lt;/script&gt; \[x\](javascript:y) !\[z\](http://w) \`code\`"
    assert f"\n# {shown}\n" in card
    assert f"| corpus | {shown} |" in card
    assert card.count(shown) == 3
    assert "<script>" not in card
    assert len(re.findall(r"^# ", card, flags=re.MULTILINE)) == 1


@pytest.mark.slow
def test_a_process_without_this_package_loads_the_folder(tmp_path: Path) -> None:
    ours = drawn(config("ME*-/*E", tie_embeddings=True))
    save_hf(ours, tmp_path / "hf", load_tokenizer("bytes"))
    ids = torch.tensor([load_tokenizer("bytes").encode(TEXT)])
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"ids = AutoTokenizer.from_pretrained('hf')({TEXT!r}, return_tensors='pt').input_ids\n"
        "torch.save(AutoModelForCausalLM.from_pretrained('hf')(ids).logits.detach(), 'logits.pt')\n"
        "assert 'explore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(theirs, ours(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_our_own_folder_is_read_unchanged(tie_embeddings: bool, tmp_path: Path) -> None:
    ours = drawn(config("ME*-/*E", tie_embeddings=tie_embeddings))
    save_model_folder(ours, tmp_path / "own")
    back = load_model_folder(tmp_path / "own")
    assert back.config == ours.config
    assert same(back, ours)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (config(blocks={"E": {"router_score": "softmax"}}), "blocks.E.router_score: 'softmax' cannot be written for"),
        (config(blocks={"E": {"router_input": "latent"}}), "blocks.E.router_input: 'latent' .* only 'model' can"),
        (config(blocks={"E": {"latent_norm": "input"}}), "blocks.E.latent_norm: 'input'"),
        (config(blocks={"E": {"bias": True}}), "blocks.E.bias: True"),
        (config(blocks={"E": {"activation": "swiglu"}}), "blocks.E.activation: 'swiglu'"),
        (config(blocks={"E": {"n_shared": 0}}), "blocks.E.n_shared: 0 .* only 1 or more can"),
        (config(blocks={"E": {"n_experts": 1, "top_k": 1}}), "blocks.E.n_experts: 1"),
        (config(blocks={"-": {"activation": "swiglu"}}), "blocks.-.activation: 'swiglu'"),
        (config(blocks={"*": {"rope_theta": 1e4}}), r"blocks.\*.rope_theta: 10000.0 .* only None can"),
        (config(blocks={"*": {"window": 8}}), r"blocks.\*.window: 8"),
        (config(blocks={"*": {"qk_norm": True}}), r"blocks.\*.qk_norm: True"),
        (config(blocks={"*": {"sinks": True}}), r"blocks.\*.sinks: True"),
        (config(blocks={"*": {"output_gate": True}}), r"blocks.\*.output_gate: True"),
        (config(blocks={"*": {"d_conv": 4}}), r"blocks.\*.d_conv: 4"),
        (config(blocks={"E": {"shared_gate": True}}), "blocks.E.shared_gate: True"),
        (config(blocks={"*": {"bias": "qkv"}}), r"blocks.\*.bias: 'qkv'"),
        (config(blocks={"M": {"norm_eps": 1e-6}}), "blocks.M.norm_eps: 1e-06 .* only 1e-05 can"),
        (config("M-F", blocks={"F": {"kind": "mlp", "d_ff": 48}}), "blocks.F.d_ff: 48 differs from 24 of '-'"),
        (config("M/*E"), "mtp: transformers has no module"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_nemotron_h_lacks_are_refused_by_name(model: ModelConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        to_hf(model.build())
    if model.mtp is None:
        with pytest.raises(ValueError, match=message):
            save_hf(model.build(), tmp_path / "hf")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind", [kind for kind in BLOCKS if kind.config not in NEMOTRON_H], ids=lambda kind: kind.config.__name__
)
def test_a_kind_of_block_that_the_target_lacks_is_refused_by_name(kind: BlockKind) -> None:
    model = ModelConfig(d_model=32, vocab_size=300, pattern=kind.letter, blocks={kind.letter: kind.example})
    for target, write in (
        ("nemotron_h", lambda: to_hf(model.build())),
        ("Megatron-LM", lambda: megatron_arguments(model)),
    ):
        message = f"blocks.{kind.letter}.kind: {kind.example.kind!r} cannot be written for {target}; only 'mamba2', "
        with pytest.raises(ValueError, match=re.escape(message)):
            write()


def test_multi_token_prediction_is_left_out_only_on_request() -> None:
    ours = drawn(config("M-/*E"))
    theirs = to_hf(ours, without_mtp=True)
    torch.testing.assert_close(theirs(tokens(ours)).logits, ours(tokens(ours)), rtol=0, atol=1e-4)
    assert from_hf(theirs).config.mtp is None


def test_only_the_clamp_of_dt_differs_from_a_released_config() -> None:
    theirs = to_hf(drawn(config("M", blocks={"M": {"dt_min": 1e-5, "dt_max": 1e-4}})))
    theirs.config.time_step_min = 0.001
    clamped = transformers.NemotronHForCausalLM(theirs.config).eval()
    clamped.load_state_dict(theirs.state_dict())
    ours = from_hf(clamped)
    assert not torch.allclose(clamped(tokens(ours)).logits, ours(tokens(ours)), rtol=0, atol=1e-4)
    clamped.model.layers[0].mixer.time_step_limit = (0.0, float("inf"))
    torch.testing.assert_close(clamped(tokens(ours)).logits, ours(tokens(ours)), rtol=0, atol=1e-4)


def test_a_mamba_ssm_mamba2_state_dict_loads_unchanged() -> None:
    # mamba_ssm.Mamba2(d_model=32, d_state=16, headdim=8, ngroups=2), mamba-ssm 2.3.2.post1: d_inner is 2 d_model
    theirs = {
        "dt_bias": torch.randn(8),
        "A_log": torch.randn(8),
        "D": torch.randn(8),
        "in_proj.weight": torch.randn(2 * 64 + 2 * 2 * 16 + 8, 32),
        "conv1d.weight": torch.randn(64 + 2 * 2 * 16, 1, 4),
        "conv1d.bias": torch.randn(64 + 2 * 2 * 16),
        "norm.weight": torch.randn(64),
        "out_proj.weight": torch.randn(32, 64),
    }
    mixer = Mamba2Config(n_heads=8, d_head=8, d_state=16, n_groups=2).build(32)
    mixer.load_state_dict(theirs)
    assert all(torch.equal(weight, theirs[name]) for name, weight in mixer.state_dict().items())


def test_the_module_of_folders_reads_no_pickle() -> None:
    source = Path(explore.interop.folder.__file__).read_text()
    assert "torch.load" not in source
    assert "pickle.load" not in source


def test_without_the_extra_import_and_export_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'hybrid-frontier\[hf\]'"):
        to_hf(drawn(config()))


@pytest.mark.parametrize("pattern", ["ME*-", "ME-"])
def test_transformers_generates_the_same_greedy_tokens(pattern: str) -> None:
    ours = drawn(config(pattern))
    prompt = tokens(ours, 9)[:1]
    found = to_hf(ours).generate(prompt, max_new_tokens=5, do_sample=False)
    expected = prompt
    for _ in range(5):
        expected = torch.cat((expected, ours(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, expected)
