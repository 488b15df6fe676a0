"""Vocabularies that write bytes as text, in GPT-2's way: `tokenizer.json` and GGUF.

Each of the 256 bytes has a printable character that stands for it. The 188 printable ones of
Latin-1 stand for themselves, the others, in order, for U+0100 and up: a space is "Ġ", a newline
"Ċ".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from bpe.encoding import Encoding
from bpe.formats.checks import short_repr


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# What a vocabulary may do without: control characters other than tab, newline and return, bytes
# that never occur in UTF-8, and first bytes of planes where hardly a character is assigned. A
# vocabulary has tokens only for the bytes of its training text. One that lacks others is damaged.
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
    normalization: Literal["NFC"] | None,
    where: str,
) -> Encoding:
    if spaces := [token for token in special_tokens if token.isspace()]:
        # As in GPT-NeoX and Phi-2. They are matched in every text, unlike special tokens.
        raise ValueError(f"{where}: added tokens of white space, as {spaces[0]!r}, cannot be read")
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    as_bytes: dict[str, bytes] = {}
    for token, id in tokens.items():
        try:
            as_bytes[token] = bytes([byte_of[character] for character in token])
        except KeyError as error:
            raise ValueError(
                f"{where}: token {id}, {token!r}, has the character {error.args[0]!r}, "
                "which stands for no byte"
            ) from None
    ranks = {token_bytes: tokens[token] for token, token_bytes in as_bytes.items()}
    dropped = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
    if lost := dropped.translate(None, _OPTIONAL_BYTES):
        raise ValueError(f"{where}: no token for the bytes {lost!r}")

    pairs: list[tuple[bytes, bytes]] = []
    for i, merge in enumerate(merges):
        match merge:
            case [str(left), str(right)] if left in as_bytes and right in as_bytes:
                pairs.append((as_bytes[left], as_bytes[right]))
            case _:
                raise ValueError(
                    f"{where}: merge {i}, {short_repr(merge)}, does not join two tokens"
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
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
