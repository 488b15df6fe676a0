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
from transformer.checkpoint import bert, encoders

pytestmark = pytest.mark.heavy

GOLDEN = Path(__file__).parent.parent / "golden" / "encoder"
# Folder -> architecture, pooling.
EMBEDDERS = {
    "mean": ("bert", "mean"),
    "xlm-roberta": ("bert", "mean"),
    "nomic": ("nomic-bert", "mean"),
    "modernbert": ("modern-bert", "cls"),
    "qwen3": ("qwen3", "lasttoken"),
    "gemma3": ("gemma-embedding", "mean"),
}
# Folder -> architecture, pooling before the head; the converter writes no pooling type.
RERANKERS = {"cross-roberta": ("bert", "cls"), "cross-modernbert": ("modern-bert", "mean")}
MODERNBERT_HEAD = {"head.dense": "cls", "head.norm": "cls.norm", "classifier": "cls.output"}
POOLINGS = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS,
            "lasttoken": gguf.PoolingType.LAST}  # fmt: skip


def write(path: Path, name: str, without: str = "", **changes: Any) -> Path:
    """Write a golden model as GGUF; `changes` replace keys of its architecture.

    The tensor `without` is left out.
    """
    arch, pooling = (EMBEDDERS | RERANKERS)[name]
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
    if arch == "modern-bert":
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_sliding_window(config["local_attention"])
    if name == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_array(f"{arch}.attention.sliding_window_pattern", [True, False, True])
    for key, value in changes.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{arch}.{key}", value)
    if name == "cross-modernbert":
        writer.add_uint32(f"{arch}.classifier.pooling_type", POOLINGS[pooling])
    elif name in EMBEDDERS and "pooling_type" not in changes:
        writer.add_pooling_type(POOLINGS[pooling])
    if is_decoder:
        writer.add_vocab_size(config["vocab_size"])
    for tensor, array in tensors(name, config, arch).items():
        if tensor != without:
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
        if "roberta" in name and "position_embeddings" in key:
            array = array[config["pad_token_id"] + 1 :]
        if name == "gemma3" and key.endswith("norm.weight"):
            array = array + np.float32(1)
        full = f"model.{key}" if name in ("qwen3", "gemma3") else key.removeprefix("roberta.")
        full = full.removeprefix("model.") if name == "cross-modernbert" else full
        part, _, suffix = full.rpartition(".")
        new = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if name == "cross-modernbert" and part in MODERNBERT_HEAD:
            new = f"{MODERNBERT_HEAD[part]}.{suffix}"
        assert new is not None, key
        result[new] = array
    if name == "gemma3":
        for i in (2, 3):
            dense = load_file(GOLDEN / name / f"{i}_Dense" / "model.safetensors")
            result[f"dense_{i}.weight"] = dense["linear.weight"]
    return result


@pytest.mark.parametrize("name", EMBEDDERS)
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


@pytest.mark.parametrize("kind", [0, 9])
def test_unsupported_pooling_is_rejected(kind: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "mean", pooling_type=kind)
    with pytest.raises(ValueError, match=naming("bert.pooling_type", kind)):
        encoders.read_config(path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cross-roberta", {}),  # as in files from before 2025
        ("cross-roberta", {"classifier.output_labels": ["a", "b", "c"]}),
        ("cross-roberta", {"pooling_type": 4}),
        ("cross-modernbert", {"classifier.output_labels": ["a", "b"]}),
    ],
)
def test_reranker_matches_golden_logits(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Bug: GGUF files of rerankers were refused."""
    path = write(tmp_path / "model.gguf", name, **changes)
    assert bert.is_cross_encoder(path) and not encoders.is_encoder(path)
    params, cfg = bert.load(path)
    golden = np.load(GOLDEN / name / "golden.npz")
    with jax.disable_jit():
        x, _ = encoder.forward(params, cfg, golden["ids"], golden["mask"], golden["types"])
        pooled = encoder.pool(x, cfg, golden["mask"], 1)[:, 0]
        logits = encoder.score(pooled, cfg, params.head)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("without", "changes", "facts"),
    [
        ("cls.weight", {}, ["cls.weight"]),  # a BERT, whose pooler the converter drops
        ("token_types.weight", {}, ["token_types.weight"]),  # a DistilBERT
        ("cls.output.bias", {}, ["cls.output.bias"]),
        ("", {"classifier.output_labels": ["a"]}, ["bert.classifier.output_labels", 3, 1]),
        ("", {"classifier.pooling_type": 3}, ["bert.classifier.pooling_type", 3]),
        ("", {"pooling_type": 1}, ["bert.pooling_type", 1]),
    ],
)
def test_damaged_reranker_names_tensor_or_key(
    without: str, changes: dict[str, Any], facts: list[object], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", "cross-roberta", without, **changes)
    with pytest.raises(ValueError, match=naming(*facts)):
        bert.load(path)


def test_reranker_that_is_a_decoder_is_rejected_with_its_key(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "qwen3", pooling_type=4)
    with pytest.raises(ValueError, match=naming("qwen3.pooling_type", 4)):
        encoders.read_config(path)


def test_name_of_an_encoder_does_not_make_a_decoder_an_encoder(tmp_path: Path) -> None:
    """Bug: any metadata value equal to an encoder's architecture made the file an encoder."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("gemma-embedding")
    writer.add_context_length(8)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert not encoders.is_encoder(path)


def test_is_encoder_of_decoder_without_pooling_is_false() -> None:
    decoders = GOLDEN.parent / "transformer" / "gguf"
    assert not encoders.is_encoder(decoders / "qwen3.gguf")


def test_is_encoder_of_file_that_is_no_gguf_raises_value_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=naming(path)):
        encoders.is_encoder(path)
