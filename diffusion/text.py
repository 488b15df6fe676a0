"""What a prompt means to the image model: the states of a frozen text encoder's tokens.

The encoder is the one that serves embeddings (all-MiniLM-L6-v2). It has read far more than the few
thousand captions of emoji, so that "automobile" and "car" lie close before the first picture is
seen; learning it anew from captions would lose that. Its states are computed once for all captions
and stored, and the recipe never runs it again. Freezing the encoder and attending to all its tokens
is what Imagen found enough (Saharia et al. 2022, arXiv:2205.11487).

Leaves out: prompts beyond `MAX_TOKENS`, whose rest is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import struct

import bpe
from transformer import encoder
from transformer.checkpoint import bert

MAX_TOKENS = 16  # the two special tokens included
_BATCH_SIZE = 64  # texts in a batch


@struct.dataclass
class PromptEmbeds:
    """Prompts, as the model sees them.

    Attributes:
        states: float [B, S, E], of each token.
        mask: bool [B, S], False for padding; all of it where nothing is said.
        pooled: float [B, E], of each prompt as a whole, of length 1.
    """

    states: jax.Array
    mask: jax.Array
    pooled: jax.Array


class TextEncoder:
    """Reads prompts.

    Attributes:
        width: E, of a state.
    """

    def __init__(self, folder: Path, *, dtype: str = "float32"):
        """Loads the encoder and its vocabulary from a sentence-transformers folder."""
        self._tokenizer = bpe.load_wordpiece(folder)
        self._params, self._cfg = bert.load(folder, dtype=dtype)
        self.width = self._cfg.d_model

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The states of some prompts; float32, padded to `MAX_TOKENS`.

        An empty prompt says nothing, which is not the same as what the encoder makes of no words.
        """
        ids = np.zeros((len(prompts), MAX_TOKENS), np.int32)
        mask = np.zeros((len(prompts), MAX_TOKENS), bool)
        for row, prompt in enumerate(prompts):
            found = self._tokenizer.encode(prompt, max_length=MAX_TOKENS)
            ids[row, : len(found)] = found
            mask[row, : len(found)] = bool(prompt.strip())
        parts = []
        for start in range(0, len(prompts), _BATCH_SIZE):
            rows = slice(start, start + _BATCH_SIZE)
            short = _BATCH_SIZE - len(ids[rows]) if len(prompts) > _BATCH_SIZE else 0
            batch = np.pad(ids[rows], ((0, short), (0, 0)))
            segments = np.pad(mask[rows], ((0, short), (0, 0))).astype(np.int32)
            states, pooled = _encode(self._params, self._cfg, batch, segments)
            count = len(ids[rows])
            parts.append((np.asarray(states[:count]), np.asarray(pooled[:count])))
        states, pooled = (np.concatenate(part) for part in zip(*parts, strict=True))
        return PromptEmbeds(states=states, mask=mask, pooled=pooled)


@partial(jax.jit, static_argnames="cfg")
def _encode(params: encoder.Params, cfg: encoder.Config, ids, segments):
    states, _ = encoder.forward(params, cfg, ids, segments)  # [B, S, E]
    return states, encoder.pool(states, cfg, segments, 1)[:, 0]
