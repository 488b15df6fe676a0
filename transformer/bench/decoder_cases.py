"""Benchmark cases of this package: each operation of `kernels`, and whole programs.

The sizes are those of a decoder config. Weights are random, so no download is needed; the speed of
a matrix product does not depend on the values of its elements.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer import (
    cache,
    decoder,
    encoder,
    generate,
    kernels,
    layers,
    quant,
    quarot,
    rope,
    sampling,
)
from transformer.bench.case import Case, in_float64
from transformer.config import GATED_MLPS, Config
from transformer.kernels import exact
from transformer.weights import Linear

DTYPES = ("float32", "bfloat16", "int8", "int4")
PROMPT_LENGTH = 256  # number of tokens in the prefill cases

SMOLLM2 = Config(
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_model=576,
    d_ff=1536,
    vocab_size=49152,
    max_seq_len=8192,
    rope_theta=100_000.0,
)
MINILM = encoder.Config(
    num_layers=6,
    num_heads=12,
    d_model=384,
    d_ff=1536,
    vocab_size=30522,
    max_seq_len=512,
    max_tokens=256,
)


@dataclass(frozen=True)
class Sizes:
    """Configs of the models that the cases run, and the number of cached tokens.

    Raises:
        ValueError: The context is too long for the model.
    """

    cfg: Config = SMOLLM2
    context: int = 512  # tokens in the KV cache before a decoding step
    encoder: encoder.Config = MINILM

    def __post_init__(self) -> None:
        if not 1 <= self.context < self.cfg.max_seq_len:
            raise ValueError(
                f"context must be from 1 to {self.cfg.max_seq_len - 1}, got {self.context}"
            )

    @classmethod
    def from_checkpoint(cls, path: Path | None, *, context: int = 512) -> Sizes:
        """Return the sizes of a checkpoint, of which only the config is read.

        Args:
            path: GGUF file or Hugging Face folder; None means the sizes of SmolLM2.
            context: Number of tokens in the KV cache before a decoding step.

        Returns:
            The sizes.

        Raises:
            OSError: The checkpoint cannot be read.
            ValueError: The checkpoint is invalid, or the context is too long for the model.
        """
        from transformer import checkpoint

        return cls(SMOLLM2 if path is None else checkpoint.read_config(path), context)


def bench_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield all cases: single operations first, then whole programs (prefill, decode, embed)."""
    yield from _matmul(sizes.cfg)
    yield from _norm(sizes.cfg)
    yield from _rotate(sizes.cfg)
    yield from _gated_mlp(sizes.cfg)
    yield from _experts(sizes.cfg)
    yield from _attend(sizes.cfg)
    yield from _attend_cached(sizes.cfg, sizes.context)
    yield from _truncate(sizes.cfg)
    for dtype in DTYPES:
        yield prefill_case(sizes.cfg, dtype)
    for dtype in DTYPES:
        for rows in (1, 8):
            yield decode_case(sizes.cfg, dtype, rows, sizes.context)
    for dtype in ("float32", "bfloat16"):
        yield _embed_case(sizes.encoder, dtype)


# --- operations ---------------------------------------------------------------------------------


def _matmul(cfg: Config) -> Iterator[Case]:
    shapes = {"gate": (cfg.d_ff, cfg.d_model), "down": (cfg.d_model, cfg.d_ff)}
    shapes["head"] = (cfg.vocab_size, cfg.d_model)
    products = [
        ("gate", 1),
        ("gate", 8),
        ("gate", PROMPT_LENGTH),
        ("down", 1),
        ("head", 1),
        ("head", 8),
    ]
    for dtype in DTYPES:
        for module, rows in products:
            out, inner = shapes[module]

            def inputs(out=out, inner=inner, rows=rows, dtype=dtype) -> tuple:
                p = as_dtype(Linear(weight=_normal(out, inner)), dtype)
                return _normal(rows, inner, seed=1), p.weight, p.scale

            yield Case(
                name=f"matmul {rows}x{inner} by {module} {out}x{inner} {dtype}",
                operation="matmul",
                function=kernels.matmul,
                inputs=inputs,
                flops=2 * rows * out * inner,
                dtype=dtype,
                expected=in_float64(functools.partial(kernels.matmul, impl="reference")),
                cold_argnums=(1, 2),
                reuse_distance=_model_bytes(cfg, dtype),
            )


