"""API reference from docstrings: one page a module, written to docs/api before Sphinx reads.

Modules are parsed, not imported: no JAX, and the pages follow when a file is renamed. A docstring
is Markdown; its Google sections (Args, Returns, Raises, Yields) become definition lists. A name is
on a page if it has no leading underscore.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note|Notes):$")
ENTRY = re.compile(r"^([\w.*, ]+(?: \([^)]*\))?): *(.*)$")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Module:
    """A parsed file, and the names that it imports."""

    def __init__(self, path: Path, root: Path) -> None:
        parts = path.relative_to(root).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_package else parts)
        self.path = path.relative_to(root)
        self.text = path.read_text("utf-8")
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.imports: dict[str, str] = {}
        self.names = {}  # what a name means in an annotation of this file
        for node in self.tree.body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name):
                    self.names[target.id] = f"{self.name}.{target.id}"
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = alias.name
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        self.names |= self.imports

    def resolve_names(self, modules: dict[str, Module], documented: Collection[str]) -> None:
        """Replace imported names by those of the defining modules; remove names without a page.

        Sphinx links a short name to any object of that name, so a name that a documented object
        also has stays qualified.
        """
        short = {name.rpartition(".")[2] for name in documented}
        for name, full in list(self.names.items()):
            package, _, last = full.rpartition(".")
            while full not in documented and package in modules and last in modules[package].names:
                if full == modules[package].names[last]:
                    break
                full = modules[package].names[last]
                package, _, last = full.rpartition(".")
            self.names[name] = full
            if full not in documented and full not in modules and name not in short:
                del self.names[name]


class Qualify(ast.NodeTransformer):
    """Replace names by their full names, so that a type links to its own page."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        self.generic_visit(node)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        """Visit the types of parameters; their default values stay as they are written."""
        others = [argument for argument in (node.vararg, node.kwarg) if argument]
        for argument in [*node.posonlyargs, *node.args, *node.kwonlyargs, *others]:
            self.visit(argument)
        return node


def source(module: Module, node: ast.AST) -> str:
    """Return part of a signature as one line of source, with qualified names."""
    return ast.unparse(Qualify(module.names).visit(node)).replace("\n", " ")


def signature(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> str:
    arguments = node.args
    first = [*arguments.posonlyargs, *arguments.args][:1]
    if method and first and not decorated(node, "staticmethod"):
        (arguments.posonlyargs or arguments.args).pop(0)
    returns = f" -> {source(module, node.returns)}" if node.returns else ""
    return f"({source(module, arguments)}){returns}"


def decorated(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> bool:
    return any(name in ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list)


def prose(docstring: str | None) -> Iterator[str]:
    """Yield the Markdown lines of a docstring."""
    section, is_session = None, False
    for line in [*(docstring or "").splitlines(), ""]:
        if is_session != (line.strip() != "" and (is_session or ">>> " in line[:8])):
            is_session = not is_session
            yield "```pycon" if is_session else "```"
        if is_session:
            yield line.strip()
        elif match := SECTION.match(line):
            section = match[1]
            yield from ("", f"**{section}**", "")
        elif section and line and not line.startswith(" "):
            section = None
            yield from ("", line)
        elif section in ("Args", "Attributes", "Raises") and (entry := ENTRY.match(line[4:])):
            yield f"- `{entry[1]}`: {entry[2]}"
        elif section in ("Args", "Attributes", "Raises"):
            yield "  " + line.strip()
        else:
            yield line[4:] if section else line


def directive(kind: str, title: str, body: Iterator[str], depth: int) -> Iterator[str]:
    fence = "`" * (6 - depth)
    yield from (f"{fence}{{py:{kind}}} {title}", "", *body, "", fence, "")


def fields(module: Module, node: ast.ClassDef) -> Iterator[str]:
    """Yield the annotated names of a class, each with its comment or the string below it."""
    following = [*node.body[1:], None]
    for statement, after in zip(node.body, following, strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name = statement.target.id
        if name.startswith("_"):
            continue
        last = module.lines[(statement.end_lineno or statement.lineno) - 1]
        comment = last[statement.end_col_offset or 0 :].partition("#")[2].strip()
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            comment = str(after.value.value)
        default = f" = {ast.unparse(statement.value)}" if statement.value else ""
        title = f"{name}: {ast.unparse(statement.annotation)}{default}"
        yield f"- `{title}`" + (f": {comment}" if comment else "")


def class_body(module: Module, node: ast.ClassDef) -> Iterator[str]:
    yield from prose(ast.get_docstring(node))
    yield from ("", *fields(module, node), "")
    for method in node.body:
        if not isinstance(method, FUNCTIONS) or method.name.startswith("_"):
            continue
        if decorated(method, "setter") or decorated(method, "overload"):
            continue
        docstring = prose(ast.get_docstring(method))
        if decorated(method, "property"):
            kind = source(module, method.returns) if method.returns else ""
            title = f"{method.name}\n:type: {kind}" if kind else method.name
            yield from directive("property", title, docstring, depth=2)
        else:
            title = method.name + signature(module, method, method=True)
            yield from directive("method", title, docstring, depth=2)


def constructor(module: Module, node: ast.ClassDef) -> str:
    for method in node.body:
        if isinstance(method, FUNCTIONS) and method.name == "__init__":
            return signature(module, method, method=True).removesuffix(" -> None")
    return ""


def exports(module: Module, summaries: dict[str, str]) -> Iterator[str]:
    """Yield a table of the names that a package exports, with links to their modules."""
    names = sorted(name for name in module.names if module.names[name] in summaries)
    if names:
        yield from ("", "| name | |", "|---|---|")
        for name in names:
            full = module.names[name]
            yield f"| {{py:obj}}`{name} <{full}>` | {summaries[full]} |"


def page(module: Module, children: list[Module], summaries: dict[str, str]) -> str:
    """Return the page of a module. Only packages are in the sidebar, which keeps it short."""
    package = module.name.rpartition(".")[0]
    lines = [] if module.is_package else ["---", "orphan: true", "---", ""]
    lines += [f"# {module.name}", "", f"```{{py:module}} {module.name}", "```", ""]
    lines += [f"Package: [{package}]({package}.md)", ""] if package else []
    lines += [*prose(ast.get_docstring(module.tree)), "", f"Source: `{module.path}`"]
    if module.is_package:
        lines += exports(module, summaries)
    if children:
        lines += ["", "| module | |", "|---|---|"]
        lines += [
            f"| [{m.name.removeprefix(module.name + '.')}]({m.name}.md) | {summary(m.tree)} |"
            for m in children
        ]
    for node in module.tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            title = node.name + constructor(module, node)
            lines += ["", *directive("class", title, class_body(module, node), depth=1)]
        elif not decorated(node, "overload"):
            title = node.name + signature(module, node, method=False)
            docstring = prose(ast.get_docstring(node))
            lines += ["", *directive("function", title, docstring, depth=1)]
    if packages := [child.name for child in children if child.is_package]:
        lines += ["", "```{toctree}", ":hidden:", "", *packages, "```"]
    return "\n".join(lines) + "\n"


def summary(node: ast.AST) -> str:
    """Return the first paragraph of a docstring, for a cell of a table."""
    docstring = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    return docstring.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def pages(root: Path, packages: list[str]) -> dict[str, str]:
    """Return the Markdown of each page, by file name."""
    modules = {
        module.name: module
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
        if path.name != "__main__.py" and (path.parent / "__init__.py").is_file()
        for module in [Module(path, root)]
    }
    summaries = {
        f"{module.name}.{node.name}": summary(node)
        for module in modules.values()
        for node in module.tree.body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
    }
    for module in modules.values():
        module.resolve_names(modules, summaries)
    written = {}
    for name, module in modules.items():
        children = [m for m in modules.values() if m.name.rpartition(".")[0] == name]
        written[f"{name}.md"] = page(module, children, summaries)
    rows = [f"| [{name}]({name}.md) | {summary(modules[name].tree)} |" for name in packages]
    listed = "\n".join(rows)
    toctree = "\n".join(packages)
    written["index.md"] = (
        "# API reference\n\nThese pages are generated from the docstrings of the library. For the "
        "HTTP API, open `/docs` of a running server.\n\n"
        f"| package | |\n|---|---|\n{listed}\n\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"
    )
    return written


def write(app: Sphinx, config: Config) -> None:
    folder = Path(app.confdir) / "api"
    folder.mkdir(exist_ok=True)
    written = pages(Path(app.srcdir), config.api_packages)
    for path in folder.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        path = folder / name
        if not path.is_file() or path.read_text("utf-8") != text:  # Sphinx rereads changed files
            path.write_text(text, "utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("api_packages", [], "env", list)
    app.connect("config-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
