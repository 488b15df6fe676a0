"""`Session` accepts pages whose blocks work as shown, and rejects others."""

from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, Session, blocks, matches, quick
from tests.serve import processes

PAGE = """\
# A page

```python
x = 2
print(x)
```

```text
2
```

~~~console
$ echo one; echo two
one
...
$ echo "a
> b"
a
b
~~~
"""


@pytest.fixture
def session(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    return Session(folder, "http://127.0.0.1:1", processes.environment())


def page(folder: Path, text: str) -> list[Block]:
    path = folder / "page.md"
    path.write_text(text, "utf-8")
    return blocks(path)


def test_blocks_have_language_line_and_text(tmp_path):
    found = page(tmp_path, PAGE)
    assert [(block.language, block.line) for block in found] == [
        ("python", 4),
        ("text", 9),
        ("console", 13),
    ]
    assert found[0].text == "x = 2\nprint(x)\n"


def test_blocks_of_page_with_unclosed_fence_raises(tmp_path):
    with pytest.raises(ValueError):
        page(tmp_path, "```python\nprint(1)\n")


@pytest.mark.parametrize(
    ("shown", "output", "same"),
    [
        ("a\nb", "a\nb\n", True),
        ("a\nb", "a  \nb\n\n", True),
        ("a", "a\nb\n", False),
        ("a\n...", "a\n", True),
        ("a\n...\nd", "a\nb\nc\nd\n", True),
        ("a\n...\nd", "a\nb\nc\n", False),
        ("took ... s", "took 3.1 s\n", True),
        ("took ... s", "took 3.1 s\nmore\n", False),
        ("1.5", "1x5", False),
    ],
)
def test_matches_ellipsis_stands_for_any_text(shown, output, same):
    assert matches(shown, output) is same


def test_session_run_of_correct_page_passes(session, tmp_path):
    session.run(page(tmp_path, PAGE))


@pytest.mark.parametrize(
    "text",
    [
        PAGE.replace("2\n```\n\n~~~", "3\n```\n\n~~~"),  # not the output of the Python block
        PAGE.replace("one\n...", "other\n..."),  # not the output of the command
        PAGE.replace("print(x)", "raise SystemError"),
        PAGE.replace("~~~console", "~~~rust"),
        PAGE.replace("~~~console", "~~~"),
        "```text\n2\n```\n",  # no block before it
        "```console\n$ false\n```\n",
        "```console\n$ false | true\n```\n",
        "```console\nls\n```\n",  # no command
    ],
    ids=["python", "command", "raises", "language", "none", "orphan", "status", "pipe", "prompt"],
)
def test_session_run_of_page_with_wrong_block_fails(session, tmp_path, text):
    with pytest.raises((AssertionError, ValueError, SystemError)):
        session.run(page(tmp_path, text))


def test_session_replaces_server_url_and_links_project_files(session, tmp_path):
    text = "```python\nu = 'http://127.0.0.1:8000'\nassert u[-2:] == ':1'\nprint(u)\n```\n"
    text += "```text\nhttp://127.0.0.1:8000\n```\n"
    text += "```console\n$ test -f README.md && echo hello > new.txt && cat new.txt\nhello\n```\n"
    text += "```console\n$ .venv/bin/python -c 'import serve; print(serve.__name__)'\nserve\n```\n"
    session.run(page(tmp_path, text))
    assert not (ROOT / "new.txt").exists()


def test_quick_leaves_out_blocks_with_slow_commands(tmp_path):
    text = "```console\n$ pellucid chat hello\n```\n```console\n$ pellucid models\n```\n"
    text += "```python\n```\n"
    left = list(quick(page(tmp_path, text), r"pellucid (chat|complete)"))
    assert [block.text for block in left] == ["$ pellucid models\n", ""]
