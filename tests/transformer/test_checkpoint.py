"""Tests of loading and saving: round trips, and errors for invalid files."""

import json
import shutil
import struct
import time
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import load_file, save_file

from tests.naming import naming
from tests.transformer.conftest import GOLDEN, TINY, randomize
from transformer import checkpoint, decoder, lora, quarot
from transformer.checkpoint import gguf as reader
from transformer.config import Config
from transformer.layers import quantize

RNG = np.random.default_rng(3)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


# Folders of safetensors


@pytest.mark.parametrize("name", TINY)
def test_save_then_load_is_bitwise_equal(tiny, tmp_path, name):
    params, cfg, _ = tiny(name)
    checkpoint.save(tmp_path / "new", params, cfg)
    reloaded, same_cfg, _ = checkpoint.load(tmp_path / "new")
    assert same_cfg == cfg
    assert_same(reloaded, params)
    ours = load_file(tmp_path / "new" / "model.safetensors")
    theirs = {}
    for shard in (GOLDEN / name).glob("*.safetensors"):
        theirs |= load_file(shard)
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_save_of_int8_weights_raises(tmp_path):
    params, cfg, _ = checkpoint.load(GOLDEN / "llama", dtype="int8")
    with pytest.raises(ValueError, match=naming("int8")):
        checkpoint.save(tmp_path / "new", params, cfg)


def test_load_in_bfloat16_and_int8_converts_linear_maps(tiny):
    params, _, _ = tiny("llama")
    narrow, _, _ = checkpoint.load(GOLDEN / "llama", dtype="bfloat16")
    int8, _, _ = checkpoint.load(GOLDEN / "llama", dtype="int8")
    layer = params.layers[0]
    assert narrow.layers[0].attn_norm.scale.dtype == jnp.float32
    np.testing.assert_array_equal(
        narrow.layers[0].down.weight, layer.down.weight.astype(jnp.bfloat16)
    )
    assert int8.layers[0].attn_norm.scale.tolist() == [1] * len(layer.attn_norm.scale)
    for part in (*lora.TARGET_MODULES, "head"):
        owner = int8 if part == "head" else int8.layers[0]
        assert getattr(owner, part).weight.dtype == jnp.int8
    norm_weight = layer.mlp_norm.scale
    expected = quantize(
        layer.gate.replace(weight=quarot.rotate_input_weight(layer.gate.weight, norm_weight))
    )
    np.testing.assert_allclose(int8.layers[0].gate.scale, expected.scale, rtol=1e-5)
    steps = np.asarray(int8.layers[0].gate.weight, int) - np.asarray(expected.weight, int)
    assert np.abs(steps).max() <= 1 and (steps == 0).mean() > 0.99


def test_load_in_int8_without_rotation_skips_output_projections(tiny):
    params, cfg, _ = tiny("gpt2")
    assert not quarot.can_rotate(cfg)
    int8, _, _ = checkpoint.load(GOLDEN / "gpt2", dtype="int8")
    narrow, _, _ = checkpoint.load(GOLDEN / "gpt2", dtype="bfloat16")
    np.testing.assert_array_equal(int8.layers[0].up.weight, quantize(params.layers[0].up).weight)
    for part in ("out", "down"):  # output projections stay bfloat16
        linear = getattr(int8.layers[0], part)
        assert linear.scale is None
        np.testing.assert_array_equal(linear.weight, getattr(narrow.layers[0], part).weight)


def test_load_of_bfloat16_file_returns_float32(tiny, tmp_path):
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    narrow = {key: value.astype(jnp.bfloat16) for key, value in tensors.items()}
    save_file(narrow, tmp_path / "model.safetensors")
    params, _, _ = checkpoint.load(tmp_path)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype("f4"), tiny("llama").params)
    assert_same(params, expected)


