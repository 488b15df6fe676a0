"""Run untrusted Jinja templates in a sandbox that limits their time and memory.

Chat templates come with model files. Jinja's sandbox prevents access to Python's internals, but it
does not limit the time and memory of a template. Three rules do:

1. *Few callables.* Only the filters, methods and globals that chat templates use are available.
   Operations that can create large values in one step (`*`, `replace`, `join`, `+`, an indent) are
   checked before they run; `**`, and `%` on strings, are rejected; `format` only inserts.
2. *Everything is metered.* The syntax tree of a template is rewritten before compilation. Every
   loop iteration, call, operation, slice, comparison and literal passes through `spend`, which
   limits the size of each value, the total size of all values, and the processor time.
3. *No constant folding*, so `"a" * 10**10` is not computed during compilation.

This module needs jinja2 and is imported only when a chat template is used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import string
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

MAX_SOURCE = 1 << 17  # characters of a template; the longest in use have about 30,000
MAX_SIZE = 1 << 22  # size of one value or of the output: characters, plus 8 per container item
MAX_TOTAL = 1 << 26  # total size of all values
MAX_SECONDS = 2.0  # processor time of the thread, which does not depend on the machine's load

# fmt: off
_FILTERS = [
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse",
    "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper",
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
_GLOBALS = ("range", "dict", "cycler", "joiner")  # not `lipsum`, which generates text


class _Meter:
    """The remaining budget of one rendering: total size of values, and processor time."""

    def __init__(self) -> None:
        self._remaining = MAX_TOTAL
        self._deadline = time.thread_time() + MAX_SECONDS

    def spend(self, size: int) -> None:
        self._remaining -= size
        if self._remaining < 0:
            raise ValueError(f"the values in it have more than {MAX_TOTAL} characters in total")
        if time.thread_time() > self._deadline:
            raise ValueError(f"rendering took more than {MAX_SECONDS:g} s")


# A context variable, because several threads can render with one environment.
_METER: ContextVar[_Meter] = ContextVar("meter")


@contextlib.contextmanager
def metered() -> Iterator[None]:
    """Return a context in which templates can run, within the limits of this module."""
    token = _METER.set(_Meter())
    try:
        yield
    finally:
        _METER.reset(token)


def value_size(value: Any) -> int:
    """Return the number of characters in `value` and its items, plus 8 for every item.

    The traversal stops above `MAX_SIZE`, because nested lists that contain one list many times can
    be larger than memory when printed.

    Raises:
        ValueError: if the size is more than `MAX_SIZE`.
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
    """Subtract the size of `value` from the budget of the rendering, and return `value`.

    Raises:
        ValueError: if the value is too large, or the budget is exhausted.
        LookupError: if called outside `metered`, as when Jinja evaluates constants at compile time;
            the error makes Jinja leave them unevaluated.
    """
    _METER.get().spend(value_size(value))
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise ValueError("integers of more than 64 bits are not available in chat templates")
    return value


def _check_size(total: int) -> None:
    if total > MAX_SIZE:
        raise ValueError(f"a value has more than {MAX_SIZE} characters")


def _concat(parts: Iterable[str]) -> str:
    """Join the parts of the output of a macro or of a `set` block, and meter the result."""
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
    num_matches = text.count(old) if count < 0 else min(text.count(old), count)
    _check_size(len(text) + num_matches * max(0, len(new) - len(old)))
    return text.replace(old, new, count)


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    """Return `text` with its fields replaced by the arguments, without format specifications."""
    parts: list[str] = []
    position = 0
    for literal, name, spec, conversion in string.Formatter().parse(text):
        parts.append(literal)
        if name is None:
            continue
        if spec or conversion:
            raise ValueError(f"format: {{{name}:{spec}}} is not available in chat templates")
        if not name:
            name, position = str(position), position + 1
        try:
            parts.append(str(spend(args[int(name)] if name.isdecimal() else kwargs[name])))
        except (IndexError, KeyError):
            raise ValueError(f"format: there is no argument {name}") from None
        _check_size(sum(map(len, parts)))
    return "".join(parts)


