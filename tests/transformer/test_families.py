"""Tests of the families of `conftest.MORE`, each with one forward pass of a golden model.

`test_parity_families.py` compares longer sequences, losses and gradients with transformers.
"""

import dataclasses
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.naming import naming
from tests.transformer.conftest import GOLDEN, MORE, randomize
from tests.transformer.quantized import quantized
from transformer import cache, checkpoint, decoder, kernels, lora, quarot
from transformer.bench import decoder_cases
from transformer.config import Config
from transformer.kernels import exact
from transformer.weights import Linear

pytestmark = pytest.mark.heavy

# Faster compilation: the tests run each program only once.
OPTIONS = {"xla_backend_optimization_level": 0}
forward = jax.jit(
    decoder.forward, static_argnums=1, static_argnames="taps", compiler_options=OPTIONS
)


@pytest.mark.parametrize("name", MORE)
def test_forward_matches_transformers(tiny, name):
    params, cfg, golden = tiny(name)
    logits, taps = forward(params, cfg, golden["ids"], taps=("residual", "attention"))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(taps["residual"], golden["stream"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(taps["attention"], golden["attention"], rtol=0, atol=1e-5)


# gemma2: soft caps and windows; phi3: LongRoPE of a part of each head; smollm3: layers without
# rotation; gpt_oss: sinks.
@pytest.mark.parametrize("name", ["gemma2", "phi3", "smollm3", "gpt_oss"])
def test_forward_cached_matches_transformers(tiny, name):
    params, cfg, golden = tiny(name)

    @jax.jit
    def read(ids):
        kv_cache, tables = cache.init(cfg, 1), np.array([[1]])
        x, kv_cache = decoder.forward_cached(
            params, cfg, kv_cache, ids[:, :16], tables, np.array([0])
        )
        y, _ = decoder.forward_cached(params, cfg, kv_cache, ids[:, 16:], tables, np.array([16]))
        return decoder.unembed(params, cfg, jnp.concatenate([x, y], axis=1))

    compiled = read.lower(golden["ids"]).compile(OPTIONS)
    logits = compiled(golden["ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_longrope_with_a_cache_of_the_original_context_has_short_factors(tiny):
    """Bug: the context of the model selected the long factors, however small the cache was."""
    params, cfg, golden = tiny("phi3")
    scaling = dataclasses.replace(cfg.rope_scaling, original_max_seq_len=cache.BLOCK_SIZE)
    cfg = dataclasses.replace(cfg, rope_scaling=scaling)
    assert cfg.max_seq_len > cache.BLOCK_SIZE
    ids = golden["ids"][:, :16]
    expected, _ = forward(params, cfg, ids)  # the length of the row selects the short factors
    long = golden["logits"][:, :16]
    assert np.abs(expected - long).max() > 0.01

    @jax.jit
    def read(ids):
        kv_cache, tables = cache.init(cfg, 1), np.array([[1]])
        x, _ = decoder.forward_cached(params, cfg, kv_cache, ids, tables, np.array([0]))
        return decoder.unembed(params, cfg, x)

    logits = read.lower(ids).compile(OPTIONS)(ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MORE if name not in ("phi3", "gpt_oss")])
def test_float64_decoder_matches_transformers(tiny, name):
    """`exact.decoder` has no RoPE scaling, so phi3 and gpt_oss are left out."""
    params, cfg, golden = tiny(name)
    logits = exact.decoder(params, cfg, golden["ids"])
    np.testing.assert_allclose(logits, golden["logits"][:, -1], rtol=0, atol=1e-4)


def test_float64_decoder_has_sinks_and_biases_of_experts(tiny):
    params, cfg, golden = tiny("gpt_oss")
    cfg = dataclasses.replace(cfg, rope_scaling=None)
    logits = exact.decoder(params, cfg, golden["ids"])
    expected, _ = forward(params, cfg, golden["ids"])
    np.testing.assert_allclose(logits, expected[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MORE)
def test_save_then_load_is_bitwise_equal(tiny, tmp_path, name):
    params, cfg, _ = tiny(name)
    checkpoint.save(tmp_path, params, cfg)
    reloaded, same_cfg, _ = checkpoint.load(tmp_path)
    assert same_cfg == cfg
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == cfg.num_params
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / name))
    if name == "gpt_neox":  # transformers 5 can write another name than published files have
        theirs = {key.replace("lm_head", "embed_out"): value for key, value in theirs.items()}
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize("name", ["granite", "mixtral", "olmo2", "gpt_oss"])
def test_int8_logits_are_close_to_float32(tiny, name):
    """The weights of experts and router are rotated too; OLMo 2 has norms that forbid rotation."""
    params, cfg, golden = tiny(name)
    int8, _, _ = checkpoint.load(GOLDEN / name, dtype="int8")
    layer = int8.layers[0]
    assert layer.up.weight.dtype == jnp.int8
    assert layer.up.scale.shape == layer.up.weight.shape[:-1]
    assert quarot.can_rotate(cfg) == (layer.down.weight.dtype == jnp.int8) == (name != "olmo2")
    if cfg.num_experts:
        assert layer.router.dtype == jnp.float32

    def dequantize(p: Linear) -> Linear:
        return p if p.scale is None else Linear(p.weight * p.scale[..., None], p.bias)

    is_linear = lambda node: isinstance(node, Linear)  # noqa: E731
    widened = jax.tree.map(lambda p: dequantize(p) if is_linear(p) else p, int8, is_leaf=is_linear)
    cfg = dataclasses.replace(cfg, rope_scaling=None)
    actual, expected = (exact.decoder(p, cfg, golden["ids"]) for p in (widened, params))
    assert np.abs(actual - expected).mean() < 0.05 * np.std(expected)


# Experts


experts = jax.jit(
    kernels.experts, static_argnums=6, static_argnames="impl", compiler_options=OPTIONS
)


def expert_arguments(rows: int, dtype: str = "float32") -> tuple:
    """Return arguments of `kernels.experts` with 5 experts, of which each token takes 2."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    maps = {"gate": (5, 96, 64), "up": (5, 96, 64), "down": (5, 64, 96)}
    maps = {name: Linear(jnp.asarray(normal(*shape))) for name, shape in maps.items()}
    maps = decoder_cases.as_dtype(maps, dtype)
    chosen = np.argsort(normal(1, rows, 5))[..., :2].astype(np.int32)
    weights = rng.random((1, rows, 2), np.float32)
    return normal(1, rows, 64), weights, chosen, maps["gate"], maps["up"], maps["down"]


@pytest.mark.parametrize(
    ("rows", "dtype", "tolerance"),
    [(70, "float32", 1e-5), (1, "int8", 3e-2)],
)
def test_experts_match_reference(rows, dtype, tolerance):
    arguments = expert_arguments(rows, dtype)
    expected = experts(*arguments, "swiglu", impl="reference")
    actual = experts(*arguments, "swiglu")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    if rows == 70:  # experts have no capacity limit: all tokens can choose the same two
        chosen = np.broadcast_to(np.array([3, 1], np.int32), arguments[2].shape)
        arguments = (*arguments[:2], chosen, *arguments[3:])
        expected = experts(*arguments, "swiglu", impl="reference")
        actual = experts(*arguments, "swiglu")
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_gradient_of_experts_equals_that_of_the_dense_formulation():
    """With biases, of all arguments."""
    x, weights, chosen, *maps = expert_arguments(7)
    rng = np.random.default_rng(1)
    maps = [p.replace(bias=rng.standard_normal(p.weight.shape[:2], np.float32)) for p in maps]
    target = rng.standard_normal(x.shape, np.float32)

    def gradients(impl):
        def loss(x, weights, maps):
            y = kernels.experts(x / 8, weights, chosen, *maps, "swiglu_oai", limit=1.0, impl=impl)
            return (y * target).sum()

        grad = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=OPTIONS)
        return grad(x, weights, maps)

    for actual, expected in zip(
        jax.tree.leaves(gradients(None)), jax.tree.leaves(gradients("reference")), strict=True
    ):
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_number_of_expert_products_does_not_depend_on_num_experts():
    """The program has a loop; each iteration multiplies one block of rows with one expert."""

    def loop(num_experts: int) -> tuple[int, int]:
        shapes = [(num_experts, 24, 16)] * 2 + [(num_experts, 16, 24)]
        maps = [Linear(jax.ShapeDtypeStruct(shape, jnp.float32)) for shape in shapes]
        arrays = [
            jax.ShapeDtypeStruct((1, 4, n), dtype)
            for n, dtype in ((16, jnp.float32), (2, jnp.float32), (2, jnp.int32))
        ]
        jaxpr = jax.make_jaxpr(lambda *a: kernels.experts(*a, "swiglu"))(*arrays, *maps)
        (scan,) = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
        products = str(jaxpr).count("dot_general")
        return scan.params["length"], products

    # Four tokens choose eight experts at most, however many there are.
    assert loop(8) == loop(64) == (8, 3)


def test_row_of_experts_is_bitwise_equal_in_every_batch_size():
    x, weights, chosen, *maps = expert_arguments(16, "bfloat16")
    arrays = (x[:, :2], weights[:, :2], chosen[:, :2])
    alone = jax.jit(kernels.experts, static_argnums=6)(*arrays, *maps, "swiglu")
    together = jax.jit(kernels.experts, static_argnums=6)(x, weights, chosen, *maps, "swiglu")
    np.testing.assert_array_equal(together[:, :2], alone)


def test_router_weights_sum_to_one_only_with_norm_topk_prob():
    cfg = Config.debug(num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)
    y = np.ones((1, 1, 32), np.float32)
    router = np.diag([1.0, 3.0, 2.0, 0.0]).astype(np.float32) @ np.eye(4, 32, dtype=np.float32)
    weights, numbers = decoder.route(y, router, cfg)
    assert numbers.tolist() == [[[1, 2]]]
    expected = np.exp([3, 2]) / np.exp([0, 1, 2, 3]).sum()
    np.testing.assert_allclose(weights[0, 0], expected, rtol=1e-6)
    normed, _ = decoder.route(y, router, Config.debug(num_experts=4, num_experts_per_tok=2))
    np.testing.assert_allclose(normed[0, 0], expected / expected.sum(), rtol=1e-6)


# Layouts of experts


def joined(tensors: dict, experts: str) -> dict:
    """Return tensors with all experts of a layer in one, as transformers 5 holds them."""
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    out, parts = {}, {}
    for name, tensor in tensors.items():
        if f".{experts}.experts." in name:
            layer, rest = name.split(f".{experts}.experts.")
            expert, part, _ = rest.split(".")
            parts.setdefault((layer, names.get(part, part)), {})[int(expert)] = tensor
        else:
            out[name.replace(f".{experts}.gate.", ".mlp.gate.")] = tensor
    stacked = {key: np.stack([part[e] for e in range(len(part))]) for key, part in parts.items()}
    for layer in {layer for layer, _ in stacked}:
        both = [stacked[layer, part] for part in ("gate_proj", "up_proj")]
        out[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate(both, axis=1)
        out[f"{layer}.mlp.experts.down_proj"] = stacked[layer, "down_proj"]
    return out


@pytest.mark.parametrize(
    ("name", "experts"), [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")]
)
def test_experts_in_one_tensor_equal_experts_in_one_tensor_each(tiny, tmp_path, name, experts):
    shutil.copy(GOLDEN / name / "config.json", tmp_path)
    tensors = joined(load_file(GOLDEN / name / "model.safetensors"), experts)
    save_file(tensors, tmp_path / "model.safetensors")
    params, cfg, _ = checkpoint.load(tmp_path)
    assert cfg == tiny(name).cfg
    jax.tree.map(np.testing.assert_array_equal, params, tiny(name).params)
    joined_name = "model.layers.1.mlp.experts.gate_up_proj"
    for wrong in (tensors[joined_name][0], tensors[joined_name][None], tensors[joined_name][1:]):
        save_file(tensors | {joined_name: wrong.copy()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=naming(tmp_path, joined_name)):
            checkpoint.load(tmp_path)


def test_mxfp4_experts_are_dequantized(tmp_path):
    expected = quantized(tmp_path)
    params, cfg, _ = checkpoint.load(tmp_path)
    checkpoint.save(tmp_path / "floats", params, cfg)
    actual = load_file(tmp_path / "floats" / "model.safetensors")
    for key, weight in expected.items():
        np.testing.assert_array_equal(actual[key], weight)
    assert {tensor.dtype for tensor in checkpoint.read_header(tmp_path).tensors.values()} == {
        "F32", "MXFP4",
    }  # fmt: skip


BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = BLOCKS.replace("blocks", "scales")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(BLOCKS),
        lambda t: t.pop(SCALES),
        lambda t: t.update({BLOCKS: t[BLOCKS][0].copy()}),
        lambda t: t.update({BLOCKS: t[BLOCKS][..., :8].copy()}),
        lambda t: t.update({SCALES: t[SCALES][..., None].copy()}),
        lambda t: t.update({SCALES: np.full_like(t[SCALES], 255)}),
    ],
)
def test_damaged_mxfp4_is_rejected(tmp_path, change):
    quantized(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=naming(path)) as error:
        checkpoint.load(tmp_path)
    assert BLOCKS.removesuffix("_blocks") in str(error.value)


# Adapters


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_adapter_of_fused_projections_round_trips(tiny, tmp_path, name):
    """Queries, keys and values share one A; rows of B are interleaved like rows of the weight."""
    _, cfg, _ = tiny(name)
    adapter = randomize(lora.init(jax.random.key(1), cfg, rank=2, alpha=4))
    shared = lora.shared_modules(cfg)
    assert set(shared) == {"q", "k", "v"} | ({"gate", "up"} if name == "phi3" else set())
    with pytest.raises(ValueError, match=naming("q, k, v")):
        lora.save(tmp_path, adapter, cfg)
    same_a = [
        {
            part: loras["q"].replace(b=x.b) if part in "qkv" else
            loras["up"].replace(b=x.b) if part == "gate" else x
            for part, x in loras.items()
        }
        for loras in adapter
    ]  # fmt: skip
    lora.save(tmp_path, tuple(same_a), cfg)
    reloaded = lora.load(tmp_path, cfg)
    jax.tree.map(np.testing.assert_array_equal, reloaded, tuple(same_a))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_adapter_of_experts_is_rejected(tiny, name):
    cfg = tiny(name).cfg
    adapter = lora.init(jax.random.key(1), cfg, rank=2, alpha=4)
    assert set(adapter[0]) == {"q", "k", "v", "out"}
    with pytest.raises(ValueError, match=naming("experts", "'up'")):
        lora.init(jax.random.key(1), cfg, rank=2, alpha=4, target_modules=("q", "up"))


# Invalid files


def damaged(tmp_path, name: str, change):
    shutil.copy(GOLDEN / name / "config.json", tmp_path)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
GPT_OSS = "model.layers.1.mlp.experts.gate_up_proj"
SINKS = "model.layers.0.self_attn.sinks"
QKV = "model.layers.0.self_attn.qkv_proj.weight"
QWEN3 = GOLDEN / "qwen3" / "model.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        ("mixtral", lambda t: t.update({EXPERT: t[EXPERT][None]}), [EXPERT, "(1, 32, 40)"]),
        ("mixtral", lambda t: t.update({EXPERT: t[EXPERT][0].copy()}), [EXPERT, "(40,)"]),
        ("mixtral", lambda t: t.update({EXPERT: t[EXPERT].T.copy()}), [EXPERT, "(40, 32)"]),
        ("mixtral", lambda t: t.pop(EXPERT), [EXPERT]),
        ("gpt_oss", lambda t: t.update({GPT_OSS: t[GPT_OSS][0].copy()}), [GPT_OSS, "(32, 128)"]),
        (
            "gpt_oss",
            lambda t: t.update({GPT_OSS: t[GPT_OSS][1:].copy()}),
            [GPT_OSS, "(3, 32, 128)"],
        ),
        (
            "gpt_oss",
            lambda t: t.update({GPT_OSS: t[GPT_OSS].swapaxes(1, 2).copy()}),
            [GPT_OSS, "(4, 128, 32)"],
        ),
        ("gpt_oss", lambda t: t.pop(f"{GPT_OSS}_bias"), [f"{GPT_OSS}_bias"]),
        ("gpt_oss", lambda t: t.pop(SINKS), [SINKS]),
        ("mixtral", lambda t: t.update({EXPERT.replace("3", "6"): t[EXPERT]}), ["experts.6"]),
        (
            "phi3",
            lambda t: t.update({QKV: np.zeros((63, 32), "f4")}),
            [QKV, "(64, 32)", "(63, 32)"],
        ),
        (
            "gpt_neox",
            lambda t: t.pop("gpt_neox.layers.0.attention.query_key_value.bias"),
            ["gpt_neox.layers.0.attention.query_key_value.bias"],
        ),
        ("olmo2", lambda t: t.update(load_file(QWEN3)), ["model.layers.0.input_layernorm.weight"]),
    ],
)  # fmt: skip
def test_missing_unknown_or_misshapen_tensor_is_rejected(tmp_path, name, change, facts):
    with pytest.raises(ValueError, match=naming(tmp_path, *facts)):
        checkpoint.load(damaged(tmp_path, name, change))


def test_shard_of_another_model_is_rejected_with_file_and_tensor(tmp_path):
    shutil.copytree(GOLDEN / "mistral", tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    first = sorted(tensors)[0]
    shutil.copy(QWEN3, shard)
    with pytest.raises(ValueError, match=naming(shard)):
        checkpoint.load(tmp_path / "m")
    save_file(tensors | {first: np.zeros((3, 2), "f4")}, shard)  # of a larger model
    with pytest.raises(ValueError, match=naming(shard, first, "(3, 2)")):
        checkpoint.load(tmp_path / "m")
    save_file({name: x for name, x in tensors.items() if name != first}, shard)
    with pytest.raises(ValueError, match=naming(shard, first)):
        checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize("shape", [(6, 40), (6, 40, 31), (5, 40, 32), (1, 6, 40, 32)])
def test_gguf_expert_of_wrong_shape_is_rejected(tmp_path, shape):
    path, name = tmp_path / "m.gguf", "blk.0.ffn_gate_exps.weight"
    metadata = {
        "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32,
        "llama.feed_forward_length": 40, "llama.attention.head_count": 4, "llama.vocab_size": 9,
        "llama.expert_count": 6, "llama.expert_used_count": 2,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    cfg = Config.debug(
        num_layers=1, num_kv_heads=4, d_ff=40, vocab_size=9, num_experts=6, num_experts_per_tok=2
    )
    sources = checkpoint.tensor_sources(cfg, "gguf", architecture="llama")
    for source, info in zip(
        jax.tree.leaves(sources), jax.tree.leaves(decoder.abstract(cfg)), strict=True
    ):
        size = shape if source.name == name else info.shape
        writer.add_tensor(source.name, np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=naming(path, name)):
        checkpoint.load(path)
