"""Whisper: an encoder that reads a spectrogram, and a decoder that writes text beside it.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision",
arXiv:2212.04356; both halves are the transformer of Vaswani et al. 2017 with norms in front. The
encoder's two convolutions are written as what they are, linear maps of three neighbouring columns;
the second steps by two, so that 30 seconds become 1500 positions.

The decoder attends to its own past, kept in a `Cache` that grows with the text, and to the sound,
whose keys and values are computed once a window. Several rows may listen to the same sound (the
beams of a search); they share its keys and values.

The format of a weight is the format of its product, as in `transformer.layers`. Attention over the
sound is computed in the format of `q`'s weight, bfloat16 in place of int8; everything else between
products is float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from audio.config import Config
from transformer.decoder import ArrayInfo
from transformer.layers import embed, linear, norm
from transformer.weights import Linear, Norm

EPS = 1e-5
_MAX_DECODE_QUERIES = 8  # queries


@struct.dataclass
class Attention:
    """Weights of one attention, with the norm in front of it."""

    norm: Norm
    q: Linear  # [D, D], as are k, v and out
    k: Linear  # without a bias, which the softmax would cancel
    v: Linear
    out: Linear


@struct.dataclass
class Mlp:
    """Weights of one MLP, with the norm in front of it."""

    norm: Norm
    up: Linear  # [F, D]
    down: Linear  # [D, F]


@struct.dataclass
class AudioLayer:
    """A block of the encoder."""

    attn: Attention
    mlp: Mlp


@struct.dataclass
class TextLayer:
    """A block of the decoder: its own past, the sound, then the MLP."""

    attn: Attention
    cross_attn: Attention
    mlp: Mlp


@struct.dataclass
class Encoder:
    """Sound to vectors."""

    conv1: Linear  # [D, 3 M]
    conv2: Linear  # [D, 3 D]
    positions: jax.Array  # [max_audio_len, D] float32
    layers: tuple[AudioLayer, ...]
    norm: Norm


@struct.dataclass
class Decoder:
    """Token ids and sound to logits."""

    embed: Linear  # [V, D], one row a token; also the head
    positions: jax.Array  # [max_text_len, D] float32
    layers: tuple[TextLayer, ...]
    norm: Norm


@struct.dataclass
class Params:
    """Weights of the whole model."""

    encoder: Encoder
    decoder: Decoder


@struct.dataclass
class Cache:
    """What the decoder remembers: a tuple item a layer.

    B rows listen to A sounds, B / A rows each, those of a sound side by side.
    """

    keys: tuple[jax.Array, ...]  # [B, N, S, H] float32, of the text so far
    values: tuple[jax.Array, ...]
    cross_keys: tuple[jax.Array, ...]  # [A, max_audio_len, D]
    cross_values: tuple[jax.Array, ...]  # [A, D, max_audio_len]

    @property
    def size(self) -> int:
        """Positions of text there is room for."""
        return self.keys[0].shape[2]


def abstract(cfg: Config) -> Params:
    """The tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
    normal = jax.nn.initializers.normal(0.02)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    d = cfg.d_model

    def matrix(out: int, inner: int, axes: tuple[str, str], bias: bool = True) -> Linear:
        return Linear(
            weight=ArrayInfo((out, inner), axes, normal),
            bias=ArrayInfo((out,), axes[:1], zeros) if bias else None,
        )

    norm_ = Norm(scale=ArrayInfo((d,), ("model",), ones), bias=ArrayInfo((d,), ("model",), zeros))
    attention = Attention(
        norm=norm_,
        q=matrix(d, d, ("heads", "model")),
        k=matrix(d, d, ("heads", "model"), bias=False),
        v=matrix(d, d, ("heads", "model")),
        out=matrix(d, d, ("model", "heads")),
    )
    mlp = Mlp(
        norm=norm_,
        up=matrix(cfg.d_ff, d, ("ff", "model")),
        down=matrix(d, cfg.d_ff, ("model", "ff")),
    )
    return Params(
        encoder=Encoder(
            conv1=matrix(d, 3 * cfg.num_mels, ("model", "mels")),
            conv2=matrix(d, 3 * d, ("model", "model")),
            positions=ArrayInfo((cfg.max_audio_len, d), ("sound", "model"), _sinusoids),
            layers=(AudioLayer(attn=attention, mlp=mlp),) * cfg.num_audio_layers,
            norm=norm_,
        ),
        decoder=Decoder(
            embed=Linear(weight=ArrayInfo((cfg.vocab_size, d), ("vocab", "model"), normal)),
            positions=ArrayInfo((cfg.max_text_len, d), ("text", "model"), normal),
            layers=(TextLayer(attn=attention, cross_attn=attention, mlp=mlp),)
            * cfg.num_text_layers,
            norm=norm_,
        ),
    )


