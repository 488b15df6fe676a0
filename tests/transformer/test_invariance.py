"""Tests of batch invariance: a row is bitwise equal in every batch size, dtype and family.

`tests/serve/test_invariance.py` tests the chat model end to end. This file tests the variants that
the chat model does not have.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.transformer.conftest import VARIANTS, randomize
from transformer import cache, decoder, lora, quant
from transformer.config import Config
from transformer.layers import quantize
from transformer.weights import Linear

pytestmark = pytest.mark.heavy

BUCKETS = (2, 4, 8, 16)
SIZES = dict(
    num_layers=1, d_model=256, d_ff=512, head_dim=64, vocab_size=1000, num_heads=8, max_seq_len=512
)
CONFIGS = {name: Config.debug(**fields | SIZES) for name, fields in VARIANTS.items()}
CONFIGS["gemma"] = replace(CONFIGS["gemma"], windows=(40,), query_scalar=50)
CONFIGS["qwen3"] = replace(CONFIGS["llama"], qk_norm=True, qkv_bias=True)


@functools.partial(jax.jit, static_argnums=1)
def step(params, cfg, kv_cache, ids, tables, starts):
    x, kv_cache = decoder.forward_cached(params, cfg, kv_cache, ids[:, None], tables, starts)
    return decoder.unembed(params, cfg, x[:, 0]), kv_cache.keys[-1]


def narrow(params: decoder.Params, dtype: str) -> decoder.Params:
    def change(p):
        if dtype == "int4":
            return p.replace(weight=quant.quantize(np.asarray(p.weight), 4))
        return quantize(p) if dtype == "int8" else p.replace(weight=p.weight.astype(jnp.bfloat16))

    is_linear = lambda node: isinstance(node, Linear)  # noqa: E731
    return jax.tree.map(lambda p: change(p) if is_linear(p) else p, params, is_leaf=is_linear)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in ("gpt2", "gemma", "qwen3", "adapted")),
        *((name, "int4") for name in ("llama", "qwen3")),
        ("gemma", "int8"),
    ],
)
def test_logits_and_keys_of_row_are_bitwise_equal_in_every_batch_size(name, dtype):
    cfg = CONFIGS["llama" if name == "adapted" else name]
    params = narrow(randomize(decoder.init(jax.random.key(0), cfg)), dtype)
    if name == "adapted":
        adapter = randomize(lora.init(jax.random.key(1), cfg, rank=8, alpha=16))
        params = lora.apply(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter))
    rng = np.random.default_rng(0)
    kv_cache = cache.init(cfg, 32, jnp.bfloat16)
    filled = [rng.normal(0, 1, pool.shape) for pool in jax.tree.leaves(kv_cache)]
    kv_cache = jax.tree.unflatten(
        jax.tree.structure(kv_cache),
        [jnp.asarray(pool, jnp.bfloat16).view(jnp.uint16) for pool in filled],
    )
    ids = rng.integers(0, cfg.vocab_size, 16).astype(np.int32)
    tables = np.arange(1, 33, dtype=np.int32).reshape(16, 2)
    starts = rng.integers(0, 511, 16).astype(np.int32)
    starts[:2] = 300, 17  # one row in its second block and past every window, one in its first
    sizes = (1, *BUCKETS) if decoder.has_native_step(params, cfg) else BUCKETS
    outputs = {
        size: step(params, cfg, kv_cache, ids[:size], tables[:size], starts[:size])
        for size in sizes
    }
    if 1 in outputs:
        logits, keys = outputs[1]
        np.testing.assert_array_equal(logits, outputs[2][0][:1], err_msg="one row")
        np.testing.assert_array_equal(keys[1:3], outputs[2][1][1:3], err_msg="one row")
    for size in BUCKETS[1:]:
        logits, keys = outputs[size]
        np.testing.assert_array_equal(logits[:2], outputs[2][0], err_msg=f"{size} rows")
        np.testing.assert_array_equal(keys[1:5], outputs[2][1][1:5], err_msg=f"{size} rows")
