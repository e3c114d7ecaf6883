"""Cost measures of a child: all totals of a model, and measures that depend on dtypes, context and hardware."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from explore.cost import DTYPES, HARDWARE, Cost, Dtypes
from explore.foreign import did_you_mean, echo
from explore.formatting import read_count
from explore.model import ModelConfig
from explore.roofline import Deployment, hardware


@dataclass(frozen=True)
class Setting:
    """The setting a model is used in.

    Attributes:
        context: tokens per sequence, also the context length of decoding.
        batch_size: sequences decoded at once.
        dtypes: dtypes of weights and state.
        device: name of the hardware.
    """

    context: int
    batch_size: int = 1
    dtypes: Dtypes = DTYPES
    device: str = HARDWARE


def _decode_s(model: ModelConfig, setting: Setting) -> float:
    deployed = Deployment(model, hardware(setting.device), setting.dtypes)
    return deployed.decode_s(setting.context, setting.batch_size)


def _prefill_s(model: ModelConfig, setting: Setting) -> float:
    return Deployment(model, hardware(setting.device), setting.dtypes).prefill_s(setting.context, setting.batch_size)


def _memory_bytes(model: ModelConfig, setting: Setting) -> float:
    cost = Cost.of(model.ledger(setting.context), setting.dtypes)
    return cost.weight_bytes + setting.batch_size * cost.state_bytes


DEPLOYED: Mapping[str, Callable[[ModelConfig, Setting], float]] = {
    "memory_bytes": _memory_bytes,
    "decode_s": _decode_s,
    "prefill_s": _prefill_s,
}
"""Bytes of weights and all state; lower bounds by roofline on the time of a decoding step and of prefill."""

TOTALS = (
    *(each.name for each in fields(Cost) if each.type in ("int", "float") and each.name != "seq_len"),
    "state_bytes",
)

MEASURES = (*TOTALS, *DEPLOYED)
"""Measures that can be bounded."""


def measure(name: str, model: ModelConfig, setting: Setting) -> float:
    """Returns one of `MEASURES` of a model.

    Raises:
        ValueError: an unknown measure or device.
    """
    if name in DEPLOYED:
        return DEPLOYED[name](model, setting)
    check_measure(name)
    return float(getattr(Cost.of(model.ledger(setting.context), setting.dtypes), name))


def read_budget(option: str, text: str, of_parent: Callable[[str], float]) -> tuple[str, float]:
    """Reads `params_active=1.5M`, or `params_active=50%`, a share of what the parent has.

    Args:
        option: the option that the text was given to, for errors.
        text: the text.
        of_parent: returns a measure of the parent by its name.

    Raises:
        ValueError: the text is not of this form, or there is no such measure.
    """
    name, _, value = text.partition("=")
    try:
        number = read_count(value.removesuffix("%"))
    except ValueError:
        number = -1
    if not name or number < 0:
        raise ValueError(
            f"{option} must be of the form BUDGET=VALUE, such as params_active=1.5M or 50%, got {echo(text)}"
        )
    check_measure(name, option)
    return name, number / 100 * of_parent(name) if value.endswith("%") else number


def check_measure(name: str, where: str = "target") -> None:
    """Checks the name of a measure; `where` is the field or option that named it, for the error.

    Raises:
        ValueError: there is no such measure.
    """
    if name not in MEASURES:
        hint = did_you_mean(name, MEASURES)
        raise ValueError(
            f"{where}: {echo(name)} is unknown; {hint}choose from params_total, params_active, flops_train, "
            "decode_bytes, weight_bytes, kv_bytes, state_bytes, memory_bytes, decode_s and other totals of explore cost"
        )
