"""Costs of many models, as a table with one row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from explore.cost import DTYPES, SEQ_LEN, Cost, Dtypes
from explore.model import ModelConfig
from explore.roofline.hardware import hardware as device_named
from explore.roofline.regimes import Deployment

if TYPE_CHECKING:
    import pandas as pd


def costs_table(
    models: Mapping[str, ModelConfig], seq_len: int = SEQ_LEN, *, dtypes: Dtypes = DTYPES, hardware: str | None = None
) -> pd.DataFrame:
    """Tabulates models' parameters, FLOPs, bytes and, on a device, lower bounds on prefill and decoding time.

    Args:
        models: models by name, such as `{"MEM*E": ModelConfig(d_model=256, vocab_size=2048, pattern="MEM*E")}`.
        seq_len: tokens per sequence and of decoding context.
        hardware: a known GPU; without one, no times.

    Returns:
        One row per model: model, pattern, family, d_model, vocab_size, n_layers, the fields of `explore.cost.Cost`, and
        `state_bytes`; with `hardware` also prefill_s and decode_s (seconds, one sequence), largest_batch (sequences; 0
        if none fits) and tokens_per_s (decoded per device at the largest batch; NaN if none fits).
    """
    import pandas as pd

    device = None if hardware is None else device_named(hardware)
    rows = []
    for name, model in models.items():
        cost = Cost.of(model.ledger(seq_len), dtypes)
        about: dict[str, Any] = {
            "model": name, "pattern": model.pattern, "family": model.family, "d_model": model.d_model,
            "vocab_size": model.vocab_size, "n_layers": model.n_layers,
        }  # fmt: skip
        row = about | cost.to_dict() | {"state_bytes": cost.state_bytes}
        if device is not None:
            row |= _times(Deployment(model, device, dtypes), seq_len)
        rows.append(row)
    return pd.DataFrame(rows)


def _times(deployed: Deployment, context: int) -> dict[str, float]:
    try:
        largest = deployed.largest_batch(context)
    except ValueError:  # no sequence fits
        largest = 0
    rate = largest / deployed.decode_s(context, largest) if largest else float("nan")
    return {
        "prefill_s": deployed.prefill_s(context),
        "decode_s": deployed.decode_s(context, 1),
        "largest_batch": largest,
        "tokens_per_s": rate,
    }
