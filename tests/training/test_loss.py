"""Chunked cross-entropy: equal to the definition, without storing all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.loss import chunked_cross_entropy, cross_entropy

pytestmark = pytest.mark.heavy

RNG = np.random.default_rng(0)
ROWS, WIDTH, VOCAB = 50, 24, 96
X = RNG.normal(0, 1, (ROWS, WIDTH)).astype(np.float32)
TABLE = RNG.normal(0, 1, (VOCAB, WIDTH)).astype(np.float32)
TARGETS = RNG.integers(0, VOCAB, ROWS).astype(np.int32)
WEIGHTS = np.where(RNG.random(ROWS) < 0.4, 0, RNG.choice([1.0, 0.25], ROWS)).astype(np.float32)


def test_cross_entropy_equals_numpy_float64():
    logits = X.astype(np.float64) @ TABLE.T.astype(np.float64)
    likely = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss, right = cross_entropy(X, TABLE, TARGETS, WEIGHTS)
    expected = -(likely[np.arange(ROWS), TARGETS] * WEIGHTS).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(right, ((logits.argmax(1) == TARGETS) * WEIGHTS).sum())


@pytest.mark.parametrize(
    ("chunk", "softcap"), [(1, None), (7, None), (25, None), (50, None), (1000, None), (25, 2.0)]
)
def test_chunked_sums_and_gradients_equal_the_definition(chunk, softcap):
    def both(function, **more):
        def loss(x, table):
            loss, right = function(x, table, TARGETS, WEIGHTS, softcap=softcap, **more)
            return 3.0 * loss, right

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(X, TABLE)

    expected, found = both(cross_entropy), both(chunked_cross_entropy, chunk=chunk)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_bfloat16_products_are_float32():
    def gradient(dtype):
        loss = lambda table: chunked_cross_entropy(X, table, TARGETS, WEIGHTS, dtype=dtype)[0]  # noqa: E731
        return jax.grad(loss)(jnp.asarray(TABLE))

    narrow, wide = gradient("bfloat16"), gradient("float32")
    assert narrow.dtype == jnp.float32
    assert 0 < np.abs(narrow - wide).max() < 0.02 * np.abs(wide).max()


def test_rows_of_weight_0_are_ignored():
    """Rows of weight 0 can have invalid targets, and all rows can have weight 0."""
    targets = np.where(WEIGHTS == 0, 10**6, TARGETS)
    found = chunked_cross_entropy(X, TABLE, targets, WEIGHTS, chunk=8)
    np.testing.assert_allclose(found[0], cross_entropy(X, TABLE, TARGETS, WEIGHTS)[0], rtol=1e-5)
    loss, gradient = jax.value_and_grad(
        lambda x: chunked_cross_entropy(x, TABLE, TARGETS, np.zeros_like(WEIGHTS))[0]
    )(X)
    assert loss == 0 and not gradient.any()


def test_chunked_loss_never_stores_all_logits():
    rows, vocab = 1024, 4096
    x, table = jnp.zeros((rows, 8)), jnp.zeros((vocab, 8))
    targets, weights = jnp.zeros(rows, jnp.int32), jnp.ones(rows)

    def need(function, **more) -> int:
        loss = lambda x: function(x, table, targets, weights, **more)[0]  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * rows * vocab
    assert need(cross_entropy) > logits > 4 * need(chunked_cross_entropy, chunk=64)


def test_chunked_loss_gradient_for_weights_raises():
    with pytest.raises(ValueError, match="weights"):
        jax.grad(lambda w: chunked_cross_entropy(X, TABLE, TARGETS, w)[0])(jnp.asarray(WEIGHTS))


def test_gradient_of_lm_head_is_computed_only_on_demand():
    def flops(**which) -> float:
        loss = lambda x, table: chunked_cross_entropy(x, table, TARGETS, WEIGHTS)[0]  # noqa: E731
        compiled = jax.jit(jax.grad(loss, **which)).lower(X, TABLE).compile()
        return compiled.as_text().count("rv,rd->vd")

    assert flops(argnums=(0, 1)) > 0
    assert flops(argnums=0) == 0