def _norm(cfg: Config) -> Iterator[Case]:
    for rows, has_bias in ((1, False), (PROMPT_LENGTH, False), (PROMPT_LENGTH, True)):

        def inputs(rows=rows, has_bias=has_bias) -> tuple:
            bias = _normal(cfg.d_model, seed=2) if has_bias else None
            return _normal(1, rows, cfg.d_model), _normal(cfg.d_model, seed=1), bias

        def function(x, scale, bias, *, impl=None):
            return kernels.norm(x, scale, bias, 1e-5, impl=impl)

        yield Case(
            name=f"norm {'layer' if has_bias else 'rms'} {rows}x{cfg.d_model}",
            operation="norm",
            function=function,
            inputs=inputs,
            flops=(6 if has_bias else 4) * rows * cfg.d_model,
            expected=in_float64(functools.partial(function, impl="reference")),
        )


def _rotate(cfg: Config) -> Iterator[Case]:
    for length in (1, PROMPT_LENGTH):

        def inputs(length=length) -> tuple:
            angles = rope.angles(100 + np.arange(length)[None], cfg.head_dim, 10_000.0)
            return _normal(1, length, cfg.num_heads, cfg.head_dim), *angles

        size = length * cfg.num_heads * cfg.head_dim
        yield Case(
            name=f"rotate {length}x{cfg.num_heads}x{cfg.head_dim}",
            operation="rotate",
            function=kernels.rotate,
            inputs=inputs,
            flops=3 * size,
            expected=in_float64(functools.partial(kernels.rotate, impl="reference")),
        )


def _gated_mlp(cfg: Config) -> Iterator[Case]:
    if cfg.mlp not in GATED_MLPS:
        return
    for dtype in DTYPES:
        for rows in (1, PROMPT_LENGTH):

            def inputs(rows=rows, dtype=dtype) -> tuple:
                gate, up = (_normal(cfg.d_ff, cfg.d_model, seed=i, scale=0.02) for i in (1, 2))
                down = _normal(cfg.d_model, cfg.d_ff, seed=3, scale=0.02)
                weights = {"gate": Linear(gate), "up": Linear(up), "down": Linear(down)}
                p = as_dtype(weights, dtype, skip_modules=quarot.int8_skip_modules(cfg))
                return _normal(1, rows, cfg.d_model), p["gate"], p["up"], p["down"]

            def function(x, gate, up, down, *, impl=None):
                limit = cfg.swiglu_limit
                return kernels.gated_mlp(x, gate, up, down, cfg.mlp, limit=limit, impl=impl)

            yield Case(
                name=f"gated_mlp {rows}x{cfg.d_model}x{cfg.d_ff} {dtype}",
                operation="gated_mlp",
                function=function,
                inputs=inputs,
                flops=6 * rows * cfg.d_model * cfg.d_ff,
                dtype=dtype,
                expected=in_float64(functools.partial(function, impl="reference")),
                cold_argnums=(1, 2, 3),
                reuse_distance=_model_bytes(cfg, dtype),
            )


