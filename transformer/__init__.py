"""Transformers as pure functions over trees of arrays: decoders, encoders, and their checkpoints.

Read `decoder.py` first (token ids in, logits out), then `attention.py`, `cache.py`, `sampling.py`
and `generate.py`. This package handles token ids only; tokenizers are in `bpe`.
"""

from transformer.config import Config

__all__ = ["Config"]
