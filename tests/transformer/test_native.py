"""Tests of block quantization and of the Numba kernels that decode with it."""

import functools
import os
import platform
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numba import types

import transformer
from tests.transformer.conftest import randomize
from transformer import cache, checkpoint, decoder, generate, kernels, lora, quant
from transformer.config import Config
from transformer.native import attention, ffi, products, simd
from transformer.weights import Linear

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_blocks_are_rows_of_dequantized_weight(bits):
    weight = quant.quantize(normal(20, 96), bits)
    assert weight.shape == (20, 96)
    rows = quant.dequantize(weight)
    ids = np.array([[3, 19], [0, 8]])
    np.testing.assert_array_equal(quant.take_rows(weight, ids), rows[ids])


@pytest.mark.parametrize(("bits", "most"), [(4, 0.082), (8, 0.006)])
def test_quantization_error_is_small(bits, most):
    """The bound of 4 bits is below that of the range (smallest, largest), which is 0.085."""
    x = normal(64, 256)
    error = quant.dequantize(quant.quantize(x, bits)) - x
    assert jnp.sqrt(jnp.mean(error**2)) < most


def test_constant_and_zero_blocks_are_exact():
    x = np.repeat(np.array([[0.0], [0.5], [-2.0]], np.float32), 32, axis=1)
    for bits in (4, 8):
        np.testing.assert_allclose(quant.dequantize(quant.quantize(x, bits)), x, rtol=1e-3)


@pytest.mark.parametrize("kind", quant.GGUF_BITS)
def test_blocks_of_gguf_file_keep_their_numbers(kind):
    type_ = gguf.GGMLQuantizationType[kind]
    if kind == "Q4_K":  # the package does not quantize to this type
        raw = RNG.integers(0, 256, (16, 288), np.uint8)
        scales = np.array([0.01, 0.02], np.float16).view(np.uint8)
        raw.reshape(16, 2, 144)[..., :4] = scales
    else:
        raw = gguf.quants.quantize(normal(16, 512), type_)
    bits = quant.GGUF_BITS[kind]
    groups = quant.empty(16, 512, bits)
    quant.pack(groups, 0, quant.from_gguf(raw, kind))
    expected = gguf.quants.dequantize(raw, type_)
    rounding = 1e-3 * np.abs(expected).max() if kind == "Q4_K" else 0
    np.testing.assert_allclose(
        quant.dequantize(quant.from_groups(groups, 16)), expected, rtol=0, atol=rounding
    )


