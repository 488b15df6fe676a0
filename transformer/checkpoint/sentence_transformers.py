"""Read sentence-transformers folders: the modules after the transformer, and the prompts.

`modules.json` lists the modules of a model in order, each with a type and a folder:

    Transformer  config.json, weights and tokenizer; `sentence_bert_config.json` has the maximum
                 length of a text
    Pooling      one or more pooling modes, see `pooling.py`
    Dense        a linear map with an activation; any number of these modules
    Normalize    optional, the last module

Any other module raises an error that names it. `config_sentence_transformers.json` has the prompts,
texts that are put before an input: a model that was trained with "query: " before questions needs
this prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer.checkpoint import safetensors
from transformer.checkpoint.gguf import LazyTensor
from transformer.pooling import MODES, Dense

# The module `torch.nn` of each activation -> name in `pooling.ACTIVATIONS`.
_ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}
# The pooling flags of older files, in the order in which several modes are concatenated.
_MODE_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TRANSFORMER_FILES = [
    "sentence_bert_config.json",
    *(f"sentence_{kind}_config.json" for kind in ("roberta", "camembert", "xlm-roberta")),
]


@dataclass(frozen=True, kw_only=True)
class Modules:
    """The settings of a sentence-transformers folder.

    Attributes:
        transformer: folder of the transformer and its tokenizer.
        pooling: one or more modes of `pooling.py`.
        dense: dense layers after the pooling.
        dense_folders: folders of the weights of the dense layers.
        normalize: whether embeddings are scaled to length 1.
        max_tokens: maximum length of a text in tokens, or None if no file has it.
        lowercase: whether texts are converted to lower case before the tokenizer.
        prompts: texts that are put before an input, by name.
        default_prompt: the prompt of an input without a prompt name; usually empty.
    """

    transformer: Path
    pooling: str | tuple[str, ...]
    dense: tuple[Dense, ...] = ()
    dense_folders: tuple[Path, ...] = ()
    normalize: bool = False
    max_tokens: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""


def has_modules(folder: Path) -> bool:
    """Whether a folder has a `modules.json`."""
    return (folder / "modules.json").is_file()


def transformer_folder(folder: Path) -> Path:
    """Return the folder with the transformer's config and weights.

    It is the folder of the model itself, or, in old models, a folder in it (0_Transformer).
    """
    modules = _read_list(folder) if has_modules(folder) else []
    return next((path for kind, path in modules if kind == "Transformer"), folder)


def has_pooling(folder: Path) -> bool:
    """Whether `modules.json` of a folder has a Pooling module, so that the model embeds texts."""
    return has_modules(folder) and any(kind == "Pooling" for kind, _ in _read_list(folder))


def read_cross_encoder_settings(path: Path) -> tuple[str | None, str]:
    """Return the activation of a cross-encoder's logits, and the prompt before its first text.

    Args:
        path: a folder with config.json, or a GGUF file, which stores neither.

    Returns:
        A name in `pooling.ACTIVATIONS`, or None if no file has one; and the prompt, usually empty.

    Raises:
        ValueError: A file is damaged, or an activation is not supported.
    """
    if not path.is_dir():
        return None, ""
    folder, path = path, transformer_folder(path) / "config.json"
    config = safetensors.read_json_object(path)
    section = config.get("sentence_transformers")
    name = section.get("activation_fn") if isinstance(section, dict) else None
    if name is None:
        name = config.get("sbert_ce_default_activation_function")  # before version 4
    settings = folder / "config_sentence_transformers.json"
    if name is None and settings.is_file():
        path, name = settings, safetensors.read_json_object(settings).get("activation_fn")
    if name is not None and (not isinstance(name, str) or name not in _ACTIVATIONS):
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{path}: the activation must be one of {known}, got {name!r}")
    return None if name is None else _ACTIVATIONS[name], _read_prompts(settings)[1]


def module_folders(folder: Path) -> list[Path]:
    """Return the folders of all modules; the folder itself for a model without modules."""
    folders = [path for _, path in _read_list(folder)] if has_modules(folder) else []
    return list(dict.fromkeys([folder, *(path for path in folders if path.is_dir())]))


def read(folder: Path) -> Modules:
    """Read the modules and prompts of a folder with `modules.json`.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is damaged, or a module, its order or a setting is not supported.
    """
    path = folder / "modules.json"
    # Dropout changes nothing at inference.
    modules = [module for module in _read_list(folder) if module[0] != "Dropout"]
    kinds = [kind for kind, _ in modules]
    known = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), "Normalize"]
    if kinds not in (known, known[:-1]):
        raise ValueError(
            f"{path}: the modules must be Transformer, Pooling, any number of Dense, and "
            f"optionally Normalize, in this order, got {kinds}"
        )
    prompts, default_prompt = _read_prompts(folder / "config_sentence_transformers.json")
    dense_folders = tuple(module for kind, module in modules if kind == "Dense")
    transformer = modules[0][1]
    max_tokens, lowercase = read_transformer_settings(transformer)
    if kinds[-1] == "Normalize":
        _check_names(modules[-1][1] / "config.json")
    return Modules(
        transformer=transformer,
        pooling=_read_pooling(modules[1][1] / "config.json", bool(any(prompts.values()))),
        dense=tuple(_read_dense(module / "config.json") for module in dense_folders),
        dense_folders=dense_folders,
        normalize=kinds[-1] == "Normalize",
        max_tokens=max_tokens,
        lowercase=lowercase,
        prompts=prompts,
        default_prompt=default_prompt,
    )


def read_dense_tensors(folders: tuple[Path, ...]) -> dict[str, LazyTensor]:
    """Return the tensors of dense layers as "dense.0.weight", "dense.0.bias", ...

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is damaged or a pickle.
    """
    tensors = {}
    for i, folder in enumerate(folders):
        for name, tensor in safetensors.read(folder)[1].items():
            tensors[f"dense.{i}.{name.removeprefix('linear.')}"] = tensor
    return tensors


def read_transformer_settings(folder: Path) -> tuple[int | None, bool]:
    """Return the maximum tokens of a text (None if no file has it), and whether to lowercase."""
    name = next((name for name in _TRANSFORMER_FILES if (folder / name).is_file()), None)
    settings = {} if name is None else safetensors.read_json_object(folder / name)
    path = folder / (name or _TRANSFORMER_FILES[0])
    task = settings.get("transformer_task")
    if task not in (None, "feature-extraction", "sequence-classification"):
        raise ValueError(
            f"{path}: transformer_task must be feature-extraction or sequence-classification, "
            f"got {task!r}"
        )
    lowercase = settings.get("do_lower_case")
    if lowercase not in (None, True, False):
        raise ValueError(f"{path}: do_lower_case must be true or false, got {lowercase!r}")
    max_tokens = _read_max_tokens(settings, "max_seq_length", path)
    path = folder / "tokenizer_config.json"
    if max_tokens is None and path.is_file():
        value = safetensors.read_json_object(path)
        max_tokens = _read_max_tokens(value, "model_max_length", path)
    return max_tokens, bool(lowercase)


def _read_max_tokens(settings: Mapping[str, Any], key: str, path: Path) -> int | None:
    value = settings.get(key)
    # Tokenizers without a limit have a placeholder of thirty digits.
    if value is None or (isinstance(value, int | float) and value >= 2**31):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: {key} must be a positive integer, got {value!r}")
    return value


def _read_list(folder: Path) -> list[tuple[str, Path]]:
    """Return the class name (such as "Pooling") and the folder of each module of `modules.json`."""
    path = folder / "modules.json"
    try:
        modules = json.loads(path.read_text("utf-8"))
        pairs = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
        parts = [Path(name).parts for _, name in pairs]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: must be a list of modules with type and path") from error
    for (_, name), names in zip(pairs, parts, strict=True):
        if Path(name).is_absolute() or ".." in names:
            raise ValueError(f"{path}: the path of a module must be in this folder, got {name!r}")
    return [(kind, folder / name) for kind, name in pairs]


def _read_pooling(path: Path, has_prompts: bool) -> str | tuple[str, ...]:
    """Return the pooling modes of a Pooling module's config.json, of any version."""
    value = safetensors.read_json_object(path)
    modes: Any = value.get("pooling_mode")
    if modes is None:
        unknown = [
            key
            for key, is_on in value.items()
            if key.startswith("pooling_mode_") and is_on and key not in _MODE_FLAGS
        ]
        modes = [mode for key, mode in _MODE_FLAGS.items() if value.get(key)] + unknown
        modes = modes or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in MODES for mode in modes):
        raise ValueError(f"{path}: pooling modes must be among {', '.join(MODES)}, got {modes}")
    if value.get("include_prompt", True) is not True and has_prompts:
        raise ValueError(
            f"{path}: include_prompt must be true: leaving the tokens of a prompt out of the "
            "pooling is not supported"
        )
    return modes[0] if len(modes) == 1 else tuple(modes)


