"""Train an encoding on texts: count pieces, learn merges, build the vocabulary.

`train.py` has the simple implementation of the algorithm. This module uses `train_fast.py`, which
learns the same merges faster.
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
    """Train a byte-pair encoding on texts, and return its vocabulary.

    Args:
        texts: the texts; no piece spans two of them. `read_files` reads them from files.
        vocab_size: the maximum number of tokens: 256 bytes, the merges, and `special_tokens`. The
            vocabulary is smaller if no more pairs occur `min_frequency` times.
        pattern: the split pattern, or several to apply in turn (see `bpe.pretokenize`).
        special_tokens: the special tokens, which get the last ids. Texts are split at special
            tokens, so that no merge is learned from their characters.
        min_frequency: the minimum count of a pair to be merged.
        name: the name of the encoding in error messages.
        progress: a callback, see `train.Progress`.

    Raises:
        ValueError: if `vocab_size` is too small for the bytes and special tokens, `min_frequency`
            is less than 1, or a special token is empty or repeated.
    """
    num_merges = vocab_size - 256 - len(special_tokens)
    if num_merges < 0:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for 256 bytes "
            f"and {len(special_tokens)} special tokens"
        )
    if min_frequency < 1:
        raise ValueError(f"min_frequency must be at least 1, got {min_frequency}")
    if "" in special_tokens or len(set(special_tokens)) != len(special_tokens):
        raise ValueError(
            f"special_tokens must be distinct and not empty, got {list(special_tokens)}"
        )
    counts = train_fast.count_pieces(texts, pattern, special_tokens, progress)
    ranks = build_vocab(train_fast.learn_merges(counts, num_merges, min_frequency, progress))
    return Encoding(
        name,
        pattern=pattern,
        ranks=ranks,
        special_tokens={token: len(ranks) + i for i, token in enumerate(special_tokens)},
    )
