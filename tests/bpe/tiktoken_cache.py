"""tiktoken's cache, filled with files rebuilt from ours: so it works without a network.

tiktoken keeps what it fetched under the SHA-1 of its address, in the folder that the environment
variable TIKTOKEN_CACHE_DIR names, and checks its SHA-256 before use. A file it accepts is OpenAI's.
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
    """Writes all files that tiktoken's encodings are made from, and tells it where they are."""
    for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base"):
        _put(
            folder,
            f"encodings/{name}.tiktoken",
            tiktoken_lines(openai_encodings.get_encoding(name)).encode(),
        )
    merges, table = gpt2_files()
    _put(folder, "gpt-2/encodings/main/vocab.bpe", merges)
    _put(folder, "gpt-2/encodings/main/encoder.json", table)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)


def gpt2_files() -> tuple[bytes, bytes]:
    """vocab.bpe and encoder.json as GPT-2 was published: its merges in order, and its table."""
    ranks, characters = openai_encodings.load_ranks("gpt2"), bytes_to_unicode()
    show = lambda token: "".join(characters[byte] for byte in token)  # noqa: E731
    lines = ["#version: 0.2", *(f"{show(a)} {show(b)}" for a, b in recover_merges(ranks))]
    table = {show(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": 50256}
    return ("\n".join(lines) + "\n").encode(), json.dumps(table).encode()


def _put(folder: Path, path: str, content: bytes) -> None:
    name = hashlib.sha1(f"{ADDRESS}/{path}".encode()).hexdigest()
    (folder / name).write_bytes(content)
