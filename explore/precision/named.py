"""Named recipes and their sources."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from explore.files import read_json
from explore.foreign import echo
from explore.precision.products import unused_setting
from explore.precision.recipe import Recipe, Rule


class NamedRecipe(NamedTuple):
    """A recipe and its source.

    Attributes:
        trains: the recipe is for training, not for a trained model.
        scales: how a trained model's weight scales are chosen, as in `explore quantize --scales`.
    """

    recipe: Recipe
    source: str
    trains: bool = True
    scales: Literal["max", "mse", "four_over_six"] = "max"


def _rule(format: str, **conditions: Any) -> Rule:
    return Rule.model_validate({"format": format, "optional": True, **conditions})


ATTENTION = ("q_proj", "k_proj", "v_proj", "gate_proj", "o_proj", "q_down", "q_up", "kv_down", "kv_up")
ROUTER = _rule("fp32", components=("router",))
EXPERTS = _rule("nvfp4", letters="E", components=("experts",))
MAMBA = _rule("fp8", letters="M", components=("in_proj", "out_proj"))
NVFP4 = Recipe(format="nvfp4", stochastic=("dy",), hadamard=("weight_gradient",), square_weights=True)
NEMOTRON_3 = (
    _rule("bf16", last=0.16),
    _rule("bf16", letters="/"),
    _rule("bf16", components=(*ATTENTION, "latent_down", "latent_up")),
    _rule("mxfp8", letters="M", components=("out_proj",)),
)
ULTRA = "Nemotron 3 Ultra, released checkpoint: routers in fp32, MTP in bf16"

RECIPES: Mapping[str, NamedRecipe] = MappingProxyType(
    {
        "fp32": NamedRecipe(Recipe(format="fp32"), "every product in fp32"),
        "bf16": NamedRecipe(Recipe(format="bf16"), "every product in bf16"),
        "fp8": NamedRecipe(
            Recipe(format="fp8"), "Transformer Engine, Float8CurrentScaling: E4M3, gradients E5M2, a scale a tensor"
        ),
        "fp8-blocks": NamedRecipe(
            Recipe(format="fp8-blocks", square_weights=True), "DeepSeek-V3, arXiv 2412.19437, section 3.3"
        ),
        "mxfp8": NamedRecipe(Recipe(format="mxfp8"), "Transformer Engine, MXFP8BlockScaling"),
        "mxfp4": NamedRecipe(
            Recipe(format="mxfp4", stochastic=("dy",), hadamard=("weight_gradient",)),
            "rounding and rotation as for NVFP4, with which arXiv 2509.25149, section 5, compares it",
        ),
        "nvfp4": NamedRecipe(NVFP4, "arXiv 2509.25149, section 4, without the layers that it keeps in bf16"),
        "nemotron-h-fp8": NamedRecipe(
            Recipe(format="fp8", rules=(_rule("bf16", layers=(0, 1, 2, 3, -4, -3, -2, -1)),)),
            "Nemotron-H, arXiv 2504.03624: the first and the last four layers in bf16",
        ),
        "nemotron-3-nvfp4": NamedRecipe(
            NVFP4.model_copy(update={"rules": NEMOTRON_3}),
            "Nemotron 3 Super, arXiv 2604.12374: the last 14 of 88 layers, attention, latents and MTP in bf16, the "
            "output projection of Mamba, of which NVFP4 flushes up to 40% to zero, in MXFP8",
        ),
        "ultra-ptq-experts": NamedRecipe(
            Recipe(rules=(ROUTER, EXPERTS)), f"{ULTRA}; routed experts in NVFP4", trains=False
        ),
        "ultra-ptq": NamedRecipe(
            Recipe(
                rules=(ROUTER, EXPERTS, _rule("fp8", letters="E", components=("shared",)), MAMBA),
                four_over_six=("w",),
                kv="fp8",
                state="fp16",
            ),
            f"{ULTRA}; routed experts in NVFP4, shared experts and Mamba projections in FP8",
            trains=False,
        ),
        "super-ptq": NamedRecipe(
            Recipe(rules=(EXPERTS, _rule("fp8", letters="E", components=("shared",)), MAMBA), kv="fp8"),
            "Nemotron 3 Super, arXiv 2604.12374, released checkpoint in NVFP4: routed experts in NVFP4, shared experts "
            "and Mamba projections in FP8; the scales of its weights are by squared error",
            trains=False,
            scales="mse",
        ),
        "nano-ptq": NamedRecipe(
            Recipe(
                rules=(
                    _rule("bf16", letters="M", before="*"),
                    _rule("fp8", letters="E", components=("experts", "shared")),
                    MAMBA,
                ),
                kv="fp8",
            ),
            "Nemotron 3 Nano, released checkpoint in FP8: attention and the Mamba layers that feed it in bf16",
            trains=False,
        ),
        "fp8-ptq": NamedRecipe(
            Recipe(
                rules=(ROUTER, _rule("fp8", letters="E", components=("experts", "shared")), MAMBA),
                kv="fp8",
                state="fp16",
            ),
            "Nemotron 3 Super and Ultra, released checkpoints in FP8: experts and Mamba projections",
            trains=False,
        ),
    }
)

TRAINED: Mapping[str, Recipe] = MappingProxyType({name: each.recipe for name, each in RECIPES.items() if each.trains})
"""The recipes for training."""


def named(name: object, field: str = "precision", allowed: Collection[str] = RECIPES.keys()) -> Recipe:
    """Returns the recipe with this name.

    Args:
        field: field name at the start of an error.
        allowed: allowed names.

    Raises:
        ValueError: no allowed recipe has this name.
    """
    if not isinstance(name, str) or name not in allowed:  # JSON may hold anything, also what cannot be hashed
        nearest = get_close_matches(name, allowed, 1) if isinstance(name, str) else []
        hint = "".join(f"; did you mean {near!r}?" for near in nearest)
        raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {echo(name)}{hint}")
    return RECIPES[name].recipe


def read_recipe(name: str) -> Recipe:
    """Returns the recipe with this name or from a JSON file.

    Raises:
        ValueError: neither exists, or the file has an invalid field, or one without effect.
    """
    if not (name.endswith(".json") or Path(name).is_file()):
        return named(name)
    recipe = Recipe.validated(read_json(Path(name)), name)
    if unused := unused_setting(recipe):
        raise ValueError(f"{name}: {unused}")
    return recipe
