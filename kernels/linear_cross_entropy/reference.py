"""A plain reference of the kernel: it stores all logits, and the result has the dtype of the inputs."""

from jaxtyping import Float, Int64
from torch import Tensor


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    targets: Int64[Tensor, "tokens"],  # noqa: F821
) -> Float[Tensor, ""]:
    """Sum over tokens of logsumexp(z) - z[target], z = weight h, in nats; targets of -100 are ignored."""
    kept = targets != -100
    z = (hidden @ weight.T)[kept]
    return (z.logsumexp(dim=1) - z.gather(1, targets[kept, None])[:, 0]).sum()
