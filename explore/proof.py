"""Proof of the ledger: random models are built and run, and what runs is counted op by op.

The counter knows the operations that multiply matrices and those that do not. Anything else is an error, so that an
operation that hides its work, as fused attention does, can never be counted as free.
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
    # By substitution: row i of the triangle has i - 1 products in each column, (n - 1) / 2 on average.
    "linalg_solve_triangular": lambda out, a, b, **_: out.numel() * (a.shape[-1] - 1),
    "convolution": lambda out, x, weight, *_: _conv(out.shape, weight.shape),
    # Each gradient that is asked for, of input and weight, is a product as large as the forward one.
    "convolution_backward": lambda out, grad, x, weight, *rest: sum(rest[-1][:2]) * _conv(grad.shape, weight.shape),
}
"""Operations that multiply matrices, and how many FLOPs they spend."""

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
"""Operations that multiply no matrices, all that the models here run."""


class UnknownOpError(RuntimeError):
    """An operation ran of which the counter does not know whether it multiplies matrices."""


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
            raise UnknownOpError(f"{func}: the counter does not know whether it multiplies matrices")
        return out


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products in `work`, on the paths whose operations the counter can see."""
    counter = OpCounter()
    with forced_paths(**paths_that(lambda path: path.countable)), counter:
        work()
    return counter.flops


class Case(NamedTuple):
    """One comparison: what the ledger says and what was found."""

    model: ModelConfig
    seq_len: int
    phase: Phase
    expected: int
    found: int


def check(config: ModelConfig, seq_len: int) -> Iterator[Case]:
    """Builds and runs one model, and counts it in every phase.

    Some blocks run more than the maths needs, and say how much: it is added to the ledger's numbers.
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
    """Bytes that autograd keeps in training for one sequence more, on the default paths; weights do not count."""
    fewer, more = (_saved_by_batch(model, torch.zeros(n, seq_len, dtype=torch.int64)) for n in (2, 3))
    return more - fewer


def _saved_by_batch(model: LanguageModel, tokens: Tensor) -> int:
    sizes = {weight.untyped_storage().data_ptr(): 0 for weight in model.parameters()}
    alive: list[Tensor] = []  # so that memory is not reused, which would count two tensors as one

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
    """A number that depends on all that a forward pass computes, as in the midst of a longer sequence.

    Gradients flow into the recurrent states before it, and come from those after it.
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
    """Reads a context as decoding does: the head computes for the last token only. Returns the state."""
    state = model.new_state()
    hidden, _ = model.hidden(tokens, state)
    model.head(hidden[:, -1])
    return state


def uncounted(blocks: Iterable[BlockConfig], seq_len: int) -> Uncounted:
    """FLOPs of one sequence that run in blocks and are in no ledger, such as attention over pairs that are masked."""
    found = [block.uncounted(seq_len) for block in blocks]
    return Uncounted(sum(each.forward for each in found), sum(each.training for each in found))


def random_model(rng: random.Random) -> ModelConfig:
    """A small model of random pattern, widths and options; now and then with multi-token prediction."""
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
    """A random model and a length to run it at; they depend on the seed and the number alone."""
    rng = random.Random(f"{seed}/{number}")
    torch.manual_seed(number)
    return random_model(rng), rng.randint(2, 40)


def tally(cases: Iterable[Case]) -> dict[Phase, tuple[int, int]]:
    """Cases of each phase, and how many of them agree."""
    result: dict[Phase, tuple[int, int]] = dict.fromkeys(get_args(Phase), (0, 0))
    for case in cases:
        n, agreeing = result[case.phase]
        result[case.phase] = (n + 1, agreeing + (case.expected == case.found))
    return result
