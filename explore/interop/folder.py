"""Models as folders: Hugging Face checkpoints and this kit's own format; both use safetensors, never pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from explore.data import Tokenizer, tokenizer_json
from explore.files import check_regular, read_json, temporary_beside
from explore.interop.card import model_card
from explore.interop.extra import needs_extra
from explore.interop.hf import hf_config, with_weights
from explore.interop.names import Shape, as_released, read_checkpoint, to_theirs
from explore.interop.nemotron_h import model_config
from explore.interop.tokenizer import tokenizer_files
from explore.model import LanguageModel, ModelConfig
from explore.weights import DIGEST, check_digest, weights_digest

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL, TOKENIZER = "model.json", "tokenizer.json"
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def save_hf(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

    Tensors are named as in the released checkpoints; multi-token prediction is `mtp.*`, which transformers
    ignores. A tied head is also written, because transformers does not tie it.

    Args:
        record: the run's row in the table of runs, for the model card.

    Raises:
        ValueError: nemotron_h cannot express the model, or the folder is not empty; nothing is written then.
    """
    with needs_extra():
        from safetensors.torch import save_file

    special = {} if tokenizer is None else {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    config = hf_config(model.config, **special)
    config.architectures = ["NemotronHForCausalLM"]
    config.dtype = model.embedding.weight.dtype
    tensors = as_released(to_theirs(model.state_dict(), model.config))
    texts = {"README.md": model_card(model, tokenizer, record or {}), "generation_config.json": json.dumps(special)}
    if tokenizer is not None:
        texts |= tokenizer_files(tokenizer)
    with new_folder(folder) as temporary:
        config.to_json_file(temporary / CONFIG)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


def read_hf_folder(folder: Path) -> LanguageModel:
    """Reads the model from a folder with config.json and safetensors.

    Raises:
        ValueError: a file is missing, broken or a pickle, or `from_hf` rejects the content.
    """
    _only_safetensors(folder)
    fields = read_json(folder / CONFIG)
    with _tensors(_weight_files(folder)) as (shapes, handles):
        config = model_config(fields, shapes)
        state = read_checkpoint(config, shapes, lambda name: handles[name].get_tensor(name), str(folder))
    return with_weights(config, state)


def save_model_folder(model: LanguageModel, folder: str | Path, tokenizer: str | None = None) -> None:
    """Writes a model in this kit's format: model.safetensors, and model.json, which commands accept as a model.

    Args:
        tokenizer: JSON of the `tokenizers` package.

    Raises:
        ValueError: the folder is not empty; nothing is written then.
    """
    with needs_extra():
        from safetensors.torch import save_file

    state = model.state_dict()
    if model.config.tie_embeddings:
        del state["head.weight"]
    with new_folder(folder) as temporary:
        text = json.dumps(model.config.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (temporary / MODEL).write_text(text + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(weights, temporary / WEIGHTS, metadata={DIGEST: weights_digest(weights)})
        if tokenizer is not None:
            (temporary / TOKENIZER).write_text(tokenizer, encoding="utf-8")


def load_model_folder(folder: str | Path) -> LanguageModel:
    """Reads a model that `save_model_folder` wrote, in evaluation mode.

    Raises:
        ValueError: a file is missing, broken or a pickle, or the tensors do not match the config.
    """
    folder = Path(folder)
    _only_safetensors(folder)
    config = load_model_config(folder)
    with _tensors([folder / WEIGHTS]) as (shapes, handles):
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in config.build().state_dict().items()}
        if config.tie_embeddings:
            del expected["head.weight"]
        if wrong := sorted(expected.items() ^ shapes.items()):
            name = wrong[0][0]
            raise ValueError(
                f"{folder / WEIGHTS}: tensor {name} has the shape {shapes.get(name)}; {expected.get(name)} is needed"
            )
        state = {name: handles[name].get_tensor(name) for name in expected}
    check_digest(folder / WEIGHTS, state)
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    return with_weights(config, state)


def is_model_folder(folder: Path) -> bool:
    """Whether `save_model_folder` wrote the folder."""
    return (folder / "model.json").exists()


def load_model_config(folder: str | Path) -> ModelConfig:
    """Reads the config from a folder that `save_model_folder` wrote.

    Raises:
        ValueError: no such file, or an invalid field.
    """
    path = Path(folder) / MODEL
    return ModelConfig.validated(read_json(path), path)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that replaces it if the block ends without an error.

    Raises:
        ValueError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: is there already; an empty or a new folder is needed")
    with temporary_beside(path, folder=True) as temporary:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(path)


def read_tokenizer_json(folder: Path) -> str | None:
    """Reads a checkpoint's tokenizer for `save_model_folder`; None if the folder has none.

    Raises:
        ValueError: invalid tokenizer, or a link to a file elsewhere, which might expose that file. Links within
            the folder are followed, and links from a Hugging Face cache snapshot to its own blobs.
    """
    path = folder / TOKENIZER
    if not os.path.lexists(path):
        return None
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
        raise ValueError(f"{path}: must be a file of the folder, got a link to a file elsewhere; copy it there")
    return tokenizer_json(path)


def _only_safetensors(folder: Path) -> None:
    if folder.suffix in PICKLES:
        raise ValueError(f"{folder}: a pickle is never read; a folder with safetensors is needed")
    if not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder with {CONFIG} and {WEIGHTS}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f"{pickles[0]} is a pickle, which is never read" if pickles else f"{WEIGHTS} is missing"
        raise ValueError(f"{folder}: {found}; safetensors are needed")


def _weight_files(folder: Path) -> list[Path]:
    """Returns the checkpoint's file, or the files named by its index."""
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{folder / INDEX}: weight_map must say the file of every tensor")
    if outside := [name for name in names.values() if Path(name).name != name]:
        raise ValueError(f"{folder / INDEX}: {outside[0]!r} is not a file of the folder")
    return [folder / name for name in sorted(set(names.values()))]


@contextmanager
def _tensors(paths: list[Path]) -> Iterator[tuple[dict[str, Shape], dict[str, Any]]]:
    """Returns the shape of every tensor in some safetensors files, and the open file that holds it."""
    with needs_extra():
        from safetensors import SafetensorError, safe_open

    shapes: dict[str, Shape] = {}
    handles: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in paths:
            check_regular(path)
            try:
                file = stack.enter_context(safe_open(path, "pt"))
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
            shapes |= found
            handles |= dict.fromkeys(found, file)
        yield shapes, handles
