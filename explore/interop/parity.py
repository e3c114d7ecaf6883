"""Parity with transformers' nemotron_h: random models must give the same logits and gradients in both."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explore.blocks import Mamba2Config
from explore.interop.extra import needs_extra, quiet
from explore.interop.hf import from_hf, hf_config, to_hf
from explore.interop.names import to_ours
from explore.model import LanguageModel, ModelConfig

if TYPE_CHECKING:
    from transformers import NemotronHForCausalLM

LOGIT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
"""Tolerances in fp32: absolute difference of logits, and of gradients relative to the parameter's largest."""


FLOOR = 1e-3
"""Smallest reference for a gradient's relative difference, as a fraction of the model's largest gradient.

Some gradients are zero except for rounding: the router's with one chosen expert of weight 1, and that of D when a norm
group is one head and x bypasses the scan, since the norm undoes the scale.
"""


class Case(NamedTuple):
    """One random model in both implementations.

    Attributes:
        model: its config.
        direction: `import` if transformers drew the weights, `export` if this kit did.
        seq_len: tokens per sequence.
        logits: largest difference of logits.
        gradients: largest difference of gradients, relative to the parameter's largest gradient.
        parameter: the parameter with that difference.
    """

    model: ModelConfig
    direction: str
    seq_len: int
    logits: float
    gradients: float
    parameter: str


def parity(n_cases: int, seed: int = 0) -> Iterator[Case]:
    """Yields random cases, half in each direction."""
    with quiet():
        for number in range(n_cases):
            yield check(seed, number)


def check(seed: int, number: int) -> Case:
    """Builds one random model in both implementations and compares logits and gradients."""
    rng = random.Random(f"{seed} {number}")
    config = random_config(rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(32))
        direction = "import" if number % 2 else "export"
        ours, theirs = _imported(config) if number % 2 else _exported(config)
        (chunk_size,) = {block.chunk_size for block in config.layers if isinstance(block, Mamba2Config)}
        seq_len = rng.choice([n for n in range(2, 4 * chunk_size) if n % chunk_size])
        tokens, targets = (torch.randint(config.vocab_size, (2, seq_len)) for _ in range(2))
    logits, gradients = [], []
    for model in (ours, theirs):
        out = model(tokens)
        found: Tensor = out if isinstance(out, Tensor) else out.logits
        F.cross_entropy(found.flatten(0, 1), targets.flatten()).backward()
        logits.append(found.detach())
        gradients.append(_gradients(model))
    wrong, where = _largest_difference(gradients[0], to_ours(gradients[1], config))
    return Case(config, direction, seq_len, float((logits[0] - logits[1]).abs().max()), wrong, where)


def random_config(rng: random.Random) -> ModelConfig:
    """Returns a small model with all four kinds of layers and random sizes and options that nemotron_h supports."""
    n_groups, n_kv_heads = rng.choice([1, 2, 4]), rng.choice([1, 2])
    norm_eps = rng.choice([1e-5, 1e-6])
    n_experts = rng.choice([2, 5, 8, 16])
    layers = ["M", "*", "-", "E", *rng.choices("M*-E", k=rng.randint(0, 4))]
    rng.shuffle(layers)
    moe = {
        "n_experts": n_experts,
        "top_k": rng.randint(1, min(4, n_experts)),
        "d_expert": rng.choice([12, 20, 32]),
        "d_latent": rng.choice([None, 8, 16, 24]),
        "n_shared": rng.choice([1, 2]),
        "d_shared": rng.choice([12, 28]),
        "normalize_weights": rng.random() < 0.8,
        "routed_scaling_factor": rng.choice([1.0, 2.5, 5.0]),
    }
    mamba = {
        "n_heads": n_groups * rng.choice([1, 2, 3]),
        "d_head": rng.choice([4, 8, 16]),
        "d_state": rng.choice([4, 8, 16]),
        "n_groups": n_groups,
        "d_conv": rng.choice([2, 4]),
        "chunk_size": rng.choice([4, 8, 16]),
        "norm_eps": norm_eps,
    }
    attention = {"n_heads": n_kv_heads * rng.choice([1, 2, 4]), "n_kv_heads": n_kv_heads, "d_head": rng.choice([4, 8])}
    return ModelConfig.model_validate(
        {
            "d_model": rng.choice([16, 32, 48]),
            "vocab_size": rng.choice([40, 61, 96]),
            "pattern": "".join(layers),
            "blocks": {
                "M": {"kind": "mamba2", **mamba},
                "*": {"kind": "attention", **attention},
                "-": {"kind": "mlp", "d_ff": rng.choice([24, 40, 64])},
                "E": {"kind": "moe", **moe},
            },
            "tie_embeddings": rng.random() < 0.5,
            "norm_eps": norm_eps,
        }
    )


def _exported(config: ModelConfig) -> tuple[LanguageModel, NemotronHForCausalLM]:
    ours = config.build().eval()
    _draw(ours)
    return ours, to_hf(ours)


def _imported(config: ModelConfig) -> tuple[LanguageModel, NemotronHForCausalLM]:
    with needs_extra():
        from transformers import NemotronHForCausalLM

    theirs_config = hf_config(config)
    theirs_config.time_step_min = 0.001  # its default
    theirs = NemotronHForCausalLM(theirs_config)
    theirs.train(False)
    _draw(theirs)
    if config.tie_embeddings:
        theirs.lm_head.weight = theirs.model.embeddings.weight
    for layer in theirs.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, math.inf)
    return from_hf(theirs), theirs


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Draws all weights so that every part affects the output; works with the names of both implementations."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        last = name.removesuffix(".weight").rpartition(".")[2]
        if last == "A_log":
            tensor.uniform_(1, 16).log_()
        elif last == "dt_bias":  # softplus(dt_bias) in 1e-5..0.3, partly below transformers' clamp
            dt = tensor.uniform_(math.log(1e-5), math.log(0.3)).exp()
            tensor.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif last == "D" or last.startswith("norm"):
            tensor.normal_(1, 0.2)
        elif tensor.ndim == 1 or "conv1d" in name:
            tensor.normal_(0, 0.3)
        elif last.startswith("embedding"):
            tensor.normal_(0, 1)
        else:
            tensor.normal_(0, (tensor.shape[-1] * tensor.shape[-2]) ** -0.25)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradient of every weight; zero for the balance bias, which is not a parameter."""
    found = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def _largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Returns the largest relative difference of gradients (see `FLOOR`) and its weight."""
    largest = {name: float(gradient.abs().max()) for name, gradient in theirs.items()}
    floor = FLOOR * max(largest.values())
    differences = {name: float((gradient - theirs[name]).abs().max()) for name, gradient in ours.items()}
    return max((difference / max(largest[name], floor), name) for name, difference in differences.items())
