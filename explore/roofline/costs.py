"""What many models cost, as a table of one row each."""

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
    """What models cost: parameters, FLOPs, bytes and, on a device, the least time of prefill and decoding.

    Args:
        models: by name, such as `{"MEM*E": ModelConfig(d_model=256, vocab_size=2048, pattern="MEM*E")}`.
        seq_len: tokens of a sequence, and of the context of decoding.
        hardware: a known GPU; no times without one.

    Returns:
        One row a model: model, pattern, family, d_model, vocab_size, n_layers, the fields of `explore.cost.Cost`, and
        `state_bytes`; with `hardware` also prefill_s and decode_s (of one sequence, in seconds), largest_batch
        (sequences; 0 where not one fits) and tokens_per_s (decoded by a device with its largest batch; NaN likewise).
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
    except ValueError:  # not one sequence fits
        largest = 0
    rate = largest / deployed.decode_s(context, largest) if largest else float("nan")
    return {
        "prefill_s": deployed.prefill_s(context),
        "decode_s": deployed.decode_s(context, 1),
        "largest_batch": largest,
        "tokens_per_s": rate,
    }
