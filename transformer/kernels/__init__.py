"""The operations whose speed decides, each as a plain reference and as faster forms.

One function an operation. Called without `impl` it takes the form that the table `CHOSEN` names
for this platform; called with one it takes that form, or raises: it never falls back on another.
The choice is made while a program is traced, so it costs nothing when the program runs.

The first form of each operation is its reference: the definition, written to be read and to be
right in any precision, with no thought for speed. `python -m transformer.bench` runs it in float64
and holds every other form to it, so a form that is fast and wrong shows as wrong.

**Adding your own** takes a function with the arguments of its reference and a line in `FORMS`. Say
you found a better norm:

    # transformer/kernels/norms.py
    def rsqrt(x, scale, bias, eps):
        if bias is not None:
            raise Unavailable("norm rsqrt is for RMS norms: this one has a bias")
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale

    # transformer/kernels/__init__.py, in FORMS["norm"]
    "rsqrt": "norms.rsqrt",

Then measure it beside the others, alone and within a whole decoding step, the two in turns:

    python -m transformer.bench norm --forms
    python -m transformer.bench decode --try norm=rsqrt

If it wins, name it in `CHOSEN`. Before there is a line in any table, a name with a dot in it says
where the function is: `--try norm=my_module.rsqrt`, or `impl="my_module.rsqrt"`. A kernel outside
XLA (a `jax.ffi` call, Pallas) is a form like any other; its module is imported when it is chosen.

Arrays are float32 unless a shape says otherwise, letters are those of ARCHITECTURE.md, and R is
rows of a product: all axes but the last, flattened.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator

import jax

# Operation, form: module (of this package) and function. The first form is the reference.
FORMS: dict[str, dict[str, str]] = {
    "matmul": {
        "reference": "products.reference",
        "dot": "products.dot",
        "batched": "products.batched",
        "slices": "products.slices",
        "pair": "products.pair",
        "integers": "products.integers",
    },
    "norm": {
        "reference": "norms.reference",
        "ones": "norms.ones",
    },
    "rotate": {
        "reference": "rotation.reference",
        "halves": "rotation.halves",
    },
    "attend": {
        "reference": "attention.reference",
        "blocks": "attention.blocks",
        "library": "attention.library",
    },
    "attend_cached": {
        "reference": "cached_attention.reference",
        "blocks": "cached_attention.blocks",
    },
    "gated_mlp": {
        "reference": "mlp.reference",
        "products": "mlp.products",
    },
    "truncate": {
        "reference": "truncation.reference",
        "bisection": "truncation.bisection",
    },
}

MANY = 128  # rows of a product from which on it counts how fast one multiplies, not how one reads

# What is taken when `impl` is None. The best product depends on the weight's dtype and on the rows.
CHOSEN: dict[str, dict[str, str]] = {
    "cpu": {
        "matmul float32": "batched",
        "matmul float32, one row": "slices",
        "matmul float32, many rows": "dot",
        "matmul bfloat16": "batched",
        "matmul bfloat16, one row": "pair",
        "matmul bfloat16, many rows": "dot",
        "matmul int8": "integers",
        "matmul int8, one row": "integers",
        "matmul int8, many rows": "integers",
        "norm": "ones",
        "rotate": "halves",
        "attend": "blocks",
        "attend_cached": "blocks",
        "gated_mlp": "products",
        "truncate": "bisection",
    },
    "elsewhere": {
        "matmul float32": "dot",
        "matmul float32, one row": "dot",
        "matmul float32, many rows": "dot",
        "matmul bfloat16": "dot",
        "matmul bfloat16, one row": "pair",
        "matmul bfloat16, many rows": "dot",
        "matmul int8": "integers",
        "matmul int8, one row": "integers",
        "matmul int8, many rows": "integers",
        "norm": "ones",
        "rotate": "halves",
        "attend": "reference",
        "attend_cached": "blocks",
        "gated_mlp": "products",
        "truncate": "bisection",
    },
}

_tried: dict[str, str] = {}  # operation: form, inside `trying`


class Unavailable(ValueError):
    """A form that cannot run here, or not with these arguments. The message says why."""


def matmul(
    rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None, *, impl: str | None = None
) -> jax.Array:
    """`rows @ (weight * scale).T`, accumulated in float32 (int32 for int8): [R, in] -> [R, out].

    Args:
        rows: [R, in].
        weight: float32, bfloat16 or int8 [out, in]; its dtype is the format of the product.
        scale: [out], of int8 weights.
    """
    count = ", one row" if len(rows) == 1 else ", many rows" if len(rows) >= MANY else ""
    with jax.named_scope("matmul"):
        return _form("matmul", f"matmul {weight.dtype}{count}", impl)(rows, weight, scale)


def norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float, *, impl: str | None = None
) -> jax.Array:
    """Layer norm over the last axis of [..., D]; where `bias` is None, RMS norm.

    Args:
        scale, bias: [D].
    """
    with jax.named_scope("norm"):
        return _form("norm", "norm", impl)(x, scale, bias, eps)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, impl: str | None = None) -> jax.Array:
    """Turns the channel pairs (i, i + H/2) of [B, T, N, H] by given angles.

    Args:
        cos, sin: [B, T, 1, H/2].
    """
    with jax.named_scope("rotate"):
        return _form("rotate", "rotate", impl)(x, cos, sin)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Causal attention of whole sequences: [B, T, N, H].

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
        window: how many positions a query sees, its own among them; None: all before it.
        segments: int32 [B, T], which of several texts in a row a position belongs to; it sees those
            of its own. None: a row is one text.
    """
    with jax.named_scope("attend"):
        return _form("attend", "attend", impl)(q, k, v, window=window, segments=segments)


