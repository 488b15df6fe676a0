"""Text conditioning of the image model: the token states of a frozen text encoder.

The encoder is the embedding model all-MiniLM-L6-v2. It is trained on far more text than the few
thousand captions of emoji, so "automobile" and "car" have similar states from the start;
fine-tuning it on the captions would lose that. The states of all captions are computed once and
stored, and training does not run the encoder. A frozen encoder with attention to all its token
states follows Imagen (Saharia et al. 2022, arXiv:2205.11487).

Leaves out: prompts of more than `MAX_TOKENS` tokens, which are truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import struct

import bpe
from transformer import encoder
from transformer.checkpoint import bert

MAX_TOKENS = 16  # per prompt, [CLS] and [SEP] included
_BATCH_SIZE = 64  # texts in a batch


@struct.dataclass
class PromptEmbeds:
    """Encoded prompts.

    Attributes:
        states: float [B, S, E], the states of the tokens.
        mask: bool [B, S], False for padding, and for all tokens of an empty prompt.
        pooled: float [B, E], the sentence embeddings, of length 1.
    """

    states: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    pooled: jax.Array | np.ndarray


class TextEncoder:
    """The frozen encoder of prompts.

    Attributes:
        width: E, the width of the states of a token.
    """

    def __init__(self, folder: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"):
        """Load the encoder and its tokenizer from a sentence-transformers folder."""
        self._tokenizer = bpe.load_wordpiece(folder)
        self._params, self._cfg = bert.load(folder, dtype=dtype)
        self.width = self._cfg.d_model

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode prompts to float32 states, padded or truncated to `MAX_TOKENS`.

        The mask of an empty prompt is False everywhere, so that its image is generated without a
        prompt instead of with the encoding of an empty text.

        Args:
            prompts: B prompts.
        """
        ids = np.zeros((len(prompts), MAX_TOKENS), np.int32)
        mask = np.zeros((len(prompts), MAX_TOKENS), bool)
        for row, prompt in enumerate(prompts):
            token_ids = self._tokenizer.encode(prompt, max_length=MAX_TOKENS)
            ids[row, : len(token_ids)] = token_ids
            mask[row, : len(token_ids)] = bool(prompt.strip())
        batches = []
        for start in range(0, len(prompts), _BATCH_SIZE):
            rows = slice(start, start + _BATCH_SIZE)
            padding = _BATCH_SIZE - len(ids[rows]) if len(prompts) > _BATCH_SIZE else 0
            batch = np.pad(ids[rows], ((0, padding), (0, 0)))
            segments = np.pad(mask[rows], ((0, padding), (0, 0))).astype(np.int32)
            states, pooled = _encode(self._params, self._cfg, batch, segments)
            count = len(ids[rows])
            batches.append((np.asarray(states[:count]), np.asarray(pooled[:count])))
        states, pooled = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return PromptEmbeds(states=states, mask=mask, pooled=pooled)


@partial(jax.jit, static_argnames="cfg")
def _encode(params: encoder.Params, cfg: encoder.Config, ids, segments):
    states, _ = encoder.forward(params, cfg, ids, segments)  # [B, S, E]
    return states, encoder.pool(states, cfg, segments, 1)[:, 0]
