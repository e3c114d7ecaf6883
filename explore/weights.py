"""Trained models on disk, as runs or folders of weights: their paths, and digests of their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from explore.archive import read_weights
from explore.config import Config, explain
from explore.files import exists, read_json, replacing
from explore.model import LanguageModel, ModelConfig

RUN, CHECKPOINT, RESULT = "experiment.json", "checkpoints/last.ckpt", "result.json"
MODEL, WEIGHTS = "model.json", "model.safetensors"
DIGEST = "digest"
"""Field of the metadata of a safetensors file."""
BLOCKS = "blocks"
"""Subfolder of a run for blocks trained to replace its layers, named by the digests of their weights."""


class TrainedModel(Config):
    """A trained model. A path is enough: the other fields are then read from it.

    Keys depend on its config and weights, not on its path.

    Attributes:
        path: folder of a finished run, or a folder that `explore import` wrote.
        model: config of the model.
        digest: digest of its weights, from `weights_digest`.
    """

    path: str
    model: ModelConfig
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _look_up(cls, data: Any) -> Any:
        if isinstance(data, str | Path):
            data = {"path": str(data)}
        if not (isinstance(data, Mapping) and data.keys() == {"path"} and isinstance(data["path"], str)):
            return data
        path = Path(data["path"])
        return {**data, "model": _read_config(path), "digest": _digest(path)}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines its outputs: config and weights, not the path."""
        return {"model": self.model.fingerprint(), "digest": self.digest}

    def check(self) -> None:
        """Raises an error if the weights are missing or have changed.

        Raises:
            ValueError: the folder does not hold these weights.
        """
        if (found := _digest(Path(self.path))) != self.digest:
            raise ValueError(
                f"{self.path}: the digest of the weights must be {self.digest[:8]}, got {found[:8]}; "
                "they have changed; to use the new weights, give only the path"
            )

    def load(self) -> LanguageModel:
        """The model with its weights, in evaluation mode.

        Raises:
            ValueError: the folder does not hold these weights.
        """
        self.check()
        model = self.model.build()
        weights = _read_weights(Path(self.path))
        check_shapes(model.state_dict(), weights, self.path)
        model.load_state_dict(weights)
        return model.eval()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Hashes names, dtypes, shapes and values of weights into 64 hexadecimal digits, independent of the file."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_digest(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Compares weights read from a safetensors file with the digest that `explore import` stored in it, if it did.

    Raises:
        ValueError: they differ, so the file is damaged.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        digest = (file.metadata() or {}).get(DIGEST)
    if digest is not None and digest != weights_digest(weights):
        raise ValueError(f"{path}: is damaged (digest of the weights)")


def block_path(folder: Path, digest: str) -> Path:
    """The path of a block that can replace a layer of the model in a folder."""
    return folder / BLOCKS / f"{digest}.safetensors"


def write_block(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """Saves a block beside the model in a folder, and returns its digest."""
    from safetensors.torch import save_file

    digest = weights_digest(weights)
    if not (path := block_path(folder, digest)).exists():
        with replacing(path) as temporary:
            save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, temporary)
    return digest


def read_block(folder: Path, digest: str) -> dict[str, Tensor]:
    """Reads the weights of a block beside the model in a folder.

    Raises:
        ValueError: the file is missing, damaged, or holds another block.
    """
    if not (path := block_path(folder, digest)).exists():
        raise ValueError(f"{path}: is missing; explore puzzle makes the blocks of a plan again")
    weights = _read_safetensors(path)
    if (found := weights_digest(weights)) != digest:
        raise ValueError(f"{path}: the digest of the weights must be {digest[:8]}, got {found[:8]}")
    return weights


def check_shapes(needed: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Raises an error if weights do not match those of a model by name and shape.

    Args:
        source: origin of the weights, for the error.

    Raises:
        ValueError: a weight is missing, has the wrong shape, or is not in the model.
    """
    ours, theirs = ({name: tuple(weight.shape) for name, weight in each.items()} for each in (needed, found))
    if different := sorted(ours.items() ^ theirs.items()):
        name = different[0][0]
        raise ValueError(
            f"{source}: the shape of the weight {name} must be {ours.get(name, 'absent')}, "
            f"got {theirs.get(name, 'none')}"
        )


def _read_config(path: Path) -> ModelConfig:
    if exists(path / MODEL):
        file = path / MODEL
        content: Any = read_json(file)
    elif exists(path / RUN):
        status = read_json(path / RESULT).get("status") if (path / RESULT).exists() else "unfinished"
        if status != "finished":
            raise ValueError(f"must be a run that has finished, got {str(path)!r}, which is {status}")
        record = read_json(path / RUN).get("experiment")
        file, content = path / RUN, record.get("model") if isinstance(record, dict) else None
    else:
        raise ValueError(f"must be a run folder, or a folder that `explore import` wrote, got {str(path)!r}")
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{file}: {explain(error, 'model')}") from None


def _file(path: Path) -> Path:
    return path / (WEIGHTS if exists(path / MODEL) else CHECKPOINT)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a folder by their names in the model, including a tied head.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = _file(path)
    if not file.exists():
        raise ValueError(f"{file}: is missing; the weights must be there")
    try:
        if file.name != WEIGHTS:
            return read_weights(file)
        weights = _read_safetensors(file)
        check_digest(file, weights)
        if _read_config(path).tie_embeddings:
            weights["head.weight"] = weights["embedding.weight"]
        return weights
    except (KeyError, OSError) as error:
        raise ValueError(f"{file}: the weights cannot be read ({' '.join(str(error).split())[:100]})") from None


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def _digest(path: Path) -> str:
    file = _file(path)
    state = file.stat() if file.exists() else None
    return _digest_of(path, None if state is None else (state.st_ino, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=64)
def _digest_of(path: Path, state: tuple[int, ...] | None) -> str:
    """The digest of a file in this state; each process reads the file once."""
    return weights_digest(_read_weights(path))
