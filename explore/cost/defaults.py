"""What is assumed of a model and of its use where nothing is said, by every command, the solver and the workbench."""

D_MODEL = 256
VOCAB_SIZE = 2048
SEQ_LEN = 4096
"""Tokens of a sequence, and of the context of decoding."""
HARDWARE = "H100"
