"""Tests of encoders in GGUF files, with the names and keys that llama.cpp's converter writes."""

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.naming import naming
from transformer import encoder
from transformer.checkpoint import encoders

pytestmark = pytest.mark.heavy

GOLDEN = Path(__file__).parent.parent / "golden" / "encoder"
# Folder -> architecture, pooling.
MODELS = {
    "mean": ("bert", "mean"),
    "xlm-roberta": ("bert", "mean"),
    "nomic": ("nomic-bert", "mean"),
    "modernbert": ("modern-bert", "cls"),
    "qwen3": ("qwen3", "lasttoken"),
    "gemma3": ("gemma-embedding", "mean"),
}
POOLINGS = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS,
            "lasttoken": gguf.PoolingType.LAST}  # fmt: skip


def write(path: Path, name: str, **changes: Any) -> Path:
    """Write a golden model as GGUF; `changes` replace keys of its architecture."""
    arch, pooling = MODELS[name]
    config = json.loads((GOLDEN / name / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    is_decoder = name in ("qwen3", "gemma3")
    eps = config.get("layer_norm_eps", config.get("norm_eps", config.get("rms_norm_eps")))
    (writer.add_layer_norm_rms_eps if is_decoder else writer.add_layer_norm_eps)(eps)
    if name != "qwen3":
        writer.add_causal_attention(False)
    if is_decoder:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    rope = config.get("rope_parameters") or {}
    if theta := rope.get("full_attention", rope).get("rope_theta"):
        writer.add_rope_freq_base(theta)
    if local := rope.get("sliding_attention"):
        writer.add_float32(f"{arch}.rope.freq_base_swa", local["rope_theta"])
    if name == "modernbert":
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_sliding_window(config["local_attention"])
    if name == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_array(f"{arch}.attention.sliding_window_pattern", [True, False, True])
    for key, value in changes.items():
        writer.add_uint32(f"{arch}.{key}", value)
    if "pooling_type" not in changes:
        writer.add_pooling_type(POOLINGS[pooling])
    if is_decoder:
        writer.add_vocab_size(config["vocab_size"])
    for tensor, array in tensors(name, config, arch).items():
        writer.add_tensor(tensor, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(name: str, config: dict[str, Any], arch: str) -> dict[str, np.ndarray]:
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    result = {}
    for key, array in load_file(GOLDEN / name / "model.safetensors").items():
        if key.startswith("pooler."):
            continue
        if name == "xlm-roberta" and "position_embeddings" in key:
            array = array[config["pad_token_id"] + 1 :]
        if name == "gemma3" and key.endswith("norm.weight"):
            array = array + np.float32(1)
        full = f"model.{key}" if name in ("qwen3", "gemma3") else key
        new = names.get_name(full, try_suffixes=(".weight", ".bias"))
        assert new is not None, key
        result[new] = array
    if name == "gemma3":
        for i in (2, 3):
            dense = load_file(GOLDEN / name / f"{i}_Dense" / "model.safetensors")
            result[f"dense_{i}.weight"] = dense["linear.weight"]
    return result


@pytest.mark.parametrize("name", MODELS)
def test_gguf_file_matches_golden_vectors(name: str, tmp_path: Path) -> None:
    changes = {}
    if name == "gemma3":
        sizes = {"dense_2_feat": (16, 24), "dense_3_feat": (24, 16)}
        for key, (inner, outer) in sizes.items():
            changes |= {f"{key}_in": inner, f"{key}_out": outer}
    path = write(tmp_path / "model.gguf", name, **changes)
    assert encoders.is_encoder(path)
    params, cfg = encoders.load(path)
    folder_params, folder_cfg = encoders.load(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    texts = [row[:n].tolist() for row, n in zip(golden["ids"], golden["mask"].sum(1), strict=True)]
    if name == "xlm-roberta":  # the folder has three poolings, of which GGUF can store one
        params, cfg = encoders.load(path)
        texts = texts[:2]
        with jax.disable_jit():
            vectors = encoder.embed_all(params, cfg, texts)
            whole = encoder.embed_all(folder_params, folder_cfg, texts)[:, :16]
        whole /= np.linalg.norm(whole, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors, whole, atol=1e-5)
        return
    with jax.disable_jit():
        vectors = encoder.embed_all(params, cfg, texts)
    np.testing.assert_allclose(vectors, golden["vectors"], atol=1e-4)


@pytest.mark.parametrize("kind", [0, 4, 9])
def test_unsupported_pooling_is_rejected(kind: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "mean", pooling_type=kind)
    with pytest.raises(ValueError, match=naming("bert.pooling_type", kind)):
        encoders.read_config(path)


def test_reranker_is_rejected_with_its_key(tmp_path: Path) -> None:
    """llama.cpp's converter writes no pooling type for a reranker, but its labels."""
    key = "bert.classifier.output_labels"
    path = write(tmp_path / "model.gguf", "xlm-roberta", **{"classifier.output_labels": 1})
    with pytest.raises(ValueError, match=naming(key)):
        encoders.read_config(path)


def test_is_encoder_of_decoder_without_pooling_is_false() -> None:
    decoders = GOLDEN.parent / "transformer" / "gguf"
    assert not encoders.is_encoder(decoders / "qwen3.gguf")


def test_is_encoder_of_file_that_is_no_gguf_raises_value_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=naming(path)):
        encoders.is_encoder(path)
