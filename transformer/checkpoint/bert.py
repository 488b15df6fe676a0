"""Encoders from files: BERT's tensors by Hugging Face's names, and how sentence-transformers says
what to make of them.

A sentence-transformers folder is a Hugging Face folder with a list of steps beside it:
`modules.json` (transformer, pooling, perhaps normalising), `1_Pooling/config.json`, and
`sentence_bert_config.json` with the longest input. A folder without `modules.json` is a bare BERT,
of which nobody has said how it makes one vector of many: the caller must.

Loading is strict both ways, as for decoders. Three kinds of tensor are known and not wanted: the
pooler (a map of the first token's vector, from pretraining), the heads of pretraining (`cls.`), and
the table of position numbers. A model saved with such a head has `bert.` in front of its names, and
the first files call the scale and shift of a norm gamma and beta.
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
    """Loads an encoder from a sentence-transformers or Hugging Face folder.

    Args:
        format: what the token table and the weights of linear maps become; the rest stays float32.
        pooling: how a text's vector comes from those of its tokens; None: as the folder says.
        normalize: whether vectors are scaled to length 1; None: as the folder says.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, a pickle, an unknown key, tensor or step, or a wrong shape; or
            the folder does not say how to pool and neither does the caller.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise ValueError(f"format must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    cfg = read_config(folder, pooling=pooling, normalize=normalize)
    _, tensors = safetensors.read(folder, ignore=_IGNORED_TENSORS)
    return _fill(_renamed(tensors), cfg, folder, _DTYPES[dtype]), cfg


def is_bert(folder: Path) -> bool:
    """Whether a Hugging Face folder is of the kind that is loaded here."""
    return safetensors.read_json_object(folder / "config.json").get("model_type") == "bert"


def read_config(
    folder: Path,
    *,
    pooling: Literal["mean", "cls"] | None = None,
    normalize: bool | None = None,
) -> Config:
    """The config of an encoder, as `load` would have it, without its weights."""
    if (folder / "modules.json").exists():
        stated_pooling, stated_normalize = _read_modules(folder)
        pooling = stated_pooling if pooling is None else pooling
        normalize = stated_normalize if normalize is None else normalize
    elif pooling is None or normalize is None:
        raise ValueError(
            f"{folder}: has no modules.json to say how a text's vector comes from those of its "
            "tokens: give pooling ('mean' or 'cls') and normalize (True or False)"
        )
    return Config.from_hf(
        safetensors.read_json_object(folder / "config.json"),
        max_tokens=_read_max_tokens(folder),
        pooling=pooling,
        normalize=normalize,
    )


def save(folder: Path, params: Params, cfg: Config) -> None:
    """Writes float32 or bfloat16 weights as a folder that `load` and sentence-transformers read.

    The tokenizer's files are not ours to write: put them beside it.
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
    """The tree of `Params` with the tensor's name at each leaf."""

    def linear(name: str) -> Linear:
        return Linear(weight=f"{name}.weight", bias=f"{name}.bias")

    def norm(name: str) -> Norm:
        return Norm(scale=f"{name}.LayerNorm.weight", bias=f"{name}.LayerNorm.bias")

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
        embed=Linear(weight="embeddings.word_embeddings.weight"),
        positions="embeddings.position_embeddings.weight",
        token_types="embeddings.token_type_embeddings.weight",
        embed_norm=norm("embeddings"),
        layers=tuple(layer(f"encoder.layer.{i}") for i in range(cfg.num_layers)),
    )


def _renamed(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors under today's names, without heads of pretraining."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(f"LayerNorm{old}"):
                name = name.removesuffix(old) + new
        if not name.startswith(_PRETRAINING_HEADS):
            renamed[name] = tensor
    return renamed


def _fill(tensors: Mapping[str, LazyTensor], cfg: Config, folder: Path, dtype: Any) -> Params:
    if cfg.num_layers > len(tensors):  # before a tree of so many layers is built
        raise ValueError(f"{folder}: {len(tensors)} tensors cannot make {cfg.num_layers} layers")
    names, infos = _names(cfg), abstract(cfg)
    wanted, given = set(jax.tree.leaves(names)), tensors.keys() - set(_UNUSED)
    if missing := sorted(wanted - given):
        raise ValueError(f"{folder}: lacks {_first_names(missing)}")
    if unknown := sorted(given - wanted):
        raise ValueError(
            f"{folder}: holds {_first_names(unknown)}, which this model has no place for"
        )

    def read(place: tuple[Any, ...], name: str, info: Any) -> jax.Array:
        tensor = tensors[name]
        if tensor.shape != info.shape:
            raise ValueError(f"{folder}: {name} must have shape {info.shape}, got {tensor.shape}")
        is_matrix = place[-1].name == "weight"  # of a Linear
        return jnp.asarray(tensor.read(0, info.shape[0]), dtype if is_matrix else np.float32)

    return jax.tree_util.tree_map_with_path(read, names, infos)


def _read_modules(folder: Path) -> tuple[Literal["mean", "cls"], bool]:
    """Pooling, and whether vectors are normalised, of a list of steps that we know."""
    path = folder / "modules.json"
    try:
        steps = json.loads(path.read_text("utf-8"))
        kinds = [step["type"].rpartition(".")[2] for step in steps]
        paths = [step["path"] for step in steps]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: must be a list of steps with type and path") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{path}: the steps must be Transformer, Pooling and perhaps Normalize, got {kinds}"
        )
    if paths[:2] != ["", "1_Pooling"]:
        raise ValueError(f"{path}: the steps must lie in '' and '1_Pooling', got {paths[:2]}")
    return _read_pooling(folder / paths[1] / "config.json"), len(kinds) == 3


def _read_pooling(path: Path) -> Literal["mean", "cls"]:
    """The one way of pooling that a file names, as older and newer versions write it."""
    value = safetensors.read_json_object(path)
    modes = {key.removeprefix("pooling_mode_") for key, on in value.items()
             if key.startswith("pooling_mode_") and on}  # fmt: skip
    if "pooling_mode" in value:
        modes |= {str(value["pooling_mode"])}
    known = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(modes) != 1 or not modes <= known.keys():
        raise ValueError(f"{path}: pooling must be by mean or cls alone, got {sorted(modes)}")
    return known[modes.pop()]


def _read_max_tokens(folder: Path) -> int | None:
    """The longest input in tokens where a file states it; None: the position table decides."""
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        path = folder / name
        value = safetensors.read_json_object(path).get(key) if path.exists() else None
        # Tokenizers without a limit of their own state one of thirty digits.
        if value is None or (isinstance(value, int | float) and value >= 2**31):
            continue
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key} must be a positive integer, got {value!r}")
        return value
    return None


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
