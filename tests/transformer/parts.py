"""Comparison of every part of a decoder with the intermediates of transformers."""

import numpy as np

from transformer import attention, decoder
from transformer.config import Config
from transformer.layers import linear


def check_parts(
    params: decoder.Params, cfg: Config, golden: dict[str, np.ndarray]
) -> dict[str, float]:
    """Compare each part with transformers, given the same input, so that errors do not add up.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        golden: Intermediates as described in tests/golden/transformer/make_tiny.py.

    Returns:
        The largest difference of each part.
    """
    positions = np.arange(golden["ids"].shape[1])[None]
    x, angles = decoder.embed_tokens(params, cfg, golden["ids"], positions)
    differences: dict[str, float] = {}

    def same(part, actual, i, atol=1e-5):
        expected = golden[part] if i is None else golden[part][i]
        actual = np.asarray(actual).reshape(expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=f"{part} {i}")
        difference = float(np.abs(actual - expected).max())
        differences[part] = max(difference, differences.get(part, 0.0))

    same("stream", x, 0)
    for i, layer in enumerate(params.layers):

        def attend(q, k, v, i=i, layer=layer):
            options = decoder.attention_options(layer, cfg, cfg.window(i))
            out, weights = attention.attend(q, k, v, **options)
            same("attention", weights, i)
            return out

        stream = normed = golden["stream"][i]
        if cfg.pre_norms:
            same("attn_norm", decoder._norm(stream, layer.attn_norm, cfg), i)
            normed = golden["attn_norm"][i]
        for part in "qkv":
            same(part, linear(normed, getattr(layer, part)), i)
        for part in ("q_norm", "k_norm") if cfg.qk_norm else ():
            heads = golden[part[0]][i]
            if cfg.qk_norm_over == "head":
                heads = heads.reshape(*normed.shape[:2], -1, cfg.head_dim)
            normed_heads = decoder._norm(heads, getattr(layer, part), cfg)
            # transformers applies the norm before the transpose of heads and tokens, in Gemma after
            is_after = golden[part][i].shape != heads.shape
            same(part, normed_heads.swapaxes(1, 2) if is_after else normed_heads, i)
        # Composites have a larger tolerance: large angles in float32 have an error of 1e-5.
        same("out", decoder.self_attention(normed, layer, cfg, angles[i], attend), i, atol=1e-4)
        added = golden["out"][i]
        if cfg.post_norms:
            same("attn_post_norm", decoder._norm(added, layer.attn_post_norm, cfg), i)
            added = golden["attn_post_norm"][i]
        added = stream if cfg.parallel_residual else stream + added * cfg.residual_multiplier
        normed = added
        if cfg.pre_norms:
            same("mlp_norm", decoder._norm(added, layer.mlp_norm, cfg), i)
            normed = golden["mlp_norm"][i]
        if layer.router is not None:
            weights, experts = decoder.route(normed, layer.router, cfg, layer.router_bias)
            same("router_weights", weights, i)
            same("router_experts", experts, i, atol=0)
        else:
            same("up", linear(normed, layer.up), i)
            if layer.gate is not None:
                same("gate", linear(normed, layer.gate), i)
        same("mlp", decoder.mlp(normed, layer, cfg), i)
        if cfg.post_norms:
            same("mlp_post_norm", decoder._norm(golden["mlp"][i], layer.mlp_post_norm, cfg), i)
        same("stream", decoder.block(stream, layer, cfg, angles[i], attend), i + 1, atol=1e-4)
    same("logits", decoder.unembed(params, cfg, golden["stream"][-1]), None)
    assert differences.keys() == golden.keys() - {"ids", "versions"}
    return differences
