"""The table of forms: which there are, which one is taken, and how to take another.

It imports no form. Each form enters itself with `@register`, when `kernels` imports its module.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

Form = Callable[..., jax.Array]
_F = TypeVar("_F", bound=Form)

# Operation, name of the form, function. The first form is the reference.
FORMS: dict[str, dict[str, Form]] = {}

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


def register(operation: str) -> Callable[[_F], _F]:
    """Enter a function in `FORMS[operation]` under its own name, and return it as it is.

    Raises:
        ValueError: the operation has a form of this name.
    """

    def enter(form: _F) -> _F:
        forms = FORMS.setdefault(operation, {})
        if forms.setdefault(form.__name__, form) is not form:
            raise ValueError(f"{operation} has a form {form.__name__!r} already")
        return form

    return enter


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


def find(operation: str, form: str) -> Form:
    """The function behind a name.

    Args:
        form: a form of `FORMS[operation]`, or "package.module.function".

    Raises:
        ValueError: there is none.
    """
    if operation not in FORMS:
        raise ValueError(f"operation must be one of {', '.join(FORMS)}, got {operation!r}")
    if form in FORMS[operation]:
        return FORMS[operation][form]
    if "." not in form:
        known = ", ".join(FORMS[operation])
        raise ValueError(
            f"{operation} has the forms {known}, got {form!r} (another is named "
            "'package.module.function')"
        )
    module, _, name = form.rpartition(".")
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
