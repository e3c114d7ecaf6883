"""The model as a module."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from explore.blocks import Linear, RMSNorm, RoutedMixer, RouterStats, State
from explore.foreign import check_type
from explore.model.config import ModelConfig
from explore.model.layer import Layer
from explore.model.mtp import MTPDepth
from explore.ops import Divergence, StateRounding, linear_cross_entropy, linear_kl, logits_kl, same_paths


class Loss(NamedTuple):
    """The losses of one batch.

    Attributes:
        cross_entropy: mean over predicted tokens, in nats; without a gradient if only the teacher is imitated.
        aux_loss: sum of the layers' balance losses, already multiplied by their coefficients.
        stats: router statistics by layer, for layers with a router.
        n_targets: number of predicted tokens.
        mtp: mean cross-entropy of every depth of multi-token prediction, if requested.
        kl: mean KL divergence from the teacher over predicted tokens, in nats, if there is a teacher.
    """

    cross_entropy: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    stats: dict[int, RouterStats]
    n_targets: Int[Tensor, ""]
    mtp: Float[Tensor, " n_depths"] | None = None
    kl: Float[Tensor, ""] | None = None


class TeacherOutput(NamedTuple):
    """A teacher's predictions for one batch: softmax(hidden weight^T / temperature), with logits not yet computed.

    Attributes:
        hidden: input of its head.
        weight: matrix of its head, in the dtype of the product.
        alone: minimise only the divergence; the cross-entropy then needs no gradient.
    """

    hidden: Float[Tensor, "batch seq d_teacher"]
    weight: Float[Tensor, "vocab_size d_teacher"]
    temperature: float = 1.0
    alone: bool = True


class LanguageModel(nn.Module):
    """Embedding, layers, norm, head, and the depths of multi-token prediction.

    Matrices start with standard deviation `ModelConfig.std`; those that write to the residual stream divide it by
    the square root of the number of layers. The config may give the embedding its own.

    Attributes:
        recompute: discard activations inside a layer and recompute them in the backward pass.
        state_rounding: formats of decoding state. Whole sequences are then also read with state, so
            attention sees the same rounded keys and values as in decoding.
    """

    def __init__(self, config: ModelConfig) -> None:
        check_type(config, ModelConfig, "config must be an explore.ModelConfig")
        super().__init__()
        self.config = config
        self.recompute = False
        self.state_rounding: StateRounding | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(block, config.d_model, config.norm_eps) for block in config.layers)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        n_stored = 0 if config.mtp is None else config.mtp.n_stored
        self.mtp = nn.ModuleList(MTPDepth(config) for _ in range(n_stored))
        self.init_weights()

    def __repr__(self) -> str:
        weight = self.embedding.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"LanguageModel({repr(self.config).partition('(')[2].removesuffix(')')}, {dtype} on {weight.device})"

    def _repr_html_(self) -> str:
        return self.config._repr_html_()

    def init_weights(self) -> None:
        """Draws all weights from torch's global generator."""
        std, out_std = self.config.std, self.config.std / math.sqrt(self.config.n_layers)
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_std or std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=std)
        self.norm.reset_parameters()
        for part in (*self.layers, *self.mtp):
            assert isinstance(part, Layer | MTPDepth)
            part.init_weights(std, out_std)

    def new_state(self, capacity: int | None = None) -> list[State]:
        """Returns the empty decoding state of each layer.

        Args:
            capacity: maximum number of positions; when given, states are written in place, which is faster.
        """
        states = [block.new_state(capacity) for block in self.config.layers]
        if self.state_rounding is not None:
            for i, state in enumerate(states):
                state.rounding = replace(self.state_rounding, layer=i)
        return states

    def forward(
        self, tokens: Int[Tensor, "batch seq"], state: list[State] | None = None
    ) -> Float[Tensor, "batch seq vocab_size"]:
        """Returns next-token logits at every position.

        Args:
            state: from `new_state`, and updated here; the tokens continue those read with it before.
        """
        hidden, _ = self.hidden(tokens, state)
        logits: Tensor = self.head(hidden)
        return logits

    def hidden(
        self, tokens: Int[Tensor, "batch seq"], state: list[State] | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], dict[int, RouterStats]]:
        """Returns the head's input, and router statistics by layer."""
        if state is None and self.state_rounding is not None:
            state = self.new_state()
        x = self.embedding(tokens)
        stats: dict[int, RouterStats] = {}
        for i, layer in enumerate(self.layers):
            x, layer_stats = self._run(layer, x) if state is None else layer(x, state[i])
            if layer_stats is not None:
                stats[i] = layer_stats
        return self.norm(x), stats

    def _run(self, part: nn.Module, *inputs: Tensor) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=same_paths)
        return part(*inputs)

    def loss(
        self,
        tokens: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        *,
        mtp: bool = False,
        teacher: TeacherOutput | None = None,
    ) -> Loss:
        """Returns the mean cross-entropy over targets other than -100.

        Args:
            mtp: also compute the losses of multi-token prediction, and include its routers in the balance loss.
            teacher: also compute the divergence from the teacher's next-token predictions.
        """
        hidden, stats = self.hidden(tokens)
        n_targets = (targets != -100).sum()
        kl = None
        if teacher is None:
            total = self._cross_entropy(hidden, targets)
        else:
            kl, total = self._divergence(hidden, targets, teacher)
            kl = kl / n_targets
            if not teacher.alone:
                total = self._cross_entropy(hidden, targets)
        deeper = self._deeper_losses(hidden, tokens, targets, stats) if mtp and self.config.mtp is not None else None
        aux_loss = sum((s.aux_loss for s in stats.values()), start=hidden.new_zeros(()))
        return Loss(total / n_targets, aux_loss, stats, n_targets, deeper, kl)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropy summed over targets other than -100."""
        if self.head.is_quantized:
            logits = self.head(hidden).flatten(0, 1).float()
            return F.cross_entropy(logits, targets.flatten(), reduction="sum")
        return linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.flatten())

    def _divergence(self, hidden: Tensor, targets: Tensor, teacher: TeacherOutput) -> Divergence:
        """Returns the divergence from a teacher summed over targets other than -100."""
        inputs = teacher.hidden.flatten(0, 1), teacher.weight, targets.flatten(), teacher.temperature
        if self.head.is_quantized:
            return logits_kl(self.head(hidden).flatten(0, 1), *inputs)
        return linear_kl(hidden.flatten(0, 1), self.head.weight, *inputs)

    def _deeper_losses(
        self, hidden: Tensor, tokens: Tensor, targets: Tensor, stats: dict[int, RouterStats]
    ) -> Float[Tensor, " n_depths"]:
        """Returns the losses of all depths; depth k reads the token k positions ahead and predicts the one after it."""
        assert self.config.mtp is not None
        losses = []
        for k in range(1, min(self.config.mtp.n_depths, tokens.shape[1] - 1) + 1):
            hidden, depth_stats = self._run(self.mtp_depth(k), self.embedding(tokens[:, k:]), hidden[:, :-1])
            for i, found in zip(self._mtp_routers(k), depth_stats, strict=True):
                before = stats.get(i)
                stats[i] = found if before is None else RouterStats(*map(torch.add, before, found))
            deeper = targets[:, k:]
            losses.append(self._cross_entropy(hidden, deeper) / (deeper != -100).sum())
        return torch.stack(losses)

    def mtp_depth(self, k: int) -> MTPDepth:
        """The weights of depth k, counted from 1."""
        assert self.config.mtp is not None
        depth = self.mtp[0 if self.config.mtp.shared else k - 1]
        assert isinstance(depth, MTPDepth)
        return depth

    def moe_layers(self) -> dict[int, RoutedMixer]:
        """The layers with a router, by index; indices of multi-token prediction follow the main layers."""
        layers = [*self.layers, *(layer for depth in self.mtp for layer in depth.layers)]  # type: ignore[union-attr]
        return {i: layer.mixer for i, layer in enumerate(layers) if isinstance(layer.mixer, RoutedMixer)}

    def _mtp_routers(self, k: int) -> list[int]:
        """Indices in `moe_layers` of the routers of depth k."""
        assert self.config.mtp is not None
        n_layers, pattern = self.config.n_layers, self.config.mtp.pattern
        first = n_layers + (0 if self.config.mtp.shared else (k - 1) * len(pattern))
        return [i for i in range(first, first + len(pattern)) if i in self.moe_layers()]
