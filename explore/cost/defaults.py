"""Defaults that all commands, the solver and the workbench share."""

D_MODEL = 256
VOCAB_SIZE = 2048
SEQ_LEN = 4096
"""Tokens per sequence, also the context length of decoding."""
HARDWARE = "H100"
