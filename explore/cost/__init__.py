"""Closed-form accounting: the ledger and its units. Knows nothing of torch."""

from explore.cost.ledger import BITS, Cost, Dtype, Entry, Ledger, Row, attended_keys, matrix, vector

__all__ = ["BITS", "Cost", "Dtype", "Entry", "Ledger", "Row", "attended_keys", "matrix", "vector"]
