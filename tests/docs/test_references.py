"""Check that files, folders and identifiers that the documents name exist in the sources."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = {"build", "data", "docs/api"}


def files() -> Iterator[str]:
    """Yield the paths of the project's files, except those in hidden and generated folders."""
    for folder, folders, names in os.walk(ROOT):
        parent = Path(folder).relative_to(ROOT)
        folders[:] = [
            name
            for name in folders
            if name[0] not in "._" and (parent / name).as_posix() not in GENERATED
        ]
        yield from ((parent / name).as_posix() for name in names)


FILES = sorted(files())
# Not checked: decisions name code of other projects, and the changelog names former code.
PAGES = [
    name
    for name in FILES
    if name.endswith(".md") and name != "CHANGELOG.md" and not name.startswith("docs/decisions/")
]
WORDS = {
    word
    for name in FILES
    if name.endswith((".py", ".js", ".toml", "Makefile"))
    for word in re.findall(r"[A-Za-z_]\w*", (ROOT / name).read_text("utf-8"))
}
FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1", re.MULTILINE | re.DOTALL)
FOLDER = r"(bpe|transformer|serve|audio|training|diffusion|tests|docs|notebooks|examples|scripts)/"
FILE = re.compile(rf"{FOLDER}[\w./-]*|[\w/.-]+\.(py|js)")
IDENTIFIER = re.compile(r"[A-Z]\w*[a-z]\w*(\.\w+)*|[a-z]\w*_\w+")  # a class, its attribute, a name_


def exists(name: str) -> bool:
    """Return whether a path ends with `name`, or lies in a folder of that name."""
    name = name.rstrip("/")
    return any(f"/{path}".endswith(f"/{name}") or f"/{name}/" in f"/{path}" for path in FILES)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_identifiers_named_in_documents_exist(page):
    text = FENCE.sub("", (ROOT / page).read_text("utf-8"))
    missing = []
    for span in re.findall(r"`([^`\n]+)`", text):
        for word in re.split(r"[\s,;:]+", span):
            is_placeholder = re.search(r"NN|CASE|PACKAGE", word)
            if FILE.fullmatch(word) and not is_placeholder and not exists(word):
                missing.append(word)
        if IDENTIFIER.fullmatch(span):
            missing += [part for part in span.split(".") if part not in WORDS]
    assert not missing
