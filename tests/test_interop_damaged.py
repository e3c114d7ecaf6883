"""Damaged checkpoints and folders are refused by name, and failures leave nothing behind."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanged_models import config, drawn, edit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from explore.data.known import ASSETS
from explore.interop import (
    from_hf,
    load_model_folder,
    read_tokenizer_json,
    save_hf,
    save_model_folder,
    to_hf,
)


def null(folder: Path, field: str) -> None:
    """Sets a field of config.json to null."""
    content = json.loads((folder / "config.json").read_text()) | {field: None}
    (folder / "config.json").write_text(json.dumps(content))


def wrap(folder: Path) -> None:
    """Makes config.json that of a vision-language model."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "VL", "llm_config": content}))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A change to the tensors of a folder."""

    def apply(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return apply


def as_pickle(name: str) -> Callable[[Path], None]:
    """Replaces the safetensors by a pickle."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps({"weight": [1.0] * 100}))

    return apply


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


HEAD, DOWN = "lm_head.weight", "backbone.layers.1.mixer.experts.5.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tensors(lambda t: t.pop(HEAD)), "tensor lm_head.weight is missing"),
        (tensors(lambda t: t.pop(DOWN)), "tensor model.layers.1.mixer.experts.5.down_proj.weight is missing"),
        (tensors(lambda t: t.update(more=torch.ones(1))), "tensor more has no place in the model"),
        (
            tensors(lambda t: t.update({HEAD: torch.ones(3, 32)})),
            r"lm_head.weight has the shape \(3, 32\); \(300, 32\)",
        ),
        (tensors(lambda t: t.update({DOWN: t[DOWN].T.contiguous()})), r"experts.5.down_proj.weight has the shape"),
        (tensors(lambda t: t.update({"model.norm_f.weight": torch.ones(32)})), "is there twice"),
        (truncate, "model.safetensors: not a whole safetensors file"),
        (as_pickle("model.safetensors"), "model.safetensors: not a whole safetensors file"),
        (as_pickle("pytorch_model.bin"), "pytorch_model.bin is a pickle, which is never read; safetensors are needed"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
        (
            lambda folder: edit(folder, mlp_hidden_act="silu"),
            "mlp_hidden_act must be 'relu2'",
        ),
        (lambda folder: edit(folder, model_type="llama"), "model_type must be 'nemotron_h', got 'llama'"),
        (
            lambda folder: edit(folder, time_step_limit=[0.001, 0.1]),
            r"time_step_limit: must be \[0, Infinity\], since dt is",
        ),
        (lambda folder: edit(folder, time_step_limit=7), "time_step_limit: must be"),
        (lambda folder: null(folder, "time_step_limit"), "time_step_limit: must be"),
        (lambda folder: edit(folder, mamba_dt_limit=[0.0, 0.1]), "time_step_limit: must be"),
        (lambda folder: edit(folder, time_step_min="x"), "time_step_min: must be a positive number, got 'x'"),
        (lambda folder: edit(folder, time_step_max=True), "time_step_max: must be a positive number, got True"),
        (lambda folder: null(folder, "time_step_min"), "time_step_min: must be a positive number, got None"),
        (lambda folder: null(folder, "model_type"), "model_type: field required"),
        (wrap, "llm_config: the weights of a vision-language model cannot be read"),
        (lambda folder: edit(folder, hidden_size=64), "explore_model: hidden_size is 32 there and 64 beside it"),
        (lambda folder: edit(folder, explore_model={"d_model": 3}), "explore_model"),
        (lambda folder: edit(folder, num_nextn_predict_layers=1), "num_nextn_predict_layers: 1, but there are no"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "'../b' is not a file of the folder",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_checkpoint_is_refused_by_name(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save_hf(drawn(config()), tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ValueError, match=message) as found:
        from_hf(tmp_path / "hf")
    assert "\n" not in str(found.value)


def test_the_tokenizer_of_a_checkpoint_is_a_separate_file(tmp_path: Path) -> None:
    hub = tmp_path / "models--x--y"
    folder = hub / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (hub / "blobs").mkdir()
    assert read_tokenizer_json(folder) is None
    text = (ASSETS / "austen-bpe-2048.json").read_text(encoding="utf-8")
    (hub / "blobs" / "89ab").write_text("\ufeff" + text, encoding="utf-8")
    (folder / "tokenizer.json").symlink_to("../../blobs/89ab")  # as huggingface_hub lays its cache out
    assert read_tokenizer_json(folder) == text
    for target, message in (
        (tmp_path / "secret", "must be a file of the folder, got a link to a file elsewhere"),
        (tmp_path / "nothing", "must be a file of the folder, got a link to a file elsewhere"),
        (folder / "nothing", "cannot be read"),
        (folder / "tokenizer.json", "cannot be read"),
        (folder / "secret", "must be a JSON file of the `tokenizers` package"),
    ):
        for secret in (tmp_path / "secret", folder / "secret"):
            secret.write_text("root:x:0:0")
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").symlink_to(target)
        with pytest.raises(ValueError, match=message) as caught:
            read_tokenizer_json(folder)
        assert "root:x" not in str(caught.value)


def test_leftovers_of_a_killed_export_are_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".0123abcd.tmp").mkdir()
    (tmp_path / ".0123abcd.tmp" / "model.safetensors").write_bytes(b"half")
    save_model_folder(drawn(config()), tmp_path / "own")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_tied_head_that_is_not_the_embedding_is_refused() -> None:
    theirs = to_hf(drawn(config(tie_embeddings=True)))
    theirs.lm_head.weight = nn.Parameter(torch.ones_like(theirs.lm_head.weight))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embeddings.weight though"):
        from_hf(theirs)


def flip(folder: Path) -> None:
    """Flips one bit of a weight."""
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 0x40
    (folder / "model.safetensors").write_bytes(content)


def as_fifo(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage", [truncate, flip, as_fifo, as_pickle("model.pt"), tensors(lambda t: t.pop("norm.weight"))]
)
def test_a_broken_folder_of_our_own_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save_model_folder(drawn(config()), tmp_path / "own")
    damage(tmp_path / "own")
    with pytest.raises(
        ValueError, match=r"not a whole|is damaged|got a FIFO|is a pickle|tensor norm.weight has the shape None"
    ):
        load_model_folder(tmp_path / "own")


def test_a_folder_that_is_not_empty_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is there already"):
        save_hf(drawn(config()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    for save in (save_hf, save_model_folder):
        with pytest.raises(OSError, match="disk full"):
            save(drawn(config()), tmp_path / "hf")
    assert not list(tmp_path.iterdir())
