"""docs/models.md has a row for every family, encoder, pooling and kind of vocabulary.

`python -m tests.models_table` computes the page.
"""

import pytest

from tests import models_table
from tests.bpe import comparisons
from transformer import encoder_families, families, pooling

TOLERANCE = 1e-4


def rows(section: str) -> list[list[str]]:
    """Return the cells of the table in a section of the page, without code marks."""
    _, _, text = models_table.PAGE.read_text("utf-8").partition(f"\n## {section}\n")
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_decoder_family_has_a_row_with_its_differences():
    table = rows("Decoders")
    assert {row[0] for row in table} == families.FAMILIES.keys(), "run python -m tests.models_table"
    assert {row[1] for row in table} == {f.architecture for f in families.FAMILIES.values()}
    for row in table:
        assert all(float(cell) <= TOLERANCE for cell in row[2:]), row


@pytest.mark.parametrize(
    ("compared", "names"),
    [
        ("vectors", set(encoder_families.FAMILIES)),
        ("pooling", set(pooling.MODES)),
        ("scores", {name for name, f in encoder_families.FAMILIES.items() if f.head}),
    ],
)
def test_every_encoder_and_pooling_has_a_row_with_its_differences(compared, names):
    table = [row for row in rows("Encoders and cross-encoders") if row[1] == compared]
    assert names <= {row[0] for row in table}, "run python -m tests.models_table"
    for row in table:
        assert all(float(cell) <= TOLERANCE for cell in row[3:] if cell), row


def test_every_kind_of_vocabulary_has_a_row_without_differences():
    table = rows("Tokenizers")
    assert {row[0] for row in table} == set(comparisons.KINDS)
    assert {row[3] for row in table} == {"tiktoken", "tokenizers", "sentencepiece", "llama.cpp"}
    assert all(row[5] == "0" for row in table)
