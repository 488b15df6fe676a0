"""The gated MLP (Shazeer 2020, arXiv:2002.05202): `kernels.gated_mlp`.

Leaves out gate and up as one product: it needs their weights side by side in memory, and was never
faster (ARCHITECTURE.md has the measurements).
"""

from __future__ import annotations

import jax

from transformer.kernels import matmuls
from transformer.kernels.operations import linear
from transformer.kernels.registry import register
from transformer.remat import recompute
from transformer.weights import Linear


@register("gated_mlp")
def reference(x: jax.Array, gate: Linear, up: Linear, down: Linear, kind: str) -> jax.Array:
    """The definition, in the precision of `x`."""

    def apply(x: jax.Array, p: Linear) -> jax.Array:
        y = matmuls.reference(x, p.weight, p.scale)
        if p.bias is not None:
            y = y + p.bias
        if p.lora is not None:
            y = y + matmuls.reference(matmuls.reference(x, p.lora.a), p.lora.b) * p.lora.scale
        return y

    return apply(activation(kind)(apply(x, gate)) * apply(x, up), down)


@register("gated_mlp")
def unfused(x: jax.Array, gate: Linear, up: Linear, down: Linear, kind: str) -> jax.Array:
    """Three products, each in the form that is chosen for its weight.

    Differentiated, only what gate and up gave is remembered, of all that is F wide.
    """

    @recompute
    def mix(gate: jax.Array, up: jax.Array, down: Linear) -> jax.Array:
        return linear(activation(kind)(gate) * up, down)

    return mix(linear(x, gate), linear(x, up), down)


def activation(kind: str):
    """What is applied to the gate."""
    if kind == "swiglu":
        return jax.nn.silu
    if kind == "geglu":
        return lambda x: jax.nn.gelu(x, approximate=True)
    raise ValueError(f"kind must be 'swiglu' or 'geglu', got {kind!r}")
