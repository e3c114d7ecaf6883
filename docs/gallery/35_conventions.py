"""FLOP conventions

Training FLOPs per token as other conventions count them, relative to `exact`, at three lengths. See [the
ledger](concepts/ledger.md) for what each of them counts.
"""

from explore import preset
from explore.figures import plot_conventions

names = ("llama-3.1-8b", "nemotron-h-8b", "nemotron-3-nano", "gpt-oss-20b")
figure = plot_conventions({name: preset(name) for name in names}, seq_lens=(4096, 32_768, 262_144))
