"""Writing a vocabulary for others to read: `.tiktoken`, and Hugging Face's `tokenizer.json`.

The first holds tokens and ranks only; whoever loads it must know the split pattern and the special
tokens. The second holds everything. What we write, tiktoken, tokenizers and `bpe.load` read with
the same result.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpe.encoding import Encoding
from bpe.formats import byte_characters
from bpe.merge import NEVER, merge


def save(encoding: Encoding, path: str | Path) -> None:
    """Writes a vocabulary, in the format that the name asks for: `.tiktoken` or `.json`.

    Raises:
        ValueError: if the name ends otherwise, or the format cannot hold this encoding.
    """
    path = Path(path)
    check_name(path)
    text = tiktoken_lines(encoding) if path.suffix == ".tiktoken" else tokenizer_json(encoding)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def check_name(path: Path) -> None:
    """Raises ValueError if `save` would refuse a name."""
    if path.suffix not in (".tiktoken", ".json"):
        raise ValueError(f"{path}: the name must end in .tiktoken or .json")


def tiktoken_lines(encoding: Encoding) -> str:
    """A `.tiktoken` file: on each line a token in base64, a space, and its rank.

    Raises:
        ValueError: if ids are no merge priorities: tokens with merges of their own (as in Hugging
            Face's and GGUF files), or a normalization.
    """
    if encoding.merges is not None or encoding.normalization or encoding.dropped_bytes:
        raise ValueError(
            f"{encoding!r} cannot be a .tiktoken file: its ids are no merge priorities; "
            "save it as tokenizer.json"
        )
    by_rank = sorted(encoding.ranks.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in by_rank)


def tokenizer_json(encoding: Encoding) -> str:
    """A `tokenizer.json` as Hugging Face's tokenizers reads it.

    Raises:
        ValueError: if the split pattern has a form that tokenizers reads otherwise.
    """
    characters = byte_characters()

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    pairs = merges_of(encoding.ranks) if encoding.merges is None else encoding.merges
    splits = [
        {
            "type": "Split",
            "pattern": {"Regex": to_oniguruma(pattern)},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in encoding.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, id in sorted(encoding.special_tokens.items(), key=lambda item: item[1])
    ]
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": encoding.normalization} if encoding.normalization else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": encoding.whole_pieces,
            "vocab": {spelled(token): id for token, id in encoding.ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in pairs],
        },
    }
    return json.dumps(spec, ensure_ascii=False, indent=1) + "\n"


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that a vocabulary of ranks was made from, in order.

    The pair of a token is what its bytes come to with only the tokens of lower rank. A token that
    does not come to two parts cannot be made by merging (it was put in by hand) and has none.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue

        def lower(left: bytes, right: bytes, rank: int = rank) -> int:
            joined = ranks.get(left + right, NEVER)
            return joined if joined < rank else NEVER

        parts = merge(token, lower)
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def to_oniguruma(pattern: str) -> str:
    r"""A split pattern in the dialect of the regex engine of tokenizers.

    It reads two things otherwise: `$` is the end of a line there, and `{1,3}+` repeats instead of
    refusing to give back.

    >>> to_oniguruma(r"\p{N}{1,3}+|\s++$")
    '(?>\\p{N}{1,3})|\\s++\\z'
    """
    atom = r"\\[pP]\{\^?\w+\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\.|\w"
    pattern = re.sub(rf"({atom})(\{{\d+(?:,\d*)?\}})\+", r"(?>\1\2)", pattern)
    if re.search(r"\)\{\d+(?:,\d*)?\}\+", pattern):
        raise ValueError(
            f"split pattern {pattern!r}: a possessive {{m,n}}+ after a group is read otherwise "
            "by tokenizers; write it as an atomic group (?>...)"
        )
    # Everything but a lone $ stays as it is: escaped characters and sets are passed over whole.
    return re.sub(
        r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$",
        lambda match: r"\z" if match.group() == "$" else match.group(),
        pattern,
    )
