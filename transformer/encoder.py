"""A BERT-style encoder: token ids in, one embedding per text out.

Every token attends to the whole text, so there is no cache. Each norm is applied after the residual
addition (post-norm). The architecture follows BERT (Devlin et al. 2018, arXiv:1810.04805); pooling
the token vectors into one vector per text follows Sentence-BERT (Reimers & Gurevych 2019,
arXiv:1908.10084). Common models of this kind are all-MiniLM, BGE and E5.

Several texts may share a row: `segments` numbers them, and a token attends only to tokens with its
own number (Krell et al. 2021, arXiv:2107.02027). `packing.py` packs texts into rows in this way, so
that there is little padding.

Leaves out: pairs of texts (token types other than 0), the pooler of BERT's pretraining, and
relative or rotary positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer import config_keys, packing
from transformer.decoder import ArrayInfo, initialize, position_ids
from transformer.layers import embed, linear, norm
from transformer.weights import Linear, Norm

# Key of config.json -> field.
_HF_FIELDS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "type_vocab_size": "num_types",
    "layer_norm_eps": "norm_eps",
}
# The defaults of transformers for keys that config.json lacks, as in Google's first files.
_HF_DEFAULTS = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
_GELU = ("gelu", "gelu_python")  # both names mean the exact GELU, computed with erf
_NEUTRAL = config_keys.LAYER_NORM | {
    **dict.fromkeys(config_keys.ACTIVATIONS, _GELU),
    "is_decoder": (False,),
    "is_causal": (False,),
    "use_bidirectional_attention": (True,),
    "pre_norm": (False,),
    "do_layer_norm_before": (False,),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters of an encoder, including its pooling.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    num_layers: int
    num_heads: int  # N
    d_model: int  # D
    d_ff: int  # F
    vocab_size: int  # V
    max_seq_len: int  # rows of the position table
    max_tokens: int  # longest text, special tokens included; at most max_seq_len
    num_types: int = 2
    norm_eps: float = 1e-12
    pooling: Literal["mean", "cls"] = "mean"  # average over all tokens, or the first token
    normalize: bool = True  # scale embeddings to length 1

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "d_model", "d_ff", "vocab_size", "max_seq_len",
                     "max_tokens", "num_types"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}"
            )
        if self.max_tokens > self.max_seq_len:
            raise ValueError(
                f"max_tokens must be at most max_seq_len, "
                f"got {self.max_tokens} and {self.max_seq_len}"
            )
        if not isinstance(self.norm_eps, float) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be between 0 and 1, got {self.norm_eps!r}")
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', got {self.pooling!r}")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize must be True or False, got {self.normalize!r}")

    @property
    def head_dim(self) -> int:
        """Width H of a head."""
        return self.d_model // self.num_heads

    @classmethod
    def debug(cls, **changes: Any) -> Config:
        """Return an encoder of less than 50,000 weights for tests; `changes` replace its fields."""
        small: dict[str, Any] = dict(
            num_layers=2,
            num_heads=4,
            d_model=32,
            d_ff=64,
            vocab_size=320,
            max_seq_len=128,
            max_tokens=128,
        )
        return cls(**(small | changes))

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        *,
        max_tokens: int | None = None,
        pooling: Literal["mean", "cls"] = "mean",
        normalize: bool = True,
    ) -> Config:
        """Convert the dictionary of a Hugging Face `config.json` of model_type bert.

        The keyword arguments are what sentence-transformers stores in other files.

        Args:
            config: The content of config.json.
            max_tokens: Maximum length of a text in tokens; None means the size of the position
                table.
            pooling: See the field of this class.
            normalize: See the field of this class.

        Returns:
            The config.

        Raises:
            ValueError: A key is missing or has an invalid value, or a key changes the forward pass
                in a way that this encoder does not support; see `config_keys`.
        """
        if (kind := config.get("model_type")) != "bert":
            raise ValueError(f"model_type must be 'bert', got {kind!r}")
        rest: dict[str, Any] = _HF_DEFAULTS | {
            key: value for key, value in config.items() if value is not None
        }
        if missing := [key for key in _HF_FIELDS if key not in rest]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        fields: dict[str, Any] = {name: rest.pop(key) for key, name in _HF_FIELDS.items()}
        fields["max_tokens"] = fields["max_seq_len"] if max_tokens is None else max_tokens
        cfg = cls(**fields, pooling=pooling, normalize=normalize)
        config_keys.check(rest, cfg, "bert", neutral_overrides=_NEUTRAL)
        return cfg

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json` dictionary that `from_hf` reads."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            **{key: getattr(self, name) for key, name in _HF_FIELDS.items()},
        }


class Layer(struct.PyTreeNode):
    """Weights of one block."""

    q: Linear  # [D, D], as are k, v and out
    k: Linear
    v: Linear
    out: Linear
    attn_norm: Norm
    up: Linear  # [F, D]
    down: Linear  # [D, F]
    mlp_norm: Norm


class Params(struct.PyTreeNode):
    """Weights of the whole encoder."""

    embed: Linear  # [V, D], one row per token
    positions: jax.Array  # [max_seq_len, D] float32
    token_types: jax.Array  # [num_types, D] float32; row 0 is used for single texts
    embed_norm: Norm
    layers: tuple[Layer, ...]


def abstract(cfg: Config) -> Params:
    """Return the tree of `Params` with an `ArrayInfo` of a float32 array at each leaf."""
    normal = jax.nn.initializers.normal(0.02)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    leaf: Any = ArrayInfo  # takes the place of an array in the tree

    def abstract_linear(out: int, inner: int, axes: tuple[str, str]) -> Linear:
        return Linear(weight=leaf((out, inner), axes, normal), bias=leaf((out,), axes[:1], zeros))

    abstract_norm = Norm(
        scale=leaf((cfg.d_model,), ("model",), ones),
        bias=leaf((cfg.d_model,), ("model",), zeros),
    )
    qkv = abstract_linear(cfg.d_model, cfg.d_model, ("heads", "model"))
    layer = Layer(
        q=qkv,
        k=qkv,
        v=qkv,
        out=abstract_linear(cfg.d_model, cfg.d_model, ("model", "heads")),
        attn_norm=abstract_norm,
        up=abstract_linear(cfg.d_ff, cfg.d_model, ("ff", "model")),
        down=abstract_linear(cfg.d_model, cfg.d_ff, ("model", "ff")),
        mlp_norm=abstract_norm,
    )
    return Params(
        embed=Linear(weight=leaf((cfg.vocab_size, cfg.d_model), ("vocab", "model"), normal)),
        positions=leaf((cfg.max_seq_len, cfg.d_model), ("seq", "model"), normal),
        token_types=leaf((cfg.num_types, cfg.d_model), ("type", "model"), normal),
        embed_norm=abstract_norm,
        layers=(layer,) * cfg.num_layers,
    )


def init(key: jax.Array, cfg: Config) -> Params:
    """Return random initial weights in float32."""
    return initialize(key, abstract(cfg))


def forward(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    segments: jax.Array,
    *,
    taps: Collection[str] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the contextual vector of every token.

    Args:
        params: Weights of the encoder.
        cfg: Config of the encoder.
        ids: Token ids including special tokens, int32 [B, T].
        segments: Text number of each token within its row, int32 [B, T]: 1, 2, ... and 0 for
            padding. The tokens of a text are contiguous.
        taps: Names of intermediates to return: "residual" (the residual stream before each block
            and after the last, [L + 1, B, T, D]) and "attention" (attention weights,
            [L, B, N, T, T]). An unused tap costs nothing under `jax.jit`.

    Returns:
        The residual stream after the last block, float32 [B, T, D], and a dictionary with exactly
        the named taps.

    Raises:
        ValueError: A tap is unknown.
    """
    if unknown := set(taps) - {"residual", "attention"}:
        raise ValueError(f"taps must be among residual, attention; got {sorted(unknown)}")
    with jax.named_scope("embed"):
        x = (
            embed(params.embed, ids)
            + params.positions[position_ids(segments)]
            + params.token_types[0]
        )
        x = norm(x, params.embed_norm, cfg.norm_eps)  # [B, T, D]
    residual, attentions = [x], []
    for layer in params.layers:
        x, weights = _block(x, layer, cfg, segments)
        residual.append(x)
        attentions.append(weights)
    outputs: dict[str, jax.Array] = {}
    if "residual" in taps:
        outputs["residual"] = jnp.stack(residual)
    if "attention" in taps:
        outputs["attention"] = jnp.stack(attentions)
    return x, outputs


def pool(x: jax.Array, cfg: Config, segments: jax.Array, num_texts: int) -> jax.Array:
    """Pool the token vectors of each text into one vector.

    Args:
        x: Token vectors, float32 [B, T, D].
        cfg: Config of the encoder.
        segments: Text number of each token, int32 [B, T], as in `forward`.
        num_texts: Maximum number of texts in a row.

    Returns:
        Embeddings, float32 [B, num_texts, D]. Index i of the second axis is segment i + 1, and zero
        if the row has no such segment.
    """
    with jax.named_scope("pool"):
        numbers = jnp.arange(1, num_texts + 1)[:, None]  # [num_texts, 1]
        mask = segments[:, None, :] == numbers  # [B, num_texts, T]
        if cfg.pooling == "cls":
            mask &= (position_ids(segments) == 0)[:, None, :]
        weights = mask.astype(jnp.float32)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)
        y = jnp.einsum("bpt,btd->bpd", weights, x, preferred_element_type=jnp.float32)
        if cfg.normalize:
            y = y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
        return y


@partial(jax.jit, static_argnames=("cfg", "num_texts"))
def embed_batch(
    params: Params, cfg: Config, ids: jax.Array, segments: jax.Array, num_texts: int
) -> jax.Array:
    """Return the embeddings of packed rows: `forward`, then `pool`; float32 [B, num_texts, D]."""
    x, _ = forward(params, cfg, ids, segments)
    return pool(x, cfg, segments, num_texts)


def embed_all(params: Params, cfg: Config, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the embeddings of many texts, computed in batches of few shapes (`packing.py`).

    Args:
        params: Weights of the encoder.
        cfg: Config of the encoder.
        texts: Token ids of each text including special tokens, at most cfg.max_tokens.

    Returns:
        float32 [len(texts), D], in the order of the texts.

    Raises:
        ValueError: A text is empty or too long, or an id is not in the vocabulary.
    """
    check_ids(cfg, texts)
    embeddings = np.empty((len(texts), cfg.d_model), np.float32)
    for batch in packing.pack(texts, cfg.max_tokens):
        pooled = embed_batch(params, cfg, batch.ids, batch.segments, batch.max_texts)
        embeddings[batch.text_indices] = np.asarray(pooled)[batch.rows, batch.slots]
    return embeddings


def check_ids(cfg: Config, texts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for an id outside the vocabulary, which a lookup would silently clamp."""
    for number, text in enumerate(texts):
        for id in text:
            if not 0 <= id < cfg.vocab_size:
                raise ValueError(
                    f"token ids must be from 0 to {cfg.vocab_size - 1}, got {id} in text {number}"
                )


@partial(jax.jit, static_argnames="cfg")  # a nested jit, so that the layers are traced once
def _block(
    x: jax.Array, layer: Layer, cfg: Config, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Apply a block: attention, add, norm; MLP, add, norm.

    Returns its output [B, T, D] and its attention weights [B, N, T, T].
    """
    batch, length, width = x.shape

    def project(p: Linear) -> jax.Array:
        y = linear(x, p).reshape(batch, length, cfg.num_heads, cfg.head_dim)
        return y.swapaxes(1, 2)  # [B, N, T, H]

    with jax.named_scope("attention"):
        y, weights = attend(project(layer.q), project(layer.k), project(layer.v), segments)
        y = y.swapaxes(1, 2).reshape(batch, length, width)  # [B, T, D]
        x = norm(x + linear(y, layer.out), layer.attn_norm, cfg.norm_eps)
    with jax.named_scope("mlp"):
        y = linear(x, layer.up)  # [B, T, F]
        y = 0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))  # GELU; jax.nn.gelu takes twice as long
        return norm(x + linear(y, layer.down), layer.mlp_norm, cfg.norm_eps), weights


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute bidirectional softmax attention within segments.

    The heads come before the positions, because on a CPU products over the two last axes are twice
    as fast as strided ones.

    Args:
        q: Queries, float32 [B, N, T, H].
        k: Keys, float32 [B, N, T, H].
        v: Values, float32 [B, N, T, H].
        segments: Text number of each position, int32 [B, T].

    Returns:
        The attention output [B, N, T, H] and the attention weights [B, N, T, T].
    """
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)
    same_segment = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, S]
    scores = jnp.where(same_segment, scores, -jnp.inf)
    exp_scores = jnp.exp(scores - scores.max(-1, keepdims=True))  # [B, N, T, S]
    total = exp_scores.sum(-1, keepdims=True)
    # Divide after the product: H numbers per query instead of S.
    out = jnp.einsum("bnts,bnsh->bnth", exp_scores, v, preferred_element_type=jnp.float32) / total
    return out, exp_scores / total


def num_bytes(params: Params) -> int:
    """Return the size of the weights in bytes."""
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
