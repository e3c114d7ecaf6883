"""Proof of the ledger: builds and runs random models and counts their FLOPs op by op.

The counter lists operations that multiply matrices and those that do not. Any other operation is an error, so one
that hides its work, such as fused attention, can never count as free.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from explore.blocks import STANDARD_LETTERS, BlockConfig, RecurrentState, State, Uncounted
from explore.cost import Cost
from explore.model import LanguageModel, ModelConfig, saved_bytes_of
from explore.ops import forced_paths, paths_that

Phase = Literal["params", "forward", "training", "prefill", "decode", "saved"]

Shape = tuple[int, ...]


def _mm(a: Shape, b: Shape) -> int:
    return 2 * math.prod(a) * b[-1]


def _conv(out: Shape, weight: Shape) -> int:
    return 2 * math.prod(out) * math.prod(weight[1:])


PRODUCTS: Mapping[str, Callable[..., int]] = {
    "mm": lambda product, a, b, **_: _mm(a.shape, b.shape),
    "addmm": lambda out, bias, a, b, **_: _mm(a.shape, b.shape),
    "bmm": lambda out, a, b: _mm(a.shape, b.shape),
    "baddbmm_": lambda out, into, a, b: _mm(a.shape, b.shape),
    # Substitution: row i of the triangle takes i - 1 products per column, (n - 1) / 2 on average.
    "linalg_solve_triangular": lambda out, a, b, **_: out.numel() * (a.shape[-1] - 1),
    "convolution": lambda out, x, weight, *_: _conv(out.shape, weight.shape),
    # Each requested gradient (input, weight) costs as much as the forward product.
    "convolution_backward": lambda out, grad, x, weight, *rest: sum(rest[-1][:2]) * _conv(grad.shape, weight.shape),
}
"""Operations that multiply matrices, and functions for their FLOPs."""

FREE = frozenset({
    "_embedding_bag", "_embedding_bag_forward_only", "_local_scalar_dense", "_softmax", "_softmax_backward_data",
    "_unsafe_view", "add", "add_", "addcmul", "addcmul_", "alias", "arange", "bincount", "bitwise_not", "cat", "clamp",
    "clamp_", "clone", "constant_pad_nd", "copy_", "cos", "cumsum", "detach", "div", "embedding",
    "embedding_dense_backward", "empty_like", "exp", "exp_", "expand", "flip", "floor_divide", "gather", "ge", "index",
    "index_put", "index_select", "le", "lift_fresh", "linalg_vector_norm", "logical_and_", "masked_fill",
    "masked_fill_", "mean", "mul", "mul_", "neg", "new_empty", "new_empty_strided", "new_full", "new_zeros", "ones",
    "ones_like", "permute", "pow", "relu", "repeat_interleave", "rsqrt", "scalar_tensor", "scatter_", "scatter_add",
    "select", "select_backward", "sigmoid", "sigmoid_backward", "silu", "silu_backward", "sin", "slice",
    "slice_backward", "softplus", "softplus_backward", "sort", "split_with_sizes", "squeeze", "stack", "sub", "sum",
    "t", "threshold_backward", "topk", "transpose", "tril", "triu", "unbind", "unsqueeze", "view", "where", "zeros",
    "zeros_like",
})  # fmt: skip
"""All other operations that the models here run; they multiply no matrices."""


class UnknownOpError(RuntimeError):
    """An operation ran that is not registered as multiplying matrices or not."""


class OpCounter(TorchDispatchMode):
    """Counts the FLOPs of the matrix products that run inside its block, forward and backward.

    Raises:
        UnknownOpError: an operation ran that is neither in `PRODUCTS` nor in `FREE`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name in PRODUCTS:
            self.flops += PRODUCTS[name](out, *args, **kwargs)
        elif func.namespace not in ("aten", "prim") or name not in FREE:
            raise UnknownOpError(f"{func}: must be in PRODUCTS or FREE, which say whether it multiplies matrices")
        return out


def count_flops(work: Callable[[], Any]) -> int:
    """Counts the FLOPs of matrix products in `work`, using paths whose operations the counter can see."""
    counter = OpCounter()
    with forced_paths(**paths_that(lambda path: path.countable)), counter:
        work()
    return counter.flops


class Case(NamedTuple):
    """One comparison of the ledger with a measurement."""

    model: ModelConfig
    seq_len: int
    phase: Phase
    expected: int
    found: int


