"""Block-wise distillation: every replacement in a library learns the output of its layer, given the parent's inputs.

Source: Puzzle, arXiv 2411.19146, section 3.1. One forward pass of the parent per batch trains the replacements of all
layers, each by its own loss MSE(o_parent, o_child) / MSE(o_parent, 0); attention and FFN count as separate layers here.
The norm before a layer stays the parent's, and so does the bias of routers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from explore.archive import read_partial
from explore.checkpoints import load_model
from explore.compress.cutting import Cutter
from explore.compress.library import Library, LibraryRequest, Replacement
from explore.compress.replacing import block_flops, flops_of_replacing, replace_one
from explore.compress.scores import finished
from explore.compress.variants import Variant, starting_weights, variants
from explore.data import IGNORED, Batch
from explore.data.progress import progress
from explore.experiment import Experiment
from explore.files import held, replacing
from explore.model import LanguageModel
from explore.runs import RunFolder
from explore.threads import use_all_cores
from explore.train.block_training import Part, by_layer, compute_gradients, layer_inputs
from explore.train.memory import keep_freed_memory
from explore.train.schedule import wsd
from explore.weights import read_block, write_block

LR_RATIO = 1 / 5
"""Peak learning rate of replacements, divided by the parent's."""

FIT_TOKENS, FIT_ROWS = 16_384, 16
"""Tokens of the least-squares fit that initialises linear maps: a fixed number, and a multiple of d_model."""

DAMPING = 1e-3
"""Weight, in that fit, of the distance from the product of the parent's weights; in units of the mean squared input."""

SAVE_EVERY_S = 20.0
"""Seconds between saves: the most training time that a kill can cost."""

VERSION = 2
"""Part of every key; raised when a change of the code can change the library that a request gives."""


def library_key(experiment: Experiment, parent: str, request: LibraryRequest) -> str:
    """Hashes everything that determines a library into 64 hexadecimal digits.

    Args:
        parent: digest of the parent's weights.
    """
    content = {"parent": parent, "request": request.model_dump(mode="json"), "version": VERSION}
    content["data"] = experiment.data.fingerprint()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def block_library(run: RunFolder | str | Path, request: LibraryRequest | None = None) -> Library:
    """Returns the library of a finished run: read from its folder, or trained there, resuming after a kill.

    Raises:
        ValueError: the run has not finished, or the request does not fit its model.
    """
    folder, request = finished(run), request or LibraryRequest()
    experiment = folder.load_experiment()
    request.offer.check(experiment.model)
    use_all_cores()  # a run that was trained in this process may have left fewer threads
    cutter = Cutter.of(folder, by=request.by)
    key = library_key(experiment, cutter.whole.parent, request)
    path = folder.path / f"library-{key[:8]}.json"
    with held(folder.path / "library.lock", lambda: None):
        if path.exists() and (found := Library.load(path)).key == key:
            return found
        library = _Maker(folder, experiment, cutter, request, key).make()
        library.save(path)
    return library


