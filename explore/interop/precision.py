"""Exports precision recipes to Megatron-LM and Model-Optimizer; errors name what these cannot express."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from explore.blocks import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, MoEConfig
from explore.cost import MTP_LETTER, in_formats
from explore.interop.refusals import refuse
from explore.model import ModelConfig
from explore.precision import HIGH, TRAINED, UNQUANTIZED, Recipe, Until, products_of

MEGATRON, MODEL_OPTIMIZER = "Megatron-LM", "Model-Optimizer"

MODULES: Mapping[type[BlockConfig], Mapping[str, tuple[str, ...]]] = {
    Mamba2Config: {"in_proj": ("mixer.in_proj",), "out_proj": ("mixer.out_proj",)},
    AttentionConfig: {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("self_attention.linear_qkv",)),
        "o_proj": ("self_attention.linear_proj",),
    },
    MLPConfig: {
        **dict.fromkeys(("up", "gate"), ("mlp.linear_fc1",)),
        "down": ("mlp.linear_fc2",),
    },
    MoEConfig: {
        "experts": ("mlp.experts.linear_fc1", "mlp.experts.linear_fc2"),
        "shared": ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"),
        "latent_down": ("mlp.fc1_latent_proj",),
        "latent_up": ("mlp.fc2_latent_proj",),
    },
}
"""Megatron-LM modules of a layer, by ledger component."""

ENGINE: Mapping[str, Mapping[str, str]] = {
    "bf16": {},
    "fp8": {"fp8_quantization_recipe": "tensorwise", "fp8_format": "hybrid"},
    "fp8-blocks": {"fp8_quantization_recipe": "blockwise"},
    "mxfp8": {"fp8_quantization_recipe": "mxfp8"},
    "nvfp4": {"fp4_quantization_recipe": "nvfp4"},
}
"""Formats and Megatron-LM's names for the corresponding Transformer Engine recipes."""

DEFAULTS = {
    "fp8": "FP8_DEFAULT_CFG", "mxfp8": "MXFP8_DEFAULT_CFG", "mxfp4": "MXFP4_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG",
}  # fmt: skip
KV = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
"""Formats and Model-Optimizer's recipe names for all linear layers, and for keys and values."""

ROUTER = ("router", "fp32")
"""Component that may have this wide format: both systems compute routers apart from quantised layers."""


def check_scales(scales: str, target: str) -> None:
    """Rejects scales of a quantised run's weights that the target does not choose itself.

    Raises:
        ValueError: the criterion is not `max`.
    """
    if scales != "max":
        raise refuse("scales", scales, target, "'max'")


def te_quant(model: ModelConfig, recipe: Recipe) -> dict[str, Any]:
    """Returns the content of a `--te-precision-config-file` for Megatron-LM, as JSON, which is valid YAML.

    The first matcher that matches a module's path decides.

    Raises:
        ValueError: Megatron-LM cannot express the recipe, or it does not fit the model.

    Source: Megatron Core, `core/quantization/quant_config.py` and `core/extensions/transformer_engine.py`.
    """
    formats: dict[str, dict[int, str]] = defaultdict(dict)
    for row in in_formats(model.ledger(1), recipe):
        component, weight = row.entry.component, row.entry.weight or "bf16"
        if not row.entry.sums_over or component in HIGH:
            if weight != "bf16" and (component, weight) != ROUTER:
                raise refuse(f"precision of {component}", weight, MEGATRON, "bf16")
            continue
        if weight not in ENGINE:
            raise refuse(f"precision of {component}", weight, MEGATRON, ", ".join(ENGINE))
        _check_rounding(recipe, weight)
        if row.letter == MTP_LETTER:
            modules: tuple[str, ...] = ("mtp",)
        else:
            block = model.blocks[row.letter] if row.letter else None
            modules = MODULES.get(type(block), {}).get(component, ()) if block is not None else ()
        if not modules and weight != "bf16":
            raise refuse(f"precision of {component}", weight, MEGATRON, "bf16")
        for module in modules:
            layer = -1 if row.layer is None else row.layer
            if formats[module].setdefault(layer, weight) != weight:
                where = "multi-token prediction" if row.layer is None else f"layer {layer}"
                allowed = f"{formats[module][layer]!r}, as of all that is in {module},"
                raise refuse(f"precision of {component} in {where}", weight, MEGATRON, allowed)
    return {"configs": _configs(formats), "matchers": _matchers(formats)}


