"""Reads released configurations: converts `config.json` of Hugging Face's nemotron_h to a model config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explore.foreign import echo
from explore.model import ModelConfig
from explore.pattern import MTP_MARK, canonical

TARGET = "nemotron_h"

LETTERS: Mapping[str, str] = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}
"""Letters of the layer types, by current and former names."""

OLD_NAMES: Mapping[str, str] = {
    "attention_head_dim": "head_dim",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
}
"""Former field names and their current names."""

WRAPPERS = ("llm_config", "text_config", "language_config")
"""Fields of a vision-language configuration that hold the language model's configuration."""

MARKS = frozenset(
    {"model_type", "architectures", "transformers_version", "hidden_size", "num_hidden_layers", *WRAPPERS}
)
"""Fields found in Hugging Face configurations and never in this kit's JSON."""

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "tie_word_embeddings": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 21_504,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "layer_norm_epsilon": 1e-5,
}
"""Values of absent fields, as in transformers' NemotronHConfig."""

FIXED: Mapping[str, tuple[Any, ...]] = {
    "use_bias": (False,),
    "mlp_bias": (False,),
    "mamba_proj_bias": (False,),
    "attention_bias": (False,),
    "use_conv_bias": (True,),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "sliding_window": (None,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "block_configs": (None,),
}
"""Fields without a counterpart here, and the values at which they have no effect."""


def is_released(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a Hugging Face configuration, of any model."""
    return not MARKS.isdisjoint(content)


def language_part(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Returns the language model's configuration and the field that wraps it, if any."""
    if content.get("model_type") != TARGET:
        for field in WRAPPERS:
            if isinstance(content.get(field), Mapping) and content[field].get("model_type") == TARGET:
                return content[field], field
    return content, None


def with_new_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """Renames former fields to their current names.

    Raises:
        ValueError: a field is present under both names with different values.
    """
    renamed = {field: value for field, value in content.items() if field not in OLD_NAMES}
    for old, new in OLD_NAMES.items():
        if old in content and renamed.setdefault(new, content[old]) != content[old]:
            raise ValueError(
                f"{new}: must be equal to {old}, its old name, got {echo(renamed[new])} and {echo(content[old])}"
            )
    return renamed


def from_released(content: Mapping[str, Any]) -> ModelConfig:
    """Converts a released configuration; for a vision-language model, that of its language model.

    Raises:
        ValueError: another model, an option without a counterpart here, or contradictory fields.
    """
    content = with_new_names(language_part(content)[0])
    if content.get("model_type") is None:
        raise ValueError(f"model_type: field required; {TARGET!r} is the only model that can be read")
    if content["model_type"] != TARGET:
        raise ValueError(f"model_type must be {TARGET!r}, got {echo(content['model_type'])}")
    for field, allowed in FIXED.items():
        if field in content and content[field] not in allowed:
            raise ValueError(
                f"{field} must be {allowed[0]!r}, as no other value has a counterpart here, got {echo(content[field])}"
            )
    c = {field: content.get(field, default) for field, default in DEFAULTS.items()}
    mtp = None
    if c["num_nextn_predict_layers"]:
        layers = _pattern(content, "mtp_hybrid_override_pattern", "mtp_layers_block_type", "*E")
        mtp = {"pattern": layers, "n_depths": c["num_nextn_predict_layers"]}
    n_shared = c["n_shared_experts"] or 0
    d_shared = c["moe_shared_expert_intermediate_size"]
    return ModelConfig.model_validate(
        {
            "d_model": c["hidden_size"],
            "vocab_size": c["vocab_size"],
            "pattern": _pattern(content, "hybrid_override_pattern", "layers_block_type", None),
            "mtp": mtp,
            "tie_embeddings": c["tie_word_embeddings"],
            "norm_eps": c["layer_norm_epsilon"],
            "blocks": {
                "M": {
                    "n_heads": c["mamba_num_heads"],
                    "d_head": c["mamba_head_dim"],
                    "d_state": c["ssm_state_size"],
                    "n_groups": c["n_groups"],
                    "d_conv": c["conv_kernel"],
                    "chunk_size": c["chunk_size"],
                    "norm_eps": c["layer_norm_epsilon"],
                },
                "*": {
                    "n_heads": c["num_attention_heads"],
                    "n_kv_heads": c["num_key_value_heads"] or c["num_attention_heads"],
                    "d_head": c["head_dim"],
                },
                "-": {"d_ff": c["intermediate_size"]},
                "E": {
                    "n_experts": c["n_routed_experts"],
                    "top_k": c["num_experts_per_tok"],
                    "d_expert": c["moe_intermediate_size"],
                    "d_latent": c["moe_latent_size"],
                    "n_shared": 1 if n_shared else 0,  # transformers builds one MLP for any number
                    "d_shared": d_shared if n_shared else None,
                    "normalize_weights": c["norm_topk_prob"],
                    "routed_scaling_factor": c["routed_scaling_factor"],
                },
            },
        }
    )


def _pattern(content: Mapping[str, Any], as_letters: str, as_list: str, absent: str | None) -> str:
    """Returns the layers; old configurations write them as letters, new ones as a list.

    Raises:
        ValueError: no layers are given, or two fields disagree.
    """
    if absent is None and not content.get(as_list) and content.get("layer_types"):
        as_list = "layer_types"
    found = {}
    if layers := content.get(as_list):
        if not isinstance(layers, list | tuple):
            raise ValueError(f"{as_list}: must be a list of layer types, got {echo(layers)}")
        if unknown := [layer for layer in layers if not isinstance(layer, str) or layer not in LETTERS]:
            raise ValueError(f"{as_list} must hold only {', '.join(LETTERS)}, got {echo(unknown[0])}")
        found[as_list] = "".join(LETTERS[layer] for layer in layers)
    if letters := content.get(as_letters):
        if not isinstance(letters, str) and not (
            isinstance(letters, list | tuple) and all(isinstance(letter, str) for letter in letters)
        ):
            raise ValueError(f"{as_letters}: must be letters, got {echo(letters)}")
        found[as_letters] = "".join(letters)
    if not found:
        if absent is None:
            raise ValueError(f"{as_list}: field required, or {as_letters}")
        return absent
    # Layers after a slash belong to multi-token prediction.
    main = {field: canonical(pattern.partition(MTP_MARK)[0]) for field, pattern in found.items()}
    if len(set(main.values())) > 1:
        ours, theirs = main[as_list], main[as_letters]
        layer = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        difference = (
            f"{len(ours)} layers and {len(theirs)}"
            if layer is None
            else f"{ours[layer]} and {theirs[layer]} as layer {layer}"
        )
        raise ValueError(f"{as_list}: must have the layers of {as_letters}, got {difference}")
    n_layers = content.get("num_hidden_layers") if absent is None else None
    if n_layers is not None and n_layers != len(main[next(iter(main))]):
        field, pattern = next(iter(main.items()))
        raise ValueError(
            f"num_hidden_layers: must be the number of layers in {field}, the integer {len(pattern)}, "
            f"got {echo(n_layers)}"
        )
    return found.get(as_letters, found[next(iter(found))])
