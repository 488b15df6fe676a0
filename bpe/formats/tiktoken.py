"""Read the `.tiktoken` files of OpenAI: each line is a token in base64 and its rank."""

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
    """Read a `.tiktoken` file: each line is a token in base64, a space, and its rank.

    Args:
        path: the file.
        pattern: the split pattern, or several to apply in turn (see `bpe.pretokenize`).
        special_tokens: text to id.

    Raises:
        ValueError: if the file is damaged, has gaps in its ranks, or has no token for a byte.
    """
    path = Path(path)
    ranks: dict[bytes, int] = {}
    rank_lines: dict[int, int] = {}  # rank -> line number
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        where = f"{path}: line {number}"
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{where}: expected a token in base64, a space and a rank, got {line[:80]!r}"
            ) from None
        if token in ranks:
            raise ValueError(
                f"{where} repeats the token {token!r} of line {rank_lines[ranks[token]]}"
            )
        if rank_lines.setdefault(rank, number) != number:
            raise ValueError(f"{where} repeats the rank {rank} of line {rank_lines[rank]}")
        ranks[token] = rank
    for rank, number in rank_lines.items():
        # p50k_base leaves out the id of <|endoftext|>; any other gap is a missing line.
        if rank > 0 and rank - 1 not in rank_lines and rank - 1 not in special_tokens.values():
            raise ValueError(
                f"{path}: expected consecutive ranks, but line {number} has the rank {rank} and no "
                f"line has the rank {rank - 1}"
            )
    try:
        encoding = Encoding(path.stem, pattern=pattern, ranks=ranks, special_tokens=special_tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    eos_id = special_tokens.get("<|endoftext|>")
    stop_ids = stop_tokens.well_known_stop_ids(encoding)
    return Tokenizer(encoding=encoding, eos_id=eos_id, stop_ids=stop_ids)
