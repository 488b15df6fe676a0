"""Tests with tiny GGUF files of each tensor type and family, made by llama.cpp."""

import contextlib

import gguf
import jax
import numpy as np
import pytest

from tests.naming import naming
from tests.transformer.conftest import GOLDEN, INVALID_VALUES
from transformer import cache, checkpoint, decoder, families, gguf_config
from transformer.checkpoint import gguf as reader
from transformer.config import RopeScaling

TENSOR_TYPES = ("f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_1", "q4_0")
FAMILIES = ("gpt2", "llama3", "qwen2", "qwen3", "gemma3")
NAMES = [*(f"llama-{name}" for name in TENSOR_TYPES), *FAMILIES]
GOLDENS = np.load(GOLDEN / "gguf" / "golden.npz")
forward = jax.jit(decoder.forward, static_argnums=1, static_argnames="taps")
forward_cached = jax.jit(decoder.forward_cached, static_argnums=1)


@pytest.mark.parametrize("name", NAMES)
def test_logits_match_transformers_and_top_tokens_llama_cpp(name):
    params, cfg, _ = checkpoint.load(GOLDEN / "gguf" / f"{name}.gguf")
    ids = GOLDENS[f"{name}.ids"][None]
    # The attention tap selects the attention implementation of transformers, with all scores at
    # once: at one position of llama-f16 transformers itself differs from float64 by 1.1e-4.
    logits, _ = forward(params, cfg, ids, taps=("attention",))
    np.testing.assert_allclose(logits[0], GOLDENS[f"{name}.logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(logits[0].argmax(-1), GOLDENS[f"{name}.top"])

    x, _ = forward_cached(params, cfg, cache.init(cfg, 1), ids, np.array([[1]]), np.array([0]))
    through_cache = decoder.unembed(params, cfg, x[0])
    np.testing.assert_allclose(through_cache, GOLDENS[f"{name}.logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_golden_gguf_file_has_tensor_type_of_its_name(name):
    tensors = gguf.GGUFReader(GOLDEN / "gguf" / f"llama-{name}.gguf").tensors
    assert name.upper() in {tensor.tensor_type.name for tensor in tensors}


def test_gguf_keys_of_family_set_config_fields():
    cfg = {name: checkpoint.load(GOLDEN / "gguf" / f"{name}.gguf")[1] for name in FAMILIES}
    assert cfg["llama3"].rope_scaling == RopeScaling(
        rope_type="llama3",
        factor=8.0,
        original_max_seq_len=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert cfg["gemma3"].rope_scaling == RopeScaling(rope_type="linear", factor=8.0)
    assert (cfg["gemma3"].rope_theta, cfg["gemma3"].local_rope_theta) == (1e6, 1e4)
    assert cfg["gemma3"].windows == (5, 5, 5, 5, 5, None) and cfg["gemma3"].scale_embeddings
    assert cfg["qwen3"].qk_norm and not cfg["qwen2"].qk_norm and cfg["qwen2"].qkv_bias


@pytest.mark.parametrize("name", FAMILIES)
def test_metadata_of_any_type_is_read_or_raises_value_error(name):
    metadata, _ = reader.read(GOLDEN / "gguf" / f"{name}.gguf")
    kind = metadata["general.architecture"]
    for key in (*metadata, f"{kind}.rope.scaling.type", f"{kind}.rope.scaling.factor"):
        for value in INVALID_VALUES:
            with contextlib.suppress(ValueError):  # any other exception fails the test
                gguf_config.from_gguf(metadata | {key: value}, has_head=False)


@pytest.mark.parametrize("name", NAMES)
def test_gguf_model_saved_as_folder_is_bitwise_equal(tmp_path, name):
    params, cfg, _ = checkpoint.load(GOLDEN / "gguf" / f"{name}.gguf")
    checkpoint.save(tmp_path, params, cfg)
    saved_params, saved_cfg, _ = checkpoint.load(tmp_path)
    assert saved_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, saved_params, params)


def test_unknown_rope_factors_are_rejected(tmp_path):
    path = GOLDEN / "gguf" / "llama3.gguf"
    (table,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    data = bytearray(path.read_bytes())
    data[table.data_offset : table.data_offset + 4] = np.float32(6).tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=naming("rope_freqs.weight", "Llama 3")):
        checkpoint.load(tmp_path / "m.gguf")


def test_rope_factors_with_two_axes_are_rejected(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=naming("rope_freqs.weight", "(2, 4)")):
        checkpoint.load(tmp_path / "m.gguf")


# The smallest metadata of each architecture; every key that the reader knows is replaced in turn.
COMMON = {
    "attention.head_count": 4, "attention.head_count_kv": 4, "embedding_length": 32,
    "block_count": 2, "feed_forward_length": 48, "vocab_size": 96, "context_length": 64,
    "attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
OPTIONAL = (
    "attention.key_length", "attention.value_length", "attention.sliding_window",
    "attention.sliding_window_pattern", "expert_count", "expert_used_count",
    "expert_feed_forward_length", "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
SCALINGS = {
    "yarn": {},
    "none": {"rope_freqs": [1.0, 1.0, 1.0, 8.0]},
    "longrope": {"rope_factors_short": [1.0] * 4, "rope_factors_long": [2.0] * 4},
}


def metadata_of(kind: str, **more) -> dict:
    keys = COMMON | more
    if kind in ("gemma3", "gpt-oss"):
        keys.setdefault("attention.sliding_window", 8)
    return {"general.architecture": kind} | {f"{kind}.{k}": v for k, v in keys.items()}


ARCHITECTURES = {family.gguf: family for family in reversed(families.FAMILIES.values())}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_key_of_any_type_is_read_or_raises_value_error(kind):
    """Bug: with the tensor rope_freqs, rope.freq_base "x" raised TypeError, and a wide head looped.

    Each key has each value, with each kind of RoPE scaling.
    """
    keys = (*COMMON, *OPTIONAL, *ARCHITECTURES[kind].gguf_keys)
    for scaling, factors in SCALINGS.items():
        metadata = metadata_of(kind, **{"rope.scaling.type": scaling})
        for key in keys:
            for value in ("x", [], {}, -1, 0, None, float("nan"), 2**63):
                changed = metadata | {f"{kind}.{key}": value}
                with contextlib.suppress(ValueError):  # any other exception fails the test
                    gguf_config.from_gguf(changed, has_head=True, rope_factors=factors)


@pytest.mark.parametrize("value", [0, -1.0, "x", float("nan")])
def test_error_names_rope_base(value):
    metadata = metadata_of("llama", **{"rope.freq_base": value})
    with pytest.raises(ValueError, match=naming("llama.rope.freq_base", value)):
        gguf_config.from_gguf(metadata, has_head=True, rope_factors=SCALINGS["none"])


def test_window_without_its_key_is_that_of_llama_cpp():
    """Bug: files of Gemma 2 from before the key were rejected; llama.cpp has a default."""
    for kind, windows in (("gemma2", (4096, None)), ("gemma3", (None,)), ("phi3", (None,))):
        metadata = metadata_of(kind)
        metadata.pop(f"{kind}.attention.sliding_window", None)
        assert gguf_config.from_gguf(metadata, has_head=False).windows == windows
    metadata = metadata_of("gpt-oss")
    del metadata["gpt-oss.attention.sliding_window"]
    with pytest.raises(ValueError, match=naming("gpt-oss.attention.sliding_window")):
        gguf_config.from_gguf(metadata, has_head=False)


@pytest.mark.parametrize("pattern", [[True], [True, False, True], [], [1, 2], ["x", "y"]])
def test_window_pattern_of_wrong_length_or_type_is_rejected(pattern):
    """Bug: a list of another length than the layers was repeated or cut."""
    more = {"attention.sliding_window": 8, "attention.sliding_window_pattern": pattern}
    facts = ("gemma2.attention.sliding_window_pattern", len(pattern), 2)
    with pytest.raises(ValueError, match=naming(*facts)):
        gguf_config.from_gguf(metadata_of("gemma2", **more), has_head=False)


def test_window_pattern_with_a_flag_per_layer_is_read():
    more = {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]}
    cfg = gguf_config.from_gguf(metadata_of("gemma2", **more), has_head=False)
    assert cfg.windows == (None, 8)
