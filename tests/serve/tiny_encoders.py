"""Folders with a tiny random encoder and a tokenizer, copied from the golden files."""

import json
import shutil
from pathlib import Path
from string import ascii_lowercase
from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden" / "encoder"
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
WORDS = ["paris", "is", "the", "capital", "of", "france", "?"]
# 64 tokens, the vocabulary size of the golden models.
VOCAB = [*SPECIAL, *WORDS, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase)]


def copied(name: str, folder: Path, **config: Any) -> Path:
    """Return a copy of a golden model with a WordPiece tokenizer; `config` changes config.json."""
    shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("golden.npz"))
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder
