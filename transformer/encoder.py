"""An encoder: token ids in, one embedding per text (or one score per pair of texts) out.

Every token attends to the whole text, so there is no cache. The architecture follows BERT (Devlin
et al. 2018, arXiv:1810.04805), in which each norm is applied after the residual addition
(post-norm). Where later encoders differ (RoBERTa, ModernBERT, nomic), a field of `Config` selects
the variant, or a part of a layer is None; `encoder_families.py` lists them. Common models of this
kind are all-MiniLM, BGE and E5.

`pooling.py` turns the token vectors into one vector per text. A cross-encoder reads a question and
a document together, as a pair of texts, and its head turns the pooled vector into a score
(Nogueira & Cho 2019, arXiv:1901.04085).

Several texts may share a row: `segments` numbers them, and a token attends only to tokens with its
own number (Krell et al. 2021, arXiv:2107.02027). `packing.py` packs texts into rows in this way, so
that there is little padding.

Leaves out: relative positions (DeBERTa, MPNet), ALiBi (Jina 2), mixtures of experts (nomic 2).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer import (
    config_keys,
    encoder_families,
    kernels,
    packing,
    pooled_decoder,
    pooling,
    rope,
)
from transformer.config import check_size
from transformer.decoder import ArrayInfo, initialize, position_ids
from transformer.layers import embed, linear, norm
from transformer.pooling import ACTIVATIONS, Dense
from transformer.weights import Linear, Norm

_SIZES = ("num_layers", "num_heads", "d_model", "d_ff", "vocab_size", "max_seq_len", "max_tokens")
_CHOICES = {"position": ("learned", "rope"), "mlp": ("gelu", "geglu", "swiglu")}
_FLAGS = ("pre_norm", "attention_bias", "mlp_bias", "normalize")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head of a cross-encoder: a dense layer, an optional norm, and a linear map to labels."""

    num_labels: int
    activation: Literal["tanh", "gelu"] = "tanh"
    has_norm: bool = False
    has_bias: bool = True  # of the dense layer


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
    max_seq_len: int  # positions
    max_tokens: int  # longest text, special tokens included; at most max_seq_len
    num_types: int = 2  # token types, for the first and second text of a pair; 0: no embedding
    norm_eps: float = 1e-12
    position: Literal["learned", "rope"] = "learned"
    position_offset: int = 0  # row of the position table for the first token; RoBERTa skips some
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None  # of layers with a window; None: rope_theta
    windows: tuple[int | None, ...] = (None,)  # per layer, repeated; see the method `window`
    pre_norm: bool = False  # norm the input of attention and MLP instead of the sum after them
    mlp: Literal["gelu", "geglu", "swiglu"] = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    pooling: str | tuple[str, ...] = "mean"  # see `pooling.py`
    dense: tuple[Dense, ...] = ()  # layers after the pooling
    normalize: bool = True  # scale embeddings to length 1
    head: HeadConfig | None = None  # of a cross-encoder

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("num_types", "position_offset"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name in ("rope_theta", "local_rope_theta"):
            value: Any = getattr(self, name)
            if name == "local_rope_theta" and value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and 0 < value < 1e12):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if not isinstance(self.windows, tuple) or not self.windows:
            raise ValueError(f"windows must be a tuple that is not empty, got {self.windows!r}")
        for window in self.windows:
            if window is not None:
                check_size("windows", window)
        checked = pooling.check(self.pooling, self.dense, self.d_model)
        object.__setattr__(self, "pooling", checked)

    @property
    def head_dim(self) -> int:
        """Width H of a head."""
        return self.d_model // self.num_heads

    @property
    def embedding_width(self) -> int:
        """Width E of an embedding."""
        return pooling.output_width(self.pooling, self.dense, self.d_model)

    def window(self, layer: int) -> int | None:
        """Return how many positions to either side a token in `layer` attends to; None for all."""
        return self.windows[layer % len(self.windows)]

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
        pooling: str | tuple[str, ...] = "mean",
        normalize: bool = True,
        dense: tuple[Dense, ...] = (),
    ) -> Config:
        """Return the config for the content of a Hugging Face `config.json`.

        The keyword arguments are settings that sentence-transformers stores in other files.

        Args:
            config: The content of config.json.
            max_tokens: Maximum length of a text in tokens; None means the number of positions.
            pooling: A mode of `pooling.py`, or several whose results are concatenated.
            normalize: Whether embeddings are scaled to length 1.
            dense: Dense layers after the pooling.

        Returns:
            The config.

        Raises:
            ValueError: A key is missing or has an invalid value, or a key changes the forward pass
                in a way that this encoder does not support; see `config_keys`.
        """
        fields, rest, neutral = encoder_families.fields_from_hf(config)
        fields["max_tokens"] = fields["max_seq_len"] if max_tokens is None else max_tokens
        cfg = cls(**fields, pooling=pooling, normalize=normalize, dense=dense)
        config_keys.check(rest, cfg, config["model_type"], neutral_overrides=neutral)
        return cfg

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json` dictionary of a BERT, which `from_hf` reads.

        Raises:
            ValueError: The encoder is not a BERT.
        """
        keys = encoder_families.FAMILIES["bert"].keys
        plain = type(self)(
            **{name: getattr(self, name) for name in keys.values()},
            max_tokens=self.max_tokens,
            pooling=self.pooling,
            normalize=self.normalize,
        )
        if plain != self:
            raise ValueError(f"only a BERT without dense layers and head can be stored, got {self}")
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            **{key: getattr(self, name) for key, name in keys.items()},
        }


class Layer(struct.PyTreeNode):
    """Weights of one block."""

    q: Linear  # [D, D], as are k, v and out
    k: Linear
    v: Linear
    out: Linear
    attn_norm: Norm | None  # None in the first layer where cfg.pre_norm is True
    up: Linear  # [F, D]
    down: Linear  # [D, F]
    mlp_norm: Norm
    gate: Linear | None = None  # [F, D] for swiglu and geglu; None for gelu


class Head(struct.PyTreeNode):
    """Weights of the head of a cross-encoder."""

    dense: Linear  # [D, D]
    norm: Norm | None
    out: Linear  # [labels, D]


class Params(struct.PyTreeNode):
    """Weights of the whole encoder."""

    embed: Linear  # [V, D], one row per token
    positions: jax.Array | None  # [position_offset + max_seq_len, D] float32, if learned
    token_types: jax.Array | None  # [num_types, D] float32; row 0 is used for single texts
    embed_norm: Norm
    layers: tuple[Layer, ...]
    final_norm: Norm | None = None  # where cfg.pre_norm is True
    dense: tuple[Linear, ...] = ()  # layers after the pooling
    head: Head | None = None


# A decoder with a pooling embeds texts through the same functions as an encoder.
AnyConfig = Config | pooled_decoder.Config
AnyParams = Params | pooled_decoder.Params


def abstract(cfg: Config) -> Params:
    """Return the tree of `Params` with an `ArrayInfo` of a float32 array at each leaf."""
    normal = jax.nn.initializers.normal(0.02)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    leaf: Any = ArrayInfo  # takes the place of an array in the tree

    def abstract_linear(
        out: int, inner: int, axes: tuple[str, str], has_bias: bool = True
    ) -> Linear:
        return Linear(
            weight=leaf((out, inner), axes, normal),
            bias=leaf((out,), axes[:1], zeros) if has_bias else None,
        )

    d = cfg.d_model
    abstract_norm = Norm(scale=leaf((d,), ("model",), ones), bias=leaf((d,), ("model",), zeros))
    qkv = abstract_linear(d, d, ("heads", "model"), cfg.attention_bias)
    up = abstract_linear(cfg.d_ff, d, ("ff", "model"), cfg.mlp_bias)
    layer = Layer(
        q=qkv,
        k=qkv,
        v=qkv,
        out=abstract_linear(d, d, ("model", "heads"), cfg.attention_bias),
        attn_norm=abstract_norm,
        up=up,
        down=abstract_linear(d, cfg.d_ff, ("model", "ff"), cfg.mlp_bias),
        mlp_norm=abstract_norm,
        gate=None if cfg.mlp == "gelu" else up,
    )
    # The input of the first layer is normed already, by `embed_norm`.
    first = layer.replace(attn_norm=None) if cfg.pre_norm else layer
    head = None
    if cfg.head is not None:
        head = Head(
            dense=abstract_linear(d, d, ("model", "model"), cfg.head.has_bias),
            norm=abstract_norm if cfg.head.has_norm else None,
            out=abstract_linear(cfg.head.num_labels, d, ("label", "model")),
        )
    rows = cfg.position_offset + cfg.max_seq_len
    return Params(
        embed=Linear(weight=leaf((cfg.vocab_size, d), ("vocab", "model"), normal)),
        positions=leaf((rows, d), ("seq", "model"), normal) if cfg.position == "learned" else None,
        token_types=leaf((cfg.num_types, d), ("type", "model"), normal) if cfg.num_types else None,
        embed_norm=abstract_norm,
        layers=(first, *(layer,) * (cfg.num_layers - 1)),
        final_norm=abstract_norm if cfg.pre_norm else None,
        dense=tuple(
            abstract_linear(p.out_features, p.in_features, ("embed", "model"), p.has_bias)
            for p in cfg.dense
        ),
        head=head,
    )


def init(key: jax.Array, cfg: Config) -> Params:
    """Return random initial weights in float32."""
    return initialize(key, abstract(cfg))


def forward(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    segments: jax.Array,
    types: jax.Array | None = None,
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
        types: Token type id (`token_type_ids`) of each token, int32 [B, T]: 0 for a single text
            and for the first text of a pair, 1 for the second. None means 0 for all.
        taps: Names of intermediates to return: "residual" (the residual stream before each block
            and after the last, [L + 1, B, T, D]) and "attention" (attention weights,
            [L, B, N, T, T]). An unused tap costs nothing under `jax.jit`.

    Returns:
        The residual stream after the last block and the final norm if there is one, float32
        [B, T, D], and a dictionary with exactly the named taps.

    Raises:
        ValueError: A tap is unknown.
    """
    if unknown := set(taps) - {"residual", "attention"}:
        raise ValueError(f"taps must be among residual, attention; got {sorted(unknown)}")
    positions = position_ids(segments)
    with jax.named_scope("embed"):
        x = embed(params.embed, ids)
        if params.positions is not None:
            x = x + params.positions[positions + cfg.position_offset]
        if params.token_types is not None:
            x = x + params.token_types[0 if types is None else types]
        x = norm(x, params.embed_norm, cfg.norm_eps)  # [B, T, D]
    rotations = _rotations(cfg, positions)
    residual, attentions = [x], []
    for i, layer in enumerate(params.layers):
        window = cfg.window(i)
        x, weights = _block(x, layer, cfg, segments, rotations[window is not None], window)
        residual.append(x)
        attentions.append(weights)
    if params.final_norm is not None:
        x = norm(x, params.final_norm, cfg.norm_eps)
    outputs: dict[str, jax.Array] = {}
    if "residual" in taps:
        outputs["residual"] = jnp.stack(residual)
    if "attention" in taps:
        outputs["attention"] = jnp.stack(attentions)
    return x, outputs


def _rotations(cfg: Config, positions: jax.Array) -> tuple[Any, Any]:
    """Return the rotary angles of the layers without a window, and of those with one.

    Both are (cos, sin) of `rope.angles`, or None if positions are learned.
    """
    if cfg.position == "learned":
        return None, None
    whole = rope.angles(positions, cfg.head_dim, cfg.rope_theta)
    if cfg.local_rope_theta is None or cfg.windows == (None,):
        return whole, whole
    return whole, rope.angles(positions, cfg.head_dim, cfg.local_rope_theta)


def pool(
    x: jax.Array,
    cfg: AnyConfig,
    segments: jax.Array,
    num_texts: int,
    dense: Sequence[Linear] = (),
) -> jax.Array:
    """Pool the token vectors of each text into one embedding.

    Args:
        x: Token vectors, float32 [B, T, D].
        cfg: Config of the encoder.
        segments: Text number of each token, int32 [B, T], as in `forward`.
        num_texts: Maximum number of texts in a row.
        dense: Weights of the dense layers, if the config has any.

    Returns:
        Embeddings, float32 [B, num_texts, E]. Index i of the second axis is segment i + 1. If the
        row has no such segment, the input of the dense layers is zero.
    """
    with jax.named_scope("pool"):
        y = pooling.pool_tokens(x, segments, position_ids(segments), num_texts, cfg.pooling)
        return pooling.project(y, dense, cfg.dense, cfg.normalize)


def score(y: jax.Array, cfg: Config, head: Head) -> jax.Array:
    """Return the logits of a cross-encoder: pooled vectors, float32 [..., D] -> [..., labels]."""
    assert cfg.head is not None
    y = ACTIVATIONS[cfg.head.activation](linear(y, head.dense))
    if head.norm is not None:
        y = norm(y, head.norm, cfg.norm_eps)
    return linear(y, head.out)


@partial(jax.jit, static_argnames=("cfg", "num_texts"))
def embed_batch(
    params: AnyParams, cfg: AnyConfig, ids: jax.Array, segments: jax.Array, num_texts: int
) -> jax.Array:
    """Return the embeddings of packed rows: `forward`, then `pool`; float32 [B, num_texts, E]."""
    if isinstance(cfg, pooled_decoder.Config):
        x, _ = pooled_decoder.forward(cast(Any, params), cfg, ids, segments)
    else:
        x, _ = forward(cast(Params, params), cfg, ids, segments)
    return pool(x, cfg, segments, num_texts, params.dense)


@partial(jax.jit, static_argnames=("cfg", "num_texts"))
def score_batch(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    segments: jax.Array,
    types: jax.Array,
    num_texts: int,
) -> jax.Array:
    """Return the logits of packed pairs of texts, float32 [B, num_texts, labels].

    Args:
        params: Weights of a cross-encoder.
        cfg: Its config.
        ids: As in `forward`.
        segments: As in `forward`; the two texts of a pair have the same number.
        types: As in `forward`.
        num_texts: Maximum number of pairs in a row.

    Raises:
        ValueError: The encoder has no head.
    """
    if params.head is None:
        raise ValueError("the encoder has no head, so it embeds texts and does not score pairs")
    x, _ = forward(params, cfg, ids, segments, types if cfg.num_types > 1 else None)
    return score(pool(x, cfg, segments, num_texts), cfg, params.head)


def embed_all(params: AnyParams, cfg: AnyConfig, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the embeddings of many texts, computed in batches of few shapes (`packing.py`).

    Args:
        params: Weights of the encoder.
        cfg: Config of the encoder.
        texts: Token ids of each text including special tokens, at most cfg.max_tokens.

    Returns:
        float32 [len(texts), E], in the order of the texts.

    Raises:
        ValueError: A text is empty or too long, or an id is not in the vocabulary.
    """
    check_ids(cfg, texts)
    embeddings = np.empty((len(texts), cfg.embedding_width), np.float32)
    for batch in packing.pack(texts, cfg.max_tokens):
        pooled = embed_batch(params, cfg, batch.ids, batch.segments, batch.max_texts)
        embeddings[batch.text_indices] = np.asarray(pooled)[batch.rows, batch.slots]
    return embeddings


def score_all(
    params: Params, cfg: Config, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> np.ndarray:
    """Return the logits of a cross-encoder for many pairs of texts.

    Args:
        params: Weights of a cross-encoder.
        cfg: Its config.
        pairs: Token ids of each pair including special tokens, and the token type id of each token.

    Returns:
        float32 [len(pairs), labels], in the order of the pairs.

    Raises:
        ValueError: A pair is empty or too long, an id is not in the vocabulary, or the encoder has
            no head.
    """
    if cfg.head is None:
        raise ValueError("the encoder has no head, so it embeds texts and does not score pairs")
    ids, types = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    check_ids(cfg, ids)
    logits = np.empty((len(pairs), cfg.head.num_labels), np.float32)
    for batch in packing.pack(ids, cfg.max_tokens):
        result = score_batch(
            params, cfg, batch.ids, batch.segments, batch.fill(types), batch.max_texts
        )
        logits[batch.text_indices] = np.asarray(result)[batch.rows, batch.slots]
    return logits


def check_ids(cfg: AnyConfig, texts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for an id outside the vocabulary, which a lookup would silently clamp."""
    for number, text in enumerate(texts):
        for id in text:
            if not 0 <= id < cfg.vocab_size:
                raise ValueError(
                    f"token ids must be from 0 to {cfg.vocab_size - 1}, got {id} in text {number}"
                )


# A nested jit, so that layers of the same shapes are traced once.
@partial(jax.jit, static_argnames=("cfg", "window"))
def _block(
    x: jax.Array,
    layer: Layer,
    cfg: Config,
    segments: jax.Array,
    angles: tuple[jax.Array, jax.Array] | None,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Apply a block: attention, add; MLP, add; each with a norm before it or after the addition.

    Returns:
        The output of the block [B, T, D], and the attention weights [B, N, T, T].
    """
    batch, length, width = x.shape

    def project(y: jax.Array, p: Linear, *, is_rotated: bool = True) -> jax.Array:
        y = linear(y, p).reshape(batch, length, cfg.num_heads, cfg.head_dim)
        if is_rotated and angles is not None:
            y = kernels.rotate(y, *angles)
        return y.swapaxes(1, 2)  # [B, N, T, H]

    def norm_input(y: jax.Array, p: Norm | None) -> jax.Array:
        return norm(y, p, cfg.norm_eps) if cfg.pre_norm and p is not None else y

    def norm_sum(y: jax.Array, p: Norm | None) -> jax.Array:
        return y if cfg.pre_norm or p is None else norm(y, p, cfg.norm_eps)

    with jax.named_scope("attention"):
        y = norm_input(x, layer.attn_norm)
        q, k = project(y, layer.q), project(y, layer.k)
        v = project(y, layer.v, is_rotated=False)
        y, weights = attend(q, k, v, segments, window)
        y = y.swapaxes(1, 2).reshape(batch, length, width)  # [B, T, D]
        x = norm_sum(x + linear(y, layer.out), layer.attn_norm)
    with jax.named_scope("mlp"):
        y = norm_input(x, layer.mlp_norm)
        return norm_sum(x + linear(_mlp(y, layer, cfg), layer.down), layer.mlp_norm), weights


def _mlp(y: jax.Array, layer: Layer, cfg: Config) -> jax.Array:
    """Return the hidden activations of the MLP, the input of `down`: [B, T, D] -> [B, T, F]."""
    if layer.gate is None:
        return pooling.gelu(linear(y, layer.up))
    gate = linear(y, layer.gate)
    return (jax.nn.silu(gate) if cfg.mlp == "swiglu" else pooling.gelu(gate)) * linear(y, layer.up)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute bidirectional softmax attention within segments.

    The heads come before the positions, because on a CPU products over the two last axes are twice
    as fast as strided ones.

    Args:
        q: Queries, float32 [B, N, T, H].
        k: Keys, float32 [B, N, T, H].
        v: Values, float32 [B, N, T, H].
        segments: Text number of each position, int32 [B, T].
        window: How many positions to either side a query attends to; None means its whole text.

    Returns:
        The attention output [B, N, T, H] and the attention weights [B, N, T, T].
    """
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)
    visible = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, S]
    if window is not None:
        column = jnp.arange(q.shape[2])
        visible &= jnp.abs(column[:, None] - column) <= window
    scores = jnp.where(visible, scores, -jnp.inf)
    exp_scores = jnp.exp(scores - scores.max(-1, keepdims=True))  # [B, N, T, S]
    total = exp_scores.sum(-1, keepdims=True)
    # Divide after the product: H numbers per query instead of S.
    out = jnp.einsum("bnts,bnsh->bnth", exp_scores, v, preferred_element_type=jnp.float32) / total
    return out, exp_scores / total


def num_bytes(params: AnyParams) -> int:
    """Return the size of the weights in bytes."""
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
