"""Import and export: Hugging Face's nemotron_h, Megatron-LM, and this kit's safetensors folders."""

from explore.interop.folder import (
    is_model_folder,
    load_model_config,
    load_model_folder,
    read_tokenizer_json,
    save_hf,
    save_model_folder,
)
from explore.interop.fresh import greedy_text
from explore.interop.hf import from_hf, hf_config, to_hf
from explore.interop.megatron import megatron_arguments
from explore.interop.parity import GRADIENT_TOLERANCE, LOGIT_TOLERANCE, Case, check, parity, random_config
from explore.interop.precision import model_optimizer_names, te_quant

__all__ = [
    "GRADIENT_TOLERANCE",
    "LOGIT_TOLERANCE",
    "Case",
    "check",
    "from_hf",
    "greedy_text",
    "hf_config",
    "is_model_folder",
    "load_model_config",
    "load_model_folder",
    "megatron_arguments",
    "model_optimizer_names",
    "parity",
    "random_config",
    "read_tokenizer_json",
    "save_hf",
    "save_model_folder",
    "te_quant",
    "to_hf",
]
