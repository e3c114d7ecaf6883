"""Runs an exported model in a process without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
cached = model.config.use_cache  # transformers has no cache for a model without attention
written = model.generate(torch.tensor([tokens]), max_new_tokens=n, do_sample=False, eos_token_id=None, use_cache=cached)
new = written[0, len(tokens) :].tolist()
assert "explore" not in sys.modules
print(json.dumps({"tokens": new, "text": tokenizer.decode(new)}))
"""


def greedy_text(folder: Path, prompt: str, max_new_tokens: int) -> tuple[list[int], str]:
    """Generates with transformers in a fresh process; returns the new tokens and their text.

    Raises:
        ValueError: transformers cannot load or run the folder.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder.resolve()), prompt, str(max_new_tokens)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise ValueError(f"{folder}: transformers cannot run it ({done.stderr.strip().splitlines()[-1]})")
    written = json.loads(done.stdout.splitlines()[-1])
    return written["tokens"], written["text"]