@dataclass(eq=False)
class _Maker:
    """Builds a library.

    Attributes:
        parts: the replacements that have weights of their own, layer by layer.
        digests: digests of their weights, once trained.
    """

    folder: RunFolder
    experiment: Experiment
    cutter: Cutter
    request: LibraryRequest
    key: str
    parts: list[Part] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> LanguageModel:
        """The parent."""
        return load_model(self.folder).requires_grad_(False).to(self.device)

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def offered(self) -> list[list[Variant]]:
        """The variants of every layer."""
        model = self.experiment.model
        pairs = zip(model.pattern, model.layers, strict=True)
        return [variants(letter, block, self.request.offer) for letter, block in pairs]

    @property
    def partial(self) -> Path:
        return self.folder.path / f"library-{self.key[:8]}.partial"

    @property
    def batch_size(self) -> int:
        return self.experiment.train.batch_size

    @property
    def n_steps(self) -> int:
        return max(1, round(self.request.tokens / self.experiment.batch_tokens))

    @property
    def n_fit_steps(self) -> int:
        """Batches of the least-squares fit."""
        if not any(each.how == "linear" for row in self.offered for each in row):
            return 0
        wanted = max(FIT_TOKENS, FIT_ROWS * self.experiment.model.d_model)
        return min(self.n_steps, -(-wanted // self.experiment.batch_tokens))

    def make(self) -> Library:
        """Trains and measures all replacements."""
        state = self._saved()
        for i, row in enumerate(self.offered):
            for variant in row:
                if variant.is_trained:
                    assert variant.block is not None
                    self.parts.append(Part(i, variant, variant.block.build(self.experiment.model.d_model)))
        self.digests = state.get("digests") or self._trained(state)
        for part, digest in zip(self.parts, self.digests, strict=True):
            part.mixer.load_state_dict(read_block(self.folder.path, digest))
            part.requires_grad_(False).to(self.device)
        errors, divergences = self._measured(state if state.get("digests") else {})
        layers, digests = [], iter(self.digests)
        for i, row in enumerate(self.offered):
            found = []
            for k, each in enumerate(row):
                digest = next(digests) if each.is_trained else None
                numbers = {"mse": float(errors[i][k]), "kl": max(0.0, float(divergences[i][k]))}
                found.append(Replacement(name=each.name, how=each.how, block=each.block, digest=digest, **numbers))
            layers.append(tuple(found))
        about = {
            "run": self.folder.path.name,
            "seq_len": self.experiment.data.seq_len,
            "request": self.request.model_dump(mode="json"),
        }
        whole = self.cutter.whole
        library = Library(
            key=self.key, parent=whole.parent, parent_model=whole.parent_model,
            layers=tuple(layers), flops=whole.flops + self._flops(), about=about,
        )  # fmt: skip
        self.partial.unlink(missing_ok=True)
        return library

    # Training

    def _trained(self, state: Mapping[str, Any]) -> list[str]:
        """Trains and saves all parts; returns their digests."""
        keep_freed_memory()
        parts = nn.ModuleList(self.parts).to(self.device)
        if not state:
            self._begin()
        train = self.experiment.train
        lr = self.request.lr or train.lr * LR_RATIO
        weights = [weight for part in parts for weight in part.parameters()]
        if not weights:
            return []
        optimizer = AdamW(weights, lr=lr, betas=train.betas, weight_decay=0.0, fused=True)
        if state:
            parts.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
        source, grouped, saved = self.experiment.data.open(self.request.seed), by_layer(self.parts), time.monotonic()
        with progress(f"library of {self.folder.path.name}", self.n_steps) as report:
            for step in range(state.get("step", 0), self.n_steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr * wsd(step, self.n_steps, train)
                optimizer.zero_grad(set_to_none=True)
                tokens = source.batch(step, self.batch_size).inputs.to(self.device)
                compute_gradients(self.model, grouped, tokens, train.clip, bf16=self.bf16)
                optimizer.step()
                report(step + 1)
                if time.monotonic() - saved > SAVE_EVERY_S and step + 1 < self.n_steps:
                    content = {"weights": parts.state_dict(), "optimizer": optimizer.state_dict()}
                    self._save({"step": step + 1, **content})
                    saved = time.monotonic()
        digests = [write_block(self.folder.path, part.mixer.state_dict()) for part in self.parts]
        self._save({"digests": digests})
        return digests

    @property
    def bf16(self) -> bool:
        """Whether matrix products are in bfloat16, as in the training of the parent."""
        return self.experiment.train.recipe.high == "bf16"

    def _begin(self) -> None:
        """Initialises the weights of every part."""
        linear = {part.layer: part for part in self.parts if part.variant.how == "linear"}
        for part in self.parts:
            if part.variant.how != "linear":
                part.mixer.load_state_dict(starting_weights(self.cutter, part.layer, part.variant))
        d, source = self.experiment.model.d_model, self.experiment.data.open(self.request.seed)
        squares = {i: torch.zeros(2, d, d, dtype=torch.float64, device=self.device) for i in linear}
        for step in range(self.n_fit_steps):
            tokens = source.batch(step, self.batch_size).inputs.to(self.device)
            for i, normed, wanted in layer_inputs(self.model, tokens, bf16=self.bf16):
                if i in linear:
                    x, y = normed.flatten(0, 1).double(), wanted.flatten(0, 1).double()
                    squares[i] += torch.stack([x.T @ x, y.T @ x])
        for i, part in linear.items():
            mixer = self.model.layers[i].mixer
            product = mixer.linear_map()  # type: ignore[operator, union-attr]
            start = torch.zeros(d, d, device=self.device) if product is None else product
            part.mixer.load_state_dict(
                {"map.weight": least_squares(squares[i][0], squares[i][1], start.double()).float()}
            )

    # Measuring

    def _measured(self, state: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Relative squared error of every variant, and the KL divergence per token when it alone replaces its layer."""
        parts, identity = iter(self.parts), [cast(nn.Module, layer.mixer) for layer in self.model.layers]
        mixers = [
            [identity[i] if each.how == "whole" else next(parts).mixer if each.is_trained else None for each in row]
            for i, row in enumerate(self.offered)
        ]
        sums = state.get("sums") or [torch.zeros(2, len(row), dtype=torch.float64) for row in mixers]
        begin, n_targets, saved = state.get("batch", 0), state.get("n_targets", 0), time.monotonic()
        batches = list(self._held_out())
        with progress(f"replacements in {self.folder.path.name}", len(batches)) as report:
            for b, batch in enumerate(batches[begin:], start=begin):
                with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                    for i, k, kl, error in replace_one(self.model, mixers, batch):
                        sums[i][:, k] += torch.stack([error.double(), kl.double()]).cpu()
                n_targets += int((batch.targets != IGNORED).sum())
                report(b + 1)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    content = {"sums": sums, "batch": b + 1, "n_targets": n_targets}
                    self._save({"digests": self.digests, **content})
                    saved = time.monotonic()
        return [each[0] / len(batches) for each in sums], [each[1] / n_targets for each in sums]

    def _held_out(self) -> Iterator[Batch]:
        source = self.experiment.data.open(self.experiment.seed)
        n_batches = max(1, round(self.request.val_tokens / self.experiment.batch_tokens))
        for batch in islice(source.eval_batches("val", self.batch_size), n_batches):
            yield Batch(batch.inputs.to(self.device), batch.targets.to(self.device), batch.n_bytes)

    # Record

    def _flops(self) -> float:
        """FLOPs of training and measuring all replacements."""
        model, seq_len = self.experiment.model, self.experiment.data.seq_len
        blocks = [[each.block for each in row if each.how != "whole"] for row in self.offered]
        passes = sum(block_flops(block, model.d_model, seq_len) for block in model.layers)
        trained = sum(
            block_flops(part.variant.block, model.d_model, seq_len) for part in self.parts if part.variant.block
        )
        batch_tokens = self.experiment.batch_tokens
        n_val = sum(batch.inputs.numel() for batch in self._held_out())
        in_training = self.n_steps * (passes + 3 * trained) + self.n_fit_steps * passes
        return batch_tokens * in_training + flops_of_replacing(model, seq_len, n_val, blocks)

    def _save(self, content: Mapping[str, Any]) -> None:
        with replacing(self.partial) as temporary:
            torch.save({"key": self.key, **content}, temporary)

    def _saved(self) -> dict[str, Any]:
        """The saved state of an earlier process; empty if there is none, or a damaged one, which is removed."""
        return read_partial(self.partial, self.key)


def least_squares(xx: Tensor, yx: Tensor, start: Tensor) -> Tensor:
    """Solves for the matrix W that minimises the sum of |y - W x|^2, regularised towards `start`.

    Args:
        xx: sum of x x^T over the inputs, in float64.
        yx: sum of y x^T.
        start: the solution if there were no inputs.
    """
    damping = DAMPING * xx.diagonal().mean()
    damped = xx + damping * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    change: Tensor = torch.linalg.solve(damped, yx - start @ xx, left=False)
    return start + change
