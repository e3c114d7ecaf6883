"""Decoding state against context

Keys and values grow with every token, and recurrent state does not. Right of a crossing, the model that kept more
before keeps less.
"""

from explore import preset
from explore.figures import plot_state

names = ("llama-3.1-8b", "nemotron-h-8b", "gpt-oss-20b")
figure = plot_state({name: preset(name) for name in names})
