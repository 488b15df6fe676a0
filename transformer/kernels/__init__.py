"""The operations whose speed decides, each as a plain reference and as faster forms.

One function an operation (`operations.py`). Called without `impl` it takes the form that `CHOSEN`
(`table.py`) names for this platform; called with one it takes that form, or raises: it never falls
back on another. The forms of an operation share a file.

The first form of each operation is its reference: the definition, written to be read and to be
right in any precision, with no thought for speed. `python -m transformer.bench` runs it in float64
and holds every other form to it, so a form that is fast and wrong shows as wrong.

**Adding your own** takes a function with the arguments of its reference, registered in one of the
files that are imported below. Say you found a better norm:

    # transformer/kernels/norms.py
    @register("norm")
    def rsqrt(x, scale, bias, eps):
        if bias is not None:
            raise Unavailable("norm rsqrt is for RMS norms: this one has a bias")
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale

Then measure it beside the others, alone and within a whole decoding step, the two in turns:

    python -m transformer.bench norm --forms
    python -m transformer.bench decode --try norm=rsqrt

If it wins, name it in `CHOSEN`. A function that is not registered is named by its place: `--try
norm=my_module.rsqrt`, or `impl="my_module.rsqrt"`. A kernel outside XLA (a `jax.ffi` call, Pallas)
is a form like any other.

Arrays are float32 unless a shape says otherwise, letters are those of ARCHITECTURE.md, and R is
rows of a product: all axes but the last, flattened.
"""

from transformer.kernels import attention, cached_attention, matmuls, mlp, norms, rotary, truncation
from transformer.kernels.operations import (
    attend,
    attend_cached,
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
    "select_impl",
    "get_impl",
    "gated_mlp",
    "linear",
    "matmul",
    "mlp",
    "norm",
    "norms",
    "matmuls",
    "rotate",
    "rotary",
    "truncate",
    "truncation",
    "override",
]
