"""A model config as the fields of Hugging Face's nemotron_h, and back."""

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
"""Field of config.json that holds the whole model config: nemotron_h has no place for all of it."""

UNCLAMPED = 1e-30
"""As `time_step_min`: transformers clamps dt there, reads no other limit, and takes its logarithm, so not 0."""

INFINITY = {"__float__": "Infinity"}
"""How transformers writes infinity, which JSON has not."""

UNREAD = ("initializer_range", "n_shared_experts", "time_step_min", "time_step_max")
"""Fields that no output depends on, and that a config is not read for."""

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
    """The fields of a nemotron_h config.

    Raises:
        ValueError: what it cannot express, by name.
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
        # The cache of transformers fails where no layer is attention; those of multi-token prediction are none of its.
        "use_cache": any(isinstance(block, AttentionConfig) for block in model.layers),
        OWN: model.model_dump(mode="json"),
    }
    if model.mtp is not None:
        # The depths that are stored, as in the released configurations: one where all share it.
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
    """The model config of a nemotron_h config.

    Args:
        fields: content of config.json.
        names: of the checkpoint's tensors, which tell how many depths of multi-token prediction are stored.

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
    """Refuses a clamp of the step size dt, and bounds that are no numbers.

    Raises:
        ValueError: the field, by name.
    """
    limit = fields.get("time_step_limit", (0, math.inf))
    if not isinstance(limit, list | tuple) or [math.inf if end == INFINITY else end for end in limit] != [0, math.inf]:
        raise ValueError(f"time_step_limit: must be [0, Infinity], since dt is not clamped here, got {echo(limit)}")
    for field in ("time_step_min", "time_step_max"):
        value = fields.get(field, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{field}: must be a positive number, got {echo(value)}")


def _explained(root: str, read: Callable[[Any], ModelConfig], content: Any) -> ModelConfig:
    """What `read` makes of some content, its errors in one line."""
    try:
        return read(content)
    except ValidationError as error:
        raise ValueError(explain(error, root)) from None


def _layer_types(pattern: str, model: ModelConfig) -> list[str]:
    return [LAYER_TYPES[letter] for letter in standard_pattern(pattern, model, KINDS)]


def _moe_fields(moe: MoEConfig) -> dict[str, Any]:
    require("blocks.E", moe, MOE, TARGET)
    if moe.n_experts < 2:  # its router takes the best two to score a group of experts
        raise refuse("blocks.E.n_experts", moe.n_experts, TARGET, "2 or more")
    shared = moe.shared_mlp()
    if shared is None:  # it builds a shared MLP whatever n_shared_experts says
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
    """The model with as many stored depths of multi-token prediction as the checkpoint has."""
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
