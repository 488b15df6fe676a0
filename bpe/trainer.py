"""From texts to an encoding: counts of pieces, merges, vocabulary.

`train.py` has the algorithm to be read; `train_fast.py` gives the same merges sooner, and is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bpe import train_fast
from bpe.encoding import Encoding
from bpe.pretokenize import GPT2
from bpe.train import Progress, build_vocab


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    pattern: str | Sequence[str] = GPT2,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    min_frequency: int = 2,
    name: str = "trained",
    progress: Progress | None = None,
) -> Encoding:
    """Trains a vocabulary.

    Args:
        texts: one after the other; no piece spans two of them. `read_files` gives those of files.
        vocab_size: how many tokens at most: 256 bytes, the merges, and `special_tokens`. It is less
            if the text has no more pairs that occur `min_frequency` times.
        pattern: the split pattern, or several to apply in turn (see `bpe.pretokenize`).
        special_tokens: get the last ids. Where a text spells one, it is cut there: no piece of
            ordinary text can come to resemble a special token.
        min_frequency: how often a pair must occur to be merged.
        name: what the encoding is called in messages.
        progress: see `Progress`.

    Raises:
        ValueError: if `vocab_size` has no room for the bytes and special tokens, `min_frequency` is
            less than 1, or a special token is empty or repeated.
    """
    num_merges = vocab_size - 256 - len(special_tokens)
    if num_merges < 0:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for 256 bytes "
            f"and {len(special_tokens)} special tokens"
        )
    if min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency} must be at least 1")
    if "" in special_tokens or len(set(special_tokens)) != len(special_tokens):
        raise ValueError(f"special_tokens must differ and not be empty: {list(special_tokens)}")
    counts = train_fast.count_pieces(texts, pattern, special_tokens, progress)
    ranks = build_vocab(train_fast.learn_merges(counts, num_merges, min_frequency, progress))
    return Encoding(
        name,
        pattern=pattern,
        ranks=ranks,
        special_tokens={token: len(ranks) + i for i, token in enumerate(special_tokens)},
    )
