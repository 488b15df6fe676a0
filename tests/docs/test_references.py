"""Files, folders and identifiers that the documents name exist in the sources."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
# Decisions name the code of other projects, and the changelog the code of the past.
PAGES = [
    name
    for name in TRACKED
    if name.endswith(".md") and name != "CHANGELOG.md" and not name.startswith("docs/decisions/")
]
WORDS = {
    word
    for name in TRACKED
    if name.endswith((".py", ".js", ".toml", "Makefile")) and (ROOT / name).is_file()
    for word in re.findall(r"[A-Za-z_]\w*", (ROOT / name).read_text("utf-8"))
}
FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1", re.MULTILINE | re.DOTALL)
FOLDER = r"(bpe|transformer|serve|audio|training|diffusion|tests|docs|notebooks|examples|scripts)/"
FILE = re.compile(rf"{FOLDER}[\w./-]*|[\w/.-]+\.(py|js)")
IDENTIFIER = re.compile(r"[A-Z]\w*[a-z]\w*(\.\w+)*|[a-z]\w*_\w+")  # a class, its attribute, a name_


def is_tracked(name: str) -> bool:
    """Return whether a tracked path ends with `name`, or lies in a folder of that name."""
    name = name.rstrip("/")
    return any(f"/{path}".endswith(f"/{name}") or f"/{name}/" in f"/{path}" for path in TRACKED)


@pytest.mark.parametrize("page", PAGES)
def test_names_in_documents_exist(page):
    text = FENCE.sub("", (ROOT / page).read_text("utf-8"))
    missing = []
    for span in re.findall(r"`([^`\n]+)`", text):
        for word in re.split(r"[\s,;:]+", span):
            is_placeholder = re.search(r"NN|CASE|PACKAGE", word)
            if FILE.fullmatch(word) and not is_placeholder and not is_tracked(word):
                missing.append(word)
        if IDENTIFIER.fullmatch(span):
            missing += [part for part in span.split(".") if part not in WORDS]
    assert not missing
