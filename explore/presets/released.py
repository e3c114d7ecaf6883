"""Released configurations: `config.json` of Hugging Face's nemotron_h as a model config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explore.model import ModelConfig

LETTERS: Mapping[str, str] = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}
"""Of the layer types, as they are called now and as they were."""

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
"""What an absent field means, as in transformers' NemotronHConfig."""

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
}
"""Fields with no counterpart here, and the values with which they change nothing."""


def is_released(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a configuration of Hugging Face's, of whatever model."""
    return "model_type" in content


def from_released(content: Mapping[str, Any]) -> ModelConfig:
    """Reads a released configuration.

    Raises:
        ValueError: of another model, or with an option that has no counterpart here.
    """
    if (model_type := content.get("model_type")) != "nemotron_h":
        raise ValueError(f"model_type: {model_type!r} cannot be read; allowed is 'nemotron_h'")
    for field, allowed in FIXED.items():
        if field in content and content[field] not in allowed:
            raise ValueError(f"{field}: {content[field]!r} has no counterpart here; allowed is {allowed[0]!r}")
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
                    "n_shared": 1 if n_shared else 0,  # transformers builds one MLP, whatever their number
                    "d_shared": d_shared if n_shared else None,
                    "normalize_weights": c["norm_topk_prob"],
                    "routed_scaling_factor": c["routed_scaling_factor"],
                },
            },
        }
    )


def _pattern(content: Mapping[str, Any], as_letters: str, as_list: str, absent: str | None) -> str:
    """The layers, which old configurations write as letters and new ones as a list."""
    layers = content.get(as_list) or content.get("layer_types" if absent is None else as_list)
    if layers:
        if unknown := [layer for layer in layers if layer not in LETTERS]:
            raise ValueError(f"{as_list}: {unknown[0]!r} is unknown; allowed are {', '.join(LETTERS)}")
        return "".join(LETTERS[layer] for layer in layers)
    if isinstance(content.get(as_letters), str):
        return str(content[as_letters])
    if absent is None:
        raise ValueError(f"{as_list}: field required, or {as_letters}")
    return absent
