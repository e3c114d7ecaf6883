"""Conversion between this kit's models and transformers' NemotronHForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from explore.foreign import check_type
from explore.interop.extra import needs_extra
from explore.interop.names import read_checkpoint, to_theirs
from explore.interop.nemotron_h import hf_fields, model_config
from explore.model import LanguageModel, ModelConfig

if TYPE_CHECKING:
    from transformers import NemotronHConfig, NemotronHForCausalLM


def from_hf(source: str | Path | NemotronHForCausalLM) -> LanguageModel:
    """Converts a nemotron_h checkpoint to a model in evaluation mode; half-precision weights become fp32.

    dt is not clamped here. transformers clamps it at `time_step_min` in all but one-token steps, so its logits differ
    from ours unless its mixers have `time_step_limit = (0, inf)`, as released configurations ask for.

    Args:
        source: a folder with config.json and safetensors, or a model of transformers.

    Raises:
        ValueError: an option has no counterpart here, or the tensors do not match the config.
    """
    if isinstance(source, str | Path):
        from explore.interop.folder import read_hf_folder

        return read_hf_folder(Path(source))
    check_type(source, nn.Module, "source must be a folder, or a model of transformers")
    tensors: Mapping[str, Tensor] = source.state_dict()
    config = model_config(source.config.to_dict(), tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return with_weights(config, read_checkpoint(config, shapes, tensors.__getitem__, "model"))


def to_hf(model: LanguageModel, *, without_mtp: bool = False) -> NemotronHForCausalLM:
    """Converts a model to transformers with copied weights; both give the same logits.

    Args:
        without_mtp: drop multi-token prediction, for which transformers has no module.

    Raises:
        ValueError: nemotron_h cannot express the model; the message names the field.
    """
    check_type(model, LanguageModel, "model must be an explore.LanguageModel")
    with needs_extra():
        from transformers import NemotronHForCausalLM

    config = model.config
    if config.mtp is not None:
        if not without_mtp:
            raise ValueError(
                "mtp: transformers has no module for multi-token prediction; "
                "pass without_mtp=True, or write a folder, which keeps its weights"
            )
        config = ModelConfig.model_validate({**config.model_dump(), "mtp": None})
    theirs_config = hf_config(config)
    tensors = to_theirs(model.state_dict(), config)
    with torch.device("meta"):
        theirs: NemotronHForCausalLM = NemotronHForCausalLM(theirs_config)
    theirs.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:  # transformers does not tie them, even with tie_word_embeddings
        theirs.lm_head.weight = theirs.model.embeddings.weight
    theirs.train(model.training)
    return theirs


def hf_config(config: ModelConfig, **fields: Any) -> NemotronHConfig:
    """Returns the config for transformers.

    Args:
        fields: fields that do not describe the model, such as ids of special tokens.
    """
    with needs_extra():
        from transformers import NemotronHConfig

    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return NemotronHConfig(**hf_fields(config), **{**no_tokens, **fields})


def with_weights(config: ModelConfig, state: Mapping[str, Tensor]) -> LanguageModel:
    """Builds a model in evaluation mode around the tensors of a complete state dict."""
    with torch.device("meta"):
        model = config.build()
    wide = {name: weight.float() if weight.dtype.itemsize < 4 else weight for name, weight in state.items()}
    model.load_state_dict(wide, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()
