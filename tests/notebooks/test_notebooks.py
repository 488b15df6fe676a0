"""The notebooks match their sources and run, and their exercises check solutions."""

import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

from scripts import notebooks

SOURCES = notebooks.sources()
NAMES = [source.stem for source in SOURCES]


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_committed_notebook_matches_its_source(source: Path) -> None:
    target = source.with_suffix(".ipynb")
    committed = nbformat.read(target, as_version=4)
    nbformat.validate(committed)
    expected = notebooks.read(source)
    assert [(c.cell_type, c.id, c.source) for c in committed.cells] == [
        (c.cell_type, c.id, c.source) for c in expected.cells
    ], "run `make notebooks`"
    assert committed.metadata == expected.metadata, "run `make notebooks`"
    assert target.stat().st_size <= notebooks.LIMIT


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_committed_cells_ran_in_order_without_errors(source: Path) -> None:
    cells = nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs and not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "warnings are for the author"


def exercises() -> list[tuple[str, str, str]]:
    """Return the notebook, function and solution of every exercise."""
    rows = []
    for source in SOURCES:
        for cell in notebooks.read(source).cells:
            for code in re.findall(r"<summary>Solution</summary>\n\n```python\n(.*?)```",
                                   cell.source, re.DOTALL):  # fmt: skip
                rows.append((source.stem, ast.parse(code).body[0].name, code))
    return rows


@pytest.mark.parametrize(("notebook", "name", "solution"), exercises())
def test_exercise_rejects_its_stub_and_accepts_its_solution(
    notebook: str, name: str, solution: str
) -> None:
    import numpy as np

    spec = importlib.util.spec_from_file_location("checks", notebooks.FOLDER / "checks.py")
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    cells = notebooks.read(notebooks.FOLDER / f"{notebook}.py").cells
    (stub,) = [c.source for c in cells if "stub" in c.metadata.get("tags", ())
               and f"def {name}(" in c.source]  # fmt: skip
    assert f"checks.report(checks.{name}, {name})" in stub
    empty, solved = {}, {"np": np}
    exec(stub.split("checks.report")[0], empty)
    exec(solution, solved)
    with pytest.raises(AssertionError):
        getattr(checks, name)(empty[name])
    getattr(checks, name)(solved[name])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_notebook_runs_and_its_checks_pass(source: Path) -> None:
    cells = notebooks.execute(notebooks.read(source)).cells
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells
    printed = [[o.text for o in c.get("outputs", ()) if o.output_type == "stream"] for c in cells]
    assert len(printed) == len(committed)
    assert any("all true" in text for texts in printed for text in texts)