def _sinusoids(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Sines, then cosines, of wavelengths from 2 pi to 10,000 times that; `key` is not used."""
    length, width = shape
    rates = jnp.exp(-math.log(10_000) / (width // 2 - 1) * jnp.arange(width // 2))
    angles = jnp.arange(length)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1).astype(dtype)


def init(key: jax.Array, cfg: Config) -> Params:
    """Fresh float32 weights."""
    infos, tree = jax.tree.flatten(abstract(cfg))
    keys = jax.random.split(key, len(infos))
    return jax.tree.unflatten(
        tree,
        [
            info.initializer(key, info.shape, jnp.float32)
            for key, info in zip(keys, infos, strict=True)
        ],
    )


# Sound to vectors


@partial(jax.jit, static_argnames=("cfg", "taps"))
def encode(
    params: Params, cfg: Config, mel: jax.Array, *, taps: tuple[str, ...] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Reads one window of spectrogram a row.

    Args:
        mel: float32 [B, num_frames, M], as `mel.log_mel` gives it, padded with zeros.
        taps: names of intermediates to return: "residual" (the stream entering each block and
            leaving the last, [L + 1, B, T, D]) and "attention" (weights, [L, B, N, T, T]).

    Returns:
        float32 [B, max_audio_len, D], and a dictionary with exactly the named taps.

    Raises:
        ValueError: `mel` has another shape, or a tap is unknown.
    """
    _check_taps(taps, ("residual", "attention"))
    if mel.shape[1:] != (cfg.num_frames, cfg.num_mels):
        raise ValueError(
            f"mel must have shape [B, {cfg.num_frames}, {cfg.num_mels}], got {mel.shape}"
        )
    p = params.encoder
    with jax.named_scope("convolve"):
        x = _gelu(linear(_conv_patches(mel), p.conv1))  # [B, frames, D]
        x = _gelu(linear(_conv_patches(x)[:, ::2], p.conv2))  # [B, T, D]
        x = x + p.positions
    residual, weights = [x], []
    for layer in p.layers:
        x, w = _audio_block(x, layer, cfg, "attention" in taps)
        residual.append(x)
        weights.append(w)
    found = {}
    if "residual" in taps:
        found["residual"] = jnp.stack(residual)
    if "attention" in taps:
        found["attention"] = jnp.stack(weights)
    return norm(x, p.norm, EPS), found


@partial(jax.jit, static_argnames=("cfg", "tapped"))  # so that alike layers are traced once
def _audio_block(
    x: jax.Array, layer: AudioLayer, cfg: Config, tapped: bool
) -> tuple[jax.Array, jax.Array | None]:
    with jax.named_scope("attention"):
        y, weights = norm(x, layer.attn.norm, EPS), None
        dtype = _attention_dtype(layer.attn.q)
        q, k, v = (
            _split_heads(linear(y, w), cfg).astype(dtype)
            for w in (layer.attn.q, layer.attn.k, layer.attn.v)
        )
        if tapped:
            y, weights = _softmax_weighted_sum(_scores(q, k), v)  # [B, N, T, H], [B, N, T, T]
        else:
            y = _attend(q, k, v)
        x = x + linear(_merge_heads(y), layer.attn.out)
    with jax.named_scope("mlp"):
        return _mlp(x, layer.mlp), weights


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of a window to itself, [B, N, T, H] each and back."""
    if jax.default_backend() != "cpu":
        return _softmax_weighted_sum(_scores(q, k), v)[0]
    # Half of a head's queries at a time: their 4.5 MB of scores stay near the processor on the way
    # through the softmax. Measured 2.2 times as fast by heads as all at once, and 1.4 times again
    # by halves.
    b, n, t, h = q.shape
    parts = 2 if t % 2 == 0 else 1
    queries = q.reshape(b * n * parts, 1, 1, t // parts, h)
    keys, values = (x.reshape(b * n, 1, 1, t, h) for x in (k, v))

    def attend(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, head = item
        return _softmax_weighted_sum(_scores(query, keys[head]), values[head])[0]

    return jax.lax.map(attend, (queries, jnp.arange(b * n * parts) // parts)).reshape(q.shape)


def _conv_patches(x: jax.Array) -> jax.Array:
    """Each column with the one before and the one behind it: [B, T, D] -> [B, T, 3 D]."""
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=-1)


# Text beside sound


@partial(jax.jit, static_argnames=("cfg", "size", "rows_per_audio"))
def init_cache(
    params: Params, cfg: Config, audio_features: jax.Array, *, size: int, rows_per_audio: int = 1
) -> Cache:
    """A cache for text about to be written beside encoded sound: float32 [A, max_audio_len, D].

    Args:
        size: positions of text to make room for.
        rows_per_sound: how many texts are written beside each sound.
    """
    sound_keys, sound_values = [], []
    for layer in params.decoder.layers:
        dtype = _attention_dtype(layer.cross_attn.q)
        sound_keys.append(linear(audio_features, layer.cross_attn.k).astype(dtype))
        sound_values.append(linear(audio_features, layer.cross_attn.v).astype(dtype).swapaxes(1, 2))
    shape = (len(audio_features) * rows_per_audio, cfg.num_heads, size, cfg.head_dim)
    empty = tuple(jnp.zeros(shape, jnp.float32) for _ in sound_keys)
    return Cache(
        keys=empty,
        values=tuple(jnp.zeros_like(x) for x in empty),
        cross_keys=tuple(sound_keys),
        cross_values=tuple(sound_values),
    )


def grow_cache(cache: Cache, size: int) -> Cache:
    """The same memory with room for `size` positions of text."""
    pad = ((0, 0), (0, 0), (0, size - cache.size), (0, 0))
    keys, values = jax.tree.map(lambda x: jnp.pad(x, pad), (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)


def reorder_cache(cache: Cache, rows: jax.Array) -> Cache:
    """Row i becomes what row `rows[i]` was, int32 [B]; it must have listened to the same sound."""
    keys, values = jax.tree.map(lambda x: x[rows], (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)


def forward_cached(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    cache: Cache,
    length: jax.Array,
    at: jax.Array,
    *,
    taps: Collection[str] = (),
) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
    """Reads more text, and says what may come next.

    Args:
        ids: int32 [B, T], at positions `length` and on. What stands behind the text that counts
            (padding) is neither seen by it nor, when overwritten, by what follows.
        cache: what stands before them; to be replaced by the one returned.
        length: int32 [], positions filled so far.
        at: int32 [P], the places among the T whose logits are wanted.
        taps: "alignment" returns the scores of the aligned heads over the sound before the
            softmax, [B, heads, T, max_audio_len].

    Returns:
        Logits float32 [B, P, V], the cache, and a dictionary with exactly the named taps.
    """
    _check_taps(taps, ("alignment",))
    p, num_new = params.decoder, ids.shape[1]
    with jax.named_scope("embed"):
        places = length + jnp.arange(num_new)  # [T]
        x = embed(p.embed, ids) + p.positions[places]  # [B, T, D]
    is_past = jnp.arange(cache.size) <= places[:, None]  # [T, S]
    keys, values, aligned = list(cache.keys), list(cache.values), {}
    for i, layer in enumerate(p.layers):
        with jax.named_scope("attention"):
            y = norm(x, layer.attn.norm, EPS)
            q, k, v = (
                _split_heads(linear(y, w), cfg) for w in (layer.attn.q, layer.attn.k, layer.attn.v)
            )
            keys[i] = jax.lax.dynamic_update_slice_in_dim(keys[i], k, length, axis=2)
            values[i] = jax.lax.dynamic_update_slice_in_dim(values[i], v, length, axis=2)
            scores = jnp.where(is_past, _scores(q, keys[i]), -jnp.inf)  # [B, N, T, S]
            y, _ = _softmax_weighted_sum(scores, values[i])
            x = x + linear(_merge_heads(y), layer.attn.out)
        with jax.named_scope("listen"):
            q = _split_heads(linear(norm(x, layer.cross_attn.norm, EPS), layer.cross_attn.q), cfg)
            y, scores = _cross_attend(q, cache.cross_keys[i], cache.cross_values[i])
            x = x + linear(_merge_heads(y), layer.cross_attn.out)
            if "alignment" in taps:
                aligned |= {(i, n): scores[:, n] for n in range(cfg.num_heads)}
        with jax.named_scope("mlp"):
            x = _mlp(x, layer.mlp)
    with jax.named_scope("unembed"):
        logits = linear(norm(x[:, at], p.norm, EPS), p.embed)  # [B, P, V]
    found = {}
    if "alignment" in taps:
        found["alignment"] = jnp.stack([aligned[pair] for pair in cfg.timing_heads], axis=1)
    return logits, cache.replace(keys=tuple(keys), values=tuple(values)), found


@partial(jax.jit, static_argnames=("cfg", "taps"))
def forward(
    params: Params,
    cfg: Config,
    sound: jax.Array,
    ids: jax.Array,
    *,
    taps: tuple[str, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits at every place of a whole text: `extend` from nothing.

    Args:
        sound: float32 [B, max_audio_len, D], encoded.
        ids: int32 [B, T].
        taps: as of `extend`.

    Returns:
        float32 [B, T, V], and a dictionary with exactly the named taps.
    """
    cache = init_cache(params, cfg, sound, size=ids.shape[1])
    zero, everywhere = jnp.zeros((), jnp.int32), jnp.arange(ids.shape[1])
    logits, _, found = forward_cached(params, cfg, ids, cache, zero, everywhere, taps=taps)
    return logits, found


def _cross_attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention of [B, N, T, H] over sounds, keys [A, S, D] and values [A, D, S].

    Returns:
        float32 [B, N, T, H], and the scores [B, N, T, S].
    """
    (b, n, t, h), a = q.shape, len(k)
    # To a sound, the rows that listen to it are so many more queries.
    q = q.reshape(a, b // a, n, t, h).swapaxes(1, 2).reshape(a, n, -1, h).astype(k.dtype)
    y, scores = (
        _cross_attend_decode if q.shape[2] <= _MAX_DECODE_QUERIES else _cross_attend_prefill
    )(q, k, v)  # [A, N, B/A * T, H or S]

    def apart(x: jax.Array) -> jax.Array:
        return x.reshape(a, n, b // a, t, -1).swapaxes(1, 2).reshape(b, n, t, -1)

    return apart(y), apart(scores)


def _cross_attend_prefill(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention of many queries to a sound, [A, N, T, H], head by head."""
    a, n, _, h = q.shape
    keys = k.reshape(a, -1, n, h).swapaxes(1, 2)  # [A, N, S, H]
    values = v.reshape(a, n, h, -1).swapaxes(2, 3)  # [A, N, S, H]
    scores = _scores(q, keys)
    return _softmax_weighted_sum(scores, values)[0], scores


def _cross_attend_decode(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same for few queries, all heads at once: each reads all of D, the others' parts as zeros.

    So keys and values are multiplied as they lie. Head by head, XLA's CPU backend packs them anew
    for every step: 2.5 times the time of a core, 4 times by the clock.
    """
    a, n, t, h = q.shape
    own = jnp.eye(n, dtype=q.dtype)
    q = q * h**-0.5
    wide = jnp.einsum("anth,nm->anhmt", q, own).reshape(a, n * h, n * t)  # [A, D, N * T]
    scores = jnp.einsum("asd,adt->ast", k, wide, preferred_element_type=jnp.float32)
    unnormed = jnp.exp(scores - scores.max(1, keepdims=True)).astype(v.dtype)
    total = unnormed.sum(1, dtype=jnp.float32)  # [A, N * T]
    y = jnp.einsum("ads,ast->adt", v, unnormed, preferred_element_type=jnp.float32)
    y = (y / total[:, None]).reshape(a, n, h, n, t)
    y = jnp.einsum("anhnt->anth", y)
    return y, scores.swapaxes(1, 2).reshape(a, n, t, -1)


# Parts of both


def _mlp(x: jax.Array, p: Mlp) -> jax.Array:
    return x + linear(_gelu(linear(norm(x, p.norm, EPS), p.up)), p.down)


def _gelu(x: jax.Array) -> jax.Array:
    # As jax.nn.gelu(approximate=False), which takes erfc: on a CPU half as fast.
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _split_heads(x: jax.Array, cfg: Config) -> jax.Array:
    """[B, T, N * H] -> [B, N, T, H]."""
    return x.reshape(*x.shape[:2], cfg.num_heads, -1).swapaxes(1, 2)


def _merge_heads(x: jax.Array) -> jax.Array:
    """[B, N, T, H] -> [B, T, N * H]."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, N, T, H], [B, N, S, H] -> float32 [B, N, T, S]."""
    q = q * q.shape[-1] ** -0.5
    return jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)


def _softmax_weighted_sum(scores: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values weighed by the softmax of the scores, float32 [B, N, T, H], and the weights."""
    # Rounded to the format of the values before they are summed, which is one pass fewer.
    unnormed = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(v.dtype)
    total = unnormed.sum(-1, keepdims=True, dtype=jnp.float32)
    # Divided after the product: H numbers a query instead of S.
    y = jnp.einsum("bnts,bnsh->bnth", unnormed, v, preferred_element_type=jnp.float32)
    return y / total, unnormed / total


def _attention_dtype(p: Linear):
    """The format of attention over the sound."""
    return jnp.bfloat16 if p.weight.dtype == jnp.int8 else p.weight.dtype


def _check_taps(taps: Collection[str], known: tuple[str, ...]) -> None:
    if unknown := set(taps) - set(known):
        raise ValueError(f"taps must be among {', '.join(known)}; got {sorted(unknown)}")
