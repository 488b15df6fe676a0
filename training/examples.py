"""Examples: a line of a file to token ids, and how much it counts to learn each of them.

Three kinds of lines, the first two as OpenAI's API takes them:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}

Of a conversation the assistant's turns are learned, with the token that ends each; "weight": 0 on
one leaves it out. Of a pair the completion is learned, and that it ends. Of a text everything.
What is not learned is still read: it has weight 0 in the loss.

`faults` says what is wrong with a line, all of it, in the words that OpenAI's API has for it where
it has some; `encode` makes the example of a line without faults.

This package knows no tokenizer: callers hand in one of `bpe` (see `Tokenizer` below).

Leaves out: tool calls and pictures, which are refused; preference pairs; a weight for the prompts
of pairs (`prompt_loss_weight` of the first API).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Kind = Literal["chat", "completion", "text"]
ROLES = ("system", "developer", "user", "assistant")
MAX_LINE = 16 * 2**20  # bytes; a line is held in memory as a whole

# Which keys decide what a line is, and which it must have.
_KEYS: dict[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_TOOL_KEYS = ("tools", "functions")
_TOOL_MESSAGE_KEYS = ("tool_calls", "function_call", "tool_call_id")
_NO_TOOLS = "has tools or tool calls, which cannot be learned yet."


class Tokenizer(Protocol):
    """What is asked of a tokenizer; `bpe.Tokenizer` is one."""

    encoding: Any  # encode_ordinary(text) -> ids
    chat_template: Any  # None, or encode_turns(encoding, messages) -> ids, [(start, end), ...]
    bos_id: int | None
    eos_id: int | None
    add_bos: bool


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a line.

    Attributes:
        code: a word for programs.
        message: for people: what goes on after "Example 7" or "Example 7, message 2".
        param: where in the line, as in "messages[1].role"; None for all of it.
        where: the same for people, as in "message 2"; empty for all of it.
    """

    code: str
    message: str
    param: str | None = None
    location: str = ""


@dataclass(frozen=True)
class Example:
    """What is learned from one line.

    Attributes:
        ids: int32 [T].
        weights: float32 [T], how much it counts to predict each id from those before it. The first
            is 0: nothing stands before it.
        line: where it stands in its file, from 1.
    """

    ids: np.ndarray
    weights: np.ndarray
    line: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, from 1; without their ends, and never all at once.

    A line of more than `MAX_LINE` bytes comes cut, at `MAX_LINE + 1` bytes.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            yield number, line.removesuffix(b"\n")
            while len(line) > MAX_LINE and not line.endswith(b"\n"):  # its rest is not looked at
                line = file.readline(MAX_LINE + 1)


def parse(line: bytes) -> dict[str, Any] | Fault:
    """The object that a line spells, or what is wrong with it."""
    if len(line) > MAX_LINE:
        return Fault("line_too_long", f"is longer than {MAX_LINE // 2**20} MB.")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return Fault(
            "not_utf8",
            f"is not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}.",
        )
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        return Fault("invalid_json", "cannot be parsed. Error: it is nested too deeply.")
    except ValueError as error:
        return Fault(
            "invalid_json", f"cannot be parsed. Error: line contains invalid json: {error}"
        )
    if not isinstance(row, dict):
        return Fault(
            "not_an_object",
            f'is not a dictionary (HINT: line starts with: "{text.strip()[:20]}...").',
        )
    return row


def kind_of(row: Mapping[str, Any]) -> Kind | None:
    """What kind of line this is, by its keys; None if it is none we know."""
    return next((kind for kind, keys in _KEYS.items() if any(key in row for key in keys)), None)


def faults(row: Mapping[str, Any], kind: Kind) -> list[Fault]:
    """What is wrong with a line that should be of a kind; empty if nothing is."""
    found = []
    for key in _KEYS[kind]:
        if key not in row:
            found.append(Fault("missing_key", f'is missing key "{key}".', key))
    for key in sorted(key for key in row.keys() - set(_KEYS[kind]) if not _is_absent(row[key])):
        if kind == "chat" and key == "parallel_tool_calls":
            continue  # says nothing without tools, which are refused
        if kind == "chat" and key in _TOOL_KEYS:
            found.append(Fault("unsupported_tools", _NO_TOOLS, key))
        else:
            found.append(Fault("extra_key", f'contains an extra "{key}".', key))
    if kind == "chat" and "messages" in row:
        return found + _chat_faults(row["messages"])
    for key in _KEYS[kind]:
        if key in row and not isinstance(row[key], str):
            found.append(Fault("invalid_type", f'has a "{key}" that is not a string.', key))
        elif row.get(key) == "" and key != "prompt":
            found.append(Fault("nothing_to_learn", f'has an empty "{key}".', key))
    return found


