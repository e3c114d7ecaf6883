"""Decoding with state: token by token, or speculatively with drafts from multi-token prediction."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from explore.blocks import RecurrentState, State
from explore.foreign import check_type
from explore.model.language_model import LanguageModel
from explore.model.low_precision import quantizable_parts
from explore.ops import compiled_step, forced_paths, paths_that

COLDEST = 1e-30
"""Below this temperature, logits / temperature may overflow fp32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Attributes:
        temperature: divisor of the logits; 0, or below `COLDEST`, takes the most probable token.
        top_k: sample only from this many most probable tokens; None allows all.
        top_p: sample only from the most probable tokens with this total probability; None allows all.
        seed: seed of the random draws.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < COLDEST

    def probabilities(self, logits: Float[Tensor, "*dims vocab"]) -> Float[Tensor, "*dims vocab"]:
        """Returns the sampling probability of every token, in fp32."""
        logits = logits.float()
        if self.is_greedy:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # the first token is always kept
            kept = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < self.top_p)
            probabilities = probabilities.masked_fill(~kept, 0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def draw(self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator) -> Int[Tensor, " batch"]:
        """Samples one token per row; at temperature 0 it is the most probable one."""
        return logits.argmax(-1) if self.is_greedy else _draw(self.probabilities(logits), generator)


GREEDY = Sampling(temperature=0)

SMALLEST_CAPACITY = 64
"""Capacity of the smallest state of a compiled step, in positions; larger capacities double."""

LENGTH = r".*\.length"
"""Torch's name of the number of positions in a cache, in a compiled step."""


@torch.inference_mode()
def generate(
    model: LanguageModel,
    tokens: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eot_id: int | None = None,
    compiled: bool = False,
) -> Int[Tensor, "batch new"]:
    """Continues every row of a batch of prompts of equal length.

    Args:
        eot_id: end-of-text token; a row that draws it repeats it, and generation stops when all rows have drawn it.
        compiled: run the one-token step as one compiled function (needs a C++ compiler). A model's first step then
            takes up to a minute, a quarter of that from the compilation cache; later steps take a third to two
            thirds of the uncompiled time. Every expert processes every token. It compiles once per
            batch size and power of two that holds prompt and new tokens.

    Returns:
        The new tokens.

    Raises:
        TypeError: the model is not a language model, or the prompt no tensor of tokens.
        ValueError: the prompt is empty or has other axes, no new tokens are requested, or a compiled step is not on a
            CPU.
        CompilerError: the step cannot be compiled here.
    """
    check_type(model, LanguageModel, "model must be an explore.LanguageModel")
    check_type(tokens, Tensor, "tokens must be a tensor of token ids; explore.load(run).generate takes text")
    _checked(tokens, max_new_tokens)
    if compiled and tokens.device.type != "cpu":
        raise ValueError(f"compiled must be False on {tokens.device.type}, got True: steps are compiled only on a CPU")
    quantizers = (part.module.quantizer for part in quantizable_parts(model))
    if compiled and (model.state_rounding is not None or any(quantizers)):
        raise ValueError("compiled must be False for a quantised model, got True")
    generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    length = tokens.shape[1] + max_new_tokens
    state = model.new_state(_capacity(length) if compiled else length)
    new: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    read = tokens
    while len(new) < max_new_tokens:
        step = _compiled_logits if compiled and new else _logits
        drawn = sampling.draw(step(model, read, state), generator)
        if eot_id is not None:
            drawn = torch.where(ended, eot_id, drawn)
            ended = ended | (drawn == eot_id)
        new.append(drawn)
        if eot_id is not None and bool(ended.all()):
            break
        read = drawn[:, None]
    return torch.stack(new, dim=1)


def _capacity(length: int) -> int:
    """Returns a state capacity that texts of similar length share, so that they use the same compiled step."""
    return max(SMALLEST_CAPACITY, 1 << (length - 1).bit_length())


def _logits(model: LanguageModel, tokens: Tensor, state: list[State]) -> Float[Tensor, "batch vocab"]:
    """Returns the logits of the next token."""
    hidden, _ = model.hidden(tokens, state)
    logits: Tensor = model.head(hidden[:, -1])
    return logits


def _compiled_logits(model: LanguageModel, tokens: Tensor, state: list[State]) -> Float[Tensor, "batch vocab"]:
    """Compiles the whole step at once: torch's checks before compiled code would cost too much per layer."""
    step = compiled_step(_logits, varying=LENGTH)
    # No shape here depends on computed values, and the plain recurrence compiles to one loop over the state.
    paths = forced_paths(**paths_that(lambda path: path.decoding))
    with paths, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # by torch, where it measures products
        logits: Tensor = step(model, tokens, state)
    return logits


@dataclass
class Speculation:
    """A continuation from speculative decoding.

    Attributes:
        tokens: the new tokens.
        accepted: number of accepted draft tokens per check.
    """

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per pass of the main model: accepted drafts plus one of its own."""
        return 1 + sum(self.accepted) / max(1, len(self.accepted))


@torch.inference_mode()
def speculate(
    model: LanguageModel,
    tokens: Int[Tensor, " prompt"],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eot_id: int | None = None,
) -> Speculation:
    """Continues one prompt speculatively: multi-token prediction drafts, one pass of the main model checks all drafts.

    Tokens have the same distribution as in `generate`, and are identical at temperature 0, if products do not depend on
    the tokens that are read at once; products quantised with one scale per tensor do. A drafted token x is kept with
    probability min(1, p(x) / q(x)); otherwise a token is drawn from max(0, p - q), normalised.

    Args:
        eot_id: token that ends the continuation; None never stops early.

    Raises:
        ValueError: the model has no multi-token prediction, or rounds its recurrent state. That is rounded once per
            call that reads tokens, so the text would not be that of `generate`.

    Source: speculative sampling, arXiv 2211.17192, algorithm 1.
    """
    if model.config.mtp is None:
        raise ValueError(
            "model.mtp: must be set for speculation, which drafts tokens by multi-token prediction, got None"
        )
    _checked(tokens[None], max_new_tokens)
    state = model.new_state()
    _check_state(state)
    generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    drafter = _Drafter(model, tokens)
    result = Speculation()
    unread: list[int] = tokens.tolist()  # known tokens that `state` has not read
    drafts: list[int] = []
    q = torch.empty(0)
    while len(result.tokens) < max_new_tokens:
        tried = [layer.copy() for layer in state]
        hidden, _ = model.hidden(torch.tensor([[*unread, *drafts]], device=tokens.device), tried)
        p = sampling.probabilities(model.head(hidden[0, len(unread) - 1 :]))
        n = 0
        while n < len(drafts) and _is_kept(drafts[n], p[n], q[n], generator):
            n += 1
        rest = (p[n] - q[n]).clamp(min=0) if n < len(drafts) else p[n]
        known = [*drafts[:n], int(_draw(rest[None] / rest.sum(), generator))]
        result.tokens += known
        if drafts:
            result.accepted.append(n)
        if eot_id in known:
            break
        drafter.read(hidden[:, : len(unread) + n], known)
        if n == len(drafts):
            state, unread = tried, known[-1:]
        else:  # `tried` includes a rejected token: the accepted ones are read again with the next drafts
            unread = [*unread, *known]
        drafts, q = drafter.draft(sampling, generator)
    end = result.tokens.index(eot_id) + 1 if eot_id in result.tokens else max_new_tokens
    result.tokens = result.tokens[:end]
    return result


class _Drafter:
    """The depths of multi-token prediction, each with the state of its confirmed positions.

    At position i, depth k reads the output of depth k - 1 and the token at i + k. At the last positions that token is a
    draft by earlier depths, so the resulting state is discarded.
    """

    def __init__(self, model: LanguageModel, prompt: Int[Tensor, " prompt"]) -> None:
        mtp = model.config.mtp
        assert mtp is not None
        self.model, self.tokens = model, prompt
        blocks = [model.config.blocks[letter] for letter in mtp.pattern]
        self.states = [[block.new_state() for block in blocks] for _ in range(mtp.n_depths)]
        self.n_read = [0] * (mtp.n_depths + 1)  # confirmed positions of the main model and of each depth
        # Outputs of the main model and of each depth at positions that the next depth has not confirmed.
        self.given = [model.embedding.weight.new_zeros(1, 0, model.config.d_model) for _ in self.n_read]

    def read(self, hidden: Float[Tensor, "1 seq d_model"], known: list[int]) -> None:
        """Takes the main model's outputs up to the last known token, and the tokens confirmed since.

        The first outputs are those of positions that were read before and are read again.
        """
        new = hidden[:, hidden.shape[1] - (len(self.tokens) + len(known) - 1 - self.n_read[0]) :]
        self._give(0, new)
        self.tokens = torch.cat((self.tokens, self.tokens.new_tensor(known)))

    def draft(self, sampling: Sampling, generator: torch.Generator) -> tuple[list[int], Float[Tensor, "drafts vocab"]]:
        """Drafts one token per depth; returns tokens and the distributions they were drawn from."""
        tokens, drawn = self.tokens, []
        uncertain = self.given[0][:, :0]
        for k, state in enumerate(self.states, start=1):
            depth, before = self.model.mtp_depth(k), torch.cat((self.given[k - 1], uncertain), dim=1)
            embedding = self.model.embedding(tokens[self.n_read[k] + k :])[None]
            n_certain = len(self.tokens) - k - self.n_read[k]
            certain = before[:, :0]
            if n_certain > 0:
                certain, _ = depth(embedding[:, :n_certain], before[:, :n_certain], state)
                self.given[k - 1] = self.given[k - 1][:, n_certain:]
                self._give(k, certain)
            n_certain = max(n_certain, 0)
            uncertain = before[:, :0]
            if n_certain < before.shape[1]:
                tried = [layer.copy() for layer in state]
                uncertain, _ = depth(embedding[:, n_certain:], before[:, n_certain:], tried)
            last = (uncertain if uncertain.shape[1] else certain)[:, -1]
            drawn.append(sampling.probabilities(self.model.head(last)))
            tokens = torch.cat((tokens, _draw(drawn[-1], generator)))
        return tokens[len(self.tokens) :].tolist(), torch.cat(drawn)

    def _give(self, k: int, new: Tensor) -> None:
        self.given[k] = torch.cat((self.given[k], new), dim=1)
        self.n_read[k] += new.shape[1]


def _is_kept(token: int, p: Tensor, q: Tensor, generator: torch.Generator) -> bool:
    draw = torch.rand((), generator=generator, device=p.device)
    return bool(draw * q[token] < p[token])


def _draw(probabilities: Float[Tensor, "batch vocab"], generator: torch.Generator) -> Int[Tensor, " batch"]:
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _check_state(state: list[State]) -> None:
    for layer in state:
        format = layer.rounding.state if isinstance(layer, RecurrentState) and layer.rounding is not None else None
        if format not in (None, "fp32"):
            raise ValueError(
                f"state: recurrent state must be in fp32 for speculation, which reads several tokens at once and would "
                f"round it less often, got {format!r}"
            )


def _checked(tokens: Tensor, max_new_tokens: int) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have the axes batch and prompt, got {tokens.ndim}")
    if tokens.shape[1] == 0:
        raise ValueError("prompt: must have at least 1 token, got 0")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
