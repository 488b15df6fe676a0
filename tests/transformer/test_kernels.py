"""Every kernel implementation compared with its float64 reference, and their selection."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.naming import naming
from transformer import cache, decoder, kernels
from transformer.bench import decoder_cases, in_float64
from transformer.config import Config
from transformer.weights import Linear, Lora

pytestmark = pytest.mark.heavy

RNG = np.random.default_rng(0)
ALL_IMPLS = [(operation, impl) for operation, impls in kernels.IMPLS.items() for impl in impls]
ROUNDING = {
    "float32": 1e-5,
    "bfloat16": 1e-2,
    "int8": 3e-2,
    "int4": 3e-2,
}  # tolerance / largest value


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def check_impl(
    operation: str, impl: str, arguments: tuple, tolerance: float = 1e-5, **named
) -> None:
    """Compare an implementation with the float64 reference; raise `Unavailable` if unsupported."""
    function = getattr(kernels, operation)
    expected = in_float64(lambda *a: function(*a, **named, impl="reference"))(*arguments)
    actual = jax.jit(lambda *a: function(*a, **named, impl=impl))(*arguments)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("operation", "impl"), ALL_IMPLS)
def test_implementation_has_parameters_of_reference(operation, impl):
    names = [
        list(inspect.signature(kernels.get_impl(operation, name)).parameters)
        for name in (impl, "reference")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 7, kernels.MANY_ROWS])
def test_matmul_matches_reference(rows, dtype):
    p = decoder_cases.as_dtype(Linear(weight=normal(48, 96)), dtype)
    arguments = (normal(rows, 96), p.weight, p.scale)
    available = []
    for impl in (None, *kernels.IMPLS["matmul"]):
        try:
            check_impl("matmul", impl, arguments, ROUNDING[dtype])
            available.append(impl)
        except kernels.Unavailable as error:
            assert f"matmul {impl} " in str(error)
    floats = ["dot", "batched", "split_weight", *["pad_to_two_rows"] * (rows == 1)]
    integers = {"int8": ["int8"], "int4": ["dequantized", "native"]}
    assert available == [None, "reference", *integers.get(dtype, floats)]


def test_default_matmul_depends_on_rows_and_dtype():
    weights = {
        "float32": ("split_weight", "batched", "dot"),
        "bfloat16": ("pad_to_two_rows", "batched", "dot"),
        "int8": ("int8",) * 3,
    }
    for dtype, names in weights.items():
        for count, name in zip((", one row", "", ", many rows"), names, strict=True):
            assert kernels.DEFAULT_IMPL["cpu"][f"matmul {dtype}{count}"] == name
    with pytest.raises(kernels.Unavailable, match=naming("'matmul float16, one row'")):
        kernels.matmul(normal(1, 8), normal(4, 8).astype(jnp.float16))


@pytest.mark.parametrize("impl", kernels.IMPLS["norm"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_norm_matches_reference(impl, has_bias):
    bias = normal(96) if has_bias else None
    check_impl("norm", impl, (2 + normal(2, 5, 96), normal(96), bias), eps=1e-5)


@pytest.mark.parametrize("impl", kernels.IMPLS["rotate"])
def test_rotate_matches_reference(impl):
    angle = normal(2, 5, 1, 8)
    check_impl("rotate", impl, (normal(2, 5, 3, 16), jnp.cos(angle), jnp.sin(angle)))


def test_rotate_first_channels_leaves_other_channels_unchanged():
    x, angle = normal(2, 5, 3, 16), normal(2, 5, 1, 3)
    rotated = kernels.rotate(x, jnp.cos(angle), jnp.sin(angle))
    np.testing.assert_array_equal(rotated[..., 6:], x[..., 6:])
    first = kernels.rotate(x[..., :6], jnp.cos(angle), jnp.sin(angle))
    np.testing.assert_array_equal(rotated[..., :6], first)


@pytest.mark.parametrize("impl", kernels.IMPLS["attend"])
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("length", [20, 300, 1100])
def test_attend_matches_reference(impl, window, length):
    heads = (normal(2, length, 4, 8), normal(2, length, 2, 8), normal(2, length, 2, 8))
    check_impl("attend", impl, heads, window=window)


@pytest.mark.parametrize("impl", kernels.IMPLS["attend"])
def test_attend_with_soft_cap_matches_reference(impl):
    """Compare forward and backward pass; an implementation without soft cap raises Unavailable."""
    heads = (3 * normal(1, 150, 4, 8), 3 * normal(1, 150, 2, 8), normal(1, 150, 2, 8))
    weights = np.asarray(normal(1, 150, 4, 8))

    def gradients(impl):
        def loss(*heads):
            return (kernels.attend(*heads, window=40, softcap=2.0, impl=impl) * weights).sum()

        return lambda *heads: jnp.concatenate(jax.grad(loss, (0, 1, 2))(*heads), axis=2)

    if impl == "jax_nn":
        with pytest.raises(kernels.Unavailable, match=naming("jax_nn", 2.0)):
            kernels.attend(*heads, softcap=2.0, impl=impl)
        return
    check_impl("attend", impl, heads, softcap=2.0, window=40)
    expected = in_float64(gradients("reference"))(*heads)
    actual = jax.jit(gradients(impl))(*heads)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    other = kernels.attend(*heads, window=40, impl=impl)
    assert np.abs(kernels.attend(*heads, window=40, softcap=2.0, impl=impl) - other).max() > 0.1


@pytest.mark.parametrize("impl", kernels.IMPLS["attend"])
def test_attend_with_sinks_matches_reference(impl):
    """In the forward and the backward pass; an implementation without sinks raises."""
    arguments = (normal(1, 150, 4, 8), normal(1, 150, 2, 8), normal(1, 150, 2, 8), 3 * normal(4))
    weights = np.asarray(normal(1, 150, 4, 8))

    def function(impl):
        return lambda *a: kernels.attend(*a[:3], sinks=a[3], window=40, impl=impl)

    def gradients(impl):
        loss = lambda *a: (function(impl)(*a) * weights).sum()  # noqa: E731
        return lambda *a: jnp.concatenate([g.ravel() for g in jax.grad(loss, (0, 1, 2, 3))(*a)])

    if impl == "jax_nn":
        with pytest.raises(kernels.Unavailable, match=naming("jax_nn", "sinks")):
            function(impl)(*arguments)
        return
    for change in (function, gradients):
        expected = in_float64(change("reference"))(*arguments)
        actual = jax.jit(change(impl))(*arguments)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # Every sink takes weight from the values; one of -inf takes none.
    values = (*arguments[:2], jnp.ones_like(arguments[2]))
    assert (function(impl)(*values, arguments[3]) < 1).all()
    none = function(impl)(*values, jnp.full(4, -1e30))
    np.testing.assert_allclose(none, np.ones_like(none), rtol=1e-6)


def segments_of(*lengths: int) -> np.ndarray:
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)


@pytest.mark.parametrize("impl", kernels.IMPLS["attend"])
@pytest.mark.parametrize("window", [None, 40])
def test_attend_with_segments_matches_reference(impl, window):
    segments = np.stack([segments_of(1, 129, 170), segments_of(250, 50)])
    heads = [normal(2, 300, 4, 8), normal(2, 300, 2, 8), normal(2, 300, 2, 8)]
    check_impl("attend", impl, tuple(heads), window=window, segments=segments)
    packed = kernels.attend(*heads, window=window, segments=segments, impl=impl)
    alone = kernels.attend(*(x[:1, 130:] for x in heads), window=window, impl=impl)
    np.testing.assert_allclose(packed[:1, 130:], alone, atol=1e-5)


@pytest.mark.parametrize("impl", kernels.IMPLS["attend"])
@pytest.mark.parametrize("window", [None, 40])
def test_attend_gradients_match_reference(impl, window):
    segments = segments_of(1, 129, 170)[None]
    heads = (normal(1, 300, 4, 8), normal(1, 300, 2, 8), normal(1, 300, 2, 8))
    weights = np.asarray(normal(1, 300, 4, 8))

    def gradients(impl):
        def loss(*heads):
            y = kernels.attend(*heads, window=window, segments=segments, impl=impl)
            return (y * weights).sum()

        return lambda *heads: jnp.concatenate(jax.grad(loss, (0, 1, 2))(*heads), axis=2)

    expected = in_float64(gradients("reference"))(*heads)
    actual = jax.jit(gradients(impl))(*heads)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_blockwise_attention_uses_less_memory():
    """Compare forward and backward pass; training on long texts needs the lower memory use."""

    def loss(impl):
        return lambda q: kernels.attend(q, q, q, impl=impl).sum()

    for change in (lambda f: f, jax.grad):
        need = {
            impl: jax.jit(change(loss(impl))).lower(normal(1, 1024, 4, 8)).compile()
            .memory_analysis().temp_size_in_bytes
            for impl in ("reference", "blockwise")
        }  # fmt: skip
        assert need["blockwise"] < 0.5 * need["reference"]


@pytest.mark.parametrize("impl", kernels.IMPLS["attend_cached"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_new", "starts"), [(1, [300, 0, 511]), (64, [256, 0, 192])])
def test_attend_cached_matches_reference(impl, window, kv_dtype, num_new, starts):
    cfg = Config.debug(num_heads=4, num_kv_heads=2, head_dim=8)
    empty = cache.init(cfg, 9, jnp.dtype(kv_dtype))
    tables = np.array([[7, 2, 1], [4, 8, 9], [5, 3, 6]], np.int32)
    keys, values = cache.append(
        empty.keys[0],
        empty.values[0],
        *(normal(3, 768, 2, 8) for _ in range(2)),
        tables,
        np.zeros(3, np.int32),
    )
    arguments = (normal(3, num_new, 4, 8), keys, values, tables, np.array(starts, np.int32))
    check_impl("attend_cached", impl, arguments, window=window)
    if kv_dtype == "float32" and num_new == 1:
        check_impl("attend_cached", impl, arguments, window=window, softcap=0.5)
    if kv_dtype == "float32" and window is not None and num_new > 1:
        check_impl("attend_cached", impl, arguments, window=window, sinks=2 * normal(4))


@pytest.mark.parametrize("impl", kernels.IMPLS["gated_mlp"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *itertools.product(("swiglu", "geglu"), ("float32", "bfloat16", "int8")),
        ("swiglu_oai", "float32"),
    ],
)
def test_gated_mlp_matches_reference(impl, kind, dtype):
    lora = Lora(a=normal(2, 32), b=normal(64, 2), scale=0.5)
    parts = {
        "gate": Linear(normal(64, 32), normal(64)),
        "up": Linear(normal(64, 32), lora=lora),
        "down": Linear(normal(32, 64), normal(32)),
    }
    p = decoder_cases.as_dtype(parts, dtype)
    arguments = (normal(2, 3, 32), p["gate"], p["up"], p["down"])
    tolerance = 1e-5 if impl == "reference" else ROUNDING[dtype]
    limit = 1.5 if kind == "swiglu_oai" else None
    check_impl("gated_mlp", impl, arguments, tolerance, kind=kind, limit=limit)


def test_unknown_kind_of_gated_mlp_is_rejected():
    """Bug: the message left out one of the known kinds."""
    with pytest.raises(ValueError, match=naming("swiglu", "geglu", "swiglu_oai", "'relu'")):
        kernels.mlp.activation("relu")


@pytest.mark.parametrize("impl", kernels.IMPLS["truncate"])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept_ids"),
    [
        (0, 1.0, 0.0, [5, 4, 3, 2, 1, 0]),
        (2, 1.0, 0.0, [5, 4]),
        (3, 1.0, 0.0, [5, 4, 3, 2]),  # 3 and 2 are tied
        (0, 0.5, 0.0, [5]),
        (0, 0.0, 0.0, [5]),
        (0, 0.7, 0.0, [5, 4]),
        (0, 1.0, 0.2, [5, 4]),
        (3, 0.99, 0.2, [5, 4]),
        (100, 1.0, 1.0, [5]),
    ],
)
def test_truncate_keeps_expected_tokens(impl, top_k, top_p, min_p, kept_ids):
    weights = np.array([0.01, 0.03, 0.06, 0.06, 0.24, 0.6], np.float32)
    logits = kernels.truncate(
        jnp.log(weights), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p), impl=impl
    )
    np.testing.assert_array_equal(
        logits, [np.log(weights[i]) if i in kept_ids else -np.inf for i in range(6)]
    )


def test_unknown_implementation_raises_value_error():
    with pytest.raises(ValueError, match=naming("norm", "reference", "sum_by_matmul", "'fused'")):
        kernels.norm(normal(2, 8), normal(8), None, 1e-5, impl="fused")
    with pytest.raises(ValueError, match=naming("norm", "'nowhere.fused'", "'nowhere'")):
        kernels.norm(normal(2, 8), normal(8), None, 1e-5, impl="nowhere.fused")
    with (
        pytest.raises(ValueError, match=naming("operation", "matmul", "'add'")),
        kernels.override(add="fast"),
    ):
        pass


def test_implementation_by_module_path_is_called(tmp_path, monkeypatch):
    (tmp_path / "my_kernels.py").write_text(
        "def doubled(x, scale, bias, eps):\n    return x * scale * 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    x, scale = normal(2, 8), normal(8)
    actual = kernels.norm(x, scale, None, 1e-5, impl="my_kernels.doubled")
    np.testing.assert_array_equal(actual, x * scale * 2)


def test_override_affects_compiled_programs(tmp_path, monkeypatch):
    """`forward_cached` has nested jits, whose traces must not outlive the override."""
    (tmp_path / "zero_kernels.py").write_text(
        "def nothing(q, keys, values, tables, starts, *, window):\n    return q * 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = Config.debug()
    params = decoder.init(jax.random.key(0), cfg)
    tables, starts = np.array([[1]], np.int32), np.array([0], np.int32)

    @jax.jit
    def run(ids):
        x, _ = decoder.forward_cached(params, cfg, cache.init(cfg, 1), ids, tables, starts)
        return x

    ids = np.array([[5]], np.int32)
    before = run(ids)
    with kernels.override(attend_cached="zero_kernels.nothing"):
        assert not np.array_equal(run(ids), before)
    np.testing.assert_array_equal(run(ids), before)


def test_override_affects_forward():
    cfg = Config.debug()
    params = decoder.init(jax.random.key(0), cfg)
    ids = RNG.integers(0, cfg.vocab_size, (2, 20)).astype(np.int32)
    for function in (decoder.forward, decoder.hidden_states):
        read = jax.jit(function, static_argnums=1)
        actual = jax.tree.leaves(read(params, cfg, ids))[0]
        with kernels.override(attend="reference"):
            other = jax.tree.leaves(read(params, cfg, ids))[0]
        assert not np.array_equal(other, actual)  # rounding differs
        np.testing.assert_allclose(other, actual, atol=1e-5)
