"""Writes tokenizers as files for transformers' AutoTokenizer."""

from __future__ import annotations

import json
from typing import Any

from explore.data import EOT, Tokenizer
from explore.data.tokenizer import ByteTokenizer, JsonTokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns tokenizer.json and tokenizer_config.json; AutoTokenizer then gives the ids used in training.

    It neither parses special tokens in text nor adds any.

    Raises:
        ValueError: a tokenizer of another kind.
    """
    if isinstance(tokenizer, ByteTokenizer):
        layout = _bytes_layout(tokenizer)
    elif isinstance(tokenizer, JsonTokenizer):
        layout = json.loads(tokenizer.to_json())
    else:
        raise ValueError(f"tokenizer: {tokenizer.name!r} cannot be written as JSON of the `tokenizers` package")
    layout["post_processor"] = None
    end = next((t["content"] for t in layout["added_tokens"] if t["id"] == tokenizer.eot_id), None)
    end = end or next(token for token, i in layout["model"]["vocab"].items() if i == tokenizer.eot_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    return {
        "tokenizer.json": json.dumps(layout, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
    }


def _bytes_layout(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Returns a byte-level BPE without merges, whose ids are the byte values."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.eot_id, "content": EOT, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _byte_characters(),
            "merges": [],
        },
    }


def _byte_characters() -> dict[str, int]:
    """Returns the character for each byte in byte-level vocabularies: itself if visible, otherwise one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    characters = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return dict(sorted(characters.items(), key=lambda item: item[1]))
