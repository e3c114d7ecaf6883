"""Accumulates the sums behind scores over a text: activations by axis, and effects of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explore.blocks import Axis, BlockConfig, Dim, RMSNorm, RoutedMixer
from explore.data import IGNORED, Batch
from explore.model import LanguageModel
from explore.model.layout import model_layout

EXPERTS, CHANNELS = "n_experts", "d_expert"
"""Axes of routed experts, scored by each expert's own computation."""

EFFECTS = ("mse", "kl", "loss", "influence")
"""Effects of a layer. Without the layer: mean squared change of the head's input, divergence of the predictions, and
loss. With it: rotation of the residual stream, 1 - cos."""


class Observer:
    """Accumulates named sums over a text in float64; they can be saved and loaded.

    Names of the sums: `activation/LAYER/AXIS/STRETCH`, `stream/NORM`, `moment/WEIGHT`, `covariance/LAYER/AXIS`,
    `reap/LAYER`, `load/LAYER`, `effect/EFFECT` and `n/WHAT`.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.active = False

    @torch.no_grad()
    def observe(self, batch: Batch, *, effects: bool = True) -> None:
        """Adds one batch.

        Args:
            effects: also run the model without each layer, which takes several times as long as the rest.
        """
        model, tokens = self.model, batch.inputs
        with ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            self.active = True
            x = model.embedding(tokens)
            stream = [x]
            for layer in model.layers:
                x, _ = layer(x)
                stream.append(x)
            hidden = model.norm(x)
            self.active = False
        self._add("n/tokens", torch.tensor(tokens.numel()))
        if effects:
            self._add_effects(stream, hidden, batch.targets)

    @torch.no_grad()
    def observe_layers(self, batch: Batch) -> None:
        """Adds only the effects of removing each layer on one batch."""
        x = self.model.embedding(batch.inputs)
        stream = [x]
        for layer in self.model.layers:
            x, _ = layer(x)
            stream.append(x)
        self._add_effects(stream, self.model.norm(x), batch.targets)

    def effect(self, name: str) -> list[float]:
        """Returns one of `EFFECTS` for each layer, as a mean over tokens."""
        n = self.sums["n/targets" if name == "loss" else "n/effects"]
        return [float(value) for value in self.sums[f"effect/{name}"] / n]

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_effects(self, stream: list[Tensor], hidden: Tensor, targets: Tensor) -> None:
        model, chosen = self.model, targets.flatten() != IGNORED
        log_p = model.head(hidden).flatten(0, 1).log_softmax(-1)
        p = log_p.exp()
        wanted = targets.flatten().clamp(min=0)[:, None]
        found: dict[str, list[Tensor]] = {name: [] for name in EFFECTS}
        for i in range(len(model.layers)):
            y = stream[i]
            for layer in list(model.layers)[i + 1 :]:
                y, _ = layer(y)
            y = model.norm(y)
            log_q = model.head(y).flatten(0, 1).log_softmax(-1)
            found["mse"].append((y - hidden).square().mean(-1).sum())
            found["kl"].append((p * (log_p - log_q)).sum())
            found["loss"].append((log_p.gather(1, wanted) - log_q.gather(1, wanted))[chosen].sum())
            found["influence"].append((1 - F.cosine_similarity(stream[i], stream[i + 1], dim=-1)).sum())
        self._add("n/targets", chosen.sum())
        self._add("n/effects", torch.tensor(chosen.numel()))
        for name, values in found.items():
            self._add(f"effect/{name}", torch.stack([value.double() for value in values]))

    def _hooks(self) -> list[Any]:
        model, layout = self.model, model_layout(self.model.config)
        handles = self._norm("norm", model.norm)
        for i, (layer, block) in enumerate(zip(model.layers, model.config.layers, strict=True)):
            mixer, name = layer.mixer, f"layers.{i}"
            assert isinstance(mixer, nn.Module)
            assert isinstance(layer.norm, RMSNorm)
            handles += self._norm(f"{name}.norm", layer.norm)
            handles += [self._probe(i, axis, block, mixer) for axis in block.axes() if axis.probe is not None]
            for inner, module in mixer.named_modules():
                dims = layout[f"{name}.mixer.{inner}.weight"].dims if isinstance(module, RMSNorm) else ((),)
                if isinstance(module, RMSNorm) and dims[0] and f"{inner}.weight" not in block.fused_norms:
                    handles.append(self._moments(f"{name}.mixer.{inner}.weight", module))
            for weight, norm in block.fused_norms.items():
                read_by, scale = mixer.get_submodule(norm.read_by), mixer.get_parameter(weight)
                handles.append(self._on_input(read_by, self._fused(f"{name}.mixer.{weight}", scale)))
            if isinstance(mixer, RoutedMixer):
                handles.append(self._on_input(mixer, self._visits(i, mixer)))
        return handles

    def _on_input(self, module: nn.Module, add: Callable[[Tensor], None]) -> Any:
        return module.register_forward_pre_hook(lambda _, inputs: add(inputs[0]) if self.active else None)

    def _on_output(self, module: nn.Module, add: Callable[[Tensor], None]) -> Any:
        return module.register_forward_hook(lambda _, inputs, output: add(output) if self.active else None)

    def _norm(self, name: str, norm: RMSNorm) -> list[Any]:
        """Hooks the input and output of a norm of the residual stream."""
        stream = self._on_output(norm, lambda y: self._add(f"stream/{name}", _by_sequence(y.abs())))
        return [stream, self._moments(f"{name}.weight", norm)]

    def _moments(self, weight: str, norm: RMSNorm) -> Any:
        """Hooks a norm to add its channels' mean squares, each token divided by its own mean square."""

        def add(x: Tensor) -> None:
            square = x.float().square()
            self._add(f"moment/{weight}", (square / (square.mean(-1, keepdim=True) + (norm.eps or 0))).sum((0, 1)))

        return self._on_input(norm, add)

    def _fused(self, weight: str, scale: Tensor) -> Callable[[Tensor], None]:
        """Like `_moments`, computed from the norm's output."""

        def add(y: Tensor) -> None:
            self._add(f"moment/{weight}", (y / torch.where(scale == 0, torch.inf, scale)).square().sum((0, 1)))

        return add

    def _probe(self, layer: int, axis: Axis, block: BlockConfig, mixer: nn.Module) -> Any:
        probe = axis.probe
        assert probe is not None
        module = mixer.get_submodule(probe.module)
        dims = block.layout()[f"{probe.module}.weight"]
        dim = dims[-1 if probe.side == "input" else 0]
        sizes = {each.name: each.size for each in block.axes()}
        stretches = probe.stretches or tuple(range(len(dim)))

        def add(a: Tensor) -> None:
            for s in stretches:
                columns, owner = owners(dim, s, axis.name, sizes)
                part = a[..., columns]
                name = f"activation/{layer}/{axis.name}/{s}"
                if probe.squares:
                    self._add(name, part.double().square().sum((0, 1)))
                    continue
                whole = part.new_zeros(*part.shape[:-1], axis.size).index_add(-1, owner, part.square()).sqrt()
                self._add(name, _by_sequence(whole))
                if axis.rotatable:
                    rows = part.flatten(0, 1).double()
                    self._add(f"covariance/{layer}/{axis.name}", rows.T @ rows)

        return (self._on_input if probe.side == "input" else self._on_output)(module, add)

    def _visits(self, layer: int, mixer: RoutedMixer) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            self.active = False
            reap, load, channels = [], [], []
            for visit in mixer.visits(x):
                reap.append((visit.weights * visit.output.norm(dim=-1)).sum())
                load.append(len(visit.tokens))
                by_sequence = x.new_zeros(len(x), visit.inner.shape[-1])
                by_sequence.index_add_(0, visit.tokens // x.shape[1], visit.inner.abs() / x.shape[1])
                channels.append(by_sequence.double().square().sum(0))
            self._add(f"reap/{layer}", torch.stack(reap))
            self._add(f"load/{layer}", torch.tensor(load))
            self._add(f"activation/{layer}/{CHANNELS}/0", torch.cat(channels))
            self.active = True

        return add


def owners(dim: Dim, stretch: int, axis: str, sizes: Mapping[str, int]) -> tuple[slice, Tensor]:
    """Returns the columns of one stretch of a dimension, and each column's index on an axis."""
    widths = [[part if isinstance(part, int) else sizes[part] for part in each] for each in dim]
    lengths = [int(torch.tensor(each).prod()) for each in widths]
    start = sum(lengths[:stretch])
    place = dim[stretch].index(axis)
    shape = [1] * len(widths[stretch])
    shape[place] = -1
    owner = torch.arange(sizes[axis]).view(shape).expand(widths[stretch]).flatten()
    return slice(start, start + lengths[stretch]), owner


def _by_sequence(a: Tensor) -> Tensor:
    """Squares the means over a sequence and sums them over the batch: (batch, seq, size) to (size)."""
    return a.double().mean(1).square().sum(0)