def test_rows_that_are_no_multiple_of_32_raise():
    with pytest.raises(ValueError, match="40"):
        quant.quantize(normal(8, 40), 4)


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inner"), [(20, 96), (576, 64), (4096, 576)])
def test_product_matches_plain_loop_for_any_number_of_rows(bits, out, inner):
    weight = quant.quantize(normal(out, inner) * 0.05, bits)
    matmul = jax.jit(products.matmul)
    x = normal(33, inner)
    integers = np.zeros(x.shape, np.int8)
    scales, sums = (np.zeros((len(x), inner // 32), np.float32) for _ in range(2))
    for b in range(len(x)):
        products.quantize_row(x[b], integers[b], scales[b], sums[b])
    plain = np.zeros((len(x), 8 * len(weight.packed)), np.float32)
    packed = np.asarray(weight.packed)
    products.multiply_plain(
        packed.reshape(-1), packed.shape[2], inner // 32, integers, scales, sums, len(x), plain
    )
    alone = np.concatenate([matmul(x[b : b + 1], weight) for b in range(5)])
    for num_rows in (2, 4, 5, 33):
        y = np.asarray(matmul(x[:num_rows], weight))
        np.testing.assert_array_equal(y[:5], alone[:num_rows])
        np.testing.assert_allclose(y, plain[:num_rows, :out], rtol=0, atol=1e-6 * np.abs(y).max())


def test_largest_integers_do_not_overflow():
    """Sixteen-bit sums of AVX2 hold 8 * 2 * 15 * 127."""
    for bits, value in ((4, 15), (8, 127)):
        groups = quant.empty(8, 32, bits)
        integers = np.full((8, 1, 32), value, np.uint8 if bits == 4 else np.int8)
        minimums = np.zeros((8, 1), np.float32) if bits == 4 else None
        quant.pack(groups, 0, quant.Blocks(integers, np.ones((8, 1), np.float32), minimums))
        weight = quant.from_groups(groups, 8)
        for sign in (1, -1):
            y = products.matmul(np.full((1, 32), sign * 127, np.float32), weight)
            np.testing.assert_allclose(y, sign * 32 * value * 127, rtol=1e-6)


def test_concurrent_programs_do_not_disturb_each_other():
    weights = [quant.quantize(normal(1024, 256), 4) for _ in range(3)]
    x = normal(2, 256)
    matmul = jax.jit(products.matmul)
    expected = [np.asarray(matmul(x, weight)) for weight in weights]
    wrong = []

    def run(i: int) -> None:
        for _ in range(200):
            if not np.array_equal(matmul(x, weights[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_exponential_is_accurate():
    x = np.linspace(-87, 87, 10001).astype(np.float32)
    y = np.array([attention.exp(v) for v in x])
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=3e-7)


# --- the whole step -------------------------------------------------------------------------------

BASE = Config(
    num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32, d_model=96, d_ff=160, vocab_size=200,
    max_seq_len=2048,
)  # fmt: skip
DECODERS = {
    "llama": {},
    "biases": dict(qkv_bias=True, linear_bias=True),
    "norms of queries and keys": dict(qk_norm=True),
    "windows": dict(windows=(100, None, 300)),
    "geglu": dict(mlp="geglu", norm="unit_rms", query_scalar=50),
    "multipliers": dict(residual_multiplier=0.3, attention_multiplier=0.1),
    "partial rotation": dict(rotary_dim=16),
    "one head per key": dict(num_heads=8, num_kv_heads=8, head_dim=40, d_ff=96),
}
forward_cached = functools.partial(jax.jit, static_argnums=1)(decoder.forward_cached)


def quantized(cfg: Config) -> decoder.Params:
    def convert(node):
        if not isinstance(node, Linear):
            return node
        return node.replace(weight=quant.quantize(np.asarray(node.weight), 4))

    params = randomize(decoder.init(jax.random.key(0), cfg))
    return jax.tree.map(convert, params, is_leaf=lambda node: isinstance(node, Linear))


def filled_cache(cfg: Config, num_rows: int, dtype: str) -> tuple[cache.KVCache, np.ndarray]:
    """Return a cache of random keys and values, and tables of four blocks for each row."""
    kv_cache = cache.init(cfg, 4 * num_rows, dtype)

    def fill(pool: jax.Array) -> jax.Array:
        x = jnp.asarray(normal(*pool.shape), dtype)
        return x.view(jnp.uint16) if dtype == "bfloat16" else x

    tables = np.arange(1, 4 * num_rows + 1, dtype=np.int32).reshape(num_rows, 4)
    return jax.tree.map(fill, kv_cache), tables


@pytest.mark.parametrize(
    ("name", "num_rows", "dtype"),
    [
        *((name, 5, "bfloat16") for name in DECODERS),
        ("llama", 1, "bfloat16"),
        ("windows", 3, "float32"),
    ],
)
def test_native_step_matches_layers_one_by_one(name, num_rows, dtype):
    cfg = replace(BASE, **DECODERS[name])
    params = quantized(cfg)
    assert decoder.has_native_step(params, cfg)
    kv_cache, tables = filled_cache(cfg, num_rows, dtype)
    starts = np.array([300, 0, 255, 1023, 40][:num_rows], np.int32)
    arguments = params, cfg, kv_cache, np.arange(num_rows, dtype=np.int32)[:, None], tables, starts
    x, native = forward_cached(*arguments)
    with kernels.override(decode_layers="reference"):
        expected, plain = forward_cached(*arguments)
    # The last bit of a number can round an integer of the next product up instead of down.
    error, largest = np.abs(x - expected), np.abs(expected).max()
    assert np.median(error) < 2e-6 * largest
    assert error.max() < 1e-2 * largest
    for a, b in zip(jax.tree.leaves(native), jax.tree.leaves(plain), strict=True):
        if dtype == "bfloat16":  # the last bit of a rounded key can differ
            a, b = (np.asarray(pool).view(jnp.bfloat16).astype(np.float32) for pool in (a, b))
            np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5)
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        dict(norm="layer"),
        dict(post_norms=True),
        dict(attn_logit_softcap=20.0),
        dict(qk_norm=True, qk_norm_over="projection"),
        dict(mlp="gelu"),
        dict(num_experts=4, num_experts_per_tok=2),
        dict(parallel_residual=True),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_decoder_that_native_step_does_not_cover_runs_layers_one_by_one(fields):
    cfg = replace(BASE, **fields)
    params = randomize(decoder.init(jax.random.key(0), cfg))
    params = jax.tree.map(
        lambda p: (
            p.replace(weight=quant.quantize(np.asarray(p.weight), 4))
            if isinstance(p, Linear) and p.weight.ndim == 2
            else p
        ),
        params,
        is_leaf=lambda node: isinstance(node, Linear),
    )
    assert not decoder.has_native_step(params, cfg)
    kv_cache, tables = filled_cache(cfg, 1, "float32")
    ids, starts = np.array([[7]], np.int32), np.array([0], np.int32)
    x, _ = forward_cached(params, cfg, kv_cache, ids, tables, starts)
    whole = decoder.hidden_states(params, cfg, ids)
    np.testing.assert_allclose(
        decoder.final_norm(params, cfg, x), whole, rtol=0, atol=2e-2 * np.abs(whole).max()
    )


def test_adapter_runs_layers_one_by_one_with_native_products():
    params = quantized(BASE)
    adapter = randomize(lora.init(jax.random.key(1), BASE, rank=4, alpha=8))
    adapted = lora.apply(params, adapter)
    assert not decoder.has_native_step(adapted, BASE)
    with pytest.raises(ValueError, match="int4"):
        lora.merge(params, adapter)


# --- checkpoints ----------------------------------------------------------------------------------


def test_folder_in_float_is_loaded_in_blocks(tmp_path):
    exact = randomize(decoder.init(jax.random.key(0), BASE))
    checkpoint.save(tmp_path, exact, BASE)
    params, cfg, _ = checkpoint.load(tmp_path, dtype="int4")
    assert (params.embed.weight.bits, params.layers[0].down.weight.bits) == (8, 4)
    for got, want in ((params.embed, exact.embed), (params.layers[0].q, exact.layers[0].q)):
        error = quant.dequantize(got.weight) - want.weight
        assert jnp.sqrt(jnp.mean(error**2)) < 0.1 * jnp.std(want.weight)
    assert cfg == BASE
    assert decoder.num_bytes(params) < 0.3 * decoder.num_bytes(exact)


def test_greedy_tokens_are_those_of_layers_one_by_one():
    params = quantized(BASE)
    run = functools.partial(generate.generate, params, BASE, list(range(20)), max_new_tokens=20)
    native = list(run())
    with kernels.override(decode_layers="reference"):
        assert list(run()) == native


# --- the interface of XLA and the machine ---------------------------------------------------------

HEADER = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"


@pytest.mark.parametrize(
    ("struct", "name"),
    [
        (ffi.ApiVersion, "XLA_FFI_Api_Version"),
        (ffi.Metadata, "XLA_FFI_Metadata"),
        (ffi.MetadataExtension, "XLA_FFI_Metadata_Extension"),
        (ffi.Buffer, "XLA_FFI_Buffer"),
        (ffi.Args, "XLA_FFI_Args"),
        (ffi.Args, "XLA_FFI_Rets"),
        (ffi.CallFrame, "XLA_FFI_CallFrame"),
        (ffi.Api, "XLA_FFI_Api"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_of_struct_are_those_of_the_header(struct, name):
    text = re.sub(r"//[^\n]*", "", HEADER.read_text("utf-8"))
    body = re.search(rf"struct {name} {{(.*?)\n}}", text, re.DOTALL)[1]
    fields = re.findall(r"(\w+)\)?;", body)
    if fields[0] == "extension_base":  # its fields are inline in ours
        base = re.search(r"struct XLA_FFI_Extension_Base {(.*?)\n}", text, re.DOTALL)[1]
        fields[:1] = re.findall(r"(\w+);", base)
    ours = [field[0] for field in struct._fields_]
    renamed = {"rets": "args"} if name == "XLA_FFI_Rets" else {}
    assert [renamed.get(field, field) for field in fields[: len(ours)]] == ours


def test_version_of_the_interface_is_the_one_that_is_mirrored():
    text = HEADER.read_text("utf-8")
    assert re.search(r"#define XLA_FFI_API_MAJOR (\d+)", text)[1] == "0"


def dot_instruction() -> str:
    if simd.HAS_VNNI:
        return "vpdpbusd"
    return "vpmaddubsw" if simd.HAS_AVX2 else ""


@pytest.mark.parametrize(
    ("name", "num_integers"), [("_one_row_4bit", 6), ("_four_rows_4bit", 7), ("multiply_8bit", 9)]
)
def test_product_uses_dot_product_instruction_of_this_cpu(name, num_integers):
    if not dot_instruction():
        pytest.skip("this CPU has none of the instructions")
    signature = (*(types.intp,) * num_integers, types.boolean)
    function = ffi.nb.njit(error_model="numpy")(getattr(products, name).py_func)
    function.compile(signature)
    assert dot_instruction() in function.inspect_asm(signature)


PRODUCTS = """
import hashlib
import numpy as np
from transformer import quant
from transformer.native import products, simd
x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
w = np.random.default_rng(1).standard_normal((20, 96)).astype(np.float32)
y = [np.asarray(products.matmul(x, quant.quantize(w, bits))) for bits in (4, 8)]
print(simd.HAS_AVX2, hashlib.sha256(b"".join(a.tobytes() for a in y)).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the features are those of x86")
def test_form_for_any_machine_computes_the_same_bits(tmp_path):
    """Compile for a processor without AVX2 and conversions of float16, in a process of its own."""
    features = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
    outputs = []
    for variables in ({}, features):
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(transformer.__file__).parents[1]),
            "NUMBA_CACHE_DIR": str(tmp_path),
            **variables,
        }
        command = [sys.executable, "-c", PRODUCTS]
        outputs.append(subprocess.check_output(command, env=environment, text=True).split())
    assert outputs[1][0] == "False"
    assert outputs[0][1] == outputs[1][1]


def test_cache_folder_that_cannot_be_written_turns_the_cache_off(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setattr(ffi.platformdirs, "user_cache_path", lambda name: tmp_path / "file" / name)
    with caplog.at_level("WARNING"):
        assert not ffi._use_cache_folder()
    assert len(caplog.records) == 1


def test_int4_works_without_numba():
    """A process in which Numba cannot be imported computes the same with XLA."""
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from transformer import kernels, quant\n"
        "assert kernels.DEFAULT_IMPL['cpu']['decode_layers'] == 'reference'\n"
        "x = np.linspace(-1, 1, 96, dtype=np.float32).reshape(1, 96)\n"
        "weight = quant.quantize(np.cos(np.arange(1920, dtype=np.float32)).reshape(20, 96), 4)\n"
        "y = kernels.matmul(x, weight)\n"
        "np.testing.assert_allclose(y, x @ np.asarray(quant.dequantize(weight)).T, rtol=1e-4)\n"
        "try: kernels.matmul(x, weight, impl='native')\n"
        "except kernels.Unavailable: print('unavailable')\n"
    )
    root = str(Path(transformer.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["unavailable"]
