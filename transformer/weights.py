"""The weights that layers and kernels both take: linear maps, adapters, norms.

A `Linear` holds its weight as [out, in], the order of Hugging Face and GGUF files, in float32,
bfloat16 or int8. The dtype of the weight is the format of the product.
"""

from __future__ import annotations

import jax
from flax import struct


@struct.dataclass
class Lora:
    """What a low-rank adapter adds to a linear map: `x @ a.T @ b.T * scale`; see `lora.py`."""

    a: jax.Array  # [r, in] float32 or bfloat16
    b: jax.Array  # [out, r]
    scale: float = struct.field(pytree_node=False)


@struct.dataclass
class Linear:
    """`y = x @ weight.T * scale + bias`. Also the token table: one row a token."""

    weight: jax.Array  # [out, in] float32, bfloat16 or int8
    bias: jax.Array | None = None  # [out] float32
    scale: jax.Array | None = None  # [out] float32, present exactly when weight is int8
    lora: Lora | None = None


@struct.dataclass
class Norm:
    """Scale of an RMS norm; with `bias`, of a layer norm."""

    scale: jax.Array  # [D] float32
    bias: jax.Array | None = None  # [D] float32
