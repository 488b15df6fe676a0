"""Loading and saving of BERT encoders, in the formats of Hugging Face and sentence-transformers.

A sentence-transformers folder is a Hugging Face folder with a list of modules: `modules.json`
(transformer, pooling, optionally normalization), `1_Pooling/config.json`, and
`sentence_bert_config.json` with the maximum input length. A folder without `modules.json` is a bare
BERT without a defined pooling, so the caller must specify it.

Loading is strict, as for decoders. Three kinds of tensors are ignored: the pooler (a linear map of
the first token's vector, from pretraining), the pretraining heads (`cls.`), and the position ids.
The tensor names of a model saved with a pretraining head have the prefix `bert.`. The first files
name the scale and bias of a norm gamma and beta.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from transformer.checkpoint import safetensors
from transformer.checkpoint.gguf import LazyTensor
from transformer.encoder import Config, Layer, Params, abstract
from transformer.weights import Linear, Norm

_UNUSED = ("pooler.dense.weight", "pooler.dense.bias")
_PRETRAINING_HEADS = ("cls.predictions.", "cls.seq_relationship.")
_IGNORED_TENSORS = ("embeddings.position_ids",)  # 0, 1, 2, ...
_DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}


def load(
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    pooling: Literal["mean", "cls"] | None = None,
    normalize: bool | None = None,
) -> tuple[Params, Config]:
    """Load an encoder from a sentence-transformers or Hugging Face folder.

    Args:
        folder: The folder.
        dtype: Dtype of the token embedding and of the weights of linear maps; the rest stays
            float32.
        pooling: Pooling of the token vectors; None means the setting of the folder.
        normalize: Whether embeddings are scaled to length 1; None means the setting of the folder.

    Returns:
        The weights and the config.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is damaged or a pickle, a key, tensor, module or shape is not supported,
            or neither the folder nor the caller specifies the pooling.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    cfg = read_config(folder, pooling=pooling, normalize=normalize)
    _, tensors = safetensors.read(folder, ignore=_IGNORED_TENSORS)
    return _build_params(_with_current_names(tensors), cfg, folder, _DTYPES[dtype]), cfg


def is_bert(folder: Path) -> bool:
    """Whether the model_type of a Hugging Face folder is bert."""
    return safetensors.read_json_object(folder / "config.json").get("model_type") == "bert"


def read_config(
    folder: Path,
    *,
    pooling: Literal["mean", "cls"] | None = None,
    normalize: bool | None = None,
) -> Config:
    """Return the config that `load` returns, without reading weights; raises as `load`."""
    if (folder / "modules.json").exists():
        file_pooling, file_normalize = _read_modules(folder)
        pooling = file_pooling if pooling is None else pooling
        normalize = file_normalize if normalize is None else normalize
    elif pooling is None or normalize is None:
        raise ValueError(
            f"{folder}: has no modules.json, which defines the pooling; pass pooling ('mean' or "
            "'cls') and normalize (True or False)"
        )
    return Config.from_hf(
        safetensors.read_json_object(folder / "config.json"),
        max_tokens=_read_max_tokens(folder),
        pooling=pooling,
        normalize=normalize,
    )


def save(folder: Path, params: Params, cfg: Config) -> None:
    """Save float32 or bfloat16 weights as a sentence-transformers folder.

    The tokenizer files are not written; sentence-transformers needs them in the same folder.

    Args:
        folder: Folder to write to; it is created if it does not exist.
        params: Weights of the encoder.
        cfg: Config of the encoder.
    """
    folder = Path(folder)
    tensors = {
        name: np.asarray(leaf)
        for name, leaf in zip(jax.tree.leaves(_names(cfg)), jax.tree.leaves(params), strict=True)
    }
    safetensors.write(folder, cfg.to_hf(), tensors)
    steps = [("", "Transformer"), ("1_Pooling", "Pooling")]
    steps += [("2_Normalize", "Normalize")] * cfg.normalize
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(steps)
    ]
    pooling = {
        "word_embedding_dimension": cfg.d_model,
        "pooling_mode_cls_token": cfg.pooling == "cls",
        "pooling_mode_mean_tokens": cfg.pooling == "mean",
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for path, value in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": cfg.max_tokens, "do_lower_case": False}),
    ):
        (folder / path).write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _names(cfg: Config) -> Params:
    """Return the tree of `Params` with the name of a tensor at each leaf."""
    leaf: Any = str  # takes the place of an array in the tree

    def linear(name: str) -> Linear:
        return Linear(weight=leaf(f"{name}.weight"), bias=leaf(f"{name}.bias"))

    def norm(name: str) -> Norm:
        return Norm(scale=leaf(f"{name}.LayerNorm.weight"), bias=leaf(f"{name}.LayerNorm.bias"))

    def layer(name: str) -> Layer:
        return Layer(
            q=linear(f"{name}.attention.self.query"),
            k=linear(f"{name}.attention.self.key"),
            v=linear(f"{name}.attention.self.value"),
            out=linear(f"{name}.attention.output.dense"),
            attn_norm=norm(f"{name}.attention.output"),
            up=linear(f"{name}.intermediate.dense"),
            down=linear(f"{name}.output.dense"),
            mlp_norm=norm(f"{name}.output"),
        )

    return Params(
        embed=Linear(weight=leaf("embeddings.word_embeddings.weight")),
        positions=leaf("embeddings.position_embeddings.weight"),
        token_types=leaf("embeddings.token_type_embeddings.weight"),
        embed_norm=norm("embeddings"),
        layers=tuple(layer(f"encoder.layer.{i}") for i in range(cfg.num_layers)),
    )


