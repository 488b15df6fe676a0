"""The weight containers that both layers and kernels take: linear maps, LoRA adapters, norms.

A `Linear` stores its weight as [out, in], the order of Hugging Face and GGUF files, in float32,
bfloat16 or int8. The matrix product is computed in the dtype of the weight. With experts, one
`Linear` has the maps of all experts of a layer, with a leading axis E in each array.
"""

from __future__ import annotations

import jax
from flax import struct


class Lora(struct.PyTreeNode):
    """Low-rank adapter of a linear map, which adds `x @ a.T @ b.T * scale`; see `lora.py`."""

    a: jax.Array  # [r, in] float32 or bfloat16
    b: jax.Array  # [out, r]
    scale: float = struct.field(pytree_node=False)


class Linear(struct.PyTreeNode):
    """Linear map `y = x @ weight.T * scale + bias`, or a token embedding with one row per token."""

    weight: jax.Array  # [out, in] float32, bfloat16 or int8
    bias: jax.Array | None = None  # [out] float32
    scale: jax.Array | None = None  # [out] float32 if weight is int8, else None
    lora: Lora | None = None


class Norm(struct.PyTreeNode):
    """Weights of an RMS norm, or of a layer norm if `bias` is not None."""

    scale: jax.Array  # [D] float32
    bias: jax.Array | None = None  # [D] float32
