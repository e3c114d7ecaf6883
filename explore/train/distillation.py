"""Distillation: a student learns a teacher's next-token distribution and, optionally, its layer outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from explore.data import TextData, load_tokenizer
from explore.experiment import Experiment
from explore.model import LanguageModel, TeacherOutput
from explore.objective import Distillation
from explore.ops import forced_paths, paths_in_use
from explore.runs import RunFolder


class Teacher:
    """A trained model that predicts without gradients and in its own precision.

    It uses the implementations of ops that are active when it is created, so none is compiled for it.
    """

    def __init__(self, config: Distillation) -> None:
        self.config = config
        self.model = config.teacher.load().requires_grad_(False)
        self.dtype = torch.bfloat16 if config.teacher_precision == "bf16" else torch.float32
        self._paths = paths_in_use("cpu")
        self._weight = self.model.head.weight.to(self.dtype)
        self._channels = None if config.hidden_channels is None else torch.tensor(config.hidden_channels)

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "batch seq"]) -> tuple[TeacherOutput, dict[int, Tensor]]:
        """Returns the teacher's predictions for a batch, and layer outputs to compare, on the student's channels."""
        device, config = tokens.device, self.config
        self.model, self._weight = self.model.to(device), self._weight.to(device)
        paths = self._paths if device.type == "cpu" else {}
        layers = [theirs for _, theirs in config.hidden_layers]
        precision = torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with precision, forced_paths(**paths), outputs_of(self.model, layers) as outputs:
            hidden, _ = self.model.hidden(tokens)
        if self._channels is not None:
            self._channels = self._channels.to(device)
            outputs = {layer: output[..., self._channels] for layer, output in outputs.items()}
        alone = config.ce_weight == 0
        return TeacherOutput(hidden.to(self.dtype), self._weight, config.temperature, alone), outputs


@contextmanager
def outputs_of(model: LanguageModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the outputs of these layers in the forward passes of the `with` block: (batch, seq, d_model)."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> torch.utils.hooks.RemovableHandle:
        return model.layers[layer].register_forward_hook(
            lambda _module, _inputs, output: found.__setitem__(layer, output[0])
        )

    handles = [keep(layer) for layer in set(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def cosine_distance(
    ours: Float[Tensor, "batch seq d_model"], theirs: Float[Tensor, "batch seq d_model"]
) -> Float[Tensor, ""]:
    """Mean of 1 - cosine over all positions."""
    return 1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean()


def check_teacher(experiment: Experiment) -> None:
    """Raises an error if the teacher's weights are gone, or its tokens or sequence length do not fit.

    Raises:
        ValueError: one of these.
    """
    objective, data = experiment.train.objective, experiment.data
    if not isinstance(objective, Distillation):
        return
    path = Path(objective.teacher.path)
    objective.teacher.check()
    run = RunFolder(path)
    if not run.experiment:  # a folder of weights, whose sequence length is unknown
        if not isinstance(data, TextData):
            raise ValueError(f"train.objective.teacher: must be a run on {data.kind} data, got the folder {path}")
        if not (path / "tokenizer.json").exists():
            raise ValueError(f"train.objective.teacher: {path} must have a tokenizer.json to compare, got none")
        theirs: str | None = load_tokenizer(str(path / "tokenizer.json")).content_hash
    else:
        learnt = run.load_experiment().data
        if learnt.kind != data.kind:
            raise ValueError(f"data.kind: must be {learnt.kind}, that of the teacher {path}, got {data.kind}")
        if data.seq_len > learnt.seq_len:
            raise ValueError(
                f"data.seq_len: must be at most {learnt.seq_len}, that of the teacher {path}, got {data.seq_len}"
            )
        theirs = (run.environment.get("data") or {}).get("tokenizer")
    if isinstance(data, TextData) and load_tokenizer(data.tokenizer).content_hash != theirs:
        raise ValueError(f"data.tokenizer: must be that of the teacher {path}, got another one, {data.tokenizer}")
