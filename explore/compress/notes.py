"""Notes on what a child lost or keeps changing, which bits per byte does not show."""

from __future__ import annotations

from explore.blocks import BlockConfig
from explore.compress.plan import LayerCut, Plan
from explore.model import ModelConfig


def notes(plan: Plan, *, is_recall: bool) -> list[str]:
    """Returns a note, one sentence each, on every such change.

    Args:
        is_recall: whether the child is scored on recall, which shows a loss of attention.
    """
    parent, child = plan.parent_model, plan.model()
    found = []
    if _has_attention(parent) and not _has_attention(child) and not is_recall:
        found.append("the child has no attention layer left; bits per byte does not show what it can recall")
    if _orders_tokens(parent) and _has_attention(child) and not _orders_tokens(child):
        found.append(
            "the child has no recurrent layer left before its first attention layer, and its attention has no "
            "positions: that layer cannot tell in which order tokens came"
        )
    if any(_loses_experts(layer, cut) for layer, cut in zip(parent.layers, plan.layers, strict=True)):
        found.append("routers keep the balancing biases of the experts that are left; training goes on adjusting them")
    return found


def _has_attention(model: ModelConfig) -> bool:
    return any(block.role == "attention" for block in model.layers)


def _orders_tokens(model: ModelConfig) -> bool:
    """Whether the first attention layer, or a layer before it, depends on the order of the tokens."""
    first = next((i for i, block in enumerate(model.layers) if block.role == "attention"), None)
    return first is not None and any(block.orders_tokens for block in model.layers[: first + 1])


def _loses_experts(block: BlockConfig, cut: LayerCut) -> bool:
    """Whether a layer keeps some of its routed experts, with their balancing biases."""
    if not getattr(block, "expert_bias", False):
        return False
    if cut.block is not None:
        return 0 < cut.block.config.routing()[0] < block.routing()[0]
    return "n_experts" in cut.keep
