"""Fill the cache of tiktoken with files created from our vocabularies, so that it works offline.

tiktoken stores a downloaded file under the SHA-1 of its URL, in the folder TIKTOKEN_CACHE_DIR, and
checks the SHA-256 before use. So a file that it accepts is identical to OpenAI's.
"""

import hashlib
import json
import os
from pathlib import Path

from bpe import openai_encodings
from bpe.formats import bytes_to_unicode
from bpe.save import recover_merges, tiktoken_lines

ADDRESS = "https://openaipublic.blob.core.windows.net"


def fill(folder: Path) -> None:
    """Write all files of tiktoken's encodings, and set TIKTOKEN_CACHE_DIR to their folder."""
    for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base"):
        _put(
            folder,
            f"encodings/{name}.tiktoken",
            tiktoken_lines(openai_encodings.get_encoding(name)).encode(),
        )
    merges, vocab = gpt2_files()
    _put(folder, "gpt-2/encodings/main/vocab.bpe", merges)
    _put(folder, "gpt-2/encodings/main/encoder.json", vocab)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)


def gpt2_files() -> tuple[bytes, bytes]:
    """Return vocab.bpe and encoder.json of GPT-2: the merges in order, and the vocabulary."""
    ranks, characters = openai_encodings.load_ranks("gpt2"), bytes_to_unicode()
    as_text = lambda token: "".join(characters[byte] for byte in token)  # noqa: E731
    lines = ["#version: 0.2", *(f"{as_text(a)} {as_text(b)}" for a, b in recover_merges(ranks))]
    vocab = {as_text(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": 50256}
    return ("\n".join(lines) + "\n").encode(), json.dumps(vocab).encode()


def _put(folder: Path, path: str, content: bytes) -> None:
    name = hashlib.sha1(f"{ADDRESS}/{path}".encode()).hexdigest()
    (folder / name).write_bytes(content)