def test_load_of_shards_reports_progress(tiny, tmp_path):
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    shard_of = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({k: v for k, v in tensors.items() if shard_of[k] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shard_of}))
    fractions = []
    params, _, _ = checkpoint.load(tmp_path, on_progress=fractions.append)
    assert_same(params, tiny("llama").params)
    assert fractions == sorted(fractions) and fractions[0] > 0 and fractions[-1] <= 1
    index.write_text(json.dumps({"weight_map": shard_of | {"x": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=naming(index, "'../model.safetensors'")):
        checkpoint.load(tmp_path)
    index.write_text(json.dumps({"weight_map": shard_of | {"x": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        checkpoint.load(tmp_path)
    index.write_text(json.dumps({"weight_map": 5}))
    with pytest.raises(ValueError, match=naming(index, "weight_map")):
        checkpoint.load(tmp_path)


def rewrite_folder(name: str, folder: Path, change) -> Path:
    """Return a copy of a golden model in one file, with `change` applied to its tensors."""
    shutil.copy(GOLDEN / name / "config.json", folder)
    tensors = {}
    for shard in (GOLDEN / name).glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(change(tensors), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"x": "gone.safetensors"}}', '{"weight_map": 5}', "{", ""]
)
def test_single_file_with_stale_index_is_loaded(tiny, tmp_path, index):
    """Bug: with an index of missing shards, a complete file next to it was not loaded."""
    rewrite_folder("mistral", tmp_path, dict)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_same(checkpoint.load(tmp_path)[0], tiny("mistral").params)


def without_prefix(prefix: str):
    return lambda tensors: {name.removeprefix(prefix): t for name, t in tensors.items()}


def with_masks(tensors: dict) -> dict:
    masks = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), bool),
        "transformer.h.1.attn.bias": np.ones((1, 1, 4, 4), np.uint8),
        "transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32),
        "lm_head.weight": tensors["transformer.wte.weight"].copy(),
    }
    return tensors | masks


def in_three_dtypes(tensors: dict) -> dict:
    """Return the weights rounded to bfloat16, every third one stored as bfloat16."""
    dtypes = ("f4", jnp.bfloat16, "f4")
    return {
        name: tensor.astype(jnp.bfloat16).astype(dtypes[i % 3])
        for i, (name, tensor) in enumerate(tensors.items())
    }


PUBLIC_TENSORS = {
    "masks and a second table of GPT-2": ("gpt2", with_masks),
    "GPT-2 saved without its head": ("gpt2", without_prefix("transformer.")),
    "a Llama saved without its head": ("qwen2", without_prefix("model.")),
    "a Llama without prefix, with a head": ("llama", without_prefix("model.")),
    "rotary tables": (
        "llama",
        lambda t: (
            t
            | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, "f2") for i in (0, 1)}
        ),
    ),
    "a second table": (
        "qwen3",
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].copy()},
    ),
}


@pytest.mark.parametrize("name", PUBLIC_TENSORS)
def test_redundant_tensors_are_ignored(tiny, tmp_path, name):
    model, change = PUBLIC_TENSORS[name]
    assert_same(checkpoint.load(rewrite_folder(model, tmp_path, change))[0], tiny(model).params)


def test_file_with_mixed_dtypes_is_loaded(tiny, tmp_path):
    params, _, _ = checkpoint.load(rewrite_folder("llama", tmp_path, in_three_dtypes))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype("f4"), tiny("llama").params)
    assert_same(params, expected)


@pytest.mark.parametrize(
    "head", [lambda table: table + 1, lambda table: table[1:].copy(), lambda table: table.T.copy()]
)
def test_tied_head_that_differs_is_rejected(tmp_path, head):
    """In transformers such a model has a separate head; ignoring it would change the logits."""

    def change(tensors):
        return tensors | {"lm_head.weight": head(tensors["model.embed_tokens.weight"])}

    with pytest.raises(ValueError, match="tie_word_embeddings"):
        checkpoint.load(rewrite_folder("qwen3", tmp_path, change))


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight"]),
        (lambda t: t.update(extra=np.zeros(3, "f4")), ["extra"]),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, "f4")}),
            ["model.norm.weight", "(32,)", "(31,)"],
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.copy()}),
            ["lm_head.weight", "(96, 32)", "(32, 96)"],
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, "i4")}),
            ["'model.norm.weight'", "F32", "I32"],
        ),
    ],
)
def test_error_names_missing_unknown_or_misshapen_tensor(tmp_path, damage, facts):
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=naming(tmp_path, *facts)):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("config.json", b"[1]", ValueError),
        ("config.json", b"{", ValueError),
        ("config.json", b"[" * 100_000, ValueError),
        ("config.json", b"\xff\xfe", ValueError),
        ("config.json", None, FileNotFoundError),
        ("model.safetensors", None, FileNotFoundError),
        ("model.safetensors", b"", ValueError),
        ("model.safetensors", b"\xff" * 8 + b"{}", ValueError),
        ("model.safetensors", struct.pack("<Q", 9) + b"{", ValueError),
        (
            "model.safetensors",
            struct.pack("<Q", 64)
            + b'{"x":{"dtype":"F32","shape":[999999999],"data_offsets":[0,4]}}  '
            + b"1234",
            ValueError,
        ),
    ],
    ids=str,
)
def test_damaged_folder_raises_with_file_name(tmp_path, name, content, error):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "llama" / file, tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=naming(name)):
        checkpoint.load(tmp_path)


