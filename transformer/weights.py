"""The weight containers that both layers and kernels take: linear maps, LoRA adapters, norms.

A `Linear` stores its weight as [out, in], the order of Hugging Face and GGUF files, in float32,
bfloat16 or int8, or as a `BlockWeight` in blocks of 4 or 8 bits. The matrix product is computed in
the dtype of the weight. With experts, one `Linear` has the maps of all experts of a layer, with a
leading axis E in each array.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct


class Lora(struct.PyTreeNode):
    """Low-rank adapter of a linear map, which adds `x @ a.T @ b.T * scale`; see `lora.py`."""

    a: jax.Array  # [r, in] float32 or bfloat16
    b: jax.Array  # [out, r]
    scale: float = struct.field(pytree_node=False)


class BlockWeight(struct.PyTreeNode):
    """A weight [out, in] as integers of 4 or 8 bits, with a scale for each 32 inputs.

    `quant.py` defines the layout.
    """

    packed: jax.Array  # [ceil(out / 8), in / 32, bytes of eight blocks] uint8
    num_rows: int = struct.field(pytree_node=False)  # out
    bits: int = struct.field(pytree_node=False)  # 4 or 8

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.num_rows, 32 * self.packed.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the size of the packed numbers in bytes."""
        return self.packed.nbytes


class Linear(struct.PyTreeNode):
    """Linear map `y = x @ weight.T * scale + bias`, or a token embedding with one row per token."""

    weight: Any  # [out, in]: jax.Array in float32, bfloat16 or int8, or a BlockWeight
    bias: jax.Array | None = None  # [out] float32
    scale: jax.Array | None = None  # [out] float32 if weight is int8, else None
    lora: Lora | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored as integers, which have no gradients."""
        return self.scale is not None or isinstance(self.weight, BlockWeight)


class Norm(struct.PyTreeNode):
    """Weights of an RMS norm, or of a layer norm if `bias` is not None."""

    scale: jax.Array  # [D] float32
    bias: jax.Array | None = None  # [D] float32
