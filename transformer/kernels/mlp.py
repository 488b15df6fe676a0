"""The gated MLP (Shazeer 2020, arXiv:2002.05202): `kernels.gated_mlp`.

Leaves out: gate and up as one fused product. It needs both weights in one array, and it was never
faster when measured.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from transformer.config import GATED_MLPS
from transformer.kernels import matmuls
from transformer.kernels.operations import linear
from transformer.kernels.registry import register
from transformer.remat import recompute
from transformer.weights import Linear


@register("gated_mlp")
def reference(
    x: jax.Array,
    gate: Linear,
    up: Linear,
    down: Linear,
    kind: str,
    limit: float | None = None,
) -> jax.Array:
    """Compute the gated MLP by the definition, in the precision of `x`."""

    def apply(x: jax.Array, p: Linear) -> jax.Array:
        y = matmuls.reference(x, p.weight, p.scale)
        if p.bias is not None:
            y = y + p.bias
        if p.lora is not None:
            y = y + matmuls.reference(matmuls.reference(x, p.lora.a), p.lora.b) * p.lora.scale
        return y

    return apply(multiply_gate(apply(x, gate), apply(x, up), kind, limit), down)


@register("gated_mlp")
def unfused(
    x: jax.Array,
    gate: Linear,
    up: Linear,
    down: Linear,
    kind: str,
    limit: float | None = None,
) -> jax.Array:
    """Compute three products, each with the default implementation for its weight.

    Of the intermediates of width F, the backward pass stores only the outputs of gate and up.
    """

    @recompute
    def mix(gate: jax.Array, up: jax.Array, down: Linear) -> jax.Array:
        return linear(multiply_gate(gate, up, kind, limit), down)

    return mix(linear(x, gate), linear(x, up), down)


def multiply_gate(gate: jax.Array, up: jax.Array, kind: str, limit: float | None) -> jax.Array:
    """Return `activation(gate) * up` elementwise, or its variant for "swiglu_oai".

    `kernels.gated_mlp` describes `kind` and `limit`.
    """
    if kind != "swiglu_oai":
        return activation(kind)(gate) * up
    assert limit is not None
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def activation(kind: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation function of the gate.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind == "swiglu":
        return jax.nn.silu
    if kind == "geglu":
        return lambda x: jax.nn.gelu(x, approximate=True)
    raise ValueError(
        f"the kind of a gated MLP must be one of {', '.join(GATED_MLPS)}, got {kind!r}"
    )