def _experts(cfg: Config) -> Iterator[Case]:
    """Yield cases of the MLP with experts; without experts in the config, 8 with 2 per token."""
    num_experts, k = cfg.num_experts or 8, cfg.num_experts_per_tok or 2
    kind = cfg.mlp if cfg.mlp in GATED_MLPS else "swiglu"
    for dtype in DTYPES:
        for rows in (1, PROMPT_LENGTH):

            def inputs(rows=rows, dtype=dtype) -> tuple:
                shapes = {"gate": (cfg.d_ff, cfg.d_model), "up": (cfg.d_ff, cfg.d_model)}
                shapes["down"] = (cfg.d_model, cfg.d_ff)
                weights = {
                    name: Linear(_normal(num_experts, *shape, seed=i, scale=0.02))
                    for i, (name, shape) in enumerate(shapes.items())
                }
                p = as_dtype(weights, dtype, skip_modules=quarot.int8_skip_modules(cfg))
                logits = _normal(1, rows, num_experts, seed=5)
                chosen_weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), k)
                x = _normal(1, rows, cfg.d_model, seed=6)
                return x, chosen_weights, chosen, p["gate"], p["up"], p["down"]

            def function(x, weights, chosen, gate, up, down, *, impl=None):
                arguments = (x, weights, chosen, gate, up, down, kind)
                return kernels.experts(*arguments, limit=cfg.swiglu_limit, impl=impl)

            yield Case(
                name=f"experts {rows}x{cfg.d_model} by {k} of {num_experts} {dtype}",
                operation="experts",
                function=function,
                inputs=inputs,
                flops=6 * rows * k * cfg.d_model * cfg.d_ff,
                dtype=dtype,
                expected=in_float64(functools.partial(function, impl="reference")),
                cold_argnums=(3, 4, 5),
                reuse_distance=_model_bytes(cfg, dtype),
            )


def _attend(cfg: Config) -> Iterator[Case]:
    for length in (PROMPT_LENGTH, 4 * PROMPT_LENGTH):

        def inputs(length=length) -> tuple:
            heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
            return tuple(_normal(1, length, n, cfg.head_dim, seed=i) for i, n in enumerate(heads))

        width = cfg.num_heads * cfg.head_dim
        yield Case(
            name=f"attend 1x{length}",
            operation="attend",
            function=kernels.attend,
            inputs=inputs,
            flops=4 * width * length * (length + 1) / 2,  # half of the scores are masked
            expected=in_float64(functools.partial(kernels.attend, impl="reference")),
        )


def _attend_cached(cfg: Config, context: int) -> Iterator[Case]:
    chunk = -(-context // cache.BLOCK_SIZE) * cache.BLOCK_SIZE
    for kv_dtype, rows, length, start in (
        ("float32", 1, 1, context),
        ("bfloat16", 1, 1, context),
        ("bfloat16", 4, 1, context),
        ("float32", 1, PROMPT_LENGTH, chunk),
        ("bfloat16", 1, PROMPT_LENGTH, chunk),
    ):

        def inputs(kv_dtype=kv_dtype, rows=rows, length=length, start=start) -> tuple:
            one_layer = dataclasses.replace(cfg, num_layers=1)
            total = start + length
            kv_cache, tables, _ = _filled_cache(one_layer, kv_dtype, rows, total, num_new=1)
            starts = jnp.full(rows, start, jnp.int32)
            q = _normal(rows, length, cfg.num_heads, cfg.head_dim)
            return q, kv_cache.keys[0], kv_cache.values[0], tables, starts

        width = cfg.num_heads * cfg.head_dim
        num_scores = sum(range(start + 1, start + length + 1)) * rows  # per head
        num_cached = rows * (start + length) * 2 * cfg.num_kv_heads * cfg.head_dim
        yield Case(
            name=f"attend_cached {rows}x{length} behind {start} {kv_dtype}",
            operation="attend_cached",
            function=kernels.attend_cached,
            inputs=inputs,
            flops=4 * width * num_scores,
            bytes=num_cached * jnp.dtype(kv_dtype).itemsize + 8 * rows * length * width,
            expected=in_float64(functools.partial(kernels.attend_cached, impl="reference")),
            cold_argnums=(1, 2),
            reuse_distance=_model_bytes(cfg, kv_dtype) if length == 1 else 0.0,
        )


def _truncate(cfg: Config) -> Iterator[Case]:
    for name, top_k, top_p, min_p in (("top-k 50", 50, 1.0, 0.0), ("top-p 0.9", 0, 0.9, 0.0)):

        def inputs(top_k=top_k, top_p=top_p, min_p=min_p) -> tuple:
            return (
                _normal(cfg.vocab_size, scale=4.0),
                *(jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p)),
            )

        reference = functools.partial(kernels.truncate, impl="reference")
        yield Case(
            name=f"truncate {name} of {cfg.vocab_size}",
            operation="truncate",
            function=kernels.truncate,
            inputs=inputs,
            flops=4 * cfg.vocab_size,
            expected=in_float64(lambda *args, f=reference: jax.nn.softmax(f(*args))),
            select_output=jax.nn.softmax,
        )


