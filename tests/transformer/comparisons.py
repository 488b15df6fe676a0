"""Comparisons of a decoder family with transformers, live, on a tiny random model.

Each returns the largest difference. The parity tests assert on it, and `tests/models_table.py`
prints it.
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
from typing import Any, NamedTuple

import jax
import numpy as np

import bpe
from bpe.save import save as save_tokenizer
from tests.transformer.parts import check_parts
from tests.transformer.quantized import quantized
from transformer import cache, checkpoint, decoder
from transformer.checkpoint import gguf
from transformer.config import Config

TOLERANCE = 1e-4  # of logits and intermediates
LENGTH = 352  # beyond the first block of the cache, every window, and every context before scaling
WINDOW = 60  # at the end the first block is outside the window


@once
def reference(name: str) -> tuple[Any, Any]:
    """Return a random model of a family, made by transformers like the golden ones, and ids."""
    import torch

    from tests.golden.transformer import make_tiny

    config = copy.deepcopy(make_tiny.CONFIGS[name])
    config.pad_token_id = None  # torch computes no gradient for the embedding of this token
    if name == "gpt2":
        config.n_positions = 512
    elif getattr(config, "sliding_window", None) is not None:
        config.sliding_window = WINDOW
    torch.manual_seed(1)
    return make_tiny.random_model(config), torch.randint(config.vocab_size, (1, LENGTH))


class Both(NamedTuple):
    """A model as Pellucid loads it, and as transformers has it, with its logits for some ids."""

    params: decoder.Params
    cfg: Config
    model: Any
    ids: Any
    expected: np.ndarray


def load_both(name: str, folder: Path) -> Both:
    """Save the model of a family in shards, and load it with Pellucid."""
    import torch

    model, ids = reference(name)
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    params, cfg, _ = checkpoint.load(folder)
    with torch.inference_mode():
        return Both(params, cfg, model, ids, model(ids).logits.numpy())


def largest(actual: Any, expected: np.ndarray) -> float:
    """Return the largest absolute difference of two arrays of one shape."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max())


def logits_difference(both: Both) -> float:
    """Compare the logits of one forward pass."""
    logits, _ = decoder.forward(both.params, both.cfg, both.ids.numpy())
    return largest(logits, both.expected)


def cached_difference(both: Both) -> float:
    """Compare logits with a KV cache: prefill in chunks, then decode beyond block and window."""
    params, cfg = both.params, both.cfg
    forward_cached = jax.jit(decoder.forward_cached, static_argnums=1, donate_argnums=2)
    kv_cache, tables, ids = cache.init(cfg, 2), np.array([[1, 2]]), both.ids.numpy()
    sizes = [64, 64, 64, *[1] * (LENGTH - 192)]
    differences = []
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        chunk = ids[:, start : start + size]
        x, kv_cache = forward_cached(params, cfg, kv_cache, chunk, tables, np.array([start]))
        logits = decoder.unembed(params, cfg, x)
        differences.append(largest(logits, both.expected[:, start : start + size]))
    return float(np.max(differences))


def part_differences(both: Both) -> dict[str, float]:
    """Compare every intermediate of every block; return the largest difference of each part.

    Raises:
        AssertionError: a difference exceeds the tolerance of its part.
    """
    from tests.golden.transformer.make_tiny import intermediates

    golden = {"ids": both.ids.numpy(), **intermediates(both.model, both.ids)}
    return check_parts(both.params, both.cfg, golden)


# --- GGUF files of llama.cpp's converter ------------------------------------------------------

SENTENCEPIECE = ("llama", "mistral", "gemma", "gemma2", "gemma3", "phi3", "mixtral")
# The converter writes no key for these, and llama.cpp has one fixed value.
CHANGES = {
    "llama": dict(  # the parameters of Llama 3, which the file has only as a table
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500_000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    ),
    "mistral": dict(sliding_window=None),
    "qwen2": dict(
        use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 2
    ),
    "gemma3": dict(
        num_hidden_layers=6,
        query_pre_attn_scalar=12,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        _sliding_window_pattern=6,
    ),
    "gemma2": dict(query_pre_attn_scalar=12),
    "gpt_neox": dict(rotary_emb_base=10_000),
    "smollm3": dict(
        num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], layer_types=["full_attention"] * 4
    ),
    "qwen3_moe": dict(norm_topk_prob=True),
    "gpt_oss": dict(swiglu_limit=7.0),
}


KEYS = {  # of published files, which the converter needs and transformers 5 does not write
    # transformers 5 would rename rotary_pct when the converter asks it to read the config. It does
    # not read that of an unknown type.
    "gpt_neox": dict(rotary_pct=0.5, model_type="unknown"),
    "gpt2": dict(n_ctx=64),
}


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


def numbers(value: Any) -> list[float]:
    """Return the numbers of a field of a config."""
    fields = dataclasses.astuple(value) if dataclasses.is_dataclass(value) else value
    return [x for x in jax.tree.leaves(fields) if isinstance(x, int | float)]


def converted_difference(name: str, llama_cpp: Path, folder: Path) -> float:
    """Convert a model of a family with llama.cpp's converter, and compare the logits of the file.

    Args:
        name: The family; followed by "-mxfp4", its experts in MXFP4.
        llama_cpp: A folder with convert_hf_to_gguf.py and models/.
        folder: An empty folder to write to.

    Raises:
        AssertionError: Vocabulary, config or weights differ from those of the safetensors.
    """
    import torch

    from tests.golden.transformer import make_tiny

    name, _, quantization = name.partition("-")
    is_sentencepiece = name in SENTENCEPIECE
    # The converter reads the tokenizer by the class of the family, which for Qwen2 has its pattern.
    vocab = "llama-spm" if is_sentencepiece else "qwen2" if name == "qwen2" else "gpt-2"
    metadata = vocabulary(llama_cpp / "models" / f"ggml-vocab-{vocab}.gguf")
    config = copy.deepcopy(make_tiny.CONFIGS[name])
    config.vocab_size = len(metadata["tokenizer.ggml.tokens"])
    for key, value in CHANGES.get(name, {}).items():
        setattr(config, key, value)
    if name == "gpt_neox":
        config.rope_parameters["rope_theta"] = 10_000
    model = make_tiny.random_model(config)
    source = folder / "hf"
    model.save_pretrained(source)
    if quantization:
        for key, weight in quantized(source, source).items():
            model.get_parameter(key).data = torch.tensor(weight)
    from_folder, folder_cfg, _ = checkpoint.load(source)
    if name in KEYS:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | KEYS[name]))
    if is_sentencepiece:
        (source / "tokenizer.model").write_bytes(sentencepiece_model(metadata))
    else:
        write_bpe(source, metadata)

    params, cfg, converted = checkpoint.load(convert(llama_cpp, source))
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
    return largest(logits, expected)
