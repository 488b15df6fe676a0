"""Run notebooks/NN_name.py and write the .ipynb files with their outputs.

`python scripts/notebooks.py [NAME.py ...]` runs the given notebooks, or all. The .py file (in the
percent format of jupytext) is the source; the .ipynb is for reading on a code host. It does not
contain random cell ids, execution times and the version of the interpreter, so that it changes only
with the source. Its metadata contain the hash of the source, with which a test detects an .ipynb
that is out of date.
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
LIMIT = 300_000  # maximum bytes of an .ipynb; code hosts do not display larger files
TIMEOUT = 300  # seconds per cell


def sources() -> list[Path]:
    """Return the paths of the notebook sources, in the order of their numbers."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def digest(source: Path) -> str:
    """Return the hash of a source, which is stored in the metadata of its .ipynb."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def read(source: Path) -> nbformat.NotebookNode:
    """Convert a source to a notebook without outputs; the result is deterministic."""
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
    """Run every cell in the folder of the notebooks, and store the outputs in the notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
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
    """Run the notebooks whose sources have these paths, or all, and write their .ipynb files."""
    for source in [Path(name) for name in names] or sources():
        started = time.perf_counter()
        target = source.with_suffix(".ipynb")
        text = nbformat.writes(execute(read(source))) + "\n"
        if len(text.encode()) > LIMIT:
            sys.exit(
                f"{target} would have {len(text.encode())} bytes; the limit is {LIMIT}: "
                "reduce the size of its outputs"
            )
        target.write_text(text, encoding="utf-8")
        seconds = time.perf_counter() - started
        print(f"{target.name}: {seconds:.0f} s, {len(text.encode()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
