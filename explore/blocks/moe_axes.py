"""The axes along which a trained mixture of experts can be cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from explore.blocks.declarations import D_MODEL, WHOLE, Axis, Dim, Layout, Probe
from explore.blocks.mlp import mlp_layout, powers_of

if TYPE_CHECKING:
    from explore.blocks.moe import MoEConfig


def moe_axes(config: MoEConfig) -> tuple[Axis, ...]:
    """The axes of a mixture of experts.

    Each expert keeps its own channels, the same number in every expert. Input and output latents have the same width
    but separate channels and rotations; a latent with a norm cannot be rotated.
    """
    c = config
    axes = [
        Axis("n_experts", c.n_experts),
        Axis("top_k", c.top_k, prefix=True),
        Axis(
            "d_expert",
            c.n_experts * c.d_expert,
            within="n_experts",
            per_index=True,
            powers=powers_of(c.activation, "up", "down"),
        ),
    ]
    if c.d_shared is not None and c.n_shared:
        axes.append(Axis("n_shared", c.n_shared))
        axes.append(
            Axis(
                "d_shared",
                c.n_shared * c.d_shared,
                within="n_shared",
                per_index=True,
                probe=Probe("shared.down", "input"),
                powers=powers_of(c.activation, "shared.up.weight", "shared.down.weight"),
            )
        )
    if c.d_latent is not None:
        read, written = Probe("latent_down", "output"), Probe("latent_up", "input")
        axes.append(Axis("d_latent", c.d_latent, rotatable=c.latent_norm != "input", probe=read))
        rotatable = c.latent_norm != "combined"
        axes.append(Axis("d_latent_out", c.d_latent, field="d_latent", rotatable=rotatable, probe=written))
    return tuple(axes)


def moe_layout(config: MoEConfig) -> Layout:
    """The axes of every weight of a mixture of experts."""
    experts: Dim = (("n_experts",),)
    inner: Dim = (("d_expert",),)
    read, written = D_MODEL, D_MODEL
    if config.d_latent is not None:
        read, written = (("d_latent",),), (("d_latent_out",),)
    shared = mlp_layout((("d_shared",),))
    return {
        "router.weight": (experts, read if config.router_input == "latent" else D_MODEL),
        "router.bias": (experts,),
        "expert_bias": (experts,),
        "latent_down.weight": (read, D_MODEL),
        "latent_norm.weight": (read if config.latent_norm == "input" else written,),
        "up": (experts, read, inner),
        "gate": (experts, read, inner),
        "down": (experts, inner, written),
        "up_bias": (experts, inner),
        "gate_bias": (experts, inner),
        "down_bias": (experts, written),
        "latent_up.weight": (D_MODEL, written),
        **{f"shared.{name}": dims for name, dims in shared.items()},
        "shared_gate.weight": (WHOLE, D_MODEL),
    }