# --- programs -----------------------------------------------------------------------------------


def prefill_case(cfg: Config, dtype: str) -> Case:
    """Return the case of prefilling a prompt of `PROMPT_LENGTH` tokens in one step."""
    ids = np.random.default_rng(3).integers(0, cfg.vocab_size, (1, PROMPT_LENGTH)).astype(np.int32)
    starts, last = np.zeros(1, np.int32), np.int32(PROMPT_LENGTH - 1)

    def inputs() -> tuple:
        kv_cache, tables, _ = _filled_cache(cfg, _cache_dtype(dtype), 1, 0, num_new=PROMPT_LENGTH)
        return random_params(cfg, dtype), kv_cache, ids, tables, starts, last

    width, attended = cfg.num_heads * cfg.head_dim, PROMPT_LENGTH * (PROMPT_LENGTH + 1) / 2
    return Case(
        name=f"prefill 1x{PROMPT_LENGTH} {dtype}",
        function=lambda params, *rest: generate.prefill(params, cfg, *rest),
        inputs=inputs,
        flops=2 * PROMPT_LENGTH * decoder.num_matmul_weights(cfg)
        + 2 * cfg.vocab_size * cfg.d_model
        + 4 * width * attended * cfg.num_layers,
        bytes=_model_bytes(cfg, dtype) + PROMPT_LENGTH * kv_bytes_per_token(cfg, dtype),
        dtype=dtype,
        expected=None if cfg.rope_scaling else lambda *_: _exact_prefill(cfg, ids.tobytes()),
        select_output=lambda out: out[0],
        donate_argnums=(1,),
        next_inputs=lambda before, out: (before[0], out[1], *before[2:]),
    )


def decode_case(cfg: Config, dtype: str, rows: int, context: int) -> Case:
    """Return the case of a greedy decoding step.

    Args:
        cfg: Config of the decoder.
        dtype: Dtype of the weights.
        rows: Number of sequences in the batch.
        context: Number of tokens of each sequence in the KV cache.

    Returns:
        The case.
    """
    ids = np.random.default_rng(4).integers(0, cfg.vocab_size, rows).astype(np.int32)
    params = [sampling.SamplingParams(temperature=0.0)] * rows
    metadata = sampling.batch_sampling_params(params, [0] * rows, [1] * rows, range(rows))

    def inputs() -> tuple:
        kv_cache, tables, _ = _filled_cache(cfg, _cache_dtype(dtype), rows, context, num_new=1)
        penalty_state = sampling.init_penalty_state(rows, cfg.vocab_size)
        starts = np.full(rows, context, np.int32)
        return random_params(cfg, dtype), kv_cache, penalty_state, ids, tables, starts, metadata

    def function(params, *rest):
        return generate.decode(params, cfg, *rest, num_ids=cfg.vocab_size)

    def expected(*_) -> np.ndarray:
        past_key_values = _filled_cache(cfg, "float32", rows, context, num_new=1)[2]
        logits = exact.decoder(random_params(cfg, "float32"), cfg, ids[:, None], past_key_values)
        logprobs = np.sort(exact.log_softmax(logits), axis=-1)[:, ::-1]
        return logprobs[:, : sampling.MAX_TOP_LOGPROBS]

    width = cfg.num_heads * cfg.head_dim
    return Case(
        name=f"decode {rows}x1 behind {context} {dtype}",
        function=function,
        inputs=inputs,
        flops=2 * rows * (decoder.num_matmul_weights(cfg) + cfg.vocab_size * cfg.d_model)
        + 4 * rows * width * (context + 1) * cfg.num_layers,
        bytes=_model_bytes(cfg, dtype) + rows * (context + 1) * kv_bytes_per_token(cfg, dtype),
        dtype=dtype,
        expected=None if cfg.rope_scaling else expected,
        select_output=lambda out: out[0].top_logprobs,
        donate_argnums=(1, 2),
        next_inputs=lambda before, out: (before[0], out[1], out[2], *before[3:]),
    )