def test_truncated_safetensors_raises(tmp_path):
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    content = (GOLDEN / "llama" / "model.safetensors").read_bytes()
    for size in [1, 7, 8, 9, 500, 2000, len(content) // 2, len(content) - 1]:
        (tmp_path / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(ValueError, match=naming(tmp_path / "model.safetensors")):
            checkpoint.load(tmp_path)


def test_error_names_truncated_or_missing_shard(tmp_path):
    shutil.copytree(GOLDEN / "mistral", tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=naming(shard)):
        checkpoint.load(tmp_path / "m")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00003.safetensors"):
        checkpoint.load(tmp_path / "m")


def test_pickle_is_rejected_unopened(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=naming(tmp_path / "weights.bin")):
        checkpoint.load(tmp_path / "weights.bin")
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, "weights.bin")):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("num_layers", "facts"),
    [(2**40, ["num_hidden_layers", 4096, 2**40]), (4096, ["21 tensors", "4096 layers"])],
)
def test_config_with_too_many_layers_is_rejected(tmp_path, num_layers, facts):
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    shutil.copy(GOLDEN / "llama" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=naming(*facts)):
        checkpoint.load(tmp_path)


# GGUF files


def write_gguf(path: Path, tensors: dict, metadata: dict, kinds: dict | None = None) -> None:
    """Write arrays with the `gguf` package, quantized to `kinds[name]` if that is set."""
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"))
    for key, value in metadata.items():
        if key != "general.architecture":
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_metadata(cfg: Config) -> dict:
    return {
        "general.architecture": "llama",
        "llama.block_count": cfg.num_layers,
        "llama.attention.head_count": cfg.num_heads,
        "llama.attention.head_count_kv": cfg.num_kv_heads,
        "llama.attention.key_length": cfg.head_dim,
        "llama.attention.value_length": cfg.head_dim,
        "llama.embedding_length": cfg.d_model,
        "llama.feed_forward_length": cfg.d_ff,
        "llama.vocab_size": cfg.vocab_size,
        "llama.context_length": cfg.max_seq_len,
        "llama.attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "llama.rope.freq_base": cfg.rope_theta,
        "llama.rope.dimension_count": cfg.head_dim,
    }


