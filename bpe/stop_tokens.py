"""Which tokens end a generation: the ids that a model's files declare, and well-known spellings.

The files of one model often disagree: its tokenizer names the end of a text, its
generation_config.json also the end of a turn. The set is the union of

- `eos_token_id` (an id or a list) in generation_config.json and config.json, and `eos_token` (a
  string, or an object with `content`) in tokenizer_config.json and special_tokens_map.json, as
  transformers and vLLM read them;
- `eos_token_id`, `eot_token_id` and `eom_token_id` in GGUF metadata, as llama.cpp reads them;
- special tokens spelled as one of `SPELLINGS`, the list of llama.cpp (`llama-vocab.cpp`). An
  ordinary token of such a spelling is text: `</s>` also ends a stroke in HTML.

llama.cpp also stops at the tokens that separate files (`<|file_sep|>`, `<|repo_name|>`); they do
not stop here, because a prompt of several files may be continued across them. An id or a token
that the vocabulary lacks is noted and passed over: it can never be generated.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bpe.encoding import Encoding
from bpe.log_once import warn_once

log = logging.getLogger(__name__)

WELL_KNOWN_STOP_TOKENS = {
    "<|endoftext|>",  # GPT-2, Qwen2, SmolLM2
    "<|im_end|>",  # ChatML
    "<|end_of_text|>",  # Llama 3, Granite: of a text,
    "<|eot_id|>",  # of a turn,
    "<|eom_id|>",  # of a message that waits for a tool
    "<|end|>",  # Phi 3
    "</s>",  # Llama 2, Mistral
    "<end_of_turn>",  # Gemma 2 and 3
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

# Where the first are all special tokens, the last only ends a part of an answer.
_EXCLUSIONS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|flush|>", "<|calls|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)


def resolve_stop_ids(encoding: Encoding, declared: Iterable[tuple[str, Any]]) -> list[int]:
    """The declared ids that the vocabulary has, in their order; notes the others.

    Args:
        encoding: the vocabulary.
        declared: a name for notes, and an id, the text of a token, or a list of them; or None.
    """
    ids: dict[int, None] = {}  # an ordered set
    for where, value in declared:
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            if (id := _resolve_id(encoding, item)) is None:
                warn_once(log, f"{where} is {item!r}, which the vocabulary lacks: it ends nothing")
            else:
                ids[id] = None
    return list(ids)


def well_known_stop_ids(encoding: Encoding) -> frozenset[int]:
    """The ids of the special tokens that are known to end a generation by their spelling."""
    special = encoding.special_tokens
    parts = {last for first, last in _EXCLUSIONS if first <= special.keys()}
    return frozenset(
        special[text] for text in special.keys() & WELL_KNOWN_STOP_TOKENS if text not in parts
    )


def folder_stop_tokens(folder: Path) -> Iterator[tuple[str, Any]]:
    """What the files of a Hugging Face folder declare, for `known_ids`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_optional_json(folder / name).get("eos_token")
        text = value.get("content") if isinstance(value, Mapping) else value
        yield f"{folder / name}: eos_token", text
    for name in ("generation_config.json", "config.json"):
        content = read_optional_json(folder / name)
        yield _drop_texts(f"{folder / name}: eos_token_id", content.get("eos_token_id"))
        if isinstance(text := content.get("text_config"), Mapping):  # of a model that also sees
            yield _drop_texts(
                f"{folder / name}: text_config.eos_token_id", text.get("eos_token_id")
            )


def gguf_stop_tokens(metadata: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """What GGUF metadata declares, for `known_ids`."""
    for name in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        if (id := metadata.get(key)) is not None:
            yield f"{source}: {key}", int(id)  # numpy's, from some readers


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object that a model can do without; a damaged one is noted and counts as empty."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warn_once(log, f"{path} is not used, because it cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        warn_once(log, f"{path} is not used: it holds a {type(content).__name__}, not an object")
        return {}
    return content


def _drop_texts(where: str, value: Any) -> tuple[str, list[Any]]:
    """A declaration without texts, which are no ids: "2" is a token too, and another one."""
    items = value if isinstance(value, list) else [value]
    for text in (item for item in items if isinstance(item, str)):
        warn_once(log, f"{where} is {text!r}, which is a text and no id: it ends nothing")
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
