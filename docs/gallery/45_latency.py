"""Decode latency against batch

Lower bounds on one H100 at 65,536 tokens of context. A hollow marker is a batch that does not fit in its memory.
"""

from explore import preset
from explore.figures import plot_latency
from explore.roofline import decode_table

names = ("llama-3.1-8b", "nemotron-h-8b", "gpt-oss-20b")
decoding = decode_table({name: preset(name) for name in names}, "H100", 65_536, (1, 4, 16, 64, 256))
figure = plot_latency(decoding)
