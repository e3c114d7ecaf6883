"""Low precision as data: number formats. Knows nothing of torch."""

from explore.precision.formats import ELEMENTS, FORMATS, Element, Format, FormatName, Scaling

__all__ = ["ELEMENTS", "FORMATS", "Element", "Format", "FormatName", "Scaling"]
