"""Closed-form accounting: the ledger, its totals, and FLOP conventions. Knows nothing of torch."""

from explore.cost.conventions import CONVENTIONS, Convention, ConventionName, diff, flops_train
from explore.cost.ledger import (
    BITS,
    DTYPES,
    MTP_LETTER,
    By,
    Dtype,
    Dtypes,
    Entry,
    Ledger,
    Part,
    Row,
    attended_keys,
    bytes_of,
    decode_bytes,
    matrix,
    product,
    vector,
    visible_keys,
)
from explore.cost.totals import Cost

__all__ = [
    "BITS",
    "CONVENTIONS",
    "DTYPES",
    "MTP_LETTER",
    "By",
    "Convention",
    "ConventionName",
    "Cost",
    "Dtype",
    "Dtypes",
    "Entry",
    "Ledger",
    "Part",
    "Row",
    "attended_keys",
    "bytes_of",
    "decode_bytes",
    "diff",
    "flops_train",
    "matrix",
    "product",
    "vector",
    "visible_keys",
]
