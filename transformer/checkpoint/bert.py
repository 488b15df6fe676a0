"""Load and save encoders in the formats of Hugging Face, sentence-transformers and GGUF.

A sentence-transformers folder is a Hugging Face folder with a list of modules
(`sentence_transformers.py`). A folder without `modules.json` is a bare encoder without a defined
pooling, so the caller must specify it. The architecture `...ForSequenceClassification` is a
cross-encoder, whose pooling is a part of its head. `encoder_families.py` lists the families.

Loading is strict, as for decoders. Three kinds of tensors are ignored: the pooler (a linear map of
the first token's vector, from pretraining), the pretraining heads, and the position ids. The tensor
names of a model saved with a head have a prefix ("bert.", "roberta.", "model."). In the oldest
files, the scale and bias of a norm are called gamma and beta.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer import checkpoint, config_keys, encoder_families
from transformer.checkpoint import gguf, safetensors, sentence_transformers
from transformer.checkpoint.encoder_names import tensor_sources
from transformer.checkpoint.gguf import LazyTensor
from transformer.checkpoint.names import TensorSource, rows_per_tensor
from transformer.encoder import Config, HeadConfig, Params, abstract
from transformer.pooling import as_modes

_UNUSED = ("pooler.dense.weight", "pooler.dense.bias")
_PRETRAINING_HEADS = ("cls.predictions.", "cls.seq_relationship.", "lm_head.")
# The masked-language-model heads of ModernBERT and nomic. The head of a ModernBERT cross-encoder
# has some of these names, so a cross-encoder keeps them.
_MASKED_HEADS = ("head.dense.", "head.norm.", "decoder.", "cls.")
_PREFIXES = ("bert.", "roberta.", "model.", "nomic_bert.")
_IGNORED_TENSORS = ("embeddings.position_ids", "rotary_emb.inv_freq")  # follow from the config
_DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}


class Header(NamedTuple):
    """Content of the files of an encoder, except the data of the weights.

    Attributes:
        cfg: Config of the encoder.
        scheme: Naming scheme of the tensors, see `encoder_names.py`.
        folder: Folder of the transformer, or the GGUF file.
        tensors: Tensor name -> tensor whose data is read later.
        modules: The modules of a sentence-transformers folder, or None.
    """

    cfg: Config
    scheme: str
    folder: Path
    tensors: Mapping[str, LazyTensor]
    modules: sentence_transformers.Modules | None = None


def load(
    path: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    pooling: str | tuple[str, ...] | None = None,
    normalize: bool | None = None,
) -> tuple[Params, Config]:
    """Load an encoder from a sentence-transformers or Hugging Face folder, or a GGUF file.

    Args:
        path: The folder or file.
        dtype: Dtype of the token embedding and of the weights of linear maps; the rest stays
            float32.
        pooling: Pooling of the token vectors; None means the setting of the files.
        normalize: Whether embeddings are scaled to length 1; None means the setting of the files.

    Returns:
        The weights and the config.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is damaged or a pickle, a key, tensor, module or shape is not supported,
            or neither the files nor the caller specify the pooling.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    header = read_header(path, pooling=pooling, normalize=normalize)
    tensors = header.tensors
    if path.is_dir():
        tensors = _with_current_names(tensors, is_cross_encoder=header.cfg.head is not None)
        if header.modules is not None:
            tensors |= sentence_transformers.read_dense_tensors(header.modules.dense_folders)
    return _build_params(tensors, header, _DTYPES[dtype]), header.cfg


def is_bert(folder: Path) -> bool:
    """Whether the model_type of a Hugging Face folder is a supported encoder family."""
    folder = sentence_transformers.transformer_folder(folder)
    kind = safetensors.read_json_object(folder / "config.json").get("model_type")
    return isinstance(kind, str) and kind in encoder_families.FAMILIES


