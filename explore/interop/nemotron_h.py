"""Converts a model config to the fields of Hugging Face's nemotron_h, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from explore.blocks import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, MoEConfig
from explore.config import explain
from explore.foreign import echo
from explore.interop.refusals import of_kind, one_config_a_kind, refuse, require, standard_pattern
from explore.model import ModelConfig
from explore.presets import from_released, language_part, with_new_names

TARGET = "nemotron_h"
OWN = "explore_model"
"""Field of config.json with the complete model config, since nemotron_h cannot hold all of it."""

UNCLAMPED = 1e-30
"""Value of `time_step_min`, transformers' only limit on dt; not 0, because transformers takes its logarithm."""

INFINITY = {"__float__": "Infinity"}
"""How transformers writes infinity, which JSON lacks."""

UNREAD = ("initializer_range", "n_shared_experts", "time_step_min", "time_step_max")
"""Fields that do not affect the output; reading ignores them."""

KINDS: Mapping[type[BlockConfig], str] = {Mamba2Config: "M", AttentionConfig: "*", MLPConfig: "-", MoEConfig: "E"}
LAYER_TYPES: Mapping[str, str] = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}

ATTENTION: Mapping[str, tuple[Any, ...]] = {
    "rope_theta": (None,),
    "window": (None,),
    "bias": ("none",),
    "qk_norm": (False,),
    "sinks": (False,),
    "output_gate": (False,),
    "d_rope": (None,),
    "d_conv": (None,),
}
MOE: Mapping[str, tuple[Any, ...]] = {
    "activation": ("relu2",),
    "router_score": ("sigmoid",),
    "router_input": ("model",),
    "latent_norm": ("none",),
    "bias": (False,),
    "shared_gate": (False,),
}


def hf_fields(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a nemotron_h config.

    Raises:
        ValueError: nemotron_h cannot express the model; the message names the field.
    """
    blocks = one_config_a_kind(model, KINDS, TARGET)
    mamba, attention = of_kind(blocks, "M", Mamba2Config), of_kind(blocks, "*", AttentionConfig)
    mlp, moe = of_kind(blocks, "-", MLPConfig), of_kind(blocks, "E", MoEConfig)
    fields: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "layers_block_type": _layer_types(model.pattern, model),
        "tie_word_embeddings": model.tie_embeddings,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.std,
        "mlp_hidden_act": "relu2",
        # The cache of transformers fails without an attention layer; multi-token prediction layers do not count.
        "use_cache": any(isinstance(block, AttentionConfig) for block in model.layers),
        OWN: model.model_dump(mode="json"),
    }
    if model.mtp is not None:
        # Number of stored depths, as in the released configurations: 1 if all depths share weights.
        fields["num_nextn_predict_layers"] = model.mtp.n_stored
        fields["mtp_layers_block_type"] = _layer_types(model.mtp.pattern, model)
    if mamba is not None:
        require("blocks.M", mamba, {"norm_eps": (model.norm_eps,)}, TARGET)
        fields |= {
            "mamba_num_heads": mamba.n_heads,
            "mamba_head_dim": mamba.d_head,
            "ssm_state_size": mamba.d_state,
            "n_groups": mamba.n_groups,
            "conv_kernel": mamba.d_conv,
            "chunk_size": mamba.chunk_size,
            "time_step_min": UNCLAMPED,
            "time_step_max": mamba.dt_max,
        }
    if attention is not None:
        require("blocks.*", attention, ATTENTION, TARGET)
        fields |= {
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_kv_heads,
            "head_dim": attention.d_head,
        }
    if mlp is not None:
        require("blocks.-", mlp, {"activation": ("relu2",)}, TARGET)
        fields["intermediate_size"] = mlp.d_ff
    if moe is not None:
        fields |= _moe_fields(moe)
    return fields


def model_config(fields: Mapping[str, Any], names: Iterable[str]) -> ModelConfig:
    """Converts a nemotron_h config to a model config.

    Args:
        fields: content of config.json.
        names: names of the checkpoint's tensors, to count the stored depths of multi-token prediction.

    Raises:
        ValueError: another model, an option without a counterpart here, or fields that contradict each other.
    """
    if (wrapper := language_part(fields)[1]) is not None:
        raise ValueError(
            f"{wrapper}: the weights of a vision-language model cannot be read, only those of nemotron_h "
            "(explore cost reads the sizes)"
        )
    released = _stored_depths(_explained("", from_released, fields), names)
    _check_time_steps(with_new_names(fields))
    if OWN not in fields:
        return released
    own = _explained(OWN, ModelConfig.model_validate, fields[OWN])
    ours, theirs = hf_fields(own), hf_fields(released)
    for field in sorted((ours.keys() | theirs.keys()) - {OWN, *UNREAD}):
        if ours.get(field) != theirs.get(field):
            raise ValueError(
                f"{OWN}: {field} is {ours.get(field)!r} there and {theirs.get(field)!r} beside it; "
                f"make them equal, or remove {OWN}"
            )
    return own


def _check_time_steps(fields: Mapping[str, Any]) -> None:
    """Rejects a clamp of the step size dt, and bounds that are not numbers.

    Raises:
        ValueError: a field has such a value; the message names it.
    """
    limit = fields.get("time_step_limit", (0, math.inf))
    if not isinstance(limit, list | tuple) or [math.inf if end == INFINITY else end for end in limit] != [0, math.inf]:
        raise ValueError(f"time_step_limit: must be [0, Infinity], since dt is not clamped here, got {echo(limit)}")
    for field in ("time_step_min", "time_step_max"):
        value = fields.get(field, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{field}: must be a positive number, got {echo(value)}")


def _explained(root: str, read: Callable[[Any], ModelConfig], content: Any) -> ModelConfig:
    """Runs `read` on some content and turns its errors into one line."""
    try:
        return read(content)
    except ValidationError as error:
        raise ValueError(explain(error, root)) from None


def _layer_types(pattern: str, model: ModelConfig) -> list[str]:
    return [LAYER_TYPES[letter] for letter in standard_pattern(pattern, model, KINDS)]


def _moe_fields(moe: MoEConfig) -> dict[str, Any]:
    require("blocks.E", moe, MOE, TARGET)
    if moe.n_experts < 2:  # its router scores a group of experts by the best two
        raise refuse("blocks.E.n_experts", moe.n_experts, TARGET, "2 or more")
    shared = moe.shared_mlp()
    if shared is None:  # it always builds a shared MLP, even with n_shared_experts=0
        raise refuse("blocks.E.n_shared", moe.n_shared, TARGET, "1 or more")
    return {
        "n_routed_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.d_expert,
        "moe_latent_size": moe.d_latent,
        "n_shared_experts": moe.n_shared,
        "moe_shared_expert_intermediate_size": shared.d_ff,
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.routed_scaling_factor,
    }


def _stored_depths(model: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """Returns the model with the checkpoint's number of stored multi-token prediction depths."""
    if model.mtp is None:
        return model
    layers = {name.split(".")[2] for name in names if name.startswith("mtp.layers.")}
    stored = len(layers) // len(model.mtp.pattern)
    n_depths = model.mtp.n_depths
    if stored == 0:
        raise ValueError(
            f"num_nextn_predict_layers: {n_depths}, but there are no tensors mtp.*; with 0 the rest can be read"
        )
    if stored not in (1, n_depths):
        raise ValueError(f"num_nextn_predict_layers: {n_depths}, but mtp.* has {stored} depths; only 1 or all can be")
    return model.model_copy(update={"mtp": model.mtp.model_copy(update={"shared": stored == 1})})
