"""A decoder and an encoder in NumPy and float64, the reference for whole programs.

The equations are those of `decoder.py` and `encoder.py`, implemented independently and as simply as
possible: one causal mask, no shared code except the weights. It is slow and accurate to fifteen
digits, and shows the whole model on one page.

Leaves out: RoPE scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def decoder(
    params: Any, cfg: Any, ids: np.ndarray, past_key_values: Sequence[tuple[Any, Any]] | None = None
) -> np.ndarray:
    """Return the logits of the last token of each row.

    Args:
        params: `decoder.Params` in float32.
        cfg: `Config` of the decoder.
        ids: Token ids, int [B, T].
        past_key_values: For each layer the keys and values of the S tokens before `ids`,
            [B, S, K, H], with rotated keys. None if S is 0.

    Returns:
        float64 [B, V].

    Raises:
        ValueError: The config has RoPE scaling.
    """
    if cfg.rope_scaling is not None:
        raise ValueError(
            f"rope_scaling must be None, because the float64 reference has no RoPE scaling, "
            f"got {cfg.rope_scaling}"
        )
    batch, length = ids.shape
    n, k, h = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    start = 0 if past_key_values is None else past_key_values[0][0].shape[1]
    position = start + np.arange(length)  # [T], of the queries
    key_position = np.arange(start + length)  # [S + T]
    x = _wide(params.embed.weight[ids])  # [B, T, D]
    if cfg.scale_embeddings:
        x = x * cfg.d_model**0.5
    if cfg.position == "learned":
        x = x + _wide(params.positions)[position]
    for i, layer in enumerate(params.layers):
        window = cfg.window(i)
        y = _norm(x, layer.attn_norm, cfg)
        q = _linear(y, layer.q).reshape(batch, length, n, h)
        key = _linear(y, layer.k).reshape(batch, length, k, h)
        value = _linear(y, layer.v).reshape(batch, length, k, h)
        q, key = _norm(q, layer.q_norm, cfg), _norm(key, layer.k_norm, cfg)
        if cfg.position == "rope":
            is_local = window is not None and cfg.local_rope_theta is not None
            theta: Any = cfg.local_rope_theta if is_local else cfg.rope_theta
            q, key = _rotate(q, position, theta), _rotate(key, position, theta)
        if past_key_values is not None:
            past_key, past_value = past_key_values[i]
            key = np.concatenate([_wide(past_key), key], axis=1)
            value = np.concatenate([_wide(past_value), value], axis=1)
        visible = key_position <= position[:, None]  # [T, S + T]
        if window is not None:
            visible &= key_position > position[:, None] - window
        key, value = (np.repeat(a, n // k, axis=2) for a in (key, value))  # [B, S + T, N, H]
        y = _attend(q, key, value, visible, cfg.query_scalar or h)
        y = _linear(y.reshape(batch, length, n * h), layer.out)
        x = x + _norm(y, layer.attn_post_norm, cfg)
        y = _norm(x, layer.mlp_norm, cfg)
        up = _linear(y, layer.up)  # [B, T, F]
        if cfg.mlp == "gelu":
            y = _gelu(up)
        elif cfg.mlp == "swiglu":
            gate = _linear(y, layer.gate)
            y = gate / (1 + np.exp(-gate)) * up
        else:
            y = _gelu(_linear(y, layer.gate)) * up
        x = x + _norm(_linear(y, layer.down), layer.mlp_post_norm, cfg)
    x = _norm(x[:, -1], params.final_norm, cfg)
    return _linear(x, params.embed if params.head is None else params.head)


def encoder(params: Any, cfg: Any, ids: np.ndarray) -> np.ndarray:
    """Return the embeddings of texts of equal length, one per row.

    Args:
        params: `encoder.Params` in float32.
        cfg: `encoder.Config`, with mean pooling and normalization.
        ids: Token ids, int [B, T].

    Returns:
        float64 [B, D].
    """
    batch, length = ids.shape
    positions, token_type = _wide(params.positions)[:length], _wide(params.token_types)[0]
    x = _wide(params.embed.weight[ids]) + positions + token_type
    x = _layer_norm(x, params.embed_norm, cfg.norm_eps)
    all_visible = np.ones((length, length), bool)
    for layer in params.layers:
        qkv = [
            _linear(x, p).reshape(batch, length, cfg.num_heads, cfg.head_dim)
            for p in (layer.q, layer.k, layer.v)
        ]
        y = _attend(*qkv, all_visible, cfg.head_dim).reshape(x.shape)
        x = _layer_norm(x + _linear(y, layer.out), layer.attn_norm, cfg.norm_eps)
        y = _linear(x, layer.up)
        erf = np.vectorize(math.erf, otypes=[np.float64])
        y = 0.5 * y * (1 + erf(y / math.sqrt(2)))
        x = _layer_norm(x + _linear(y, layer.down), layer.mlp_norm, cfg.norm_eps)
    y = x.mean(axis=1)
    return y / np.linalg.norm(y, axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-softmax over the last axis."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _attend(q, k, v, visible, scalar) -> np.ndarray:
    """Compute softmax attention: q, k, v [B, T, N, H], visible [T, S] -> [B, T, N, H]."""
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = np.where(visible, q @ k.transpose(0, 1, 3, 2) / scalar**0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


def _rotate(x: np.ndarray, position: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    phases = np.exp(1j * position[:, None] * theta ** (-np.arange(half) / half))  # [T, H/2]
    rotated = (x[..., :half] + 1j * x[..., half:]) * phases[:, None]
    return np.concatenate([rotated.real, rotated.imag], axis=-1)


def _norm(x: np.ndarray, p, cfg) -> np.ndarray:
    if p is None:
        return x
    if cfg.norm == "layer":
        return _layer_norm(x, p, cfg.norm_eps)
    scale = _wide(p.scale) + (cfg.norm == "unit_rms")
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + cfg.norm_eps) * scale


def _layer_norm(x: np.ndarray, p, eps: float) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * _wide(p.scale) + _wide(p.bias)


def _linear(x: np.ndarray, p) -> np.ndarray:
    y = x @ _wide(p.weight).T
    return y if p.bias is None else y + _wide(p.bias)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _wide(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
