"""Build encodings from byte-level vocabularies as in GPT-2: `tokenizer.json` and GGUF.

Each of the 256 bytes is written as a printable character. The 188 printable characters of Latin-1
represent themselves; the other bytes, in order, are written as U+0100 and up: a space is "Ġ", a
newline "Ċ".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bpe.added_tokens import AddedToken
from bpe.encoding import Encoding
from bpe.formats.checks import short_repr
from bpe.pretokenize import NormalizationForm


def bytes_to_unicode() -> dict[int, str]:
    """Return GPT-2's character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# The bytes that a vocabulary may lack, because they were not in its training text: control
# characters other than tab, newline and return, bytes that never occur in UTF-8, and lead bytes of
# planes with few assigned characters. A vocabulary that lacks other bytes is damaged.
_OPTIONAL_BYTES = bytes(
    [*(b for b in range(32) if b not in b"\t\n\r"), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)]
)


def from_byte_level(
    name: str,
    *,
    tokens: Mapping[str, int],
    special_tokens: Mapping[str, int],
    merges: Iterable[Any],
    patterns: str | Sequence[str],
    ignore_merges: bool,
    normalization: NormalizationForm | None,
    where: str,
    added_tokens: Sequence[AddedToken] = (),
) -> Encoding:
    """Build an encoding from tokens that are written with GPT-2's characters for bytes.

    Args:
        name: the name of the encoding in error messages.
        tokens: token to id, without the special tokens.
        special_tokens: text to id.
        merges: pairs of tokens, in order of rank.
        patterns: the split pattern, or several to apply in turn.
        ignore_merges: as in `Vocab`.
        normalization: as in `Vocab`.
        where: the file and key, for error messages.
        added_tokens: as in `Vocab`.

    Raises:
        ValueError: if a byte has no token, a merge is not a pair of tokens, or `Vocab` rejects the
            arguments.
    """
    char_to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    token_bytes: dict[str, bytes] = {}
    unreachable: dict[int, bytes] = {}
    for token, id in tokens.items():
        try:
            token_bytes[token] = bytes([char_to_byte[character] for character in token])
        except KeyError:  # a character that represents no byte, as in Command R
            unreachable[id] = token.encode()
    ranks = {data: tokens[token] for token, data in token_bytes.items()}
    dropped = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
    if missing := dropped.translate(None, _OPTIONAL_BYTES):
        raise ValueError(
            f"{where}: expected a token for every byte, but there is none for {missing!r}"
        )

    pairs: list[tuple[bytes, bytes]] = []
    for i, merge in enumerate(merges):
        match merge:
            case [str(left), str(right)] if left in token_bytes and right in token_bytes:
                pairs.append((token_bytes[left], token_bytes[right]))
            case _:
                raise ValueError(
                    f"{where}: expected two tokens of the vocabulary for merge {i}, got "
                    f"{short_repr(merge)}"
                )
    try:
        return Encoding(
            name,
            pattern=patterns,
            ranks=ranks,
            special_tokens=special_tokens,
            merges=pairs,
            ignore_merges=ignore_merges,
            normalization=normalization,
            dropped_bytes=dropped,
            added_tokens=added_tokens,
            unreachable_tokens=unreachable,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def is_plain_text(token: str) -> bool:
    """Return whether an added token that its file does not declare as special is plain text.

    A plain-text token is matched in every text: the runs of spaces in GPT-NeoX. Markup, such as
    `<tool_call>`, structures a conversation, so user text must not produce it.
    """
    return token.isspace() or not any(mark in token for mark in "<>[]{}|｜")