def is_cross_encoder(path: Path) -> bool:
    """Whether a folder or GGUF file has an encoder with a head for sequence classification.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is damaged.
    """
    if not path.is_dir():
        kind = gguf.read_metadata_head(path).get("general.architecture")
        return kind in encoder_families.GGUF_ARCHITECTURES and (
            encoder_families.is_gguf_cross_encoder(*gguf.read(path))
        )
    if not is_bert(path) or sentence_transformers.has_pooling(path):
        return False
    transformer = sentence_transformers.transformer_folder(path)
    return _has_head(safetensors.read_json_object(transformer / "config.json"))


def read_config(
    path: Path,
    *,
    pooling: str | tuple[str, ...] | None = None,
    normalize: bool | None = None,
) -> Config:
    """Return the config that `load` returns, without reading weights; raises as `load`."""
    return read_header(Path(path), pooling=pooling, normalize=normalize).cfg


def read_header(
    path: Path,
    *,
    pooling: str | tuple[str, ...] | None = None,
    normalize: bool | None = None,
) -> Header:
    """Read everything but the weights; the arguments and errors are those of `load`."""
    if not path.is_dir():
        return _read_gguf_header(path, pooling, normalize)
    folder = sentence_transformers.transformer_folder(path)
    config, tensors = safetensors.read(folder, ignore=_IGNORED_TENSORS)
    if _has_head(config) and not sentence_transformers.has_pooling(path):
        return _read_cross_encoder_header(folder, config, tensors)
    modules = sentence_transformers.read(path) if sentence_transformers.has_modules(path) else None
    if modules is not None:
        pooling = modules.pooling if pooling is None else pooling
        normalize = modules.normalize if normalize is None else normalize
    elif pooling is None or normalize is None:
        raise ValueError(
            f"{path}: has no modules.json, which defines the pooling; pass pooling ('mean' or "
            "'cls') and normalize (True or False)"
        )
    cfg = Config.from_hf(
        config,
        pooling=pooling,
        normalize=normalize,
        dense=() if modules is None else modules.dense,
    )
    max_tokens, _ = sentence_transformers.read_transformer_settings(folder)
    cfg = _with_max_tokens(cfg, max_tokens)
    return Header(cfg, config["model_type"], folder, tensors, modules)


