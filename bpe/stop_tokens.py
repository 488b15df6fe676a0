"""Collect the tokens that end a generation: those that a model's files declare, and known ones.

The files of a model often disagree: the tokenizer can declare the end-of-text token only, and
generation_config.json also the end-of-message token. The stop tokens are the union of

- `eos_token_id` (an id or a list) in generation_config.json and config.json, and `eos_token` (a
  string, or an object with `content`) in tokenizer_config.json and special_tokens_map.json, as
  transformers and vLLM read them;
- `eos_token_id`, `eot_token_id` and `eom_token_id` in GGUF metadata, as llama.cpp reads them;
- special tokens in `WELL_KNOWN_STOP_TOKENS`, the list of llama.cpp (`llama-vocab.cpp`). An ordinary
  token with the same text is not a stop token: `</s>` is also an HTML end tag.

llama.cpp also stops at the tokens that separate files (`<|file_sep|>`, `<|repo_name|>`). This
module does not, because the completion of a prompt of several files can contain them. A declared id
or token that is not in the vocabulary is logged and ignored, because a model never generates it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bpe.encoding import Encoding
from bpe.formats.checks import get_id
from bpe.log_once import warn_once

log = logging.getLogger(__name__)

WELL_KNOWN_STOP_TOKENS = {
    "<|endoftext|>",  # GPT-2, Qwen2, SmolLM2
    "<|im_end|>",  # ChatML
    "<|end_of_text|>",  # Llama 3, Granite: end of a text
    "<|eot_id|>",  # end of a message
    "<|eom_id|>",  # end of a message with a tool call
    "<|end|>",  # Phi 3
    "</s>",  # Llama 2, Mistral
    "<end_of_turn>",  # Gemma 1 to 3
    "<eos>",
    "<turn|>",  # Gemma 4
    "<|tool_response>",
    "<|return|>",  # o200k_harmony
    "<|call|>",
    "<|calls|>",  # Solar
    "<|flush|>",
    "[EOT]",  # Kimi K2
    "[EOS]",
    "<EOT>",
    "_<EOT>",
    "<end_of_utterance>",  # SmolVLM
}

# If all tokens of the set are special tokens of a vocabulary, the second token only ends a part of
# an answer, so it is not a stop token.
_EXCLUSIONS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|flush|>", "<|calls|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)


def resolve_stop_ids(encoding: Encoding, declared: Iterable[tuple[str, Any]]) -> list[int]:
    """Return the declared ids that are in the vocabulary, in order; log the others.

    Args:
        encoding: the vocabulary.
        declared: (file and key, value), as from `folder_stop_tokens`; the value is an id, the text
            of a token, a list of both, or None.
    """
    ids: dict[int, None] = {}  # an ordered set
    for where, value in declared:
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            if (id := _resolve_id(encoding, item)) is None:
                warn_once(
                    log, f"{where}: the vocabulary has no token {item!r}; the value is ignored"
                )
            else:
                ids[id] = None
    return list(ids)


def well_known_stop_ids(encoding: Encoding) -> frozenset[int]:
    """Return the ids of the special tokens in `WELL_KNOWN_STOP_TOKENS`."""
    special = encoding.special_tokens
    excluded = {token for others, token in _EXCLUSIONS if others <= special.keys()}
    return frozenset(
        special[text] for text in special.keys() & WELL_KNOWN_STOP_TOKENS if text not in excluded
    )


def folder_stop_tokens(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file and key, value) for each stop token that a Hugging Face folder declares."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_optional_json(folder / name).get("eos_token")
        text = value.get("content") if isinstance(value, Mapping) else value
        yield f"{folder / name}: eos_token", text
    for name in ("generation_config.json", "config.json"):
        content = read_optional_json(folder / name)
        yield _drop_texts(f"{folder / name}: eos_token_id", content.get("eos_token_id"))
        if isinstance(text := content.get("text_config"), Mapping):  # of a multimodal model
            yield _drop_texts(
                f"{folder / name}: text_config.eos_token_id", text.get("eos_token_id")
            )


def gguf_stop_tokens(metadata: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Yield (file and key, id) for each stop token that GGUF metadata declares."""
    for name in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        if (id := get_id(metadata, key, source)) is not None:
            yield f"{source}: {key}", id


def read_optional_json(path: Path) -> dict[str, Any]:
    """Return the object in an optional JSON file, or an empty dict if the file is missing.

    If the file is damaged or its value is not an object, a warning is logged and the result is
    empty as well.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warn_once(log, f"{path} cannot be read and is ignored: {error}")
        return {}
    if not isinstance(content, dict):
        warn_once(log, f"{path} is ignored: expected a JSON object, got {type(content).__name__}")
        return {}
    return content


def _drop_texts(where: str, value: Any) -> tuple[str, list[Any]]:
    """Return (file and key, ids) without the strings of `value`, and log them.

    A string such as "2" might be an id or the text of a token.
    """
    items = value if isinstance(value, list) else [value]
    for text in (item for item in items if isinstance(item, str)):
        warn_once(log, f"{where}: expected an id (an integer), got the string {text!r}; ignored")
    return where, [item for item in items if not isinstance(item, str)]


def _resolve_id(encoding: Encoding, item: Any) -> int | None:
    try:
        if isinstance(item, str):
            special = encoding.special_tokens.get(item)
            return encoding.encode_single_token(item) if special is None else special
        if type(item) is int:
            encoding.decode_single_token_bytes(item)
            return item
    except (KeyError, OverflowError):
        pass
    return None