def check(config: ModelConfig, seq_len: int) -> Iterator[Case]:
    """Builds and runs one model, and compares its counts with the ledger in every phase.

    Some blocks execute more than the maths needs; the FLOPs they declare for it are added to the ledger's.
    """
    with torch.device("meta"):
        built = sum(weight.numel() for weight in config.build().parameters())
    ledger = config.ledger(seq_len)
    cost = Cost.of(ledger)
    yield Case(config, seq_len, "params", cost.params_total + cost.params_mtp, built)
    main = ledger.main.flops_seq
    more = uncounted(config.layers, seq_len)
    model = config.build()
    tokens = torch.randint(0, config.vocab_size, (1, seq_len))
    forward = count_flops(lambda: torch.no_grad()(model)(tokens))
    yield Case(config, seq_len, "forward", main + more.forward, forward)
    training = count_flops(lambda: scalar(model, tokens).backward())
    yield Case(config, seq_len, "training", 3 * main + more.training, training)
    expected = ledger.flops_prefill + more.forward
    yield Case(config, seq_len, "prefill", expected, count_flops(lambda: prefill(model, tokens)))
    state = prefill(model, tokens[:, :-1])
    step = count_flops(lambda: torch.no_grad()(model)(tokens[:, -1:], state))
    yield Case(config, seq_len, "decode", ledger.main.flops_step, step)
    yield Case(
        config, seq_len, "saved", int(saved_bytes_of(config, seq_len)["exact"]), saved_by_autograd(model, seq_len)
    )


def saved_by_autograd(model: LanguageModel, seq_len: int) -> int:
    """Bytes that autograd saves per additional sequence in training, on the default paths, without weights."""
    fewer, more = (_saved_by_batch(model, torch.zeros(n, seq_len, dtype=torch.int64)) for n in (2, 3))
    return more - fewer


def _saved_by_batch(model: LanguageModel, tokens: Tensor) -> int:
    sizes = {weight.untyped_storage().data_ptr(): 0 for weight in model.parameters()}
    alive: list[Tensor] = []  # keeps tensors alive: reused memory would make two look like one

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        sizes.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(tokens, torch.zeros_like(tokens), mtp=True)
        total = loss.cross_entropy + loss.aux_loss
        total = total if loss.mtp is None else total + loss.mtp.sum()
    return sum(sizes.values())


def scalar(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Returns a number that depends on everything a forward pass computes, as in the middle of a longer sequence.

    Gradients flow from the final recurrent states and into the initial ones.
    """
    state = model.new_state()
    recurrent = [layer for layer in state if isinstance(layer, RecurrentState)]
    for layer in recurrent:
        layer.recurrent = torch.zeros(len(tokens), *layer.shape, requires_grad=True)
    logits: Tensor = model(tokens, state)
    after = (layer.recurrent.sum() for layer in recurrent if layer.recurrent is not None)
    return sum(after, start=logits.square().mean())


@torch.no_grad()
def prefill(model: LanguageModel, tokens: Tensor) -> list[State]:
    """Prefills a context, with the head for the last token only, and returns the state."""
    state = model.new_state()
    hidden, _ = model.hidden(tokens, state)
    model.head(hidden[:, -1])
    return state


def uncounted(blocks: Iterable[BlockConfig], seq_len: int) -> Uncounted:
    """Sums the executed FLOPs per sequence that the ledger leaves out, such as attention over masked pairs."""
    found = [block.uncounted(seq_len) for block in blocks]
    return Uncounted(sum(each.forward for each in found), sum(each.training for each in found))


def random_model(rng: random.Random) -> ModelConfig:
    """Returns a small model with random pattern, widths and options, sometimes with multi-token prediction."""
    letters = {letter: config.random_example(rng) for letter, config in STANDARD_LETTERS.items()}
    alphabet = "".join(letters)
    pattern = "".join(rng.choices(alphabet, k=rng.randint(1, 10)))
    mtp = None
    if rng.random() < 0.25:
        layers = "".join(rng.choices(alphabet, k=rng.randint(1, 3)))
        mtp = {"pattern": layers, "n_depths": rng.randint(1, 3), "shared": rng.random() < 0.5}
    return ModelConfig.model_validate(
        {
            "d_model": rng.randint(1, 24),
            "vocab_size": rng.randint(2, 60),
            "pattern": pattern,
            "blocks": letters,
            "mtp": mtp,
            "tie_embeddings": rng.random() < 0.5,
        }
    )


def random_case(seed: int, number: int) -> tuple[ModelConfig, int]:
    """Returns a random model and sequence length, which depend only on seed and number."""
    rng = random.Random(f"{seed}/{number}")
    torch.manual_seed(number)
    return random_model(rng), rng.randint(2, 40)


def tally(cases: Iterable[Case]) -> dict[Phase, tuple[int, int]]:
    """Counts the cases of each phase, and those that agree."""
    result: dict[Phase, tuple[int, int]] = dict.fromkeys(get_args(Phase), (0, 0))
    for case in cases:
        n, agreeing = result[case.phase]
        result[case.phase] = (n + 1, agreeing + (case.expected == case.found))
    return result
