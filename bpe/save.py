"""Save a vocabulary as a `.tiktoken` file, or as a `tokenizer.json` of Hugging Face.

A `.tiktoken` file has tokens and ranks only; the split pattern and the special tokens must be
passed when the file is loaded. A `tokenizer.json` is complete. tiktoken, tokenizers and `bpe.load`
read these files with the same result.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpe.added_tokens import AddedToken
from bpe.encoding import Encoding
from bpe.formats import bytes_to_unicode
from bpe.merge import NO_MERGE, merge


def save(encoding: Encoding, path: str | Path) -> None:
    """Save a vocabulary in the format that the suffix of `path` names: `.tiktoken` or `.json`.

    Args:
        encoding: the vocabulary.
        path: the file to write; an existing file is replaced.

    Raises:
        ValueError: if the suffix is another one, or the format cannot represent this encoding.
    """
    path = Path(path)
    check_output_path(path)
    text = tiktoken_lines(encoding) if path.suffix == ".tiktoken" else tokenizer_json(encoding)
    part_path = path.with_name(path.name + ".part")
    part_path.write_text(text, encoding="utf-8")
    os.replace(part_path, path)


def check_output_path(path: Path) -> None:
    """Check that `path` has a suffix that `save` supports.

    Raises:
        ValueError: if the suffix is neither `.tiktoken` nor `.json`.
    """
    if path.suffix not in (".tiktoken", ".json"):
        raise ValueError(
            f"{path}: expected a file name that ends in .tiktoken or .json, got {path.suffix!r}"
        )


def tiktoken_lines(encoding: Encoding) -> str:
    """Return the content of a `.tiktoken` file: lines of a token in base64, a space, and its rank.

    Raises:
        ValueError: if the ids are not merge ranks, because the encoding has a list of merges (from
            a Hugging Face or GGUF file), a normalization, or dropped bytes; or if it has added
            tokens other than special ones.
    """
    is_plain = encoding.patterns and not encoding.added_tokens and encoding.merges is None
    if not is_plain or encoding.normalization or encoding.dropped_bytes:
        raise ValueError(
            f"{encoding!r} cannot be saved as a .tiktoken file: its ids are not merge ranks, or it "
            "has added tokens; save it as tokenizer.json"
        )
    return "".join(
        f"{base64.b64encode(token).decode()} {encoding.ranks[token]}\n"
        for token in _by_rank(encoding.ranks)
    )


def tokenizer_json(encoding: Encoding) -> str:
    """Return the content of a `tokenizer.json` for Hugging Face's tokenizers.

    If two special tokens have the same id, as in o200k_harmony, tokenizers uses only the last.

    Raises:
        ValueError: if tokenizers would interpret the split pattern differently, if an added token
            has the same text as an ordinary token, or if a vocabulary of SentencePiece has a
            setting that tokenizers does not have (`save_sentencepiece`).
    """
    if not encoding.patterns:
        from bpe.save_sentencepiece import sentencepiece_spec  # loads NumPy

        return _to_json(sentencepiece_spec(encoding))
    characters = bytes_to_unicode()

    def as_text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    # With "ignore_merges", a token that no sequence of merges makes can still be a whole piece.
    pairs = encoding.merges
    if pairs is None:
        pairs = [
            pair
            for token in _by_rank(encoding.ranks)
            if (pair := _recover_pair(token, encoding.ranks))
        ]
    vocab = {as_text(token): id for token, id in encoding.ranks.items()}
    vocab |= {token.decode(): id for id, token in encoding.unreachable_tokens.items()}
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
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(encoding, vocab),
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
            "merges": [[as_text(left), as_text(right)] for left, right in pairs],
        },
    }
    return _to_json(spec)


def _to_json(spec: Mapping[str, Any]) -> str:
    return json.dumps(spec, ensure_ascii=False, indent=1) + "\n"


def added_tokens(encoding: Encoding, vocab: dict[str, int]) -> list[dict[str, Any]]:
    """Return the value of `added_tokens` in a tokenizer.json, and add these tokens to `vocab`.

    tokenizers would renumber added tokens that are not in the vocabulary.

    Args:
        encoding: the encoding.
        vocab: token to id; changed in place.

    Raises:
        ValueError: if an added token has the same text as an ordinary token.
    """
    tokens = {text: AddedToken(content=text, id=id) for text, id in encoding.special_tokens.items()}
    tokens |= {token.content: token for token in encoding.added_tokens}
    for token in tokens.values():
        if vocab.setdefault(token.content, token.id) != token.id:
            kind = "special" if token.special else "added"
            raise ValueError(
                f"{encoding!r} cannot be saved as a tokenizer.json: the {kind} token "
                f"{token.content!r} has the same text as the token {vocab[token.content]}"
            )
    return [
        dataclasses.asdict(token) for token in sorted(tokens.values(), key=lambda token: token.id)
    ]


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recover the merges of a vocabulary that has ranks only (tiktoken), in order of rank.

    Args:
        ranks: token bytes to rank.

    Raises:
        ValueError: if no merge makes one of the tokens, for example a token added by hand.
    """
    pairs = []
    for token in _by_rank(ranks):
        if (pair := _recover_pair(token, ranks)) is not None:
            pairs.append(pair)
        elif len(token) > 1:
            raise ValueError(
                f"expected every token to be the result of a merge, but no merge makes {token!r} "
                f"of rank {ranks[token]}"
            )
    return pairs