def llama_tensors(params: decoder.Params, cfg: Config) -> dict[str, np.ndarray]:
    """Return the tensors of a GGUF file as llama.cpp's converter writes them."""

    def interleave(weight):  # from (0, H/2), (1, H/2 + 1), ... to (0, 1), (2, 3), ... in each head
        halves = np.asarray(weight).reshape(-1, 2, cfg.head_dim // 2, weight.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))

    out = {"token_embd.weight": params.embed.weight, "output_norm.weight": params.final_norm.scale}
    if params.head is not None:
        out["output.weight"] = params.head.weight
    for i, layer in enumerate(params.layers):
        out |= {
            f"blk.{i}.attn_norm.weight": layer.attn_norm.scale,
            f"blk.{i}.attn_q.weight": interleave(layer.q.weight),
            f"blk.{i}.attn_k.weight": interleave(layer.k.weight),
            f"blk.{i}.attn_v.weight": layer.v.weight,
            f"blk.{i}.attn_output.weight": layer.out.weight,
            f"blk.{i}.ffn_norm.weight": layer.mlp_norm.scale,
            f"blk.{i}.ffn_gate.weight": layer.gate.weight,
            f"blk.{i}.ffn_up.weight": layer.up.weight,
            f"blk.{i}.ffn_down.weight": layer.down.weight,
        }
    return {name: np.asarray(array, np.float32) for name, array in out.items()}


@pytest.mark.parametrize("is_tied", [True, False])
def test_gguf_round_trip_is_bitwise_equal(tmp_path, is_tied):
    cfg = Config.debug(tie_embeddings=is_tied, num_layers=3, norm_eps=2**-16)
    params = randomize(decoder.init(jax.random.key(0), cfg))
    write_gguf(tmp_path / "m.gguf", llama_tensors(params, cfg), llama_metadata(cfg))
    loaded, loaded_cfg, _ = checkpoint.load(tmp_path / "m.gguf")
    assert loaded_cfg == cfg
    assert_same(loaded, params)


@pytest.mark.parametrize(
    "kind", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0], ids=lambda k: k.name
)
def test_type_that_gguf_package_can_quantize_is_dequantized(tmp_path, kind):
    array = RNG.normal(size=(6, 256)).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", {"x": array}, {}, {"x": kind})
    _, tensors = reader.read(tmp_path / "m.gguf")
    expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
    assert tensors["x"].shape == (6, 256)
    np.testing.assert_array_equal(tensors["x"].read(0, 6), expected)
    np.testing.assert_array_equal(tensors["x"].read(2, 5), expected[2:5])


@pytest.mark.parametrize(
    "kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL, Q.IQ4_XS], ids=lambda k: k.name
)
def test_type_that_gguf_package_only_dequantizes_is_dequantized(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # 0x2e2e as a half float is 0.1, so scales are finite at any position in the block.
    raw = np.where(RNG.random((4, 512 // block * size)) < 0.5, 0x2E, 0x2D).astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, tensors = reader.read(tmp_path / "m.gguf")
    expected = gguf.quants.dequantize(raw, kind)
    assert np.isfinite(expected).all() and tensors["x"].shape == expected.shape == (4, 512)
    np.testing.assert_array_equal(tensors["x"].read(0, 4), expected)


@pytest.fixture
def small(tmp_path) -> Path:
    """Return the path of a valid GGUF file, which the tests damage."""
    cfg = Config.debug(num_layers=1, vocab_size=32, d_ff=32)
    params = decoder.init(jax.random.key(0), cfg)
    write_gguf(tmp_path / "m.gguf", llama_tensors(params, cfg), llama_metadata(cfg))
    return tmp_path / "m.gguf"


def test_truncated_gguf_raises(small):
    content = small.read_bytes()
    began = time.monotonic()
    sizes = [*range(0, 1400, 7), *range(1400, len(content), len(content) // 20), len(content) - 40]
    for size in sizes:
        small.write_bytes(content[:size])
        with pytest.raises(ValueError, match=naming(small)):
            checkpoint.load(small)
    assert time.monotonic() - began < 20


def test_gguf_with_changed_byte_loads_or_raises_value_error(small):
    content = small.read_bytes()
    header = content.index(b"output_norm.weight")
    for offset in range(4, header, 5):
        damaged = bytearray(content)
        damaged[offset] ^= 0xFF
        small.write_bytes(damaged)
        try:
            checkpoint.load(small)
        except ValueError as error:
            assert str(error)  # any other exception fails the test


def raw_gguf(metadata: list[bytes] = (), tensors: list[bytes] = (), *, version=3, counts=None):
    num_tensors, num_keys = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    return head + b"".join(metadata) + b"".join(tensors) + bytes(256)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape=(32,), kind=0, offset=0) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"", ["GGUF"]),
        (b"\x80\x04\x95pickle", ["GGUF"]),
        (raw_gguf(version=1), ["version", 1]),
        (raw_gguf(version=0x03000000), ["version", 0x03000000]),
        (raw_gguf(counts=(2**63, 0)), ["tensors", 2**63]),
        (raw_gguf(counts=(0, 2**64 - 1)), ["metadata", 2**64 - 1]),
        (raw_gguf([struct.pack("<Q", 2**62)]), ["key", 2**62]),
        (raw_gguf([text(b"k") + struct.pack("<I", 99)]), ["k", 99]),
        (
            raw_gguf([text(b"k") + struct.pack("<IIQ", 9, 4, 2**61)]),
            ["k", 2**61],
        ),
        (raw_gguf([text(b"k") + struct.pack("<IIQ", 9, 9, 1)]), ["k", "array", 9]),
        (raw_gguf([text(b"k") + struct.pack("<II", 4, 1)] * 2), ["'k'"]),
        (raw_gguf([], [tensor(b"x")] * 2), ["'x'"]),
        (raw_gguf([], [tensor(b"x", kind=77)]), ["'x'", 77]),
        (raw_gguf([], [tensor(b"x", kind=2, shape=(33,))]), ["'x'", 32]),
        (raw_gguf([], [tensor(b"x", shape=(2**40, 2**20))]), ["'x'"]),
        (raw_gguf([], [tensor(b"x", offset=2**40)]), ["'x'"]),
        (raw_gguf([], [tensor(b"x", offset=1)]), ["'x'"]),
        (raw_gguf([], [tensor(b"x", shape=())]), ["'x'", 0]),
        (raw_gguf([], [tensor(b"x", shape=(0, 2**63))]), ["'x'", f"({2**63}, 0)"]),
        (raw_gguf([], [tensor(b"x", shape=(2, 2, 2, 2))]), ["'x'", 4]),
        (
            raw_gguf([text(b"general.alignment") + struct.pack("<II", 4, 0)]),
            ["general.alignment", 0],
        ),
        (raw_gguf(), ["general.architecture", None]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_malicious_gguf_raises(tmp_path, content, facts):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=naming(*facts)):
        checkpoint.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"llama.block_count": 2**32 - 1}, ["num_layers", 4096, 2**32 - 1]),
        ({"llama.block_count": 2}, ["blk.1"]),
        ({"llama.vocab_size": 2**31}, ["token_embd.weight", 2**31]),
        ({"llama.attention.head_count": 0}, ["attention.head_count", 0]),
        ({"llama.attention.head_count": 2.5}, ["attention.head_count", 2.5]),
        ({"llama.rope.scaling.type": "longrope"}, ["rope_type", "'longrope'"]),
        ({"llama.rope.scaling.factor": -2.0}, ["factor", "-2.0"]),
        ({"llama.rope.scaling.attn_factor": 2.0}, ["llama.rope.scaling.attn_factor"]),
        ({"llama.expert_count": 8}, ["llama.expert_used_count"]),
        ({"llama.rope.dimension_count": 4}, ["rope.dimension_count", "head_dim"]),
    ],
    ids=str,
)
def test_gguf_with_invalid_metadata_raises(tmp_path, change, facts):
    cfg = Config.debug(num_layers=1)
    params = decoder.init(jax.random.key(0), cfg)
    path = tmp_path / "m.gguf"
    write_gguf(path, llama_tensors(params, cfg), llama_metadata(cfg) | change)
    with pytest.raises(ValueError, match=naming(*facts)):
        checkpoint.load(path)


