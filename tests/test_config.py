"""Configs: defaults, refusals and error messages."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from explore.blocks import BLOCKS, AttentionConfig, Mamba2Config
from explore.config import Config, Frozen, FrozenMapping, added_later, explain
from explore.model import ModelConfig

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}
LETTERS = "".join(EXAMPLES)


def model_of(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"d_model": 256, "vocab_size": 50, "pattern": "M*-E", "blocks": {}} | changes)


@given(pattern=st.text(LETTERS + "| ", max_size=12).filter(lambda text: text.strip(" |")), tied=st.booleans())
def test_json_is_an_identity(pattern: str, tied: bool) -> None:
    model = ModelConfig(d_model=16, vocab_size=50, pattern=pattern, blocks=EXAMPLES, tie_embeddings=tied)
    again = ModelConfig.model_validate_json(model.model_dump_json())
    assert (again, hash(again)) == (model, hash(model))
    assert again.blocks.keys() == set(model.pattern)
    assert ModelConfig.model_validate(model.model_dump()) == model
    assert pickle.loads(pickle.dumps(model)) == model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": {"M": {"d_stat": 3}}}, "model.blocks.M.d_stat: unknown field"),
        ({"blocks": {"E": {"top_k": 999}}}, "model.blocks.E.top_k: must be at most n_experts=128, got 999"),
        ({"blocks": {"E": {"latent_norm": "input"}}}, "model.blocks.E.latent_norm: must be 'none' without d_latent"),
        ({"blocks": {"*": {"n_heads": 6, "n_kv_heads": 4}}}, "model.blocks.*.n_kv_heads: must divide n_heads=6, got 4"),
        ({"blocks": {"M": {"n_groups": 3}}}, "model.blocks.M.n_groups: must divide n_heads=8, got 3"),
        (
            {"blocks": {"*": {"rope_theta": 1e4, "d_head": 5}}},
            "model.blocks.*: d_head must be even with rope_theta, got 5",
        ),
        ({"blocks": {"*": {"d_rope": 4}}}, "model.blocks.*.d_rope: must be absent without rope_theta, got 4"),
        (
            {"blocks": {"*": {"rope_theta": 1e4, "d_rope": 130}}},
            "model.blocks.*.d_rope: must be even and at most d_head=64, got 130",
        ),
        (
            {"blocks": {"E": {"n_shared": 0, "shared_gate": True}}},
            "model.blocks.E: shared_gate must be False with n_shared=0, got True",
        ),
        ({"blocks": {"-": {"d_ff": -1}}}, "model.blocks.-.d_ff: must be above 0, got -1"),
        ({"blocks": {"M": {"kind": "mamba2"}}}, "model.blocks.M.n_heads: field required (and 2 more)"),
        ({"blocks": {"M": {"kind": "mamba3"}}}, "model.blocks.M.kind: must be mamba2, "),
        ({"pattern": "MX"}, "model.pattern: unknown letter 'X' at position 2 of 'MX'"),
        ({"pattern": " "}, "model.pattern: ' ' has no layer"),
        ({"pattern": 3}, "model.pattern: "),
        ({"d_model": 0}, "model.d_model: "),
        ({"d_model": "wide"}, "model.d_model: "),
        ({"d_model": 100}, "model.d_model: must be a multiple of 16 and at least 32"),
        ({"d_modl": 1}, "model.d_modl: unknown field"),
        ({"norm_eps": float("nan")}, "model.norm_eps: "),
    ],
)
def test_an_error_names_the_path_and_the_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        model_of(**change)
    line = explain(refusal.value, "model")
    assert line.startswith(message)
    assert "\n" not in line


def test_a_width_without_default_heads_is_allowed_if_heads_are_given() -> None:
    sizes = {"n_heads": 2, "n_kv_heads": 1, "d_head": 5}
    assert model_of(d_model=7, pattern="*", blocks={"*": sizes}).blocks["*"] == AttentionConfig.model_validate(sizes)
    with pytest.raises(ValidationError, match="d_model: must be a multiple of 16"):
        model_of(d_model=7, pattern="*", blocks={"*": {"n_heads": 2}})


def test_sizes_that_are_not_given_follow_d_model() -> None:
    partial, whole = model_of(blocks={"E": {"d_latent": 64}}), model_of()
    assert partial.blocks["E"] == whole.blocks["E"].model_copy(update={"d_latent": 64})
    assert [partial.blocks[letter] for letter in "M*-"] == [whole.blocks[letter] for letter in "M*-"]
    every = model_of(pattern="".join(kind.letter for kind in BLOCKS))
    assert every.blocks == {kind.letter: kind.config.default(256) for kind in BLOCKS}


@pytest.mark.parametrize("d_model", ["256", 256.0])
def test_a_width_of_another_type_is_read_as_a_number(d_model: object) -> None:
    assert model_of(d_model=d_model, pattern="M|E") == model_of(pattern="ME")


def test_a_custom_letter_needs_its_kind_and_all_sizes() -> None:
    own = {"kind": "mamba2", "n_heads": 4, "d_head": 8, "d_state": 16}
    assert model_of(pattern="MX", blocks={"X": own}).layers[1] == Mamba2Config(n_heads=4, d_head=8, d_state=16)


def test_a_letter_that_the_pattern_does_not_use_is_dropped() -> None:
    assert model_of(pattern="M", blocks={"E": {"top_k": 3}}) == model_of(pattern="M")


def test_a_config_is_frozen_and_independent_of_order() -> None:
    one, other = model_of(blocks=EXAMPLES), model_of(blocks=dict(reversed(EXAMPLES.items())))
    assert (one, hash(one), one.model_dump_json()) == (other, hash(other), other.model_dump_json())
    assert len({one, other, model_of()}) == 2
    with pytest.raises(ValidationError):
        one.d_model = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        one.blocks["M"].n_heads = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        one.blocks["M"] = EXAMPLES["E"]  # type: ignore[index]


@given(items=st.dictionaries(st.text(max_size=3), st.integers(), max_size=5))
def test_a_frozen_mapping_equals_its_source(items: dict[str, int]) -> None:
    frozen = FrozenMapping(items)
    assert frozen == items
    assert list(frozen) == sorted(items)
    assert len(frozen) == len(items)
    assert hash(frozen) == hash(FrozenMapping(dict(reversed(items.items()))))
    assert pickle.loads(pickle.dumps(frozen)) == frozen
    items["new key"] = 1
    assert "new key" not in frozen
    with pytest.raises(AttributeError):
        frozen._items = {}


# Fields added after experiments had keys


class Part(Config):
    width: int


class LaterPart(Config):
    width: int
    gate: bool = added_later(False)
    inner: Part = added_later(Part(width=1))


class Whole(Config):
    parts: Frozen[str, LaterPart]
    pair: tuple[LaterPart, ...] = ()


def test_a_new_field_with_its_default_changes_neither_json_nor_fingerprint() -> None:
    before, after = Part(width=3), LaterPart(width=3, gate=False, inner=Part(width=1))
    assert after.model_dump() == before.model_dump() == after.fingerprint() == {"width": 3}
    assert after.model_dump_json() == before.model_dump_json()
    whole = Whole(parts={"a": after}, pair=(after, after))
    assert whole.fingerprint() == {"parts": {"a": {"width": 3}}, "pair": [{"width": 3}] * 2}


def test_a_new_field_with_another_value_is_written_and_changes_the_fingerprint() -> None:
    part = LaterPart(width=3, gate=True, inner=Part(width=2))
    whole = Whole(parts={"a": part, "b": LaterPart(width=4)}, pair=(part,))
    content = {"width": 3, "gate": True, "inner": {"width": 2}}
    assert whole.fingerprint() == {"parts": {"a": content, "b": {"width": 4}}, "pair": [content]}
    assert Whole.model_validate_json(whole.model_dump_json()) == whole


def test_a_nested_config_with_files_counts_by_its_own_fingerprint() -> None:
    class File(Config):
        path: str

        def fingerprint(self) -> dict[str, Any]:
            return {"digest": len(self.path)}

    class Holder(Config):
        one: File
        some: tuple[File, ...]
        named: Frozen[str, File]

    file = File(path="/a/b")
    holder = Holder(one=file, some=(file,), named={"x": file})
    assert holder.fingerprint() == {"one": {"digest": 4}, "some": [{"digest": 4}], "named": {"x": {"digest": 4}}}
    assert holder.model_dump()["one"] == {"path": "/a/b"}
