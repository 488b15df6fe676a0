"""Fixtures for the tests of bpe: the pulled models and the golden files."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import bpe

GOLDEN = Path(__file__).parent.parent / "golden" / "bpe"
MODELS = (
    "smollm2-135m-instruct",
    # Its 152,000 tokens take long to read.
    pytest.param("qwen2.5-coder-0.5b-instruct", marks=pytest.mark.slow),
)


def models_folder() -> Path:
    """Return the folder of pulled models."""
    if folder := os.environ.get("PELLUCID_TEST_MODELS"):
        return Path(folder)
    import platformdirs

    home = os.environ.get("PELLUCID_HOME") or platformdirs.user_data_dir("pellucid")
    return Path(home) / "models"


@pytest.fixture(scope="session")
def model_file() -> Callable[[str], Path]:
    """Return a function that finds the GGUF file of a pulled model by id.

    The function skips the test if the model was not pulled.
    """

    def find(id: str) -> Path:
        models = models_folder()
        if not (files := sorted((models / id).glob("*.gguf"))):
            pytest.skip(f"{id} is not in {models}; run: pellucid pull {id}")
        return files[0]

    return find


@pytest.fixture(scope="session")
def load_model(model_file) -> Callable[[str], bpe.Tokenizer]:
    """Return a function that loads the tokenizer of a pulled model by id, once per session."""
    return cache(lambda id: bpe.load(model_file(id)))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """Return a function that reads a JSON file of tests/golden/bpe by name, once per session."""
    return cache(lambda name: json.loads((GOLDEN / f"{name}.json").read_text()))