def test_error_names_gguf_with_missing_or_unknown_tensor(tmp_path):
    cfg = Config.debug(num_layers=1)
    tensors = llama_tensors(decoder.init(jax.random.key(0), cfg), cfg)
    path = tmp_path / "m.gguf"
    write_gguf(path, tensors | {"blk.0.attn_sinks": np.zeros(4, "f4")}, llama_metadata(cfg))
    with pytest.raises(ValueError, match=naming(path, "blk.0.attn_sinks")):
        checkpoint.load(path)
    del tensors["blk.0.ffn_up.weight"]
    write_gguf(path, tensors, llama_metadata(cfg))
    with pytest.raises(ValueError, match=naming(path, "blk.0.ffn_up.weight")):
        checkpoint.load(path)


def test_load_of_absent_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "absent.gguf")


def test_first_gpt2_files_without_prefix_are_loaded(tmp_path):
    """In these files, tensor names have no prefix "transformer.", and config.json has `n_ctx`."""
    config = json.loads((GOLDEN / "gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_ctx": config["n_positions"]}))
    tensors = load_file(GOLDEN / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    params, cfg, _ = checkpoint.load(tmp_path)
    expected, same_cfg, _ = checkpoint.load(GOLDEN / "gpt2")
    assert cfg == same_cfg
    jax.tree.map(np.testing.assert_array_equal, params, expected)
