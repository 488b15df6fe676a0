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
from bpe.formats import bytes_to_unicode
from bpe.merge import NO_MERGE, merge


def save(encoding: Encoding, path: str | Path) -> None:
    """Writes a vocabulary, in the format that the name asks for: `.tiktoken` or `.json`.

    Raises:
        ValueError: if the name ends otherwise, or the format cannot hold this encoding.
    """
    path = Path(path)
    check_output_path(path)
    text = tiktoken_lines(encoding) if path.suffix == ".tiktoken" else tokenizer_json(encoding)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def check_output_path(path: Path) -> None:
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
    return "".join(
        f"{base64.b64encode(token).decode()} {encoding.ranks[token]}\n"
        for token in _by_rank(encoding.ranks)
    )


def tokenizer_json(encoding: Encoding) -> str:
    """A `tokenizer.json` as Hugging Face's tokenizers reads it.

    Where a special token has two spellings, as in o200k_harmony, tokenizers knows only the last.

    Raises:
        ValueError: if the split pattern has a form that tokenizers reads otherwise.
    """
    characters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    # A token that no merge makes can still be a whole piece, and "ignore_merges" says just that.
    pairs = encoding.merges
    if pairs is None:
        pairs = [
            pair
            for token in _by_rank(encoding.ranks)
            if (pair := _recover_pair(token, encoding.ranks))
        ]
    # Special tokens are in the vocabulary too: tokenizers would number others one after the other.
    vocab = {spelled(token): id for token, id in encoding.ranks.items()}
    for token, id in encoding.special_tokens.items():
        if vocab.setdefault(token, id) != id:
            raise ValueError(
                f"{encoding!r} cannot be a tokenizer.json: there the special token {token!r} is "
                f"spelled as the token {vocab[token]} is"
            )
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
            "ignore_merges": encoding.ignore_merges,
            "vocab": vocab,
            "merges": [[spelled(left), spelled(right)] for left, right in pairs],
        },
    }
    return json.dumps(spec, ensure_ascii=False, indent=1) + "\n"


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that a vocabulary of ranks was made from, in order.

    Raises:
        ValueError: if no pair makes one of the tokens, as where it was put in by hand.
    """
    pairs = []
    for token in _by_rank(ranks):
        if (pair := _recover_pair(token, ranks)) is not None:
            pairs.append(pair)
        elif len(token) > 1:
            raise ValueError(f"no merge makes the token {ranks[token]}, {token!r}")
    return pairs


def _by_rank(ranks: Mapping[bytes, int]) -> list[bytes]:
    return sorted(ranks, key=ranks.__getitem__)


def _recover_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that are joined to make one; None if none are.

    They are what is left of its bytes when all is merged but the token itself is not to be made.
    If that is more than two, no merge makes the token, alone or within a text.
    """

    def others(left: bytes, right: bytes) -> int:
        return (
            NO_MERGE if len(left) + len(right) == len(token) else ranks.get(left + right, NO_MERGE)
        )

    match merge(token, others):
        case [left, right]:
            return left, right
        case _:
            return None


def to_oniguruma(pattern: str) -> str:
    r"""A split pattern in the dialect of the regex engine of tokenizers.

    It reads two things otherwise: `$` is the end of a line there, and `{1,3}+` repeats instead of
    refusing to give back.

    Raises:
        ValueError: if there is such a `{1,3}+` after a group, or an inline flag but `i`, of which
            it knows no other by the same letter.

    >>> to_oniguruma(r"\p{N}{1,3}+|\s++$")
    '(?>\\p{N}{1,3})|\\s++\\z'
    """
    if flags := re.search(r"(?<!\\)\(\?[a-zA-Z-]*[^\W\dPi][a-zA-Z-]*[:)]", pattern):
        raise ValueError(
            f"split pattern {pattern!r}: tokenizers reads the flags {flags.group()} otherwise; "
            "write it without them, such as [\\s\\S] for a dot that matches line ends"
        )
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