def _embed_case(cfg: encoder.Config, dtype: str) -> Case:
    """Return the case of embedding four texts of 256 tokens."""
    shape = (4, 256)
    ids = np.random.default_rng(5).integers(0, cfg.vocab_size, shape).astype(np.int32)
    segments = np.ones(shape, np.int32)
    tokens, matrices = ids.size, cfg.num_layers * (4 * cfg.d_model + 2 * cfg.d_ff) * cfg.d_model

    def inputs() -> tuple:
        params = encoder.init(jax.random.key(0), cfg)
        return as_dtype(params, dtype), ids, segments

    def expected(_, ids, segments) -> np.ndarray:
        return exact.encoder(encoder.init(jax.random.key(0), cfg), cfg, ids)

    return Case(
        name=f"embed {shape[0]}x{shape[1]} {dtype}",
        function=lambda params, ids, segments: encoder.embed_batch(params, cfg, ids, segments, 1),
        inputs=inputs,
        flops=2 * tokens * matrices + 4 * tokens * shape[1] * cfg.d_model * cfg.num_layers,
        bytes=matrices * jnp.dtype(dtype).itemsize + 4 * tokens * cfg.d_model,
        dtype=dtype,
        expected=expected,
        select_output=lambda out: out[:, 0],
    )


# --- inputs -------------------------------------------------------------------------------------


def as_dtype(tree: Any, dtype: str, *, skip_modules: Collection[str] = ()) -> Any:
    """Convert the linear layers of a pytree of weights to a dtype, as `checkpoint.load` does.

    Args:
        tree: Pytree of weights in float32.
        dtype: "float32", "bfloat16", "int8" or "int4".
        skip_modules: Names of linear layers that become bfloat16 if `dtype` is "int8"; see
            `quarot.int8_skip_modules`.

    Returns:
        The converted pytree. Unlike in a loaded checkpoint, int8 weights are not rotated (QuaRot).
    """

    def convert(key_path, node):
        if not isinstance(node, Linear) or dtype == "float32":
            return node
        name = _name(key_path) if key_path else ""
        if dtype == "int4" and quant.has_blocks(node.weight.shape):
            bits = quant.bits_of(name)
            return node.replace(weight=quant.quantize(np.asarray(node.weight), bits))
        if dtype == "int8" and name not in skip_modules:
            return layers.quantize(node)
        return node.replace(weight=node.weight.astype(jnp.bfloat16))

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=_is_linear)


def _name(key_path: tuple) -> str:
    return str(getattr(key_path[-1], "name", getattr(key_path[-1], "key", "")))


def _is_linear(node: Any) -> bool:
    return isinstance(node, Linear)


@functools.lru_cache(maxsize=3)
def random_params(cfg: Config, dtype: str) -> decoder.Params:
    """Return random weights; they are the same in every dtype, up to rounding."""
    if dtype == "float32":
        return decoder.init(jax.random.key(0), cfg)
    return as_dtype(
        random_params(cfg, "float32"), dtype, skip_modules=quarot.int8_skip_modules(cfg)
    )