def encode(row: Mapping[str, Any], kind: Kind, tokenizer: Tokenizer, line: int = 0) -> Example:
    """The example that a line without faults makes.

    Raises:
        ValueError: there is no chat template, or it refuses the messages.
    """
    if kind == "chat":
        return _encode_chat(row["messages"], tokenizer, line)
    encode = tokenizer.encoding.encode_ordinary
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if kind == "completion":
        # Each by itself, as the model will find them: it reads a prompt, then it writes.
        start, learned = start + encode(row["prompt"]), encode(row["completion"]) + end
    else:
        learned = encode(row["text"]) + end
    return _example(start + learned, [(len(start), len(start) + len(learned))], line)


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Tokenizer, line: int) -> Example:
    if tokenizer.chat_template is None:
        raise ValueError("this model has no chat template; give it prompt and completion pairs")
    plain = []
    for message in messages:
        plain.append({"role": message["role"], "content": text_of(message["content"])})
        if message.get("name") is not None:
            plain[-1]["name"] = message["name"]
    ids, turns = tokenizer.chat_template.encode_with_assistant_spans(tokenizer.encoding, plain)
    spoken = [message for message in messages if message["role"] == "assistant"]
    learned = [turn for turn, message in zip(turns, spoken, strict=True) if _is_learned(message)]
    return _example(ids, learned, line)


def _is_learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _example(ids: list[int], learned: list[tuple[int, int]], line: int) -> Example:
    weights = np.zeros(len(ids), np.float32)
    for start, end in learned:
        weights[start:end] = 1
    weights[:1] = 0
    return Example(np.array(ids, np.int32), weights, line)


def text_of(content: str | list[dict[str, str]]) -> str:
    """A message's content as one string: it may come in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _chat_faults(messages: Any) -> list[Fault]:
    if not isinstance(messages, list) or not messages:
        message = 'has "messages" that are not a list with a message or more.'
        return [Fault("invalid_type", message, "messages")]
    found = [fault for i, message in enumerate(messages) for fault in _message_faults(message, i)]
    if not found and not any(map(_is_learned, messages)):
        reason = "has no message of the assistant to learn from."
        found.append(Fault("nothing_to_learn", reason, "messages"))
    return found


def _message_faults(message: Any, i: int) -> list[Fault]:
    def fault(code: str, message: str, inner: str = "") -> Fault:
        return Fault(code, message, f"messages[{i}]{inner}", location=f"message {i + 1}")

    if not isinstance(message, dict):
        return [fault("invalid_type", "is not a dictionary.")]
    found = []
    role = message.get("role")
    if "role" not in message:
        found.append(fault("missing_role", 'is missing key "role".', ".role"))
    elif role in ("tool", "function"):
        found.append(fault("unsupported_tools", _NO_TOOLS, ".role"))
    elif role not in ROLES:
        wanted = ", ".join(ROLES)
        found.append(
            fault("invalid_role", f"has the role {role!r}; it must be one of {wanted}.", ".role")
        )
    for key, value in message.items():
        if _is_absent(value):
            continue  # as answers of the API have keys that do not apply; see below for content
        if key in _TOOL_MESSAGE_KEYS:
            found.append(fault("unsupported_tools", _NO_TOOLS, f".{key}"))
        elif key == "name":
            if not isinstance(value, str):
                found.append(fault("invalid_type", "has a name that is not a string.", ".name"))
        elif key == "weight":
            if role != "assistant" or isinstance(value, bool) or value not in (0, 1):
                reason = f"has the weight {value!r}; only the assistant's have one, 0 or 1."
                found.append(fault("invalid_weight", reason, ".weight"))
        elif key not in ("role", "content"):
            found.append(fault("extra_key", f'contains an extra "{key}".', f".{key}"))
    if any(found.code == "unsupported_tools" for found in found):
        return found  # its content may well be null
    if (content := message.get("content")) is None:
        found.append(fault("missing_content", 'is missing key "content".', ".content"))
    elif isinstance(content, list):
        for j, part in enumerate(content):
            inner = f".content[{j}]"
            if not isinstance(part, dict) or part.get("type") != "text":
                reason = "has a part that is not text; this model reads nothing else."
                found.append(fault("unsupported_content", reason, inner))
            elif not isinstance(part.get("text"), str):
                found.append(fault("missing_content", 'is missing key "text".', f"{inner}.text"))
    elif not isinstance(content, str):
        found.append(fault("invalid_type", "has a content that is not a string.", ".content"))
    return found


def _is_absent(value: Any) -> bool:
    """Whether a key is there and holds nothing, as in answers of the API and exported tables."""
    return value is None or value == [] or value == {}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