def _read_dense(path: Path) -> Dense:
    value = safetensors.read_json_object(path)
    _check_names(path)
    if value.get("use_residual"):
        raise ValueError(f"{path}: use_residual must be false, got {value['use_residual']!r}")
    name = value.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{path}: activation_function must be one of {known}, got {name!r}")
    if missing := [key for key in ("in_features", "out_features") if key not in value]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    try:
        return Dense(
            in_features=value["in_features"],
            out_features=value["out_features"],
            has_bias=value.get("bias", True),
            activation=_ACTIVATIONS[name],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_names(path: Path) -> None:
    """Check that a module reads and writes the embedding of the text, not the token vectors."""
    value = safetensors.read_json_object(path) if path.is_file() else {}
    for key in ("module_input_name", "module_output_name"):
        if value.get(key) not in (None, "sentence_embedding"):
            raise ValueError(f"{path}: {key} must be 'sentence_embedding', got {value[key]!r}")


def _read_prompts(path: Path) -> tuple[dict[str, str], str]:
    """Return the prompts by name, and the text of the default prompt ("" for none)."""
    value = safetensors.read_json_object(path) if path.is_file() else {}
    prompts, default = value.get("prompts") or {}, value.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str | None) for text in prompts.values()
    ):
        raise ValueError(f"{path}: prompts must be an object of texts, got {prompts!r}")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ValueError(
            f"{path}: default_prompt_name must be one of {sorted(prompts)}, got {default!r}"
        )
    prompts = {name: text or "" for name, text in prompts.items()}
    return prompts, prompts.get(default or "", "") if default is not None else ""