@functools.lru_cache(maxsize=1)  # the cases of the three dtypes share the float32 weights
def _exact_prefill(cfg: Config, ids: bytes) -> np.ndarray:
    return exact.decoder(random_params(cfg, "float32"), cfg, np.frombuffer(ids, np.int32)[None])


def _filled_cache(cfg: Config, kv_dtype: str, rows: int, length: int, *, num_new: int):
    """Return a KV cache with `length` random positions per row and space for `num_new` more.

    Returns:
        The cache; the block tables; and for each layer the keys and values that the cache
        contains, float32 [B, length, K, H].
    """
    blocks_per_row = cache.blocks_for(length + num_new)
    kv_cache = cache.init(cfg, rows * blocks_per_row, jnp.dtype(kv_dtype))
    tables = np.arange(1, rows * blocks_per_row + 1, dtype=np.int32).reshape(rows, blocks_per_row)
    keys, values, past_key_values = [], [], []
    append = jax.jit(cache.append, donate_argnums=(0, 1))
    padded = cache.blocks_for(length) * cache.BLOCK_SIZE  # `append` takes whole blocks
    for i in range(cfg.num_layers):
        k, v = (
            _normal(rows, padded, cfg.num_kv_heads, cfg.head_dim, seed=2 * i + offset)
            for offset in (0, 1)
        )
        pools = kv_cache.keys[i], kv_cache.values[i]
        if length:
            pools = append(*pools, k, v, tables, np.zeros(rows, np.int32))
        keys.append(pools[0])
        values.append(pools[1])
        past_key_values.append((k[:, :length], v[:, :length]))
    return cache.KVCache(keys=tuple(keys), values=tuple(values)), tables, past_key_values


def _normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(numbers * np.float32(scale))


def _cache_dtype(dtype: str) -> str:
    """Return the dtype of the KV cache that the engine uses with weights of `dtype`."""
    return "float32" if dtype == "float32" else "bfloat16"


# --- arithmetic ---------------------------------------------------------------------------------


def _model_bytes(cfg: Config, dtype: str) -> float:
    """Return the bytes of weights that a decoding step reads, including the LM head."""
    params = decoder.abstract(cfg)
    head = params.embed if params.head is None else params.head
    leaves = jax.tree_util.tree_leaves_with_path((params.layers, head), is_leaf=_is_linear)
    total = 0.0
    for key_path, leaf in leaves:
        if _is_linear(leaf):
            size = np.prod(leaf.weight.shape) * _bytes_per_weight(key_path, leaf, cfg, dtype)
            if len(leaf.weight.shape) == 3:  # one token reads some of the experts
                size *= (cfg.num_experts_per_tok or 1) / leaf.weight.shape[0]
            total += size
    return total


def _bytes_per_weight(key_path: tuple, leaf: Linear, cfg: Config, dtype: str) -> float:
    name = _name(key_path) or "head"  # the path of the head is its index
    if dtype == "int4" and quant.has_blocks(leaf.weight.shape):
        return quant.GROUP_BYTES[quant.bits_of(name)] / (quant.GROUP * quant.BLOCK)
    is_skipped = dtype == "int4" or dtype == "int8" and name in quarot.int8_skip_modules(cfg)
    return jnp.dtype("bfloat16" if is_skipped else dtype).itemsize


def kv_bytes_per_token(cfg: Config, dtype: str) -> int:
    """Return the bytes of keys and values of one token in all layers.

    Args:
        cfg: Config of the decoder.
        dtype: Dtype of the weights, which determines the dtype of the KV cache.
    """
    return cache.bytes_per_block(cfg, jnp.dtype(_cache_dtype(dtype))) // cache.BLOCK_SIZE
