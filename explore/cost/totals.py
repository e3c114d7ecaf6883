"""Totals of a ledger, under the names used in tables, run records and programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from explore.cost.ledger import DTYPES, Dtypes, Ledger, Stored, bytes_of
from explore.formatting import count, flops


@dataclass(frozen=True)
class Cost:
    """Totals of a model over sequences, and contexts, of `seq_len` tokens.

    Papers define active parameters differently, so each definition has a name: with embeddings and router
    (`params_active`), without the input embedding, without embeddings and head, and each of these without router.
    A tied matrix counts as the head's.

    Attributes:
        params_total: all parameters except multi-token prediction.
        params_active: parameters used by one token, including embeddings and router.
        params_router: parameters of all routers.
        params_mtp: parameters of multi-token prediction; no other count includes them.
        flops_fwd: forward FLOPs per token, averaged over the sequence, multi-token prediction included.
        flops_train: forward and backward FLOPs per token, 3 * flops_fwd.
        flops_mtp: share of `flops_fwd` spent on multi-token prediction.
        flops_prefill: FLOPs of prefilling the whole sequence, with logits for its last token only.
        flops_decode: FLOPs of decoding one token with `seq_len` tokens of context, itself included.
        weight_bytes: bytes of `params_total`.
        kv_bytes_per_token: bytes of keys and values per token of context, before any window is full.
        kv_bytes: bytes of keys and values after `seq_len` tokens.
        ssm_state_bytes: bytes of recurrent state per sequence.
        conv_state_bytes: bytes of convolution state per sequence.
        decode_bytes: bytes read and written to decode one token of one sequence.
        all_to_all_bytes: bytes sent to experts and back per token, if all its experts are on other devices.
    """

    seq_len: int
    params_total: int
    params_total_no_router: int
    params_active: int
    params_active_no_input_embedding: int
    params_active_no_embeddings: int
    params_active_no_router: int
    params_active_no_input_embedding_no_router: int
    params_active_no_embeddings_no_router: int
    params_router: int
    params_mtp: int
    flops_fwd: float
    flops_train: float
    flops_mtp: float
    flops_prefill: int
    flops_decode: int
    weight_bytes: float
    kv_bytes_per_token: float
    kv_bytes: float
    ssm_state_bytes: float
    conv_state_bytes: float
    decode_bytes: float
    all_to_all_bytes: float
    weight_dtype: Stored
    kv_dtype: Stored
    state_dtype: Stored
    activation_dtype: Stored

    @classmethod
    def of(cls, ledger: Ledger, dtypes: Dtypes = DTYPES) -> Cost:
        """Sums a ledger, with bytes in the given `dtypes`."""
        main, mtp, router = ledger.main, ledger.extra, ledger.router
        no_input = main.params_active - ledger.before.total.params
        no_embeddings = no_input - sum(entry.params for entry in ledger.after.entries if entry.component == "head")
        flops_fwd = (main.flops_seq + mtp.flops_seq) / ledger.seq_len
        return cls(
            seq_len=ledger.seq_len,
            params_total=main.params,
            params_total_no_router=main.params - router,
            params_active=main.params_active,
            params_active_no_input_embedding=no_input,
            params_active_no_embeddings=no_embeddings,
            params_active_no_router=main.params_active - router,
            params_active_no_input_embedding_no_router=no_input - router,
            params_active_no_embeddings_no_router=no_embeddings - router,
            params_router=router,
            params_mtp=mtp.params,
            flops_fwd=flops_fwd,
            flops_train=3 * flops_fwd,
            flops_mtp=mtp.flops_seq / ledger.seq_len,
            flops_prefill=ledger.flops_prefill,
            flops_decode=main.flops_step,
            weight_bytes=ledger.weight_bytes(dtypes),
            kv_bytes_per_token=ledger.state_bytes(dtypes.kv, "kv_numel"),
            kv_bytes=ledger.state_bytes(dtypes.kv, "kv_numel_seq"),
            ssm_state_bytes=ledger.state_bytes(dtypes.state, "ssm_numel"),
            conv_state_bytes=ledger.state_bytes(dtypes.state, "conv_numel"),
            decode_bytes=ledger.decode_bytes(dtypes),
            all_to_all_bytes=bytes_of(main.all_to_all_numel, dtypes.activation),
            weight_dtype=dtypes.weight,
            kv_dtype=dtypes.kv,
            state_dtype=dtypes.state,
            activation_dtype=dtypes.activation,
        )

    @property
    def params_total_no_embeddings(self) -> int:
        """All parameters without embeddings and head."""
        return self.params_total - (self.params_active - self.params_active_no_embeddings)

    @property
    def state_bytes(self) -> float:
        """Bytes of decoding state per sequence after `seq_len` tokens."""
        return self.kv_bytes + self.ssm_state_bytes + self.conv_state_bytes

    def __repr__(self) -> str:
        active = "" if self.params_active == self.params_total else f", {count(self.params_active)} active"
        return (
            f"Cost(seq_len={self.seq_len}, {count(self.params_total)} parameters{active}, "
            f"FLOPs/token: {flops(self.flops_fwd)} forward, {flops(self.flops_train)} training, "
            f"{flops(self.flops_decode)} decoding)"
        )

    def _repr_html_(self) -> str:
        from explore.cost.display import cost_html

        return cost_html(self)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
