"""Reading vocabularies: `.tiktoken` files, Hugging Face's `tokenizer.json`, and GGUF metadata.

Each reader is strict where the ids change. A vocabulary read half right still encodes, only
differently from what the model was trained on, and nobody notices but the model. So a step or a
value that cannot be followed raises a ValueError naming the file and the key. A key that neither
`tokenizers` nor llama.cpp reads is passed over, as they do, and logged once.

SentencePiece vocabularies (Llama 2, Mistral, Gemma) cannot be read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from bpe.formats.bert import load_wordpiece
from bpe.formats.byte_level import bytes_to_unicode
from bpe.formats.gguf import from_gguf, read_gguf_metadata
from bpe.formats.huggingface import from_folder, from_tokenizer_json
from bpe.formats.tiktoken import from_tiktoken
from bpe.formats.tokenizer import Tokenizer
from bpe.openai_encodings import ENCODING_SPECS, TIKTOKEN_SHA256

__all__ = [
    "Tokenizer",
    "bytes_to_unicode",
    "from_folder",
    "from_gguf",
    "from_tiktoken",
    "from_tokenizer_json",
    "load",
    "load_wordpiece",
]


def load(path: str | Path) -> Tokenizer:
    """Reads a tokenizer from a file or folder, whatever its format.

    Args:
        path: a `.gguf` file, a `.tiktoken` file of OpenAI's, a `tokenizer.json`, or a Hugging Face
            folder (`tokenizer.json`, `tokenizer_config.json`, chat templates).

    Raises:
        FileNotFoundError: if there is nothing at `path`, or no tokenizer in the folder.
        ValueError: if the format is unknown, or the file is damaged or says what we do not know.
    """
    path = Path(path)
    if path.is_dir():
        return from_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".gguf":
        return from_gguf(read_gguf_metadata(path), source=str(path))
    if path.suffix == ".json":
        return from_tokenizer_json(path)
    if path.suffix == ".tiktoken":
        # OpenAI's files hold only the ranks; pattern and special tokens go by the name.
        if (expected := TIKTOKEN_SHA256.get(path.stem)) is None:
            raise ValueError(
                f"{path}: a .tiktoken file holds no split pattern, and only those of "
                f"{', '.join(TIKTOKEN_SHA256)} are known by name; call "
                "bpe.from_tiktoken(path, pattern=..., special_tokens=...)"
            )
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
            raise ValueError(
                f"{path}: its SHA-256 is {found}, that of OpenAI's file of this name is {expected}"
            )
        known = ENCODING_SPECS[path.stem]
        return from_tiktoken(path, pattern=known.pattern, special_tokens=known.special_tokens)
    raise ValueError(
        f"{path}: unknown kind of vocabulary; a .gguf, a .tiktoken, a tokenizer.json or a folder "
        "holding one can be read"
    )
