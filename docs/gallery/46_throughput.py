"""Throughput against latency

The decoding steps of the figure above: tokens per second of the device against the time between the tokens of one
sequence. Points with the same batch lie on a diagonal; up and to the left is better.
"""

from explore import preset
from explore.figures import plot_throughput
from explore.roofline import decode_table

names = ("llama-3.1-8b", "nemotron-h-8b", "gpt-oss-20b")
decoding = decode_table({name: preset(name) for name in names}, "H100", 65_536, (1, 4, 16, 64, 256))
figure = plot_throughput(decoding)
