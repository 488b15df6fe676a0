"""Default sampling parameters of a request.

A parameter that the request does not set comes from the first of these that sets it: the `sampling`
of the model's catalogue entry, the model's own files, and OpenAI's API. The model's own files are
generation_config.json of a folder, with the same keys as in vLLM (`do_sample` is ignored), and
`general.sampling.*` of a GGUF file, as in llama.cpp. `max_new_tokens`, which vLLM uses as a limit,
is ignored.

A penalty changes which token is the most likely. So default penalties do not apply at temperature
0, when a text is scored (`echo` with `logprobs`), or when completions are ranked by their
likelihood (`best_of`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

BOUNDS = {  # minimum and maximum of each parameter, inclusive
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),  # 0 and -1 mean all tokens
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-3, 1e3),
}
OPENAI_DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
PENALTIES = frozenset({"presence_penalty", "frequency_penalty", "repetition_penalty"})
DefaultsSource = Literal["model", "openai"]

# Keys of generation_config.json that do not change the sampled text. Other unknown keys are
# reported.
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
    """Return the sampling parameters of one request.

    Args:
        overrides: the parameters that the request sets.
        defaults: the model's defaults, see `read_defaults`.
        is_likelihood_scored: whether the likelihood of the text is returned or used for ranking;
            default penalties then do not apply.
    """
    params: dict[str, Any] = {**OPENAI_DEFAULTS, **defaults, **overrides}
    if is_likelihood_scored or params["temperature"] == 0:
        params |= {name: OPENAI_DEFAULTS[name] for name in PENALTIES - overrides.keys()}
    params["top_k"] = max(int(params["top_k"]), 0)
    return params


def read_defaults(
    row: Mapping[str, float],
    path: Path | None,
    notify: Callable[[str], None],
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Return the default sampling parameters of a model, without those equal to OpenAI's.

    Args:
        row: the `sampling` of the model's entry in the catalogue; empty without an entry.
        path: its GGUF file or folder, if it was pulled. A GGUF file is read only with an empty
            `row`, because an entry describes exact bytes.
        notify: called with a message for each value that cannot be used.
        metadata: the metadata of the GGUF file, if it was read already.
    """
    params: dict[str, float] = {}
    if path is not None and path.is_dir():
        params = _read_folder(path, notify)
    elif path is not None and path.suffix == ".gguf" and path.is_file() and not row:
        params = _read_gguf(path, notify, metadata)
    params = params | dict(row)
    return {name: value for name, value in params.items() if value != OPENAI_DEFAULTS[name]}


def validation_error(name: str, value: object) -> str | None:
    """Return how to fix an invalid default, as the end of an error message; None if it is valid."""
    if name not in BOUNDS:
        return f"unknown parameter, use one of {', '.join(BOUNDS)}"
    low, high = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "use a number"
    if not low <= value <= high:  # NaN fails too
        return f"use a number from {low} to {high}"
    return "use a whole number" if name == "top_k" and value != int(value) else None


def format_params(settings: Mapping[str, float]) -> str:
    """Return the temperature, and the parameters that differ from OpenAI's defaults, as a text."""
    names = [n for n in BOUNDS if n == "temperature" or settings[n] != OPENAI_DEFAULTS[n]]
    return ", ".join(f"{name} {settings[name]:g}" for name in names)


def _read_folder(folder: Path, notify: Callable[[str], None]) -> dict[str, float]:
    from bpe.stop_tokens import read_optional_json

    path = folder / "generation_config.json"
    content = {key: value for key, value in read_optional_json(path).items() if value is not None}
    unknown = content.keys() - BOUNDS.keys() - _IGNORED_KEYS
    if unused := sorted(key for key in unknown if not key.startswith("_")):
        notify(f"{path}: ignored keys: {', '.join(unused)}")
    return _drop_invalid({name: content[name] for name in BOUNDS if name in content}, path, notify)


def _read_gguf(
    path: Path, notify: Callable[[str], None], metadata: Mapping[str, Any] | None
) -> dict[str, float]:
    from transformer.checkpoint import gguf  # imports JAX

    if metadata is None:
        metadata, _ = gguf.read(path)
    params, unused = gguf.sampling_defaults(metadata)
    if unused:
        notify(f"{path}: ignored keys: {', '.join(sorted(unused))}")
    return _drop_invalid(params, path, notify)


def _drop_invalid(
    values: Mapping[str, Any], path: Path, notify: Callable[[str], None]
) -> dict[str, float]:
    valid = {}
    for name, value in values.items():
        if problem := validation_error(name, value):
            notify(f"{path}: {name} is {value!r} and is ignored: {problem}")
        else:
            valid[name] = int(value) if name == "top_k" else float(value)
    return valid
