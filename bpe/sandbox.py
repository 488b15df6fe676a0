"""A Jinja environment for templates nobody vouches for: they end soon and stay small.

Chat templates arrive inside model files. Jinja's own sandbox keeps them away from Python's insides,
but not from running for a week or filling the memory. Three rules together do:

1. *Little to call.* Filters, methods and globals are the ones chat templates use, listed below.
   What could make much out of little in one step (`*`, `replace`, `join`, `+`, an indent) is
   checked before it is done; `**`, and `%` and `format` on strings, are refused.
2. *Everything is metered.* The template's syntax tree is rewritten before compilation, so that
   every turn of a loop, call, operation, slice, comparison and literal passes through `spend`,
   which bounds the size of a single value, of all values together, and the processor time.
3. *Nothing at compile time.* Constant folding is off, so that `"a" * 10**10` is not computed while
   compiling either.

Imported only when a chat template is used: it needs jinja2.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 17  # characters of a template; the longest in use have some 30,000
MAX_SIZE = 1 << 22  # of one value, or the output: characters, plus 8 per item of a container
MAX_TOTAL = 1 << 26  # of all values together
MAX_SECONDS = 2.0  # of this thread's processor time, so that a busy machine makes no difference

# fmt: off
_FILTERS = [
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "reject", "rejectattr", "reverse", "select",
    "selectattr", "string", "title", "trim", "upper",
]
_METHODS: dict[type, set[str]] = {
    str: {
        "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit",
        "islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition",
        "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit",
        "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
    },
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    int: set(),
    float: set(),
}
# fmt: on
_GLOBALS = ("range", "dict", "cycler", "joiner")  # not `lipsum`, which makes text from nothing


class _Meter:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self._left = MAX_TOTAL
        self._deadline = time.thread_time() + MAX_SECONDS

    def spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError(f"it makes more than {MAX_TOTAL} characters in all")
        if time.thread_time() > self._deadline:
            raise ValueError(f"it runs for more than {MAX_SECONDS:g} s")


# A context variable, because several threads may render with one environment.
_METER: ContextVar[_Meter] = ContextVar("meter")


@contextlib.contextmanager
def metered() -> Iterator[None]:
    """Within this block, templates may run, up to the limits above."""
    token = _METER.set(_Meter())
    try:
        yield
    finally:
        _METER.reset(token)


def value_size(value: Any) -> int:
    """The characters in `value`, with those in the items of containers, plus 8 for every item.

    Raises:
        ValueError: if that is more than `MAX_SIZE`. A list that holds one list many times, level on
            level, can be larger than memory when printed: hence no more is looked at than that.
    """
    if isinstance(value, str):
        total, rest = len(value), []
    else:
        total, rest = 1, [value]
    while rest and total <= MAX_SIZE:
        value = rest.pop()
        total += 8
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            rest += value.keys()
            rest += value.values()
        elif isinstance(value, list | tuple | KeysView | ValuesView | ItemsView):
            rest += value
    _check_size(total)
    return total


def spend(value: Any) -> Any:
    """Passes `value` through, at the expense of its size.

    Raises:
        ValueError: if it is too large, or the rendering has used up what it may.
        LookupError: outside `metered` (Jinja, trying to fold constants, takes it for "cannot").
    """
    _METER.get().spend(value_size(value))
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise ValueError("it computes with integers of more than 64 bits")
    return value


def _check_size(total: int) -> None:
    if total > MAX_SIZE:
        raise ValueError(f"it makes a value of more than {MAX_SIZE} characters")


def _concat(parts: Iterable[str]) -> str:
    """What Jinja joins the output of a macro or a `set` block with."""
    parts = list(parts)
    _check_size(sum(map(len, parts)))
    result = "".join(parts)
    spend(result)
    return result


def _join(items: Iterable[Any], separator: str = "") -> str:
    parts = [str(spend(item)) for item in items]
    _check_size(sum(map(len, parts)) + len(separator) * len(parts))
    return separator.join(parts)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    times = text.count(old) if count < 0 else min(text.count(old), count)
    _check_size(len(text) + times * max(0, len(new) - len(old)))
    return text.replace(old, new, count)


def _join_filter(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise ValueError("join(attribute=...) is not available in chat templates")
    return _join(value, str(d))


def _replace_filter(s: Any, old: str, new: str, count: int | None = None) -> str:
    return _replace(str(s), str(old), str(new), -1 if count is None else count)


def _indent_filter(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * min(width, 64)
    if len(margin) != (len(width) if isinstance(width, str) else width):
        raise ValueError(f"indent of {width} is more than 64")
    _check_size(len(s) + (s.count("\n") + 1) * len(margin))
    lines = [margin + line if blank or line else line for line in str(s).split("\n")]
    return "\n".join(lines if first else [str(s).split("\n")[0], *lines[1:]])


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: unlike Jinja's own, it escapes no HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise ValueError(f"tojson(indent={indent!r}) must be from 0 to 16")
    if separators is not None and sum(map(len, separators)) > 8:
        raise ValueError("tojson's separators must be short")
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    _check_size(len(format) * 64)
    return datetime.now().strftime(format)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, whose contents do not count in `size` and hence must not be printed."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _metered_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that spends its result, complete: what is lazy would escape the meter."""

    @functools.wraps(function)  # also carries over what Jinja wants passed as first argument
    def metered_function(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return spend(list(result) if isinstance(result, Iterator) else result)

    return metered_function


class _Metering(NodeTransformer):
    """Rewrites a syntax tree so that all that costs something goes through `Sandbox.spend`.

    Calls, arithmetic, filters, tests and look-ups need no rewriting: they go through the
    environment anyway.
    """

    def _spend(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _call("spend", [node], node.lineno)

    visit_Compare = visit_List = visit_Dict = _spend

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._spend(node) if node.ctx == "load" else node  # else the target of a `for`

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        if isinstance(node.arg, nodes.Slice):
            return self._spend(node)
        self.generic_visit(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _call("join_all", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        tick = nodes.ExprStmt(_call("spend", [nodes.Const(None)], node.lineno))
        tick.set_lineno(node.lineno)
        node.body.insert(0, tick)
        return node


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of one of the environment's attributes, in the template's syntax tree."""
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(line)
    return call


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: the part of a turn that the model is to write.

    Renders its contents, between the two characters in the variable `generation_marks` if given.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, context: Context, caller: Macro) -> str:
        start, end = context.get("generation_marks") or ("", "")
        return f"{start}{caller()}{end}"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with the settings of transformers' chat templates, within the limits above."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(_concat)  # type: ignore[assignment]
    spend = staticmethod(spend)
    join_all = staticmethod(lambda *parts: _join(parts))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
            optimized=False,
            finalize=spend,  # every value that is printed
        )
        filters: dict[str, Callable[..., Any]] = {name: FILTERS[name] for name in _FILTERS}
        filters |= {
            "indent": _indent_filter,
            "join": _join_filter,
            "replace": _replace_filter,
            "safe": str,  # nothing is escaped, so nothing need be called safe
            "tojson": _tojson,
        }
        self.filters = {name: _metered_function(function) for name, function in filters.items()}
        self.tests = {name: _metered_function(function) for name, function in self.tests.items()}
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def load(self, source: str) -> jinja2.Template:
        """Compiles a template.

        Raises:
            ValueError: if it is too long or not a template we can run.
        """
        if len(source) > MAX_SOURCE:
            raise ValueError(f"chat template has {len(source)} characters, at most {MAX_SOURCE} do")
        try:
            return self.from_string(_Metering().visit(self.parse(source)))
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"chat template cannot be compiled: {error}") from error

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja offers `str.format` in a form of its own; without that it is refused as unknown."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        spend(None)  # filters look up attributes by themselves, in loops of their own
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if obj is spend:
            return spend(*args)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            obj = functools.partial(_replace if name == "replace" else _join_with, owner)
        return spend(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "%" and not numbers):
            raise ValueError(f"the operator {operator} is not available on these values")
        if not numbers and operator == "*":
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int):
                _check_size(value_size(repeated) * times)
        elif not numbers:
            _check_size(value_size(left) + value_size(right))
        return spend(super().call_binop(context, operator, left, right))


def _join_with(separator: str, items: Iterable[Any]) -> str:
    return _join(items, separator)
