"""Tests of GGUF files that llama.cpp's converter makes, with a real vocabulary.

    LLAMA_CPP=/path/to/llama.cpp pytest -m parity tests/transformer/test_parity_converter.py

The folder is a checkout of llama.cpp, or `vendor/llama.cpp` of the source package of
llama-cpp-python. The converter runs offline: the vocabularies are those of `models/`, written as
the tokenizer files that it reads.
"""

import copy
import dataclasses
import json
import os
import struct
import subprocess
import sys
from functools import cache as once
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import bpe
from bpe.save import save as save_tokenizer
from tests.transformer.conftest import GOLDEN, MORE
from tests.transformer.quantized import quantized
from tests.transformer.test_quantized import QUANTIZATION, random_tensors
from transformer import checkpoint, decoder
from transformer.checkpoint import gguf

pytestmark = pytest.mark.parity
SENTENCEPIECE = ("gemma2", "phi3", "mixtral")
# The converter writes no key for these, and llama.cpp has one fixed value.
CHANGES = {
    "gemma2": dict(query_pre_attn_scalar=12),
    "gpt_neox": dict(rotary_emb_base=10_000),
    "smollm3": dict(
        num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], layer_types=["full_attention"] * 4
    ),
    "qwen3_moe": dict(norm_topk_prob=True),
    "gpt_oss": dict(swiglu_limit=7.0),
}


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip("set LLAMA_CPP to a folder with convert_hf_to_gguf.py")
    return Path(folder)


@once
def vocabulary(path: Path) -> dict:
    return gguf.read(path)[0]


def protobuf(number: int, value: bytes | int | float) -> bytes:
    """Return a field of a protocol buffer: bytes, an integer or a float32."""

    def varint(n: int) -> bytes:
        low, n = n & 127, n >> 7
        return bytes([low | 128]) + varint(n) if n else bytes([low])

    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def sentencepiece_pieces(metadata: dict) -> bytes:
    """Return the pieces of a vocabulary as in a tokenizer.model."""
    keys = ("tokens", "scores", "token_type")
    pieces = zip(*(metadata[f"tokenizer.ggml.{key}"] for key in keys), strict=True)
    return b"".join(
        protobuf(1, protobuf(1, piece) + protobuf(2, score) + protobuf(3, kind))
        for piece, score, kind in pieces
    )


def sentencepiece_model(metadata: dict) -> bytes:
    """Return the tokenizer.model of a vocabulary: pieces, and a BPE trainer with byte fallback."""
    return sentencepiece_pieces(metadata) + protobuf(2, protobuf(3, 2) + protobuf(35, 1))


def numbers(value) -> list[float]:
    """Return the numbers of a field of a config."""
    fields = dataclasses.astuple(value) if dataclasses.is_dataclass(value) else value
    return [x for x in jax.tree.leaves(fields) if isinstance(x, int | float)]


def write_bpe(folder: Path, metadata: dict) -> None:
    """Write the tokenizer files of a vocabulary of byte pairs."""
    save_tokenizer(bpe.from_gguf(metadata).encoding, folder / "tokenizer.json")
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def convert(llama_cpp: Path, folder: Path) -> Path:
    """Return the GGUF file in float32 that the converter makes from a folder."""
    target = folder.parent / "m.gguf"
    command = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", folder]
    done = subprocess.run(
        [*command, "--outtype", "f32", "--outfile", target],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "packed"])
def test_converter_dequantizes_to_the_same_weights(llama_cpp, tmp_path, method):
    metadata = vocabulary(llama_cpp / "models" / "ggml-vocab-gpt-2.gguf")
    folder, size = tmp_path / "hf", len(metadata["tokenizer.ggml.tokens"])
    folder.mkdir()
    # Where GPTQ has the zero point 0, llama.cpp reads 16, unlike GPTQModel.
    tensors = dict(random_tensors(method, lowest_zero=1)[0])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (size, 32))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    config |= {"vocab_size": size, "quantization_config": QUANTIZATION[method]}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    (folder / "config.json").write_text(json.dumps(config))
    write_bpe(folder, metadata)
    expected, _, _ = checkpoint.load(folder)
    params, _, _ = checkpoint.load(convert(llama_cpp, folder))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), params, expected)


@pytest.mark.parametrize("name", [*MORE, "gpt_oss-mxfp4"])
def test_converted_model_matches_transformers(llama_cpp, tmp_path, name):
    import torch

    from tests.golden.transformer import make_tiny

    name, _, quantization = name.partition("-")
    is_sentencepiece = name in SENTENCEPIECE
    vocab = "llama-spm" if is_sentencepiece else "gpt-2"
    metadata = vocabulary(llama_cpp / "models" / f"ggml-vocab-{vocab}.gguf")
    config = copy.deepcopy(make_tiny.CONFIGS[name])
    config.vocab_size = len(metadata["tokenizer.ggml.tokens"])
    for key, value in CHANGES.get(name, {}).items():
        setattr(config, key, value)
    if name == "gpt_neox":
        config.rope_parameters["rope_theta"] = 10_000
    model = make_tiny.random_model(config)
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    if quantization:
        for key, weight in quantized(folder, folder).items():
            model.get_parameter(key).data = torch.tensor(weight)
    from_folder, folder_cfg, _ = checkpoint.load(folder)
    if name == "gpt_neox":
        # The converter needs this key of published files, which transformers 5 renames when it
        # reads the config. It does not read that of an unknown type.
        path = folder / "config.json"
        keys = dict(rotary_pct=0.5, model_type="unknown")
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    if is_sentencepiece:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(metadata))
    else:
        write_bpe(folder, metadata)
    target = convert(llama_cpp, folder)

    params, cfg, converted = checkpoint.load(target)
    assert converted["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]
    different = {
        field: (value, getattr(folder_cfg, field))
        for field, value in vars(cfg).items()
        if value != getattr(folder_cfg, field)
    }
    for field, values in different.items():  # the file has float32 numbers
        np.testing.assert_allclose(*map(numbers, values), rtol=1e-6, err_msg=field)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, from_folder
    )
    ids = torch.randint(config.vocab_size, (1, 24))
    with torch.inference_mode():
        expected = model(ids).logits.numpy()
    logits, _ = decoder.forward(params, cfg, ids.numpy())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
