"""A decoder as an embedding model: its blocks, then the pooling of `pooling.py`.

A decoder that was trained to embed texts (Qwen3-Embedding, E5-Mistral) keeps causal attention; the
last token has seen the whole text, so its vector is the embedding (BehnamGhader et al. 2024,
arXiv:2404.05961, compares the variants). Gemma 3 can be bidirectional (EmbeddingGemma): then every
token attends to the whole text (in a layer with a sliding window, to half of the window on either
side), and the vectors of all tokens are averaged.

`encoder.embed_batch` calls `forward` for a config of this module.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from transformer import attention, decoder, kernels, pooling
from transformer.config import Config as DecoderConfig
from transformer.config import check_size
from transformer.pooling import Dense
from transformer.weights import Linear


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters of a decoder with a pooling.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    decoder: DecoderConfig
    max_tokens: int  # longest text, special tokens included; at most max_seq_len
    is_causal: bool = True
    pooling: str | tuple[str, ...] = "lasttoken"  # see `pooling.py`
    dense: tuple[Dense, ...] = ()  # layers after the pooling
    normalize: bool = True  # scale embeddings to length 1

    def __post_init__(self) -> None:
        check_size("max_tokens", self.max_tokens, self.max_seq_len)
        for name in ("is_causal", "normalize"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        checked = pooling.check(self.pooling, self.dense, self.d_model)
        object.__setattr__(self, "pooling", checked)

    @property
    def d_model(self) -> int:
        """Width D of a token vector."""
        return self.decoder.d_model

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""
        return self.decoder.vocab_size

    @property
    def max_seq_len(self) -> int:
        """Number of positions."""
        return self.decoder.max_seq_len

    @property
    def embedding_width(self) -> int:
        """Width E of an embedding."""
        return pooling.output_width(self.pooling, self.dense, self.d_model)


class Params(struct.PyTreeNode):
    """Weights of a decoder with a pooling."""

    decoder: decoder.Params
    dense: tuple[Linear, ...] = ()  # layers after the pooling


def forward(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    segments: jax.Array,
    *,
    taps: Collection[str] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the contextual vector of every token; see `encoder.forward`."""
    if unknown := set(taps) - {"residual", "attention"}:
        raise ValueError(f"taps must be among residual, attention; got {sorted(unknown)}")
    positions = decoder.position_ids(segments)
    x, angles = decoder.embed_tokens(params.decoder, cfg.decoder, ids, positions)
    residual, attentions = [x], []
    for i, layer in enumerate(params.decoder.layers):
        window = cfg.decoder.window(i)
        if not cfg.is_causal and window is not None:
            window = window // 2  # to either side
        options: Any = decoder.attention_options(layer, cfg.decoder, window)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, options=options) -> jax.Array:
            if cfg.is_causal and "attention" not in taps:
                return kernels.attend(q, k, v, segments=segments, **options)
            out, weights = attention.attend(
                q, k, v, segments=segments, is_causal=cfg.is_causal, **options
            )
            attentions.append(weights)
            return out

        x = decoder.block(x, layer, cfg.decoder, angles[i], attend)
        residual.append(x)
    outputs: dict[str, Any] = {}
    if "residual" in taps:
        outputs["residual"] = jnp.stack(residual)
    if "attention" in taps:
        outputs["attention"] = jnp.stack(attentions)
    return decoder.final_norm(params.decoder, cfg.decoder, x), outputs
