"""Tests of GGUF files that llama.cpp's converter makes, with a real vocabulary.

    LLAMA_CPP=/path/to/llama.cpp pytest -m parity tests/transformer/test_parity_converter.py

The folder is a checkout of llama.cpp, or `vendor/llama.cpp` of the source package of
llama-cpp-python. The converter runs offline: the vocabularies are those of `models/`, written as
the tokenizer files that it reads.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.serve import encoder_comparisons
from tests.transformer.comparisons import (
    TOLERANCE,
    convert,
    converted_difference,
    vocabulary,
    write_bpe,
)
from tests.transformer.conftest import GOLDEN, MORE, TINY
from tests.transformer.test_quantized import QUANTIZATION, random_tensors
from transformer import checkpoint

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip("set LLAMA_CPP to a folder with convert_hf_to_gguf.py")
    return Path(folder)


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "packed"])
def test_llama_cpp_converter_dequantizes_to_the_same_weights(llama_cpp, tmp_path, method):
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


@pytest.mark.parametrize("name", [*TINY, *MORE, "gpt_oss-mxfp4"])
def test_model_converted_by_llama_cpp_matches_transformers(llama_cpp, tmp_path, name):
    assert converted_difference(name, llama_cpp, tmp_path) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "labels", "file"),
    [
        (kind, labels, file)
        for kind, files in encoder_comparisons.CONVERTIBLE.items()
        for labels in (1, 2)
        for file in files
    ],
)
def test_reranker_converted_by_llama_cpp_matches_cross_encoder(
    llama_cpp, tmp_path, kind, labels, file
):
    """Bug: GGUF files of rerankers, such as those of bge-reranker-v2-m3, were refused."""
    difference = encoder_comparisons.converted_score_difference(
        kind, llama_cpp, tmp_path, labels, file
    )
    assert difference <= encoder_comparisons.TOLERANCE
