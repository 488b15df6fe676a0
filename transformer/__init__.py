"""Decoder transformers as pure functions over trees of arrays: token ids in, logits out.

Read `decoder.py` first, then `attention.py`, `cache.py`, `sampling.py` and `generate.py`. This
package handles token ids only; tokenizers are in `bpe`.
"""

from transformer.config import Config

__all__ = ["Config"]
