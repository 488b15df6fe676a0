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

import jax
import numpy as np

from transformer.weights import Linear


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
    x = x * cfg.embedding_multiplier
    if cfg.position == "learned":
        x = x + _wide(params.positions)[position]
    for i, layer in enumerate(params.layers):
        window = cfg.window(i)
        y = _norm(x, layer.attn_norm, cfg)
        q, key, value = (_linear(y, p) for p in (layer.q, layer.k, layer.v))
        if cfg.qk_norm_over == "projection":
            q, key = _norm(q, layer.q_norm, cfg), _norm(key, layer.k_norm, cfg)
        q = q.reshape(batch, length, n, h)
        key, value = (a.reshape(batch, length, k, h) for a in (key, value))
        if cfg.qk_norm_over == "head":
            q, key = _norm(q, layer.q_norm, cfg), _norm(key, layer.k_norm, cfg)
        if cfg.has_rope(i):
            is_local = window is not None and cfg.local_rope_theta is not None
            theta: Any = cfg.local_rope_theta if is_local else cfg.rope_theta
            r = cfg.rotary_dim or h
            q, key = (
                np.concatenate([_rotate(a[..., :r], position, theta), a[..., r:]], axis=-1)
                for a in (q, key)
            )
        if past_key_values is not None:
            past_key, past_value = past_key_values[i]
            key = np.concatenate([_wide(past_key), key], axis=1)
            value = np.concatenate([_wide(past_value), value], axis=1)
        visible = key_position <= position[:, None]  # [T, S + T]
        if window is not None:
            visible &= key_position > position[:, None] - window
        key, value = (np.repeat(a, n // k, axis=2) for a in (key, value))  # [B, S + T, N, H]
        scale = cfg.attention_multiplier or (cfg.query_scalar or h) ** -0.5
        y = _attend(q, key, value, visible, scale, cfg.attn_logit_softcap, layer.sinks)
        y = _linear(y.reshape(batch, length, n * h), layer.out)
        after = x + cfg.residual_multiplier * _norm(y, layer.attn_post_norm, cfg)
        y = _norm(x if cfg.parallel_residual else after, layer.mlp_norm, cfg)
        y = _mlp(y, layer, cfg) if cfg.num_experts is None else _experts(y, layer, cfg)
        x = after + cfg.residual_multiplier * _norm(y, layer.mlp_post_norm, cfg)
    x = _norm(x[:, -1], params.final_norm, cfg)
    x = _linear(x, params.embed if params.head is None else params.head) / cfg.logits_scaling
    cap = cfg.final_logit_softcap
    return x if cap is None else cap * np.tanh(x / cap)


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
        y = _attend(*qkv, all_visible, cfg.head_dim**-0.5).reshape(x.shape)
        x = _layer_norm(x + _linear(y, layer.out), layer.attn_norm, cfg.norm_eps)
        y = _gelu_erf(_linear(x, layer.up))
        x = _layer_norm(x + _linear(y, layer.down), layer.mlp_norm, cfg.norm_eps)
    y = x.mean(axis=1)
    return y / np.linalg.norm(y, axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-softmax over the last axis."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _mlp(y: np.ndarray, layer, cfg) -> np.ndarray:
    up = _linear(y, layer.up)  # [..., F]
    if layer.gate is None:
        return _linear(_gelu(up) if cfg.mlp == "gelu" else _gelu_erf(up), layer.down)
    gate = _linear(y, layer.gate)
    if cfg.mlp == "swiglu_oai":
        limit = cfg.swiglu_limit
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return _linear(gate / (1 + np.exp(-1.702 * gate)) * (up + 1), layer.down)
    gate = gate / (1 + np.exp(-gate)) if cfg.mlp == "swiglu" else _gelu(gate)
    return _linear(gate * up, layer.down)


def _experts(y: np.ndarray, layer, cfg) -> np.ndarray:
    """Compute the experts of each token, one token after another."""
    logits = _linear(y, Linear(layer.router, layer.router_bias))  # [B, T, E]
    probabilities = np.exp(log_softmax(logits))
    out = np.zeros_like(y)
    for token in np.ndindex(*y.shape[:2]):
        p = probabilities[token]
        chosen = np.argsort(-p, kind="stable")[: cfg.num_experts_per_tok]
        total = p[chosen].sum() if cfg.norm_topk_prob else 1.0
        for e in chosen:
            maps = {name: getattr(layer, name) for name in ("gate", "up", "down")}
            expert = layer.replace(**jax.tree.map(lambda array, e=e: array[e], maps))
            out[token] += p[e] / total * _mlp(y[token], expert, cfg)
    return out


def _attend(q, k, v, visible, scale, softcap=None, sinks=None) -> np.ndarray:
    """Compute softmax attention: q, k, v [B, T, N, H], visible [T, S] -> [B, T, N, H]."""
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(_wide(sinks)[:, None, None] - top)
    return (weights / total @ v).transpose(0, 2, 1, 3)


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


def _gelu_erf(x: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def _wide(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
