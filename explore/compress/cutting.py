"""Cuts: turns a child's sizes into a plan that keeps the best-scored parts of its parent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from explore.blocks import Axis
from explore.compress.choosing import choose, highest
from explore.compress.depth import one_by_one
from explore.compress.observing import EFFECTS
from explore.compress.parent import open_parent
from explore.compress.plan import LayerCut, Plan
from explore.compress.ranking import METHODS, SCORED, Ranking, ranking
from explore.compress.scores import Scores, score
from explore.compress.surgery import complete, indices
from explore.foreign import echo
from explore.model import LanguageModel, ModelConfig
from explore.model.layout import model_layout
from explore.runs import RunFolder


@dataclass(frozen=True, eq=False)
class Cutter:
    """Makes plans of any sizes for one parent, with one ranking of its parts.

    Attributes:
        whole: the plan that cuts nothing.
        scores: scores of the parent on a text, for norm scales and principal axes.
        norm_scales: rescale norm weights for the changed mean square over fewer channels.
        principal: keep leading principal axes of a latent instead of channels, unless a norm prevents it.
    """

    whole: Plan
    weights: Mapping[str, Tensor]
    ranking: Ranking
    scores: Scores | None
    norm_scales: bool = True
    principal: bool = False

    @classmethod
    def of(
        cls,
        run: RunFolder | str | Path,
        *,
        by: str = "activation",
        effect: str = "mse",
        seed: int = 0,
        norm_scales: bool = True,
        principal: bool = False,
        scores: Scores | None = None,
        data: str | Path | None = None,
    ) -> Cutter:
        """Returns the cutter of a finished run; scores the run first if needed.

        Args:
            data: run or experiment whose data an imported checkpoint is scored on.

        Raises:
            ValueError: the run is not finished, the scores belong to another parent, or the method or the effect is
                unknown.
        """
        if by not in METHODS:
            raise ValueError(f"by must be one of {', '.join(METHODS)}, got {by!r}")
        if effect not in EFFECTS:
            raise ValueError(f"effect must be one of {', '.join(EFFECTS)}, got {effect!r}")
        parent = open_parent(run, data)
        model = parent.model
        weights = model.state_dict()
        whole = Plan.keep_all(model)
        if scores is None and (by in SCORED or norm_scales or principal):
            scores, _ = score(parent.path, data=data)
        if scores is not None and scores.about["parent"] != whole.parent:
            raise ValueError(
                f"scores: must be of this parent, with the digest {whole.parent[:12]}, "
                f"got those of {str(scores.about['parent'])[:12]}"
            )
        order = ranking(by, model.config, weights, scores, effect=effect, seed=seed)
        origin: dict[str, Any] = {"run": parent.path.resolve().name, "by": by, "norm_scales": norm_scales}
        origin |= {"seed": seed} if by == "random" else {"effect": effect}
        origin |= {} if scores is None else {"scores": scores.key, "flops": scores.about["flops"]}
        whole = whole.model_copy(update={"origin": origin})
        return cls(whole, weights, order, scores, norm_scales, principal)

    @property
    def model(self) -> ModelConfig:
        """The parent's config."""
        return self.whole.parent_model

    def plan(
        self,
        sizes: Mapping[str, int],
        drop: int | Collection[int] = 0,
        *,
        drop_mtp: bool = False,
    ) -> Plan:
        """Returns the plan of a child with the given sizes.

        Args:
            sizes: `d_model`, or a block's field: `d_ff` for all layers that have it, `M.n_heads` for the layers of a
                letter, `3.d_ff` for one layer by index. Unnamed sizes stay whole.
            drop: layers to remove: indices, or a number of the least important ones.
            drop_mtp: remove multi-token prediction.

        Raises:
            ValueError: an unknown field or layer, or an impossible size.
        """
        model, dropped = self.model, self.dropped(drop)
        of_layer, width = self._by_layer(sizes)
        layers = []
        for i, block in enumerate(model.layers):
            if i in dropped:
                layers.append(LayerCut(drop=True))
                continue
            try:
                keep = choose(block, of_layer[i], partial(self.ranking.axis, i))
            except ValueError as error:
                raise ValueError(f"layers.{i}: {error}") from None
            layers.append(self._rotated(i, keep) if self.principal else LayerCut(keep=keep))
        stream = None
        if width is not None:
            if not 1 <= width <= model.d_model:
                raise ValueError(f"d_model: must be from 1 to {model.d_model}, got {width}")
            if width < model.d_model:
                stream = tuple(sorted(highest(self.ranking.stream(), range(model.d_model), width)))
        content = {name: getattr(self.whole, name) for name in Plan.model_fields}
        asked = tuple(f"{name}={n}" for name, n in sizes.items())
        origin = {**self.whole.origin, "keep": asked, "dropped": tuple(map(str, sorted(dropped)))}
        changes = {"d_model": stream, "layers": tuple(layers), "drop_mtp": drop_mtp, "origin": origin}
        plan = Plan.model_validate({**content, **changes})
        return (
            plan
            if not self.norm_scales
            else Plan.model_validate({**content, **changes, "norm_scales": self._scales(plan)})
        )

    def one_by_one(
        self,
        run: RunFolder | str | Path,
        sizes: Mapping[str, int],
        n: int,
        *,
        drop_mtp: bool = False,
        **how: Any,
    ) -> Plan:
        """Like `plan`, with `n` layers removed one at a time as chosen by `explore.compress.depth`.

        Args:
            run: the parent.
            how: as for `explore.compress.depth.one_by_one`.
        """
        order = one_by_one(run, n, **how)
        plan = self.plan(sizes, order.layers, drop_mtp=drop_mtp)
        origin = {**plan.origin, "order": tuple(map(str, order.layers)), "flops": plan.flops + order.flops}
        return plan.model_copy(update={"origin": origin})

    def child(self, plan: Plan) -> LanguageModel:
        """Builds the model of a plan."""
        child = plan.model().build()
        child.load_state_dict(plan.cut_weights(self.weights))
        return child.eval()

    def dropped(self, drop: int | Collection[int]) -> frozenset[int]:
        """Returns the indices of the layers to remove."""
        n = self.model.n_layers
        if not isinstance(drop, int):
            for i in drop:
                if not 0 <= i < n:
                    raise ValueError(f"drop: a layer must be from 0 to {n - 1}, got {i}")
            return frozenset(drop)
        if not 0 <= drop < n:
            raise ValueError(f"drop: must be from 0 to {n - 1} of {n} layers, got {drop}")
        least = [-value for value in self.ranking.layers()] if drop else [0.0] * n
        return frozenset(highest(least, range(n), drop))

    def _by_layer(self, sizes: Mapping[str, int]) -> tuple[list[dict[str, int]], int | None]:
        """Returns the sizes of each layer, and of the residual stream."""
        model = self.model
        found: list[dict[str, int]] = [{} for _ in model.layers]
        for name, n in sizes.items():
            where, _, field = name.rpartition(".")
            here = [
                i
                for i, block in enumerate(model.layers)
                if where in ("", model.pattern[i], str(i)) and field in fields(block.axes())
            ]
            if name == "d_model":
                continue
            if not here:
                raise ValueError(f"keep must be among {', '.join(names(model))} for this parent, got {echo(name)}")
            for i in here:
                found[i][field] = n
        return found, sizes.get("d_model")

    def _rotated(self, layer: int, keep: Mapping[str, Sequence[int]]) -> LayerCut:
        """Replaces kept channels of rotatable axes by leading principal axes."""
        rotate, kept = {}, dict(keep)
        for axis in self.model.layers[layer].axes():
            if axis.rotatable and axis.name in keep and self.scores is not None:
                matrix = self.scores.matrix(layer, axis.name)
                if matrix is not None:
                    n = len(keep[axis.name])
                    rotate[axis.name] = tuple(map(tuple, matrix[:, :n].float().tolist()))
                    kept[axis.name] = tuple(range(n))
        return LayerCut(keep=kept, rotate=rotate)  # type: ignore[arg-type]

    def _scales(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Returns sqrt(mean square of kept / all channels), by norm and group, for norms that lose channels."""
        if self.scores is None:
            return {}
        model, scales = self.model, {}
        stream = Axis("d_model", model.d_model)
        width = complete((stream,), {} if plan.d_model is None else {"d_model": plan.d_model})
        for name, place in model_layout(model).items():
            moments = self.scores.values("moment", -1, name)
            if moments is None or (place.layer is not None and plan.layers[place.layer].drop):
                continue
            cut = LayerCut() if place.layer is None else plan.layers[place.layer]
            axes = () if place.block is None else place.block.axes()
            kept = {**complete(axes, cut.keep), **width}
            index = indices(place.dims[0], {axis.name: axis for axis in (*axes, stream)}, kept).tolist()
            if len(index) == len(moments) or any(axis in cut.rotate for stretch in place.dims[0] for axis in stretch):
                continue
            fused = None if place.block is None else place.block.fused_norms.get(name.partition(".mixer.")[2])
            groups = 1 if fused is None else next(axis.size for axis in axes if axis.name == fused.groups)
            share, factors = len(moments) // groups, []
            for group in range(groups):
                here = [moments[i] for i in index if i // share == group]
                every = moments[group * share : (group + 1) * share]
                if here:
                    ratio = sum(here) / len(here) * share / sum(every) if sum(every) else 1.0
                    factors.append(ratio**0.5 or 1.0)
            scales[name] = tuple(factors)
        return scales


def fields(axes: Sequence[Axis]) -> list[str]:
    """Returns the config fields that count indices of axes."""
    return list(dict.fromkeys(axis.field or axis.name for axis in axes))


def names(model: ModelConfig) -> list[str]:
    """Returns the names of sizes that a plan can cut: `d_model`, and fields of blocks by letter."""
    letters = dict.fromkeys(model.pattern)
    return ["d_model", *(f"{letter}.{field}" for letter in letters for field in fields(model.blocks[letter].axes()))]


def cut(
    run: RunFolder | str | Path,
    sizes: Mapping[str, int],
    drop: int | Collection[int] = 0,
    *,
    drop_mtp: bool = False,
    **how: Any,
) -> Plan:
    """Returns the plan of a child of a finished run; use `Cutter` for many plans of one parent.

    Args:
        sizes: as in `Cutter.plan`.
        drop: as in `Cutter.plan`.
        drop_mtp: remove multi-token prediction.
        how: ranking options, as in `Cutter.of`.
    """
    return Cutter.of(run, **how).plan(sizes, drop, drop_mtp=drop_mtp)
