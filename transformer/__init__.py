"""Decoder transformers as pure functions over trees of arrays: token ids in, logits out.

Read `decoder.py` first, then `attention.py`, `cache.py`, `sampling.py`, `generate.py`. This package
knows token ids, never text.
"""

from transformer.config import Config

__all__ = ["Config"]
