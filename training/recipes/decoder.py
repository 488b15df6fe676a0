"""Decoders as tasks: all weights of one, or a low-rank adapter beside them.

Both learn to predict the next token. A batch holds rows of tokens in which several texts may stand
one behind another: `segments` keeps them apart, `weights` says which tokens are to be learned.

    ids       int32 [B, T]
    segments  int32 [B, T], 1, 2, ... for the texts of a row; 0 for padding
    weights   float32 [B, T], how much it counts to predict this token from what stands before it in
              its text; of the first token of a text it is ignored

Weights are trained in float32. `format="bfloat16"` makes the products in bfloat16, forwards and
backwards, from copies made in each step; sums, norms, softmax and the update stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from training.loss import chunked_cross_entropy
from transformer import decoder, lora
from transformer.config import Config
from transformer.decoder import Params
from transformer.weights import Linear

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class DecoderTask:
    """All weights of a decoder."""

    cfg: Config
    init_params: Params | None = None  # float32, copied; None: fresh weights
    dtype: Dtype = "float32"
    remat: bool = False  # see `decoder.hidden`

    def init(self, key: jax.Array) -> Params:
        if self.init_params is None:
            return decoder.init(key, self.cfg)
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), self.init_params)

    def loss(self, weights: Params, frozen: None, batch, key: jax.Array):
        return next_token_loss(weights, self.cfg, batch, self.dtype, remat=self.remat)

    def flops_per_token(self, length: int) -> float:
        """Arithmetic of a step for a token of a text of this length, backwards included."""
        return 3 * _forward_flops(self.cfg, length)


@dataclass(frozen=True, kw_only=True)
class LoraTask:
    """An adapter of a decoder whose own weights, float32 or bfloat16, are the frozen tree."""

    cfg: Config
    rank: int = 16
    alpha: float = 32.0
    target_modules: Sequence[str] = lora.TARGET_MODULES
    dtype: Dtype = "float32"
    remat: bool = False

    def init(self, key: jax.Array) -> lora.Adapter:
        return lora.init(
            key, self.cfg, rank=self.rank, alpha=self.alpha, target_modules=self.target_modules
        )

    def loss(self, weights: lora.Adapter, frozen: Params, batch, key: jax.Array):
        params = lora.apply(frozen, weights)
        return next_token_loss(params, self.cfg, batch, self.dtype, remat=self.remat)

    def flops_per_token(self, length: int) -> float:
        """As for `Full`, but that no gradient of the decoder's own weights is needed."""
        adapter = jax.eval_shape(self.init, jax.random.key(0))
        return 2 * _forward_flops(self.cfg, length) + 6 * sum(
            leaf.size for leaf in jax.tree.leaves(adapter)
        )


def next_token_loss(params: Params, cfg: Config, batch, format: Dtype, *, remat: bool = False):
    """What `Task.loss` returns, with the number of right tokens and of all.

    Raises:
        ValueError: weights are int8, through which no gradient goes.
    """
    ids, segments = batch["ids"], batch["segments"]
    params = cast_params(params, format)
    x = decoder.hidden_states(params, cfg, ids, segments, remat=remat)  # [B, T, D]
    # Position t predicts token t + 1, if that belongs to the same text; the last one predicts none.
    targets = jnp.roll(ids, -1, axis=1)
    continues = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights = jnp.pad(batch["weights"][:, 1:] * continues, ((0, 0), (0, 1)))  # [B, T]
    table = decoder.lm_head(params).weight
    with jax.named_scope("loss"):
        loss, right = chunked_cross_entropy(
            x.reshape(-1, x.shape[-1]), table, targets.ravel(), weights.ravel(), dtype=format
        )
    return loss, weights.sum(), {"correct": right, "tokens": (segments > 0).sum()}


def cast_params(params: Params, format: Dtype) -> Params:
    """The decoder with the weights of its layers' products in a format.

    The token table stays as it is: looking up a row is no product, and the gradients of all its
    occurrences are to be added in float32. The loss narrows it for the logits.
    """
    if format not in ("float32", "bfloat16"):
        raise ValueError(f"format must be 'float32' or 'bfloat16' for training, got {format!r}")

    def narrow(part):
        if not isinstance(part, Linear):
            return part
        if part.scale is not None:
            raise ValueError("int8 weights cannot be trained, nor trained through: load wider ones")
        own = part.lora
        if own is not None:
            own = own.replace(a=own.a.astype(format), b=own.b.astype(format))
        return part.replace(weight=part.weight.astype(format), lora=own)

    layers = jax.tree.map(narrow, params.layers, is_leaf=lambda node: isinstance(node, Linear))
    return params.replace(layers=layers)


def _forward_flops(cfg: Config, length: int) -> float:
    """Of one token: two for each weight it is multiplied with, and attention over half the text."""
    infos = decoder.abstract(cfg)
    matrices = [leaf for leaf in jax.tree.leaves(infos.layers) if len(leaf.shape) == 2]
    products = sum(out * inner for out, inner in (leaf.shape for leaf in matrices))
    attention = 2 * cfg.num_heads * cfg.head_dim * (length + 1) / 2  # weights, then their mix
    return 2 * (products + cfg.vocab_size * cfg.d_model + cfg.num_layers * attention)
