"""Reading OpenAI's `.tiktoken` files: a token in base64 and its rank on each line."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

from bpe import stop_tokens
from bpe.encoding import Encoding
from bpe.formats.tokenizer import Tokenizer


def from_tiktoken(
    path: str | Path, *, pattern: str | Sequence[str], special_tokens: Mapping[str, int]
) -> Tokenizer:
    """Reads a `.tiktoken` file: on each line a token in base64, a space, and its rank.

    Args:
        path: the file.
        pattern: its split pattern (see `bpe.pretokenize`).
        special_tokens: spelling to id.

    Raises:
        ValueError: if the file is damaged, has gaps in its ranks, or lacks a byte.
    """
    path = Path(path)
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}  # rank to the number of its line
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        here = f"{path}: line {number}"
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise ValueError(f"{here} is not 'base64 rank': {line[:80]!r}") from None
        if token in ranks:
            raise ValueError(f"{here} repeats the token {token!r} of line {line_of[ranks[token]]}")
        if line_of.setdefault(rank, number) != number:
            raise ValueError(f"{here} repeats the rank {rank} of line {line_of[rank]}")
        ranks[token] = rank
    for rank, number in line_of.items():
        # p50k_base leaves out the id of <|endoftext|>; any other gap is a line that was lost.
        if rank > 0 and rank - 1 not in line_of and rank - 1 not in special_tokens.values():
            raise ValueError(f"{path}: line {number} has the rank {rank}, but none has {rank - 1}")
    try:
        encoding = Encoding(path.stem, pattern=pattern, ranks=ranks, special_tokens=special_tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    eos_id = special_tokens.get("<|endoftext|>")
    stop_ids = stop_tokens.well_known_stop_ids(encoding)
    return Tokenizer(encoding=encoding, eos_id=eos_id, stop_ids=stop_ids)
