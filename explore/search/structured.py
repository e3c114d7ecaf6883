"""Patterns from a few numbers: how many attention and expert layers there are, and where they stand."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from optuna.trial import BaseTrial
from pydantic import Field, model_validator

from explore.config import Config

Placement = Literal["early", "even", "late"]
Layout = Literal["shares", "periodic", "free"]
Share = Annotated[float, Field(ge=0, le=1)]

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
PAIRS = ("M-", "ME", "*-", "*E")


def with_shares(
    n_layers: int,
    n_attention: int,
    placement: Placement = "even",
    n_moe: int = 0,
    moe_placement: Placement = "even",
) -> str:
    """Mixers and feed-forward layers in turn, some of them attention, some of them mixtures of experts.

    `with_shares(8, 1)` is `M-M-*-M-`. The rest of the mixers is Mamba-2, the rest of the feed-forward layers MLPs.
    With an odd number of layers the last one is a mixer.

    Args:
        n_attention: attention layers among the mixers.
        placement: the first places, places spread evenly, or the last places.
        n_moe: mixtures of experts among the feed-forward layers.

    Raises:
        ValueError: a count that does not fit.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers: {n_layers} is not allowed; at least 1 is")
    for field, value in (("placement", placement), ("moe_placement", moe_placement)):
        if value not in PLACEMENTS:
            raise ValueError(f"{field}: {value!r} is not allowed; {', '.join(PLACEMENTS)} are")
    mixers = _placed("M", "*", (n_layers + 1) // 2, n_attention, placement, "n_attention")
    feeds = _placed("-", "E", n_layers // 2, n_moe, moe_placement, "n_moe")
    return "".join(mixer + feed for mixer, feed in zip(mixers, [*feeds, ""], strict=False))


def _placed(rest: str, letter: str, n_places: int, count: int, placement: Placement, field: str) -> list[str]:
    if not 0 <= count <= n_places:
        raise ValueError(f"{field}: {count} is not allowed; 0 to {n_places} are")
    if placement == "early":
        places = set(range(count))
    elif placement == "late":
        places = set(range(n_places - count, n_places))
    else:
        places = {(2 * i + 1) * n_places // (2 * count) for i in range(count)}  # the middles of equal parts
    return [letter if place in places else rest for place in range(n_places)]


class StructuredSpace(Config):
    """Patterns of pairs, a mixer and a feed-forward layer, described by a few parameters.

    Attributes:
        min_layers: fewest layers; even, as max_layers is.
        attention: shares of the mixers that may be attention; the number is rounded.
        placement: where attention may stand.
        moe: shares of the feed-forward layers that may be mixtures of experts.
        layout: what a trial may choose: `shares` counts and places layers over the whole depth, `periodic` does so in
            a few pairs that are repeated, and `free` chooses every pair.
        periods: pairs in a period.
    """

    min_layers: Annotated[int, Field(ge=2, multiple_of=2)] = 4
    max_layers: Annotated[int, Field(ge=2, multiple_of=2)] = 12
    attention: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0, 0.125, 0.25, 0.5, 1.0)
    placement: Annotated[tuple[Placement, ...], Field(min_length=1)] = ("early", "even", "late")
    moe: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0, 0.5, 1.0)
    layout: Annotated[tuple[Layout, ...], Field(min_length=1)] = ("shares",)
    periods: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 3, 4)

    @model_validator(mode="after")
    def _check(self) -> StructuredSpace:
        if self.min_layers > self.max_layers:
            raise ValueError(f"min_layers: {self.min_layers} is above max_layers={self.max_layers}")
        return self

    def suggest(self, trial: BaseTrial, name: str = "pattern") -> str:
        """The pattern of a trial. A parameter with one allowed value is registered, too.

        Different parameters can give the same pattern, for example two placements of no attention.
        """
        n_pairs = trial.suggest_int(f"{name}_pairs", self.min_layers // 2, self.max_layers // 2)
        layout = trial.suggest_categorical(f"{name}_layout", self.layout)
        if layout == "free":
            return "".join(trial.suggest_categorical(f"{name}_pair_{i:02d}", PAIRS) for i in range(n_pairs))
        period = n_pairs
        if layout == "periodic":
            period = min(n_pairs, trial.suggest_categorical(f"{name}_period", self.periods))
        attention = trial.suggest_categorical(f"{name}_attention", self.attention)
        placement: Any = trial.suggest_categorical(f"{name}_placement", self.placement)
        moe = trial.suggest_categorical(f"{name}_moe", self.moe)
        repeated = with_shares(2 * period, round(attention * period), placement, round(moe * period))
        return (repeated * n_pairs)[: 2 * n_pairs]
