"""Search: spaces of patterns and sizes, and the samplers that draw from them."""

from explore.search.spaces import PatternSpace

__all__ = ["PatternSpace"]