def _check_rounding(recipe: Recipe, format: str) -> None:
    """Rejects settings that Transformer Engine's recipe for a format lacks."""
    plain = Recipe()
    for field in ("forward", "input_gradient", "weight_gradient", "since", "until", "kv", "state"):
        if (value := getattr(recipe, field)) != (allowed := getattr(plain, field)):
            raise refuse(f"precision.{field}", _plain(value), MEGATRON, repr(_plain(allowed)))
    if format in UNQUANTIZED:
        return
    own = TRAINED[format]
    fields = ("stochastic", "hadamard", "hadamard_size", "square_weights", "four_over_six", "scale_rounding")
    for field in fields:
        given = recipe.model_copy(update={name: getattr(own, name) for name in fields if name != field})
        if products_of(given, own.format) != products_of(own, own.format):
            raise refuse(f"precision.{field}", getattr(recipe, field), MEGATRON, repr(getattr(own, field)))


def _plain(value: Any) -> Any:
    """Formats a recipe's field for an error."""
    return {"forward": value.forward, "backward": value.backward} if isinstance(value, Until) else value


def _configs(formats: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    used = {weight for by_layer in formats.values() for weight in by_layer.values()}
    return {
        name: {
            "transformer_engine_config_type": "TEQuantizationParams",
            # A quantised module although the whole model's recipe is bf16.
            "training_recipe": {**engine, **({"override_nonquantized_autocast": True} if engine else {})},
        }
        for name, engine in ENGINE.items()
        if name in used or name == "bf16"
    }


def _matchers(formats: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    """Returns rules per module: first the layers that differ from the majority, then all layers; the rest is bf16."""
    rules: list[tuple[str, str, str]] = []
    for module, by_layer in formats.items():
        usual = Counter(by_layer.values()).most_common(1)[0][0]
        if module == "mtp":
            rules.insert(0, ("mtp", "*mtp.*", usual))
            continue
        for layer, weight in by_layer.items():
            if weight != usual:
                rules.append((f"{module}, layer {layer}", f"*decoder.layers.{layer}.{module}", weight))
        rules.append((module, f"*decoder.layers.*.{module}", usual))
    rules.append(("others", "*", "bf16"))
    return {
        name: {"type": "glob", "pattern": pattern, "config": weight, "enabled": True} for name, pattern, weight in rules
    }


def model_optimizer_names(recipe: Recipe) -> tuple[str, ...]:
    """Returns the names of Model-Optimizer's recipes for all linear layers, and for quantised keys and values.

    Like recipes here, they do not quantise head and routers.

    Raises:
        ValueError: these recipes cannot express the given one; the message names the field.

    Source: Model-Optimizer, `modelopt/torch/quantization/config.py`.
    """
    if recipe.format not in DEFAULTS:
        raise refuse("precision.format", recipe.format, MODEL_OPTIMIZER, ", ".join(DEFAULTS))
    for i, rule in enumerate(recipe.rules):
        stays = [(rule.format == "bf16" and each in HIGH) or (each, rule.format) == ROUTER for each in rule.components]
        if not (stays and all(stays)):
            allowed = (
                "one format for all linear layers, with bf16 for embedding, head and routers, or fp32 for routers,"
            )
            raise refuse(f"precision.rules.{i}", rule.model_dump(), MODEL_OPTIMIZER, allowed)
    plain = Recipe()
    for field in Recipe.model_fields:
        value = getattr(recipe, field)
        if field not in ("format", "rules", "kv") and value != getattr(plain, field):
            raise refuse(f"precision.{field}", _plain(value), MODEL_OPTIMIZER, repr(_plain(getattr(plain, field))))
    if recipe.kv is None:
        return (DEFAULTS[recipe.format],)
    if recipe.kv not in KV:
        raise refuse("precision.kv", recipe.kv, MODEL_OPTIMIZER, ", ".join(KV))
    return (DEFAULTS[recipe.format], KV[recipe.kv])
