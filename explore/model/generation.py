"""Decoding with state: token by token, and several at once where multi-token prediction drafts them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from explore.blocks import State
from explore.model.language_model import LanguageModel
from explore.model.low_precision import quantizable_parts
from explore.ops import compiled_step, forced_paths, paths_that

COLDEST = 1e-30
"""Temperature below which logits over it need not be finite in fp32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0, or less than `COLDEST`, takes the most probable token.
        top_k: only so many tokens, the most probable; all when absent.
        top_p: only the most probable tokens that together have this probability; all when absent.
        seed: of the draws.
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
        """Of every token to be drawn, in fp32."""
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
        """A token of each row; without temperature nothing is left to chance."""
        return logits.argmax(-1) if self.is_greedy else _draw(self.probabilities(logits), generator)


GREEDY = Sampling(temperature=0)

SMALLEST_CAPACITY = 64
"""Positions of the smallest state of a compiled step; larger ones double."""

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
        eot_id: a row that has drawn it goes on with nothing else, and all stop when every row has; never when absent.
        compiled: the step of one token runs as one compiled function, for which a C++ compiler is needed. A model's
            first step then takes up to a minute, and what is cached of it a quarter of that; those after it a
            third to two thirds of the time. Every expert computes every token in it. It is compiled once for each
            batch size and for each power of two that prompt and new tokens fit in.

    Returns:
        The new tokens.

    Raises:
        ValueError: a prompt without tokens, no token asked for, or a compiled step on another device than a CPU.
        CompilerError: the step cannot be compiled here.
    """
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
    """Positions of a state that texts of similar length share, so that one compiled step serves all of them."""
    return max(SMALLEST_CAPACITY, 1 << (length - 1).bit_length())


def _logits(model: LanguageModel, tokens: Tensor, state: list[State]) -> Float[Tensor, "batch vocab"]:
    """Of the token after the last."""
    hidden, _ = model.hidden(tokens, state)
    logits: Tensor = model.head(hidden[:, -1])
    return logits


def _compiled_logits(model: LanguageModel, tokens: Tensor, state: list[State]) -> Float[Tensor, "batch vocab"]:
    """The whole step as one, for what torch checks before it calls compiled code takes too long for every layer."""
    step = compiled_step(_logits, varying=LENGTH)
    # No shape in these depends on what is computed, and the recurrence's definition becomes one loop over the state.
    paths = forced_paths(**paths_that(lambda path: path.decoding))
    with paths, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # by torch, where it measures products
        logits: Tensor = step(model, tokens, state)
    return logits


@dataclass
class Speculation:
    """A continuation that was drafted and checked.

    Attributes:
        tokens: the new tokens.
        accepted: of every check, how many drafted tokens were right.
    """

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Tokens that one pass of the main model yields on average: those accepted and one of its own."""
        return 1 + sum(self.accepted) / max(1, len(self.accepted))


@torch.inference_mode()
def speculate(
    model: LanguageModel,
    tokens: Int[Tensor, " prompt"],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eot_id: int | None = None,
) -> Speculation:
    """Continues one prompt; multi-token prediction drafts tokens that one pass of the main model checks together.

    Every token has the distribution that `generate` draws from, and without temperature is the same token: a drafted
    token x is kept with probability min(1, p(x) / q(x)), and else drawn from what p has over q.

    Args:
        eot_id: stops the continuation; never when absent.

    Raises:
        ValueError: the model has no multi-token prediction.

    Source: speculative sampling, arXiv 2211.17192, algorithm 1.
    """
    if model.config.mtp is None:
        raise ValueError("model.mtp: is absent, and speculation needs multi-token prediction to draft tokens")
    _checked(tokens[None], max_new_tokens)
    generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    drafter = _Drafter(model, tokens)
    result = Speculation()
    state = model.new_state()
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
        else:  # `tried` has read a wrong token: the right ones are read again with the next drafts
            unread = [*unread, *known]
        drafts, q = drafter.draft(sampling, generator)
    end = result.tokens.index(eot_id) + 1 if eot_id in result.tokens else max_new_tokens
    result.tokens = result.tokens[:end]
    return result


class _Drafter:
    """The depths of multi-token prediction, each with the state of the positions that it has certainly read.

    Depth k reads at position i what depth k - 1 gave there, and the token at i + k. Of the last positions that token
    is a draft of the depths before: what is made of it is not kept.
    """

    def __init__(self, model: LanguageModel, prompt: Int[Tensor, " prompt"]) -> None:
        mtp = model.config.mtp
        assert mtp is not None
        self.model, self.tokens = model, prompt
        blocks = [model.config.blocks[letter] for letter in mtp.pattern]
        self.states = [[block.new_state() for block in blocks] for _ in range(mtp.n_depths)]
        self.n_read = [0] * (mtp.n_depths + 1)  # positions that the main model, and each depth, has certainly read
        # What the main model, and each depth, gave at positions that the next depth has not certainly read.
        self.given = [model.embedding.weight.new_zeros(1, 0, model.config.d_model) for _ in self.n_read]

    def read(self, hidden: Float[Tensor, "1 seq d_model"], known: list[int]) -> None:
        """Takes what the main model gave at positions up to the last known token, and the tokens that then got known.

        Positions that were read before, which it has read again, are the first of them.
        """
        new = hidden[:, hidden.shape[1] - (len(self.tokens) + len(known) - 1 - self.n_read[0]) :]
        self._give(0, new)
        self.tokens = torch.cat((self.tokens, self.tokens.new_tensor(known)))

    def draft(self, sampling: Sampling, generator: torch.Generator) -> tuple[list[int], Float[Tensor, "drafts vocab"]]:
        """One token a depth, and the distributions that they were drawn from."""
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


def _checked(tokens: Tensor, max_new_tokens: int) -> None:
    if tokens.shape[1] == 0:
        raise ValueError("prompt: is empty; at least one token is needed")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