def _join_filter(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise ValueError("join(attribute=...) is not available in chat templates")
    return _join(value, str(d))


def _replace_filter(s: Any, old: str, new: str, count: int | None = None) -> str:
    return _replace(str(s), str(old), str(new), -1 if count is None else count)


def _indent_filter(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * min(width, 64)
    if len(margin) != (len(width) if isinstance(width, str) else width):
        raise ValueError(f"expected indent(width) with a width of at most 64, got {width}")
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
    """Return `x` as JSON, without Jinja's escaping of HTML, as in transformers."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise ValueError(f"expected tojson(indent) from 0 to 16, got {indent!r}")
    if separators is not None and sum(map(len, separators)) > 8:
        raise ValueError("the separators of tojson must have at most 8 characters")
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    _check_size(len(format) * 64)
    return datetime.now().strftime(format)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace(...)`, printed as `<Namespace>`.

    `value_size` does not count its content, so printing the content would bypass the size limit.
    """

    def __repr__(self) -> str:
        return "<Namespace>"


def _metered_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a Jinja filter or test so that its result counts against the budget, see `spend`.

    A result that is an iterator is evaluated to a list first.
    """

    @functools.wraps(function)  # also copies Jinja's marker for the first argument
    def metered_function(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return spend(list(result) if isinstance(result, Iterator) else result)

    return metered_function


class _Metering(NodeTransformer):
    """A rewriter of syntax trees that makes every costly expression count against the budget.

    Calls, arithmetic, filters, tests and lookups need no rewriting, because Jinja evaluates them
    through the environment.
    """

    def _spend(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _call("spend", [node], node.lineno)

    visit_Compare = visit_List = visit_Dict = _spend

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        """Rewrite a tuple; leave an assignment target as it is."""
        return self._spend(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        """Rewrite a slice; the environment meters other subscripts."""
        if isinstance(node.arg, nodes.Slice):
            return self._spend(node)
        self.generic_visit(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        """Rewrite `~` to a call of `Sandbox.join_all`."""
        self.generic_visit(node)
        return _call("join_all", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Insert a call of `Sandbox.spend` into the loop body, to check the time."""
        self.generic_visit(node)
        tick = nodes.ExprStmt(_call("spend", [nodes.Const(None)], node.lineno))
        tick.set_lineno(node.lineno)
        node.body.insert(0, tick)
        return node


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """Return a syntax tree node that calls an attribute of the environment."""
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(line)
    return call


class GenerationTag(Extension):
    """The tag `{% generation %}...{% endgeneration %}`, which marks text that the model generates.

    The content is rendered, with the first character of the template variable `generation_marks`
    before it and the second one after it if the variable is set.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag to a call of `mark` with its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, context: Context, caller: Macro) -> str:
        """Return the rendered content between the generation marks."""
        start, end = context.get("generation_marks") or ("", "")
        return f"{start}{caller()}{end}"


class Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment with the settings of transformers and the limits of this module."""

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
            "safe": Markup,  # autoescaping is off, but Markup + str escapes, as in transformers
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
        """Compile a template.

        Raises:
            ValueError: if the source is too long or cannot be compiled.
        """
        if len(source) > MAX_SOURCE:
            raise ValueError(
                f"chat template has {len(source)} characters; at most {MAX_SOURCE} are allowed"
            )
        try:
            return self.from_string(_Metering().visit(self.parse(source)))
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"chat template cannot be compiled: {error}") from error

    def variables(self, source: str) -> set[str]:
        """Return the names that a template looks up in its variables.

        Raises:
            jinja2.TemplateError: if the source cannot be parsed.
        """
        return meta.find_undeclared_variables(self.parse(source))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may access an attribute."""
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """If `value` is the `format` method of a string, return a safe replacement, else None.

        The replacement only inserts the arguments into the string; see `_format`.
        """
        text = getattr(value, "__self__", None)
        if getattr(value, "__name__", "") != "format" or not isinstance(text, str):
            return None
        return functools.partial(_format, text)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return the item or attribute `argument` of an object, and check the time."""
        spend(None)  # filters look up attributes in loops that are not metered otherwise
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function and meter its result.

        The size of the results of `str.replace` and `str.join` is checked before the call.
        """
        if obj is spend:
            return spend(*args)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            obj = functools.partial(_replace if name == "replace" else _join_with, owner)
        return spend(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check the size that the result of a binary operator will have, then evaluate it."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "%" and not numbers):
            raise ValueError(
                f"the operator {operator} is not available for {type(left).__name__} and "
                f"{type(right).__name__} in chat templates"
            )
        if not numbers and operator == "*":
            count, sequence = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int):
                _check_size(value_size(sequence) * count)
        elif not numbers:
            _check_size(value_size(left) + value_size(right))
        return spend(super().call_binop(context, operator, left, right))


def _join_with(separator: str, items: Iterable[Any]) -> str:
    return _join(items, separator)
