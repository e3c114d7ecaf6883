"""Scores of a whole split by document, the unit over which claims about text generalise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch.nn import functional as F

from explore.data import TextSource
from explore.evals.bits_per_byte import Score
from explore.model import LanguageModel

MOST_LOGITS = 1 << 26
"""Number of logits held in memory at once."""


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Cross-entropy summed over each document of a split, in the order of the text.

    Attributes:
        nats: summed cross-entropy.
        n_targets: predicted tokens; the end-of-text token before a document counts towards it.
        n_bytes: bytes of text.
    """

    nats: Float64[np.ndarray, " documents"]
    n_targets: Int64[np.ndarray, " documents"]
    n_bytes: Int64[np.ndarray, " documents"]

    @property
    def total(self) -> Score:
        """The score of the whole split."""
        return Score(float(self.nats.sum()), int(self.n_targets.sum()), int(self.n_bytes.sum()))

    def to_record(self) -> dict[str, list[Any]]:
        """One list per column, as in `evals.json`."""
        return {"nats": self.nats.tolist(), "n_targets": self.n_targets.tolist(), "n_bytes": self.n_bytes.tolist()}


@torch.inference_mode()
def score_documents(
    model: LanguageModel, source: TextSource, split: Literal["val", "test"], batch_size: int = 16
) -> DocumentScores:
    """Scores a whole split in the windows of `TextSource.eval_batches`, and sums over each document.

    As in training, windows cross the ends of documents, so the first tokens of a document are predicted from the end of
    the previous one.

    Raises:
        ValueError: the tokenizer does not give the number of bytes per token.
    """
    table, ids = source.tokenizer.token_bytes, np.asarray(source.streams[split].ids)
    if table is None:
        raise ValueError(
            f"tokenizer: {source.tokenizer.name!r} must give the number of bytes per token for scores by document"
        )
    device, seq_len = model.embedding.weight.device, source.seq_len
    rows = max(1, min(batch_size, MOST_LOGITS // (seq_len * model.embedding.weight.shape[0])))
    found: list[np.ndarray] = []
    for batch in source.eval_batches(split, rows):
        logits = model(batch.inputs.to(device)).float()
        nats = F.cross_entropy(logits.transpose(1, 2), batch.targets.to(device), ignore_index=-100, reduction="none")
        found.append(nats.flatten().double().cpu().numpy()[: len(ids) - 1 - seq_len * rows * len(found)])
    targets = ids[1:]
    document = np.maximum(np.cumsum(ids == source.tokenizer.eot_id) - 1, 0)[1:]
    n = int(document.max()) + 1
    return DocumentScores(
        np.bincount(document, np.concatenate(found), n),
        np.bincount(document, minlength=n).astype(np.int64),
        np.bincount(document, table[targets], n).astype(np.int64),
    )
