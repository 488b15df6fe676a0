"""Load any model that embeds texts: an encoder (`bert.py`), or a decoder with a pooling.

A decoder embeds texts if its folder has the modules of sentence-transformers with a pooling, or its
GGUF metadata has a `pooling_type`. `pooled_decoder.py` computes the embeddings; the output
projection of the decoder is not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from transformer import checkpoint, encoder_families, gguf_config, hf_config, pooled_decoder
from transformer.checkpoint import bert, gguf, safetensors, sentence_transformers
from transformer.encoder import AnyConfig, AnyParams
from transformer.pooling import Dense
from transformer.weights import Linear

_IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")
# The architecture of EmbeddingGemma in GGUF files; its keys are those of Gemma 3.
_GGUF_GEMMA = "gemma-embedding"


class Settings(NamedTuple):
    """Settings of an embedding model for the text before it is tokenized.

    Attributes:
        folder: Folder of the tokenizer, or the GGUF file that contains it.
        prompts: Texts to put before an input, by prompt name.
        default_prompt: The prompt of an input without a prompt name.
        lowercase: Whether texts are converted to lower case before the tokenizer.
    """

    folder: Path
    prompts: dict[str, str]
    default_prompt: str
    lowercase: bool


def load(
    path: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[AnyParams, AnyConfig]:
    """Load an embedding model; `bert.load` describes arguments, results and errors."""
    if not _is_decoder(path):
        return bert.load(path, dtype=dtype)
    cfg, tensors, scheme, architecture = _read_decoder(path)
    dense_folders = ()
    if path.is_dir():
        dense_folders = sentence_transformers.read(path).dense_folders
    dense_tensors = sentence_transformers.read_dense_tensors(dense_folders)
    for i in range(len(cfg.dense) if not path.is_dir() else 0):
        dense_tensors[f"dense.{i}.weight"] = tensors.pop(f"dense_{i + 2}.weight")
    params = checkpoint.build_params(
        tensors, cfg.decoder, scheme, architecture, path, dtype, lambda done: None
    )
    dense = []
    for i, layer in enumerate(cfg.dense):
        shapes: dict[str, tuple[int, ...]] = {"weight": (layer.out_features, layer.in_features)}
        if layer.has_bias:
            shapes["bias"] = (layer.out_features,)
        names = {f"dense.{i}.{part}" for part in shapes}
        stored = {name for name in dense_tensors if name.startswith(f"dense.{i}.")}
        if wrong := sorted(names ^ stored):
            raise ValueError(
                f"{path}: dense layer {i} must have the tensors {sorted(names)}, and {wrong[0]} is "
                f"{'missing' if wrong[0] in names else 'unknown'}"
            )
        arrays: dict[str, Any] = {}
        for part, shape in shapes.items():
            tensor = dense_tensors[f"dense.{i}.{part}"]
            if tensor.shape != shape:
                raise ValueError(
                    f"{path}: dense.{i}.{part} must have shape {shape}, got {tensor.shape}"
                )
            kind = jnp.bfloat16 if dtype == "bfloat16" and part == "weight" else np.float32
            arrays[part] = jnp.asarray(tensor.read(0, shape[0]), kind)
        dense.append(Linear(**arrays))
    return pooled_decoder.Params(decoder=params, dense=tuple(dense)), cfg


def read_config(path: Path) -> AnyConfig:
    """Return the config that `load` returns, without reading weights; raises as `load`."""
    return _read_decoder(path)[0] if _is_decoder(path) else bert.read_config(path)


def read_settings(path: Path) -> Settings:
    """Return the prompts and tokenizer settings of a folder or GGUF file; raises as `load`."""
    if path.is_dir() and sentence_transformers.has_pooling(path):
        modules = sentence_transformers.read(path)
        return Settings(
            modules.transformer, dict(modules.prompts), modules.default_prompt, modules.lowercase
        )
    if not path.is_dir():
        return Settings(path, {}, "", False)
    folder = sentence_transformers.transformer_folder(path)
    lowercase = sentence_transformers.read_transformer_settings(folder)[1]
    return Settings(folder, {}, "", lowercase)


def is_encoder(path: Path) -> bool:
    """Whether a folder or GGUF file has a model that embeds texts.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is damaged.
    """
    if not path.is_dir():
        return _has_gguf_pooling(gguf.read_metadata_head(path)) and not bert.is_cross_encoder(path)
    if sentence_transformers.has_pooling(path):
        return True
    return bert.is_bert(path) and not bert.is_cross_encoder(path)


def _has_gguf_pooling(metadata: dict[str, Any]) -> bool:
    kind = metadata.get("general.architecture")
    if kind == _GGUF_GEMMA or kind in encoder_families.GGUF_ARCHITECTURES:
        return True
    return metadata.get(f"{kind}.pooling_type") not in (0, None)


def _is_decoder(path: Path) -> bool:
    if path.is_dir():
        return not bert.is_bert(path)
    kind = gguf.read_metadata_head(path).get("general.architecture")
    return kind not in encoder_families.GGUF_ARCHITECTURES


def _read_decoder(path: Path) -> tuple[pooled_decoder.Config, dict[str, Any], str, str]:
    """Return the config, the tensors of the decoder, their naming scheme and architecture."""
    if not path.is_dir():
        return _read_gguf_decoder(path)
    if not sentence_transformers.has_modules(path):
        raise ValueError(f"{path}: has no modules.json, which defines how a decoder embeds texts")
    modules = sentence_transformers.read(path)
    config, tensors = safetensors.read(modules.transformer, ignore=_IGNORED)
    # The head is not used, so embeddings count as tied.
    config = {**config, "tie_word_embeddings": True}
    is_causal = not config.pop("use_bidirectional_attention", False)
    if config.get("is_causal") is False:  # as in the files of models that bring their own code
        config["is_causal"], is_causal = True, False
    decoder_cfg = hf_config.from_hf(config)
    limit = modules.max_tokens or decoder_cfg.max_seq_len
    cfg = pooled_decoder.Config(
        decoder=decoder_cfg,
        max_tokens=min(limit, decoder_cfg.max_seq_len),
        is_causal=is_causal,
        pooling=modules.pooling,
        dense=modules.dense,
        normalize=modules.normalize,
    )
    kind = config["model_type"]
    return cfg, dict(checkpoint.with_prefix(tensors, kind)), "hf", kind


def _read_gguf_decoder(
    path: Path,
) -> tuple[pooled_decoder.Config, dict[str, Any], str, str]:
    metadata, tensors = gguf.read(path)
    kind = metadata.get("general.architecture")
    pooling = encoder_families.gguf_pooling(metadata) or "mean"
    metadata = {key: value for key, value in metadata.items() if key != f"{kind}.pooling_type"}
    is_causal = metadata.pop(f"{kind}.attention.causal", kind != _GGUF_GEMMA)
    dense_sizes = [
        {part: metadata.pop(f"{kind}.dense_{i}_feat_{part}", None) for part in ("in", "out")}
        for i in (2, 3)
    ]
    if kind == _GGUF_GEMMA:
        metadata = {
            f"gemma3.{key.removeprefix(f'{kind}.')}" if key.startswith(f"{kind}.") else key: value
            for key, value in metadata.items()
        }
        metadata["general.architecture"] = kind = "gemma3"
    tensors.pop("output.weight", None)
    decoder_cfg = gguf_config.from_gguf(metadata, has_head=False)
    dense = tuple(  # llama.cpp has two, without bias and activation
        Dense(
            in_features=sizes["in"],
            out_features=sizes["out"],
            has_bias=False,
            activation="identity",
        )
        for i, sizes in enumerate(dense_sizes)
        if f"dense_{i + 2}.weight" in tensors
    )
    cfg = pooled_decoder.Config(
        decoder=decoder_cfg,
        max_tokens=decoder_cfg.max_seq_len,
        is_causal=bool(is_causal),
        pooling=pooling,
        dense=dense,
    )
    return cfg, tensors, "gguf", str(kind)
