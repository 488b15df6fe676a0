"""Runs notebooks/NN_name.py and writes the .ipynb with its outputs beside it.

python scripts/notebooks.py [NAME.py ...] runs the named ones, or all. The .py (jupytext's percent
format) is the source; the .ipynb is for reading on a code host. What would differ from run to run
without meaning anything is left out of it: random cell ids, times of execution, the versions of
the interpreter. Its metadata hold the hash of the source, so that a stale one is noticed.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LIMIT = 300_000  # bytes: what a code host still shows, and git still likes
TIMEOUT = 300  # seconds a cell may take


def sources() -> list[Path]:
    """The notebooks, in the order of their numbers."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def digest(source: Path) -> str:
    """What the .ipynb says it was made from."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs; the same bytes give the same notebook."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "pellucid": {"source_sha256": digest(source)}}
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs every cell, in the folder of the notebooks, and keeps the outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    notebook.metadata.pop("language_info", None)
    return notebook


def main(names: list[str]) -> None:
    for source in [Path(name) for name in names] or sources():
        started = time.perf_counter()
        target = source.with_suffix(".ipynb")
        text = nbformat.writes(execute(read(source))) + "\n"
        if len(text.encode()) > LIMIT:
            sys.exit(f"{target} would have {len(text.encode())} bytes: keep it under {LIMIT}")
        target.write_text(text, encoding="utf-8")
        seconds = time.perf_counter() - started
        print(f"{target.name}: {seconds:.0f} s, {len(text.encode()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