def attend_cached(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    *,
    window: int | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Causal attention of new queries over the cached past of their rows: [B, T, N, H].

    The pools are those of one layer of `transformer.cache`, which says how they are laid out.

    Args:
        q: [B, T, N, H]; query t of row b stands at position starts[b] + t.
        keys: float32, or bfloat16 as its bits in uint16, [P, K, H, BLOCK].
        values: the same, [P, K, BLOCK, H].
        tables: int32 [B, S/BLOCK], the blocks of each row in order.
        starts: int32 [B].
        window: as in `attend`.
    """
    with jax.named_scope("attend_cached"):
        form = _form("attend_cached", "attend_cached", impl)
        return form(q, keys, values, tables, starts, window=window)


def gated_mlp(x: jax.Array, gate, up, down, kind: str, *, impl: str | None = None) -> jax.Array:
    """`down(activation(gate(x)) * up(x))`, a gated linear unit: [..., D] -> [..., D].

    After Shazeer 2020, arXiv:2002.05202.

    Args:
        gate, up: `layers.Linear` [F, D].
        down: `layers.Linear` [D, F].
        kind: "swiglu" (SiLU) or "geglu" (GELU, by its tanh approximation).
    """
    with jax.named_scope("gated_mlp"):
        return _form("gated_mlp", "gated_mlp", impl)(x, gate, up, down, kind)


def truncate(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    impl: str | None = None,
) -> jax.Array:
    """-inf where top-k, top-p or min-p leave a token out: [V] -> [V].

    Tokens as likely as the last one that stays, stay too.

    Args:
        top_k: int32, keep so many; 0 keeps all.
        top_p: keep the likeliest tokens that hold this much probability; 1 keeps all.
        min_p: keep tokens at least this likely, relative to the likeliest.
    """
    with jax.named_scope("truncate"):
        return _form("truncate", "truncate", impl)(logits, top_k, top_p, min_p)


@contextlib.contextmanager
def trying(**forms: str) -> Iterator[None]:
    """Takes other forms where `impl` is None: `with trying(norm="reference"): ...`.

    For experiments, not for a server: it holds for the whole process, and makes JAX forget its
    compiled programs at both ends, so that none keeps what it was traced with.

    Raises:
        ValueError: no such operation or form.
    """
    global _tried
    before = _tried
    for operation, form in forms.items():
        find(operation, form)
    _tried = {**before, **forms}
    jax.clear_caches()
    try:
        yield
    finally:
        _tried = before
        jax.clear_caches()


def find(operation: str, form: str) -> Callable[..., jax.Array]:
    """The function behind a name.

    Args:
        form: a form of `FORMS[operation]`, or "package.module.function".

    Raises:
        ValueError: there is none.
    """
    if operation not in FORMS:
        raise ValueError(f"operation must be one of {', '.join(FORMS)}, got {operation!r}")
    if form in FORMS[operation]:
        place = f"{__name__}.{FORMS[operation][form]}"
    elif "." in form:
        place = form
    else:
        known = ", ".join(FORMS[operation])
        raise ValueError(
            f"{operation} has the forms {known}, got {form!r} (another is named "
            "'package.module.function')"
        )
    module, _, name = place.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{operation} {form!r} cannot be found: {error}") from error


def chosen(kind: str) -> str:
    """The form that a line of `CHOSEN` names for this platform, or that is being tried.

    Args:
        kind: an operation; for products "matmul DTYPE", "matmul DTYPE, one row" or "matmul DTYPE,
            many rows".
    """
    operation = kind.partition(" ")[0]
    if operation in _tried:
        return _tried[operation]
    platform = jax.default_backend()
    table = CHOSEN.get(platform, CHOSEN["elsewhere"])
    if kind not in table:
        raise Unavailable(f"there is no form for {kind!r} on {platform}: {', '.join(table)}")
    return table[kind]


def _form(operation: str, kind: str, impl: str | None) -> Callable[..., jax.Array]:
    return find(operation, impl or chosen(kind))
