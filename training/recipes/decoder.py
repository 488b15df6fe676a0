"""Tasks that train a decoder: all of its weights, or a LoRA adapter.

Both are trained to predict the next token. A row of a batch can contain several packed texts:
`segments` separates them, and `weights` selects the targets.

    ids       int32 [B, T]
    segments  int32 [B, T], 1, 2, ... for the texts of a row; 0 for padding
    weights   float32 [B, T], the weight in the loss of predicting a token from the tokens before
              it in its text; ignored for the first token of a text

The master weights are float32. With `dtype="bfloat16"`, the matrix products of the forward and the
backward pass are computed in bfloat16, from copies that are made in each step; sums, norms, softmax
and the update stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Training of all weights of a decoder; implements `Task`.

    Attributes:
        cfg: the configuration of the decoder.
        init_params: the initial weights, which are copied to float32; None for random weights.
        dtype: the dtype of the matrix products.
        remat: whether to rematerialize activations; see `decoder.hidden_states`.
    """

    cfg: Config
    init_params: Params | None = None
    dtype: Dtype = "float32"
    remat: bool = False

    def init(self, key: jax.Array) -> Params:
        """Return the initial weights in float32."""
        if self.init_params is None:
            return decoder.init(key, self.cfg)
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), self.init_params)

    def loss(self, weights: Params, frozen: None, batch, key: jax.Array):
        """Return the loss of a batch; see `next_token_loss`."""
        return next_token_loss(weights, self.cfg, batch, self.dtype, remat=self.remat)

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs per token, forward and backward, for texts of `length` tokens."""
        return 3 * _forward_flops(self.cfg, length)


@dataclass(frozen=True, kw_only=True)
class LoraTask:
    """Training of a LoRA adapter; implements `Task`.

    The weights of the decoder, float32 or bfloat16, are passed to the loss as `frozen`.

    Attributes:
        cfg: the configuration of the decoder.
        rank: the rank of the adapter.
        alpha: the scale of the adapter is alpha / rank.
        target_modules: the linear layers with an adapter; None for all that can have one.
        dtype: the dtype of the matrix products.
        remat: whether to rematerialize activations; see `decoder.hidden_states`.
    """

    cfg: Config
    rank: int = 16
    alpha: float = 32.0
    target_modules: Sequence[str] | None = None
    dtype: Dtype = "float32"
    remat: bool = False

    def init(self, key: jax.Array) -> lora.Adapter:
        """Return the initial adapter in float32."""
        return lora.init(
            key, self.cfg, rank=self.rank, alpha=self.alpha, target_modules=self.target_modules
        )

    def loss(self, weights: lora.Adapter, frozen: Params, batch, key: jax.Array):
        """Return the loss of a batch; see `next_token_loss`."""
        params = lora.apply(frozen, weights)
        return next_token_loss(params, self.cfg, batch, self.dtype, remat=self.remat)

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs per token, without those of gradients for the frozen weights."""
        adapter = jax.eval_shape(self.init, jax.random.key(0))
        return 2 * _forward_flops(self.cfg, length) + 6 * sum(
            leaf.size for leaf in jax.tree.leaves(adapter)
        )


def next_token_loss(
    params: Params,
    cfg: Config,
    batch: Mapping[str, jax.Array],
    dtype: Dtype,
    *,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Return the summed next-token loss of a batch, the sum of weights, and other sums.

    It implements `Task.loss` for decoders.

    Args:
        params: the weights of the decoder.
        cfg: the configuration of the decoder.
        batch: "ids", "segments" and "weights"; see the docstring of this module.
        dtype: the dtype of the matrix products.
        remat: whether to rematerialize activations.

    Returns:
        The sum of the losses, the sum of the weights, and {"correct", "tokens"}: the sum of the
        weights of correct predictions, and the number of tokens.

    Raises:
        ValueError: the weights are int8 or int4, which have no gradients.
    """
    ids, segments = batch["ids"], batch["segments"]
    params = cast_params(params, dtype)
    x = decoder.hidden_states(params, cfg, ids, segments, remat=remat)  # [B, T, D]
    # Position t predicts token t + 1 if both are in the same text; the last position predicts none.
    targets = jnp.roll(ids, -1, axis=1)
    continues = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights = jnp.pad(batch["weights"][:, 1:] * continues, ((0, 0), (0, 1)))  # [B, T]
    table = decoder.lm_head(params).weight
    if cfg.logits_scaling != 1:
        x = x / cfg.logits_scaling
    with jax.named_scope("loss"):
        loss, correct = chunked_cross_entropy(
            x.reshape(-1, x.shape[-1]), table, targets.ravel(), weights.ravel(),
            dtype=dtype, softcap=cfg.final_logit_softcap,
        )  # fmt: skip
    return loss, weights.sum(), {"correct": correct, "tokens": (segments > 0).sum()}


def cast_params(params: Params, dtype: Dtype) -> Params:
    """Return the decoder with the weights of the linear layers cast to a dtype.

    The embedding table stays float32, because the gradients of all occurrences of a token are
    summed in the dtype of the table. The LM head is cast in the loss.

    Args:
        params: the weights of the decoder, with or without an adapter.
        dtype: "float32" or "bfloat16".

    Raises:
        ValueError: `dtype` is not one of these, or the weights are int8 or int4.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16' for training, got {dtype!r}")

    def cast(node):
        if not isinstance(node, Linear):
            return node
        if node.is_quantized:
            raise ValueError(
                "int8 and int4 weights cannot be trained; load float32 or bfloat16 weights"
            )
        adapter = node.lora
        if adapter is not None:
            adapter = replace(adapter, a=adapter.a.astype(dtype), b=adapter.b.astype(dtype))
        return replace(node, weight=node.weight.astype(dtype), lora=adapter)

    layers = jax.tree.map(cast, params.layers, is_leaf=lambda node: isinstance(node, Linear))
    return replace(params, layers=layers)


def _forward_flops(cfg: Config, length: int) -> float:
    """Return the forward FLOPs per token: two per weight, and attention to half of the text."""
    products = decoder.num_matmul_weights(cfg)
    attention = 2 * cfg.num_heads * cfg.head_dim * (length + 1) / 2  # scores and weighted values
    return 2 * (products + cfg.vocab_size * cfg.d_model + cfg.num_layers * attention)
