"""CPU kernels written in Python: compiled by Numba, called inside `jax.jit` through `jax.ffi`.

XLA's CPU backend has no products with 4-bit blocks, reads low-bit weights at a fraction of the
memory bandwidth, and needs hundreds of calls for one decoding step. The kernels of this package
are loops, and vector operations where a loop does not reach the instruction:

    ffi.py        how XLA calls a Numba function; threads, atomic counters
    simd.py       vectors and the dot-product instruction of this CPU
    products.py   rows times a weight in blocks of 4 or 8 bits
    attention.py  one query over the blocks of a KV cache
    step.py       all layers of a decoding step as one call

They are implementations of `transformer.kernels` like all others: without Numba, or for an
operation that they do not cover, XLA programs are used. Nothing here is imported before it is used,
because the first import compiles.
"""
