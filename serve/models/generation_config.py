"""Sampling defaults: the settings of a request that does not give its own.

Each setting is taken from the first that has it: the request, the `sampling` of the model's row in
the catalogue, the model's own files, OpenAI's API. A model's own files are a folder's
generation_config.json, of which the same keys count as in vLLM, whatever `do_sample` says, and a
GGUF file's `general.sampling.*`, as in llama.cpp. `max_new_tokens`, which vLLM takes for a limit,
is left to the request.

A penalty that nobody asked for changes the likeliest answer, so no default penalty applies at
temperature 0, where a text is scored (`echo` with `logprobs`), or where answers are ranked by their
likelihood (`best_of`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

BOUNDS = {  # of a request's values, ends included
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),  # 0 and -1: all
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-3, 1e3),
}
OPENAI_DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
PENALTIES = frozenset({"presence_penalty", "frequency_penalty", "repetition_penalty"})
DefaultsSource = Literal["model", "openai"]

# What generation_config.json holds beside sampling; everything else in it would change the answer.
_IGNORED_KEYS = {
    *("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"),
    *("cache_implementation", "use_cache", "do_sample", "transformers_version"),
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
    *("return_dict_in_generate", "trust_remote_code", "chat_format", "max_window_size"),
}


def resolve_params(
    overrides: Mapping[str, Any],
    defaults: Mapping[str, float],
    *,
    is_likelihood_scored: bool = False,
) -> dict[str, Any]:
    """The settings of one request.

    Args:
        asked: what the request gives.
        defaults: those of the model, see `of_model`.
        is_judged: whether the answer's likelihood counts: it is scored, or ranked among others.
    """
    settings: dict[str, Any] = {**OPENAI_DEFAULTS, **defaults, **overrides}
    if is_likelihood_scored or settings["temperature"] == 0:
        settings |= {name: OPENAI_DEFAULTS[name] for name in PENALTIES - overrides.keys()}
    settings["top_k"] = max(int(settings["top_k"]), 0)
    return settings


def read_defaults(
    row: Mapping[str, float],
    path: Path | None,
    notify: Callable[[str], None],
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """The defaults of a model, without those that are OpenAI's anyway.

    Args:
        row: the `sampling` of its row in the catalogue; empty where it has none.
        path: its GGUF file or folder, if it is here. A GGUF file is read only without a row: a
            row is about exact bytes.
        notify: called with a line for each value that cannot be used.
        metadata: of the GGUF file, where it was read already.
    """
    settings: dict[str, float] = {}
    if path is not None and path.is_dir():
        settings = _read_folder(path, notify)
    elif path is not None and path.suffix == ".gguf" and path.is_file() and not row:
        settings = _read_gguf(path, notify, metadata)
    both = settings | dict(row)
    return {name: value for name, value in both.items() if value != OPENAI_DEFAULTS[name]}


def validation_error(name: str, value: object) -> str | None:
    """What is wrong with a default, if anything."""
    if name not in BOUNDS:
        return f"use some of {', '.join(BOUNDS)}"
    low, high = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "use a number"
    if not low <= value <= high:  # NaN neither
        return f"use a number from {low} to {high}"
    return "use a whole number" if name == "top_k" and value != int(value) else None


def format_params(settings: Mapping[str, float]) -> str:
    """Settings in one line: the temperature, and those that differ from OpenAI's."""
    shown = [n for n in BOUNDS if n == "temperature" or settings[n] != OPENAI_DEFAULTS[n]]
    return ", ".join(f"{name} {settings[name]:g}" for name in shown)


def _read_folder(folder: Path, notify: Callable[[str], None]) -> dict[str, float]:
    from bpe.stop_tokens import read_optional_json

    path = folder / "generation_config.json"
    content = {key: value for key, value in read_optional_json(path).items() if value is not None}
    others = content.keys() - BOUNDS.keys() - _IGNORED_KEYS
    if unused := sorted(key for key in others if not key.startswith("_")):
        notify(f"{path}: not used here: {', '.join(unused)}")
    return _checked({name: content[name] for name in BOUNDS if name in content}, path, notify)


def _read_gguf(
    path: Path, notify: Callable[[str], None], metadata: Mapping[str, Any] | None
) -> dict[str, float]:
    from transformer.checkpoint import gguf  # brings JAX along

    if metadata is None:
        metadata, _ = gguf.read(path)
    settings, others = gguf.sampling_defaults(metadata)
    if others:
        notify(f"{path}: not used here: {', '.join(sorted(others))}")
    return _checked(settings, path, notify)


def _checked(
    values: Mapping[str, Any], path: Path, notify: Callable[[str], None]
) -> dict[str, float]:
    good = {}
    for name, value in values.items():
        if problem := validation_error(name, value):
            notify(f"{path}: {name} is {value!r} and is not used: {problem}")
        else:
            good[name] = int(value) if name == "top_k" else float(value)
    return good
