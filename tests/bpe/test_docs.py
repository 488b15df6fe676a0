"""Run the examples in docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import bpe

MODULES = [f"bpe.{module.name}" for module in pkgutil.iter_modules(bpe.__path__)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "bpe.__main__"])
def test_docstring_examples_of_module_pass(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"bpe": bpe})
    assert results.failed == 0


def test_bpe_has_more_than_ten_docstring_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    examples = [
        example for module in modules for test in finder.find(module) for example in test.examples
    ]
    assert len(examples) > 10
