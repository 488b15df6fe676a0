"""Read vocabularies: `.tiktoken`, `tokenizer.json`, `tokenizer.model` files, and GGUF metadata.

Each reader is strict about settings that change the ids. A tokenizer with a wrong setting still
encodes text, but to ids that the model was not trained on, which is hard to notice. Therefore an
unsupported setting raises a ValueError with the file and the key. A key that the reader does not
know is logged once and ignored.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from bpe.formats.bert import load_wordpiece
from bpe.formats.byte_level import bytes_to_unicode
from bpe.formats.gguf import from_gguf, read_gguf_metadata
from bpe.formats.huggingface import from_folder, from_tokenizer_json, from_tokenizer_model
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
    "from_tokenizer_model",
    "load",
    "load_wordpiece",
]


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer from a file or folder of any supported format.

    Args:
        path: a `.gguf` file, a `.tiktoken` file of OpenAI, a `tokenizer.json`, a `tokenizer.model`
            of SentencePiece, or a Hugging Face folder (with a `tokenizer.json` or
            `tokenizer.model`, `tokenizer_config.json` and chat templates).

    Raises:
        FileNotFoundError: if `path` does not exist, or the folder has no tokenizer.
        ValueError: if the format is unknown, or the file is damaged or has an unsupported setting.
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
    if path.suffix == ".model":
        return from_tokenizer_model(path)
    if path.suffix == ".tiktoken":
        # OpenAI's files have only ranks; the name determines the pattern and the special tokens.
        if (expected := TIKTOKEN_SHA256.get(path.stem)) is None:
            raise ValueError(
                f"{path}: a .tiktoken file has no split pattern; expected an OpenAI file "
                f"({', '.join(TIKTOKEN_SHA256)}), got the name {path.stem!r}; for other files call "
                "bpe.from_tiktoken(path, pattern=..., special_tokens=...)"
            )
        if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
            raise ValueError(
                f"{path}: the SHA-256 is {digest}, but that of OpenAI's file is {expected}; "
                "download the file again"
            )
        spec = ENCODING_SPECS[path.stem]
        return from_tiktoken(path, pattern=spec.pattern, special_tokens=spec.special_tokens)
    raise ValueError(
        f"{path}: expected a .gguf, .tiktoken or .model file, a tokenizer.json, or a Hugging Face "
        f"folder, got a file with the suffix {path.suffix!r}"
    )
