"""The examples in docstrings are run."""

import doctest
import importlib
import pkgutil

import pytest

import bpe

MODULES = [f"bpe.{module.name}" for module in pkgutil.iter_modules(bpe.__path__)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "bpe.__main__"])
def test_examples(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"bpe": bpe})
    assert found.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    examples = [
        example for module in modules for test in finder.find(module) for example in test.examples
    ]
    assert len(examples) > 10
