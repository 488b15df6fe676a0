"""Mixture of experts: each token passes through a few of many gated MLPs: `kernels.experts`.

After Shazeer et al. 2017, arXiv:1701.06538, as in Mixtral (arXiv:2401.04088). The (token, expert)
pairs are sorted by expert and cut into blocks of rows that share an expert, so that a product reads
one expert and no product has the rows of other experts (MegaBlocks: Gale et al. 2022,
arXiv:2211.15841). The arithmetic grows with the experts that a token passes through, not with all
of them, and no token is dropped.

Leaves out: adapters (LoRA) of experts, and experts distributed over devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.kernels import mlp
from transformer.kernels.operations import gated_mlp
from transformer.kernels.registry import register
from transformer.weights import Linear

_MAX_BLOCK = 32  # rows; the last block of an expert is padded to this size


@register("experts")
def reference(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: Linear,
    up: Linear,
    down: Linear,
    kind: str,
    limit: float | None = None,
) -> jax.Array:
    """Compute the experts by the definition: every expert for every token, at `x`'s precision."""
    y = jnp.zeros_like(x)
    for e in range(gate.weight.shape[0]):
        weight = jnp.sum(weights * (chosen == e), axis=-1, keepdims=True)  # [R, 1]
        y = y + weight * mlp.reference(x, *_expert(e, gate, up, down), kind, limit)
    return y


@register("experts")
def sorted_blocks(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: Linear,
    up: Linear,
    down: Linear,
    kind: str,
    limit: float | None = None,
) -> jax.Array:
    """Compute the experts in blocks of rows with the same expert, without unused experts."""
    (num_rows, k), num_experts = chosen.shape, gate.weight.shape[0]
    num_pairs, size = num_rows * k, min(num_rows, _MAX_BLOCK)
    expert = chosen.reshape(-1)  # [P], of each pair
    order = jnp.argsort(expert)  # stable: pairs by expert, then by row
    counts = jnp.zeros(num_experts, jnp.int32).at[expert].add(1)
    # First pair and first block of each expert, [E].
    num_blocks = -(-counts // size)
    first_pair, first_block = jnp.cumsum(counts) - counts, jnp.cumsum(num_blocks) - num_blocks

    # At most: each expert wastes less than one block.
    num_used = min(num_experts, num_pairs)
    block = jnp.arange((num_pairs - num_used) // size + num_used)  # [M]
    block_expert = jnp.searchsorted(jnp.cumsum(num_blocks), block, side="right")
    is_used, block_expert = block_expert < num_experts, jnp.minimum(block_expert, num_experts - 1)
    # Rows of each block, [M, size]. Padding takes any row; its results are not used.
    start = first_pair[block_expert] + (block - first_block[block_expert]) * size
    pairs = jnp.minimum(start[:, None] + jnp.arange(size), num_pairs - 1)
    rows = order[pairs] // k

    def compute(_, item):
        row, e, is_used = item

        def apply() -> jax.Array:
            return gated_mlp(x[row], *_expert(e, gate, up, down), kind, limit=limit)

        return None, jax.lax.cond(is_used, apply, lambda: jnp.zeros((size, x.shape[1]), x.dtype))

    y = jax.lax.scan(compute, None, (rows, block_expert, is_used))[1]  # [M, size, D]
    # Row of each pair among the rows of all blocks, in the order of `chosen`.
    rank = jnp.argsort(order) - first_pair[expert]
    block_row = first_block[expert] * size + rank  # [P]
    y = y.reshape(-1, x.shape[1])[block_row].reshape(num_rows, k, -1)
    # A sum in a fixed order: the result of a row does not depend on the number of rows.
    return sum(weights[:, i, None] * y[:, i] for i in range(1, k)) + weights[:, :1] * y[:, 0]


def _expert(
    e: jax.Array | int, gate: Linear, up: Linear, down: Linear
) -> tuple[Linear, Linear, Linear]:
    """Return the linear maps gate, up and down of expert `e`."""
    return jax.tree.map(lambda array: array[e], (gate, up, down))
