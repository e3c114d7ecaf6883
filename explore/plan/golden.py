"""Memory that Megatron-LM measured in its functional tests of hybrids, and the plans of the same runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from explore.model import ModelConfig
from explore.plan.cluster import Cluster
from explore.plan.layout import Layout
from explore.plan.plans import Plan
from explore.plan.run import Run

SOURCE = "Megatron-LM, tests/functional_tests/test_cases/hybrid, hybrid_mr_mcore_te_*, golden values on H100"
PATTERN = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
IN_STAGES = "M-M-M-M*-M-|M-M-M*-M-M-|M-M*-M-M-M-|M*-M-M-M-M-"
GPT2_VOCAB = 50_257


class Golden(NamedTuple):
    """A measured case.

    Attributes:
        layout: fields of a layout.
        fused: whether attention is fused and saves no scores.
        steady_gib: GiB allocated between steps on the last rank, which writes the log.
        peak_gib: peak GiB allocated.
    """

    name: str
    layout: Mapping[str, Any]
    fused: bool
    steady_gib: float
    peak_gib: float

    def plan(self) -> Plan:
        tp = self.layout.get("tp", 1)
        run = Run(seq_len=1024, global_batch=32, dropout=True, fused_attention=self.fused, sequence_parallel=False)
        return Plan.of(model(padded_vocab(GPT2_VOCAB, tp)), run, Layout(micro_batch=4, **self.layout), CLUSTER)


CLUSTER = Cluster.named("H100x8")
GOLDEN = (
    Golden("TP1", {}, False, 2.903379, 9.448730),
    Golden("TP2", {"tp": 2}, False, 1.785702, 5.502232),
    Golden("TP2 CP4", {"tp": 2, "cp": 4}, True, 1.785581, 2.555353),
    Golden("PP4", {"pp": 4, "pipeline": IN_STAGES}, False, 1.661753, 4.175781),
    Golden("PP2 VPP2", {"pp": 2, "pipeline": IN_STAGES}, False, 2.029263, 7.212822),
)


def padded_vocab(vocab_size: int, tp: int, divisor: int = 128) -> int:
    """The vocabulary that Megatron-LM makes: a multiple of the divisor for each tensor-parallel rank."""
    return -(-vocab_size // (divisor * tp)) * divisor * tp


def model(vocab_size: int) -> ModelConfig:
    """The model of all cases; its biases, GELU and learned positions have no counterpart and little memory."""
    blocks = {
        "M": {"n_heads": 32, "d_head": 64, "d_state": 128, "n_groups": 8},
        "*": {"n_heads": 16, "n_kv_heads": 8, "d_head": 64},
        "-": {"d_ff": 4096},
    }
    return ModelConfig.model_validate(
        {"d_model": 1024, "vocab_size": vocab_size, "pattern": PATTERN, "blocks": blocks, "tie_embeddings": True}
    )