def _by_rank(ranks: Mapping[bytes, int]) -> list[bytes]:
    return sorted(ranks, key=ranks.__getitem__)


def _recover_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two tokens that are merged to `token`; None if no merge makes it.

    The bytes of the token are merged with all merges except those that make the token itself. If
    more than two tokens remain, no merge makes the token, alone or within a text.
    """

    def other_rank(left: bytes, right: bytes) -> int:
        return (
            NO_MERGE if len(left) + len(right) == len(token) else ranks.get(left + right, NO_MERGE)
        )

    match merge(token, other_rank):
        case [left, right]:
            return left, right
        case _:
            return None


def to_oniguruma(pattern: str) -> str:
    r"""Convert a split pattern to the dialect of Oniguruma, the regex engine of tokenizers.

    Three constructs differ: in Oniguruma, `$` matches at the end of a line, `{1,3}+` is a nested
    repetition instead of a possessive one, and there is no `\U0001F600`.

    Args:
        pattern: a regular expression in the dialect of the `regex` module.

    Raises:
        ValueError: if a `{1,3}+` follows a group, or if there is an inline flag other than `i`,
            because the letters of other flags differ.

    >>> to_oniguruma(r"\p{N}{1,3}+|\s++$")
    '(?>\\p{N}{1,3})|\\s++\\z'
    """
    if flags := re.search(r"(?<!\\)\(\?[a-zA-Z-]*[^\W\dPi][a-zA-Z-]*[:)]", pattern):
        raise ValueError(
            f"split pattern {pattern!r}: tokenizers interprets the flags {flags.group()} "
            "differently; remove them, for example write [\\s\\S] for a dot that matches newlines"
        )
    atom = r"\\[pP]\{\^?\w+\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\.|\w"
    pattern = re.sub(rf"({atom})(\{{\d+(?:,\d*)?\}})\+", r"(?>\1\2)", pattern)
    if re.search(r"\)\{\d+(?:,\d*)?\}\+", pattern):
        raise ValueError(
            f"split pattern {pattern!r}: tokenizers interprets a possessive {{m,n}}+ after a group "
            "differently; write it as an atomic group (?>...)"
        )
    pattern = re.sub(
        r"\\(U[0-9a-fA-F]{8}|.)",
        lambda match: rf"\x{{{match[1][1:]}}}" if match[1][1:] else match[0],
        pattern,
    )
    # Replace $ only; escaped characters and character sets are matched as a whole and unchanged.
    return re.sub(
        r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$",
        lambda match: r"\z" if match.group() == "$" else match.group(),
        pattern,
    )
