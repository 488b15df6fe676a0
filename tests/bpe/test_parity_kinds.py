"""Ids of each kind of vocabulary, live against the references; see `comparisons.py`.

`test_openai_encodings.py` compares with tiktoken, `test_parity_vocabularies.py` with the files of
llama.cpp and of packages.
"""

from pathlib import Path

import pytest

from tests.bpe import comparisons

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", comparisons.golden()["models"])
def test_tokenizer_model_matches_sentencepiece(name: str, tmp_path: Path) -> None:
    assert comparisons.sentencepiece_model(name, tmp_path).different == ()


@pytest.mark.parametrize("name", comparisons.golden()["tokenizers"])
def test_tokenizer_json_matches_tokenizers(name: str, tmp_path: Path) -> None:
    assert comparisons.sentencepiece_json(name, tmp_path).different == ()


def test_wordpiece_matches_tokenizers() -> None:
    assert comparisons.wordpiece_json().different == ()
