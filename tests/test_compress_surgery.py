"""Exact surgery: a child equals its parent with the removed parts set to zero, and has the counts of its config."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from block_variants import D_MODEL, VARIANTS
from torch import Tensor, nn

from explore.blocks import Axis, BlockConfig, Mamba2Config, MoE, MoEConfig, RMSNorm
from explore.compress import LayerCut, Plan
from explore.compress.choosing import choose
from explore.compress.surgery import complete, cut, resized
from explore.model import LanguageModel, ModelConfig, MTPConfig
from explore.model.layout import model_layout
from explore.proof import random_model
from explore.weights import weights_digest


def model_of(pattern: str, seed: int = 0, *, mtp: bool = False, **blocks: BlockConfig) -> LanguageModel:
    letters = {**{letter: VARIANTS[letter] for letter in pattern if letter in VARIANTS}, **blocks}
    depths = MTPConfig(pattern=pattern[0]) if mtp else None
    config = ModelConfig(d_model=16, vocab_size=40, pattern=pattern, blocks=letters, init_std=0.2, mtp=depths)
    return disturbed(config, seed)


EMBEDDING = 6
"""Factor on the weights of the embedding."""


@torch.no_grad()
def disturbed(config: ModelConfig, seed: int) -> LanguageModel:
    """A model in which no weight has a value that hides a mistake, such as 0 or 1."""
    torch.manual_seed(seed)
    model = config.build()
    for weight in model.parameters():
        weight += 0.02 * torch.randn_like(weight)
    # A residual stream near zero, divided by its mean square, would amplify rounding.
    model.embedding.weight *= EMBEDDING
    for name, buffer in model.named_buffers():
        assert name.endswith("expert_bias")
        buffer += 0.1 * torch.randn_like(buffer)
    return model.eval()


def any_option(rng: random.Random) -> ModelConfig:
    """A small model of random pattern and sizes, with every option of routers."""
    config = random_model(rng)
    blocks: dict[str, Any] = dict(config.blocks)
    for letter, block in blocks.items():
        if "router_score" in type(block).model_fields:
            change = {
                "router_score": rng.choice(["sigmoid", "softmax"]),
                "normalize_weights": rng.random() < 0.5,
                "routed_scaling_factor": rng.choice([1.0, 2.5]),
            }
            blocks[letter] = block.model_copy(update=change)
    return ModelConfig.model_validate({**config.model_dump(), "blocks": blocks})


def random_cut(block: BlockConfig, rng: random.Random) -> LayerCut:
    sizes: dict[str, int] = {}
    axes = {axis.name: axis for axis in block.axes()}
    for axis in axes.values():
        share = axis.size // axes[axis.within].size if axis.within else axis.size
        each = rng.randint(1, share)
        n_outer = sizes[axis.within] if axis.within else 1
        sizes.setdefault(axis.field or axis.name, each if axis.per_index else each * n_outer)
    if "top_k" in sizes:
        sizes["top_k"] = min(sizes["top_k"], sizes["n_experts"])
    scores = {name: [rng.random() for _ in range(axis.size)] for name, axis in axes.items()}
    return LayerCut(keep=choose(block, sizes, lambda axis, _: scores[axis.name]))


def random_plan(model: LanguageModel, rng: random.Random) -> Plan:
    config = model.config
    layers = [LayerCut(drop=True) if rng.random() < 0.2 else random_cut(block, rng) for block in config.layers]
    one = rng.randrange(len(layers))  # a child has a layer
    layers[one] = random_cut(config.layers[one], rng)
    d_model = sorted(rng.sample(range(config.d_model), rng.randint(1, config.d_model)))
    whole = Plan.keep_all(model)
    return Plan.model_validate(
        {**whole.model_dump(), "layers": layers, "d_model": d_model, "drop_mtp": rng.random() < 0.2}
    )


def replaced(plan: Plan, layer: int, by: LayerCut) -> Plan:
    layers = [by if i == layer else each for i, each in enumerate(plan.layers)]
    return Plan.model_validate({**plan.model_dump(), "layers": layers})


def child_of(model: LanguageModel, plan: Plan) -> LanguageModel:
    child = plan.model(model.config).build()
    child.load_state_dict(plan.apply(model.state_dict()), strict=True)
    return child.eval()


@torch.no_grad()
def masked(model: LanguageModel, plan: Plan) -> LanguageModel:
    """The parent with the same indices set to zero, and norms that average over the remaining channels."""
    parent = model.config.build()
    parent.load_state_dict(model.state_dict())
    masks = {name: mask_of(name, weight, plan) for name, weight in parent.state_dict().items()}
    for name, weight in parent.state_dict().items():
        weight *= masks[name]
    for name, module in parent.named_modules():
        if isinstance(module, RMSNorm):
            mask = masks[f"{name}.weight"]
            mixer = parent.get_submodule(name.rpartition(".")[0])
            config = getattr(mixer, "config", None)
            groups = config.n_groups if isinstance(config, Mamba2Config) else 1
            kept = mask.view(groups, -1).mean(1)
            share = float(kept[kept > 0].mean())
            module.weight *= share**0.5
            assert module.eps is not None
            module.eps *= share
            if isinstance(config, Mamba2Config):  # its norm is an op, which takes eps from the config
                mixer.config = config.model_copy(update={"norm_eps": config.norm_eps * share})
    for layer, each in zip(parent.layers, plan.layers, strict=True):
        if isinstance(layer.mixer, MoE):
            without_experts(layer.mixer, each.keep)
    kept_layers = [layer for layer, each in zip(parent.layers, plan.layers, strict=True) if not each.drop]
    parent.layers = nn.ModuleList(kept_layers)
    return parent.eval()


def mask_of(name: str, weight: Tensor, plan: Plan) -> Tensor:
    """1 where a weight is kept."""
    place = model_layout(plan.parent_model)[name]
    keep = {} if place.layer is None else plan.layers[place.layer].keep
    axes = () if place.block is None else place.block.axes()
    kept = complete(axes, keep)
    assert plan.d_model is not None
    axis = Axis("d_model", plan.parent_model.d_model)
    stream = complete((axis,), {"d_model": plan.d_model})
    where = torch.arange(weight.numel()).view(weight.shape)
    where = cut(where, place.dims, (*axes, axis), {**kept, **stream})
    mask = torch.zeros(weight.numel())
    mask[where.flatten()] = 1
    return mask.view(weight.shape)


def without_experts(mixer: MoE, keep: Any) -> None:
    """No token goes to an expert that is cut, whatever its score."""
    c = mixer.config
    gone = torch.ones(c.n_experts, dtype=torch.bool)
    gone[list(keep.get("n_experts", range(c.n_experts)))] = False
    mixer.expert_bias[gone] = -torch.inf
    mixer.config = c.model_copy(update={"top_k": len(keep.get("top_k", range(c.top_k)))})

    def scores(x: Tensor) -> Tensor:
        logits = nn.functional.linear(x, mixer.router.weight, mixer.router.bias).masked_fill(gone, -torch.inf)
        return logits.sigmoid() if c.router_score == "sigmoid" else logits.softmax(-1)

    mixer._scores = scores  # type: ignore[method-assign]


@torch.no_grad()
def outputs(model: LanguageModel, tokens: Tensor, mtp: bool) -> list[Tensor]:
    hidden, _ = model.hidden(tokens)
    found = [model.head(hidden)]
    if mtp:
        deeper, _ = model.mtp_depth(1)(model.embedding(tokens[:, 1:]), hidden[:, :-1])
        found.append(model.head(deeper))
    return found


# Layouts


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layout_of_a_block_has_the_shape_of_each_of_its_weights(name: str) -> None:
    block = VARIANTS[name]
    model = ModelConfig(d_model=D_MODEL, vocab_size=10, pattern="x", blocks={"x": block}).build()
    layout = model_layout(model.config)
    sizes = {axis.name: axis.size for axis in block.axes()} | {"d_model": D_MODEL}
    for weight, tensor in model.state_dict().items():
        dims = layout[weight].dims
        assert len(dims) == tensor.ndim, weight
        for length, dim in zip(tensor.shape, dims, strict=True):
            parts = [math.prod(part if isinstance(part, int) else sizes[part] for part in stretch) for stretch in dim]
            each = sizes["n_experts"] if dim == (("d_expert",),) else 1
            assert not dim or sum(parts) == length * each, weight


@pytest.mark.parametrize("name", VARIANTS)
def test_each_axis_has_the_size_of_its_config_field(name: str) -> None:
    block = VARIANTS[name]
    assert block.axes() or type(block).model_fields.keys() == {"kind"}  # a linear map has no size of its own
    for axis in block.axes():
        outer = {each.name: each.size for each in block.axes()}.get(axis.within, 1)
        assert getattr(block, axis.field or axis.name) == axis.size // (outer if axis.per_index else 1)


# Children


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_that_cuts_nothing_gives_the_same_logits_bit_for_bit(seed: int) -> None:
    model = disturbed(any_option(random.Random(seed)), seed)
    plan = Plan.keep_all(model)
    tokens = torch.randint(0, model.config.vocab_size, (2, 17))
    assert plan.model(model.config) == model.config
    with torch.no_grad():
        assert torch.equal(child_of(model, plan)(tokens), model(tokens))


@pytest.mark.parametrize("n", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_child_equals_its_masked_parent_and_has_the_counts_of_its_config(n: int) -> None:
    worst = 0.0
    for number in range(n):
        rng = random.Random(number)
        model = disturbed(any_option(rng), number)
        plan = random_plan(model, rng)
        child = child_of(model, plan)
        cost = child.config.cost(8)
        assert cost.params_total + cost.params_mtp == sum(weight.numel() for weight in child.parameters())
        tokens = torch.randint(0, model.config.vocab_size, (2, 13))
        mtp = child.config.mtp is not None
        for ours, theirs in zip(outputs(child, tokens, mtp), outputs(masked(model, plan), tokens, mtp), strict=True):
            assert torch.isfinite(ours).all()
            enlarged = EMBEDDING if model.config.tie_embeddings else 1  # a tied head has the weights of the embedding
            worst = max(worst, float((ours - theirs).abs().max()) / enlarged)
    assert worst < 1e-5


def test_a_kept_expert_keeps_channels_of_its_own() -> None:
    model = model_of("E")
    block = model.config.blocks["E"]
    keep = {"n_experts": (1, 6), "d_expert": (24, 30, 24 * 6 + 3, 24 * 6 + 5)}  # 24 channels each
    plan = Plan.keep_all(model).model_copy(update={"layers": (LayerCut(keep=keep),)})
    up = plan.apply(model.state_dict())["layers.0.mixer.up"]
    whole = model.state_dict()["layers.0.mixer.up"]
    assert resized(block, complete(block.axes(), keep)).d_expert == 2  # type: ignore[attr-defined]
    torch.testing.assert_close(up, torch.stack([whole[1][:, [0, 6]], whole[6][:, [3, 5]]]), rtol=0, atol=0)


def test_cutting_a_mamba_head_removes_only_its_rows_and_columns() -> None:
    model = model_of("M")  # 4 heads of 8 channels in 2 groups, a state of 16
    plan = replaced(Plan.keep_all(model), 0, LayerCut(keep={"n_heads": (1, 2)}))
    ours, whole = plan.apply(model.state_dict()), model.state_dict()
    z, x, B, C, dt = whole["layers.0.mixer.in_proj.weight"].split((32, 32, 32, 32, 4))
    parts = (z[8:24], x[8:24], B, C, dt[1:3])
    torch.testing.assert_close(ours["layers.0.mixer.in_proj.weight"], torch.cat(parts), rtol=0, atol=0)
    conv = whole["layers.0.mixer.conv1d.weight"]
    torch.testing.assert_close(ours["layers.0.mixer.conv1d.weight"], torch.cat((conv[8:24], conv[32:])), rtol=0, atol=0)
    assert torch.equal(ours["layers.0.mixer.A_log"], whole["layers.0.mixer.A_log"][1:3])
    assert torch.equal(ours["layers.0.mixer.norm.weight"], whole["layers.0.mixer.norm.weight"][8:24])
    assert torch.equal(ours["layers.0.mixer.out_proj.weight"], whole["layers.0.mixer.out_proj.weight"][:, 8:24])


@torch.no_grad()
def test_mamba_heads_may_change_places_inside_a_group_and_not_across_groups() -> None:
    model = model_of("M", M=Mamba2Config(n_heads=6, d_head=4, d_state=4, n_groups=2, chunk_size=8))
    tokens = torch.randint(0, 40, (2, 19))
    before = model(tokens)

    def permuted(order: list[int]) -> Tensor:
        other = model.config.build().eval()
        axes = model.config.layers[0].axes()
        kept = {**complete(axes, {}), "n_heads": tuple(order), "d_model": tuple(range(16))}
        stream = Axis("d_model", 16)
        layout = model_layout(model.config)
        other.load_state_dict(
            {name: cut(weight, layout[name].dims, (*axes, stream), kept) for name, weight in model.state_dict().items()}
        )
        return other(tokens)

    torch.testing.assert_close(permuted([2, 0, 1, 3, 5, 4]), before, rtol=0, atol=1e-5)
    assert float((permuted([3, 1, 2, 0, 4, 5]) - before).abs().max()) > 1e-2


def test_layers_that_differ_after_a_cut_get_different_letters() -> None:
    model = model_of("-M-M-", mtp=True)
    keep = {"d_ff": tuple(range(10))}
    plan = replaced(replaced(Plan.keep_all(model), 0, LayerCut(keep=keep)), 1, LayerCut(drop=True))
    child = plan.model()
    assert child.pattern == "a-M-"
    assert (
        plan.model_copy(update={"drop_mtp": True}).model().pattern == "a-M-"
    )  # the most frequent one keeps the letter
    assert [child.blocks[letter].d_ff for letter in "a-"] == [10, 48]  # type: ignore[attr-defined]
    homogeneous = plan.model_copy(update={"layers": (LayerCut(keep=keep), LayerCut()) * 2 + (LayerCut(keep=keep),)})
    assert homogeneous.model().pattern == "aMaMa"  # multi-token prediction has the letter
    dropped = homogeneous.model_copy(update={"drop_mtp": True})
    assert dropped.model().pattern == "-M-M-"
    assert child_of(model, dropped).config.mtp is None


def test_a_full_rotation_of_the_latent_changes_nothing() -> None:
    block = MoEConfig(n_experts=4, top_k=2, d_expert=8, d_shared=8, d_latent=8, router_input="latent", bias=True)
    model = model_of("E", E=block)
    rotations = {
        name: torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for name in ("d_latent", "d_latent_out")
    }
    rotate = {name: tuple(map(tuple, matrix.tolist())) for name, matrix in rotations.items()}
    plan = replaced(Plan.keep_all(model), 0, LayerCut(rotate=rotate))
    tokens = torch.randint(0, 40, (2, 19))
    child = child_of(model, plan)
    assert not torch.allclose(child.layers[0].mixer.up, model.layers[0].mixer.up, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(child(tokens), model(tokens), rtol=0, atol=1e-5)


def test_a_latent_with_a_norm_cannot_be_rotated() -> None:
    block = MoEConfig(n_experts=4, top_k=2, d_expert=8, d_shared=8, d_latent=2, latent_norm="input")
    with pytest.raises(ValueError, match=r"layers.0: rotate: d_latent cannot be rotated"):
        replaced(Plan.keep_all(model_of("E", E=block)), 0, LayerCut(rotate={"d_latent": ((1.0, 0.0), (0.0, 1.0))}))


def test_scales_of_norms_are_folded_into_their_weights_by_kept_group() -> None:
    model = model_of("M")
    plan = replaced(Plan.keep_all(model), 0, LayerCut(keep={"n_heads": (0, 2), "d_head": (0, 1, 5)}))
    scales = {"layers.0.mixer.norm.weight": (2.0, 3.0), "norm.weight": (0.5,)}
    scaled = Plan.model_validate({**plan.model_dump(), "norm_scales": scales}).apply(model.state_dict())
    plain = plan.apply(model.state_dict())
    factors = torch.tensor([2.0] * 3 + [3.0] * 3)
    assert torch.equal(scaled["layers.0.mixer.norm.weight"], plain["layers.0.mixer.norm.weight"] * factors)
    assert torch.equal(scaled["norm.weight"], plain["norm.weight"] / 2)
    assert all(torch.equal(scaled[name], plain[name]) for name in plain if name not in scales)


# Plans as files, and refusals


def test_a_plan_is_the_same_after_json_and_its_origin_does_not_count(tmp_path: Path) -> None:
    model = disturbed(any_option(random.Random(5)), 5)
    plan = random_plan(model, random.Random(5))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    assert len((tmp_path / "plan.json").read_text().splitlines()) < 12 + len(plan.layers)
    other = Plan.model_validate({**content, "origin": {"method": "by hand"}})
    assert other.key() == plan.key()
    assert Plan.keep_all(model).key() != plan.key()


def test_weights_of_another_parent_are_refused_by_their_digest() -> None:
    plan, other = Plan.keep_all(model_of("M-")), model_of("M-", seed=1)
    digest = weights_digest(other.state_dict())
    with pytest.raises(ValueError, match=f"digest {plan.parent[:12]}, got {digest[:12]}"):
        plan.apply(other.state_dict())


def test_the_digest_of_weights_depends_on_names_shapes_dtypes_and_values() -> None:
    digests = {
        weights_digest(weights)
        for weights in (
            {"a": torch.ones(2, 3)},
            {"b": torch.ones(2, 3)},
            {"a": torch.ones(3, 2)},
            {"a": torch.ones(2, 3, dtype=torch.int32)},
            {"a": torch.zeros(2, 3)},
        )
    }
    assert len(digests) == 5
    assert weights_digest({"a": torch.ones(2, 3).T.contiguous().T}) in digests


@pytest.mark.parametrize(
    ("layer", "keep", "message"),
    [
        (0, {"n_heads": (0, 1)}, "layers.0: n_heads: equally many must be kept within each kept index of n_groups"),
        (0, {"n_heads": (2, 0)}, "layers.0: n_heads: kept indices must rise and lie from 0 to 3, got [2, 0]"),
        (0, {"d_state": (0, 16)}, "layers.0: d_state: kept indices must rise and lie from 0 to 15"),
        (0, {"d_state": ()}, "layers.0: d_state: at least 1 of 16 must be kept, got none"),
        (0, {"d_ff": (0,)}, "layers.0: keep must name an axis of this block (n_groups, d_head"),
        (1, {"n_heads": (0, 1, 2)}, "layers.1: n_heads: equally many must be kept within each kept index of n_kv"),
        (1, {"n_kv_heads": (0,), "n_heads": (2, 3)}, "layers.1: n_heads: equally many must be kept"),
        (2, {"n_experts": (0,)}, "layers.2: top_k: must be at most n_experts=1, got 2"),
        (2, {"top_k": (1,)}, "layers.2: top_k: only the first ones can be kept, got [1]"),
        (2, {"d_latent": (0, 1)}, "layers.2: d_latent_out: as many must be kept as of d_latent, 2, got 16"),
    ],
)
def test_an_invalid_cut_is_refused_in_one_line(layer: int, keep: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replaced(Plan.keep_all(model_of("M*E")), layer, LayerCut(keep=keep))


def test_a_plan_must_keep_a_layer_and_list_every_layer() -> None:
    plan = Plan.keep_all(model_of("M-"))
    with pytest.raises(ValueError, match="layers: at least 1 of 2 must be kept, got none"):
        Plan.model_validate({**plan.model_dump(), "layers": (LayerCut(drop=True),) * 2})
    with pytest.raises(ValueError, match="layers: must have 2 entries, one for each layer, got 3"):
        Plan.model_validate({**plan.model_dump(), "layers": (LayerCut(),) * 3})
    with pytest.raises(ValueError, match="is for one of other sizes"):
        plan.model(model_of("M").config)
