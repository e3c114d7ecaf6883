"""What published models spend

How active parameters, FLOPs of a forward pass and bytes of a decoding step divide among the parts of a model, at
65,536 tokens.
`explore cost` prints the same numbers.
"""

from explore import preset
from explore.figures import plot_receipts

names = ("llama-3.1-8b", "nemotron-h-8b", "nemotron-3-nano", "gpt-oss-20b")
figure = plot_receipts({name: preset(name) for name in names}, seq_len=65_536)
