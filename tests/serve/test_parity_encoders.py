"""Compare encoders with sentence-transformers, from text to vector or score.

`encoder_comparisons.py` makes the models and compares.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.serve import encoder_comparisons as comparisons
from tests.serve.encoder_comparisons import TEXTS, TOLERANCE
from transformer.pooling import MODES

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", comparisons.KINDS)
def test_vectors_equal_sentence_transformers(kind: str, tmp_path: Path) -> None:
    assert comparisons.vector_difference(kind, tmp_path).is_small


@pytest.mark.parametrize("pooling", [*MODES, ("weightedmean", "cls"), MODES], ids=str)
def test_vectors_of_each_pooling_equal_sentence_transformers(pooling: Any, tmp_path: Path) -> None:
    assert comparisons.pooling_difference(pooling, tmp_path).is_small


def test_vectors_with_dense_layers_and_prompts_equal_sentence_transformers(tmp_path: Path) -> None:
    assert comparisons.dense_difference(tmp_path).is_small


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_vectors_with_lower_case_and_length_limit_equal_sentence_transformers(
    kind: str, tmp_path: Path
) -> None:
    peer = comparisons.sentence_transformer(
        tmp_path, kind, "cls", transformer=dict(do_lower_case=True, max_seq_length=20)
    )
    path = tmp_path / "whole" / "sentence_bert_config.json"
    saved = json.loads(path.read_text()) | dict(do_lower_case=True, max_seq_length=20)
    path.write_text(json.dumps(saved))
    # Version 6 writes lower case into tokenizer.json; earlier ones left that file alone.
    shutil.copy(tmp_path / "bare" / "tokenizer.json", tmp_path / "whole")
    vectors = comparisons.served_vectors(tmp_path)
    assert comparisons.compare(vectors, peer.encode(TEXTS)).is_small


@pytest.mark.parametrize(
    ("kind", "labels", "has_types"),
    [
        ("bert", 1, True),
        ("bert", 1, False),
        ("bert", 2, True),
        ("roberta", 1, True),
        ("xlm-roberta", 2, True),
        ("camembert", 1, True),
        ("modernbert", 1, True),
        ("modernbert", 2, True),
    ],
)
def test_scores_of_pairs_equal_cross_encoder(
    kind: str, labels: int, has_types: bool, tmp_path: Path
) -> None:
    assert comparisons.score_difference(kind, labels, has_types, tmp_path) <= TOLERANCE
