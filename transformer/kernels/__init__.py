"""The performance-critical operations, each with a reference and faster implementations.

Each operation is one function (`operations.py`). Without `impl` it calls the implementation that
`DEFAULT_IMPL` (`registry.py`) selects for the platform. With `impl` it calls that implementation or
raises; there is no fallback. The implementations of an operation are in one file.

The first implementation of each operation is its reference: the definition, written for clarity and
for any precision, not for speed. `python -m transformer.bench` runs the reference in float64 and
compares the results of all other implementations with it.

**To add an implementation**, write a function with the arguments of the reference and register it
in one of the files imported below. For example, another norm:

    # transformer/kernels/norms.py
    @register("norm")
    def rsqrt(x, scale, bias, eps):
        if bias is not None:
            raise Unavailable("norm rsqrt is for RMS norms: this one has a bias")
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale

Then compare it with the others, alone and in a whole decoding step:

    python -m transformer.bench norm --all-impls
    python -m transformer.bench decode --impl norm=rsqrt

If it is faster, add it to `DEFAULT_IMPL`. A function that is not registered is given by its
module path: `--impl norm=my_module.rsqrt` or `impl="my_module.rsqrt"`. A kernel outside XLA (a
`jax.ffi` call, Pallas) is registered in the same way.

Arrays are float32 unless a docstring says otherwise. The letters of shapes are those of
ARCHITECTURE.md; R is the number of rows of a product: all axes but the last, flattened.
"""

from transformer.kernels import (
    attention,
    cached_attention,
    matmuls,
    mixture,
    mlp,
    norms,
    rotary,
    truncation,
)
from transformer.kernels.operations import (
    attend,
    attend_cached,
    experts,
    gated_mlp,
    linear,
    matmul,
    norm,
    rotate,
    truncate,
)
from transformer.kernels.registry import (
    DEFAULT_IMPL,
    IMPLS,
    MANY_ROWS,
    Unavailable,
    get_impl,
    native_module,
    override,
    select_impl,
)

__all__ = [
    "DEFAULT_IMPL",
    "IMPLS",
    "MANY_ROWS",
    "Unavailable",
    "attend",
    "attend_cached",
    "attention",
    "cached_attention",
    "experts",
    "select_impl",
    "get_impl",
    "gated_mlp",
    "linear",
    "matmul",
    "mixture",
    "mlp",
    "native_module",
    "norm",
    "norms",
    "matmuls",
    "rotate",
    "rotary",
    "truncate",
    "truncation",
    "override",
]