def _has_head(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return (
        isinstance(names, list)
        and len(names) == 1
        and str(names[0]).endswith("ForSequenceClassification")
    )


def _read_cross_encoder_header(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> Header:
    fields, pooling = encoder_families.head_fields(config)
    cfg = replace(
        Config.from_hf(config, pooling=pooling, normalize=False), head=HeadConfig(**fields)
    )
    max_tokens, _ = sentence_transformers.read_transformer_settings(folder)
    return Header(_with_max_tokens(cfg, max_tokens), config["model_type"], folder, tensors)


def _read_gguf_header(
    path: Path, pooling: str | tuple[str, ...] | None, normalize: bool | None
) -> Header:
    metadata, tensors = gguf.read(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    head = None
    if encoder_families.is_gguf_cross_encoder(metadata, shapes):
        head_fields, pooling = encoder_families.head_fields_from_gguf(metadata, shapes)
        head, normalize = HeadConfig(**head_fields), False
    elif pooling is None:
        pooling = encoder_families.gguf_pooling(metadata) or "mean"
    fields, rest = encoder_families.fields_from_gguf(metadata, shapes)
    cfg = Config(
        **fields,
        max_tokens=fields["max_seq_len"],
        pooling=pooling,
        normalize=True if normalize is None else normalize,  # as llama.cpp does; no key stores it
        head=head,
    )
    kind = metadata["general.architecture"]
    config_keys.check_gguf(rest, cfg, kind)
    return Header(cfg, f"gguf.{kind}", path, tensors)


def _with_max_tokens(cfg: Config, max_tokens: int | None) -> Config:
    # A tokenizer may allow more tokens than the model has positions.
    return cfg if max_tokens is None else replace(cfg, max_tokens=min(max_tokens, cfg.max_seq_len))


def save(folder: Path, params: Params, cfg: Config) -> None:
    """Save a BERT with float32 or bfloat16 weights as a sentence-transformers folder.

    The tokenizer files are not written; sentence-transformers needs them in the same folder.

    Args:
        folder: Folder to write to; it is created if it does not exist.
        params: Weights of the encoder.
        cfg: Config of the encoder.

    Raises:
        ValueError: The encoder is not a BERT.
    """
    folder = Path(folder)
    config = cfg.to_hf()
    sources = jax.tree.leaves(tensor_sources(cfg, "bert", ()))
    tensors = {
        source.name: np.asarray(leaf)
        for source, leaf in zip(sources, jax.tree.leaves(params), strict=True)
    }
    safetensors.write(folder, config, tensors)
    steps = [("", "Transformer"), ("1_Pooling", "Pooling")]
    steps += [("2_Normalize", "Normalize")] * cfg.normalize
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(steps)
    ]
    modes = as_modes(cfg.pooling)
    pooling: dict[str, Any] = {"word_embedding_dimension": cfg.d_model}
    if modes in (("cls",), ("mean",)):  # the keys that every version reads
        pooling["pooling_mode_cls_token"] = modes == ("cls",)
        pooling["pooling_mode_mean_tokens"] = modes == ("mean",)
    else:
        pooling["pooling_mode"] = list(modes)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for path, value in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": cfg.max_tokens, "do_lower_case": False}),
    ):
        (folder / path).write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _with_current_names(
    tensors: Mapping[str, LazyTensor], *, is_cross_encoder: bool
) -> dict[str, LazyTensor]:
    """Return the tensors by the names that transformers uses today, without pretraining heads.

    Names lose the prefix of the model type, and gamma and beta of a norm become weight and bias.

    Raises:
        ValueError: Two tensors get the same name.
    """
    unused = _PRETRAINING_HEADS if is_cross_encoder else (*_PRETRAINING_HEADS, *_MASKED_HEADS)
    renamed: dict[str, LazyTensor] = {}
    old_names: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.startswith(unused):
            continue
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        new_name = name.removeprefix(prefix)
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if new_name.endswith(f"LayerNorm{old}"):
                new_name = new_name.removesuffix(old) + new
        if new_name in renamed:
            raise ValueError(
                f"{tensor.path}: {old_names[new_name]} and {name} are the same weight of the model"
            )
        renamed[new_name], old_names[new_name] = tensor, name
    return renamed


def _build_params(tensors: Mapping[str, LazyTensor], header: Header, dtype: Any) -> Params:
    cfg, path = header.cfg, header.folder
    if cfg.num_layers > len(tensors):  # checked before a tree of so many layers is built
        raise ValueError(
            f"{path}: has {len(tensors)} tensors, too few for the {cfg.num_layers} layers of the "
            "config"
        )
    sources, infos = tensor_sources(cfg, header.scheme, tensors.keys()), abstract(cfg)
    num_rows = rows_per_tensor(sources, infos)
    num_rows.pop("", None)  # biases that are zero
    names = tensors.keys() - ({*_UNUSED} - num_rows.keys())
    checkpoint.check_names(names, num_rows.keys(), tensors, path)

    def read(key_path: tuple[Any, ...], source: TensorSource, info: Any) -> jax.Array:
        if not source.name:
            return jnp.zeros(info.shape, np.float32)
        tensor, expected = tensors[source.name], (num_rows[source.name], *info.shape[1:])
        if tensor.shape != expected:
            raise ValueError(
                f"{tensor.path}: {source.name} must have shape {expected}, got {tensor.shape}"
            )
        is_matrix = key_path[-1].name == "weight"  # of a Linear
        rows = tensor.read(source.first_row, source.first_row + info.shape[0])
        return jnp.asarray(rows, dtype if is_matrix else np.float32)

    return jax.tree_util.tree_map_with_path(read, sources, infos)