def _with_current_names(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors by their current names, without pretraining heads."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(f"LayerNorm{old}"):
                name = name.removesuffix(old) + new
        if not name.startswith(_PRETRAINING_HEADS):
            renamed[name] = tensor
    return renamed


def _build_params(
    tensors: Mapping[str, LazyTensor], cfg: Config, folder: Path, dtype: Any
) -> Params:
    if cfg.num_layers > len(tensors):  # checked before a tree of so many layers is built
        raise ValueError(
            f"{folder}: {len(tensors)} tensors are too few for {cfg.num_layers} layers"
        )
    names, infos = _names(cfg), abstract(cfg)
    expected, actual = set(jax.tree.leaves(names)), tensors.keys() - set(_UNUSED)
    if missing := sorted(expected - actual):
        raise ValueError(f"{folder}: missing tensors: {_first_names(missing)}")
    if unknown := sorted(actual - expected):
        raise ValueError(
            f"{folder}: tensors that are not part of this model: {_first_names(unknown)}"
        )

    def read(key_path: tuple[Any, ...], name: str, info: Any) -> jax.Array:
        tensor = tensors[name]
        if tensor.shape != info.shape:
            raise ValueError(f"{folder}: {name} must have shape {info.shape}, got {tensor.shape}")
        is_matrix = key_path[-1].name == "weight"  # of a Linear
        return jnp.asarray(tensor.read(0, info.shape[0]), dtype if is_matrix else np.float32)

    return jax.tree_util.tree_map_with_path(read, names, infos)


def _read_modules(folder: Path) -> tuple[Literal["mean", "cls"], bool]:
    """Return the pooling and whether embeddings are normalized, from the list of modules."""
    path = folder / "modules.json"
    try:
        modules = json.loads(path.read_text("utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        paths = [module["path"] for module in modules]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: must be a list of modules with type and path") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{path}: the modules must be Transformer, Pooling and optionally Normalize, "
            f"got {kinds}"
        )
    if paths[:2] != ["", "1_Pooling"]:
        raise ValueError(
            f"{path}: the paths of the first two modules must be '' and '1_Pooling', "
            f"got {paths[:2]}"
        )
    return _read_pooling(folder / paths[1] / "config.json"), len(kinds) == 3


def _read_pooling(path: Path) -> Literal["mean", "cls"]:
    """Return the pooling of a config file in the old or the new format."""
    value = safetensors.read_json_object(path)
    modes = {key.removeprefix("pooling_mode_") for key, on in value.items()
             if key.startswith("pooling_mode_") and on}  # fmt: skip
    if "pooling_mode" in value:
        modes |= {str(value["pooling_mode"])}
    known: dict[str, Literal["mean", "cls"]] = {
        "mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"
    }  # fmt: skip
    if len(modes) != 1 or not modes <= known.keys():
        raise ValueError(f"{path}: pooling must be either mean or cls, got {sorted(modes)}")
    return known[modes.pop()]


def _read_max_tokens(folder: Path) -> int | None:
    """Return the maximum input length in tokens, or None if no file has one."""
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        path = folder / name
        value = safetensors.read_json_object(path).get(key) if path.exists() else None
        # Tokenizers without a limit have a placeholder of thirty digits.
        if value is None or (isinstance(value, int | float) and value >= 2**31):
            continue
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key} must be a positive integer, got {value!r}")
        return value
    return None


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
