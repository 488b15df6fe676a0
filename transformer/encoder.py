"""A BERT-style encoder: token ids in, one vector for each text out.

Where a decoder's token sees only what came before it, here every token sees the whole text, so
there is no cache and nothing to generate; and the norm stands behind each addition, not before each
branch. After BERT (Devlin et al. 2018, arXiv:1810.04805) and Sentence-BERT (Reimers & Gurevych
2019, arXiv:1908.10084), which made one vector of a text by averaging those of its tokens. The
models people run this way are all-MiniLM, BGE and E5.

Several texts may share a row: `segments` numbers them, and a token attends to tokens of its own
number only (Krell et al. 2021, arXiv:2107.02027). `packing.py` fills rows like that, so that hardly
any padding is computed.

Leaves out: pairs of texts (token types other than 0), the pooler that BERT was pretrained with, and
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

# config.json's name of each field.
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
# What transformers takes where config.json is silent, as Google's first files are.
_HF_DEFAULTS = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
_GELU = ("gelu", "gelu_python")  # one function: the exact one, by erf
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
    """Sizes of an encoder, and how a text's vector comes from those of its tokens.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
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
    pooling: Literal["mean", "cls"] = "mean"  # average of all tokens, or the first one's
    normalize: bool = True  # to length 1

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
        """H, the width of a head."""
        return self.d_model // self.num_heads

    @classmethod
    def debug(cls, **changes: Any) -> Config:
        """An encoder under 50,000 weights, for tests; `changes` replace its fields."""
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
        """Reads the dictionary of a Hugging Face `config.json` of model_type bert.

        What sentence-transformers keeps in files of its own stands in the other arguments;
        max_tokens is by default what the position table holds.

        Raises:
            ValueError: a key is missing or has a value that cannot be, or one changes the forward
                pass in a way this encoder lacks; see `config_keys`.
        """
        if (kind := config.get("model_type")) != "bert":
            raise ValueError(f"model_type must be 'bert', got {kind!r}")
        rest = _HF_DEFAULTS | {key: value for key, value in config.items() if value is not None}
        if missing := [key for key in _HF_FIELDS if key not in rest]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        fields = {name: rest.pop(key) for key, name in _HF_FIELDS.items()}
        max_tokens = fields["max_seq_len"] if max_tokens is None else max_tokens
        cfg = cls(**fields, max_tokens=max_tokens, pooling=pooling, normalize=normalize)
        config_keys.check(rest, cfg, "bert", neutral_overrides=_NEUTRAL)
        return cfg

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`: a `config.json`, without what has files of its own."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            **{key: getattr(self, name) for key, name in _HF_FIELDS.items()},
        }


@struct.dataclass
class Layer:
    """Weights of one block."""

    q: Linear  # [D, D], as are k, v and out
    k: Linear
    v: Linear
    out: Linear
    attn_norm: Norm
    up: Linear  # [F, D]
    down: Linear  # [D, F]
    mlp_norm: Norm


@struct.dataclass
class Params:
    """Weights of the whole encoder."""

    embed: Linear  # [V, D], one row a token
    positions: jax.Array  # [max_seq_len, D] float32
    token_types: jax.Array  # [num_types, D] float32; row 0 is that of a text on its own
    embed_norm: Norm
    layers: tuple[Layer, ...]


def abstract(cfg: Config) -> Params:
    """The tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
    normal = jax.nn.initializers.normal(0.02)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones

    def matrix(out: int, inner: int, axes: tuple[str, str]) -> Linear:
        return Linear(
            weight=ArrayInfo((out, inner), axes, normal), bias=ArrayInfo((out,), axes[:1], zeros)
        )

    norm_ = Norm(
        scale=ArrayInfo((cfg.d_model,), ("model",), ones),
        bias=ArrayInfo((cfg.d_model,), ("model",), zeros),
    )
    qkv = matrix(cfg.d_model, cfg.d_model, ("heads", "model"))
    layer = Layer(
        q=qkv,
        k=qkv,
        v=qkv,
        out=matrix(cfg.d_model, cfg.d_model, ("model", "heads")),
        attn_norm=norm_,
        up=matrix(cfg.d_ff, cfg.d_model, ("ff", "model")),
        down=matrix(cfg.d_model, cfg.d_ff, ("model", "ff")),
        mlp_norm=norm_,
    )
    return Params(
        embed=Linear(weight=ArrayInfo((cfg.vocab_size, cfg.d_model), ("vocab", "model"), normal)),
        positions=ArrayInfo((cfg.max_seq_len, cfg.d_model), ("seq", "model"), normal),
        token_types=ArrayInfo((cfg.num_types, cfg.d_model), ("type", "model"), normal),
        embed_norm=norm_,
        layers=(layer,) * cfg.num_layers,
    )


def init(key: jax.Array, cfg: Config) -> Params:
    """Fresh float32 weights."""
    return initialize(key, abstract(cfg))


def forward(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    segments: jax.Array,
    *,
    taps: Collection[str] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The vector of every token, having read the whole of its text.

    Args:
        ids: int32 [B, T], special tokens included.
        segments: int32 [B, T], the text of its row that a token belongs to, 1, 2, ...; 0 for
            padding. The tokens of a text stand side by side.
        taps: names of intermediates to return: "residual" (the stream entering each block and
            leaving the last, [L + 1, B, T, D]) and "attention" (weights, [L, B, N, T, T]). An
            unused tap costs nothing under `jax.jit`.

    Returns:
        The stream after the last block, float32 [B, T, D], and a dictionary with exactly the named
        taps.
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
    residual, weights = [x], []
    for layer in params.layers:
        x, w = _block(x, layer, cfg, segments)
        residual.append(x)
        weights.append(w)
    found: dict[str, jax.Array] = {}
    if "residual" in taps:
        found["residual"] = jnp.stack(residual)
    if "attention" in taps:
        found["attention"] = jnp.stack(weights)
    return x, found


def pool(x: jax.Array, cfg: Config, segments: jax.Array, num_texts: int) -> jax.Array:
    """One vector for each text from those of its tokens.

    Args:
        x: float32 [B, T, D].
        segments: int32 [B, T], as in `forward`.
        num_texts: how many texts a row may hold.

    Returns:
        float32 [B, num_texts, D]; row i is that of segment i + 1, and zero where there is none.
    """
    with jax.named_scope("pool"):
        numbers = jnp.arange(1, num_texts + 1)[:, None]  # [num_texts, 1]
        belongs = segments[:, None, :] == numbers  # [B, num_texts, T]
        if cfg.pooling == "cls":
            belongs &= (position_ids(segments) == 0)[:, None, :]
        share = belongs.astype(jnp.float32)
        share = share / jnp.maximum(share.sum(-1, keepdims=True), 1.0)
        y = jnp.einsum("bpt,btd->bpd", share, x, preferred_element_type=jnp.float32)
        if cfg.normalize:
            y = y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
        return y


@partial(jax.jit, static_argnames=("cfg", "num_texts"))
def embed_batch(
    params: Params, cfg: Config, ids: jax.Array, segments: jax.Array, num_texts: int
) -> jax.Array:
    """The vectors of the texts in some rows: `forward`, then `pool`; float32 [B, num_texts, D]."""
    x, _ = forward(params, cfg, ids, segments)
    return pool(x, cfg, segments, num_texts)


def embed_all(params: Params, cfg: Config, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """The vectors of many texts, computed in batches of few shapes (`packing.py`).

    Args:
        texts: the ids of each, special tokens included, at most cfg.max_tokens.

    Returns:
        float32 [len(texts), D], in the order of the texts.

    Raises:
        ValueError: a text is empty or too long, or an id is not in the vocabulary.
    """
    check_ids(cfg, texts)
    vectors = np.empty((len(texts), cfg.d_model), np.float32)
    for batch in packing.pack(texts, cfg.max_tokens):
        found = embed_batch(params, cfg, batch.ids, batch.segments, batch.max_texts)
        vectors[batch.text_indices] = np.asarray(found)[batch.rows, batch.slots]
    return vectors


def check_ids(cfg: Config, texts: Sequence[Sequence[int]]) -> None:
    """Raises ValueError, naming it, for an id outside the vocabulary: looking it up would not."""
    for number, text in enumerate(texts):
        for id in text:
            if not 0 <= id < cfg.vocab_size:
                raise ValueError(
                    f"text {number} has the id {id}: ids go from 0 to {cfg.vocab_size - 1}"
                )


@partial(jax.jit, static_argnames="cfg")  # so that the layers, all alike, are traced once
def _block(
    x: jax.Array, layer: Layer, cfg: Config, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention, add, norm; MLP, add, norm. Also returns the attention weights [B, N, T, T]."""
    batch, length, width = x.shape

    def heads(p: Linear) -> jax.Array:
        y = linear(x, p).reshape(batch, length, cfg.num_heads, cfg.head_dim)
        return y.swapaxes(1, 2)  # [B, N, T, H]

    with jax.named_scope("attention"):
        y, weights = attend(heads(layer.q), heads(layer.k), heads(layer.v), segments)
        y = y.swapaxes(1, 2).reshape(batch, length, width)  # [B, T, D]
        x = norm(x + linear(y, layer.out), layer.attn_norm, cfg.norm_eps)
    with jax.named_scope("mlp"):
        y = linear(x, layer.up)  # [B, T, F]
        y = 0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))  # gelu; jax.nn's own takes twice as long
        return norm(x + linear(y, layer.down), layer.mlp_norm, cfg.norm_eps), weights


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention in both directions, within segments.

    Args:
        q, k, v: float32 [B, N, T, H]: heads first, because products over the two last axes ran
            twice as fast as those that step over an axis (on a CPU).
        segments: int32 [B, T].

    Returns:
        The attended values [B, N, T, H] and the attention weights [B, N, T, T].
    """
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)
    is_together = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, S]
    scores = jnp.where(is_together, scores, -jnp.inf)
    unnormed = jnp.exp(scores - scores.max(-1, keepdims=True))  # [B, N, T, S]
    total = unnormed.sum(-1, keepdims=True)
    # Divided after the product: H numbers a query instead of S.
    out = jnp.einsum("bnts,bnsh->bnth", unnormed, v, preferred_element_type=jnp.float32) / total
    return out, unnormed / total


def num_bytes(params: Params) -> int:
    """Memory the weights take."""
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
