"""Examples: from a line of a file to token ids and the weight of each token in the loss.

A line is a JSON object of one of three kinds, "chat", "completion" and "text". The first two are
those of OpenAI's fine-tuning API:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}

Target tokens count in the loss with weight 1; other tokens are context with weight 0. The targets
of "chat" are the messages of the assistant, each with the token that ends it, except messages with
"weight": 0. The targets of "completion" are the completion and the end-of-text token. The targets
of "text" are all tokens.

`faults` returns all problems of a line, worded as in OpenAI's API where it has a message for them;
`encode` returns the `Example` of a valid line. Callers pass a tokenizer of `bpe` (see `Tokenizer`).

Left out: tool calls and images, which are rejected; preference pairs; a loss weight for the prompts
of "completion" (`prompt_loss_weight` of OpenAI's first fine-tuning API).
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
MAX_LINE = 16 * 2**20  # bytes; limited because a whole line is read into memory

# The required keys of each kind of example; the presence of any of them identifies the kind.
_KEYS: dict[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_TOOL_KEYS = ("tools", "functions")
_TOOL_MESSAGE_KEYS = ("tool_calls", "function_call", "tool_call_id")
_NO_TOOLS = "has tools or tool calls, which training does not support yet."


class Tokenizer(Protocol):
    """The interface of a tokenizer; `bpe.Tokenizer` implements it."""

    @property
    def encoding(self) -> Any:
        """Return the encoding, which has a method `encode_ordinary(text) -> ids`."""
        ...

    @property
    def chat_template(self) -> Any:
        """Return the chat template, or None if the model has none.

        A chat template has a method `encode_with_assistant_spans(encoding, messages)`, which
        returns token ids, and a span (start, end) of them for each message of the assistant.
        """
        ...

    @property
    def bos_id(self) -> int | None:
        """Return the id of the token that begins a text if `add_bos`; None if there is none."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Return the id of the token that ends a text; None if there is none."""
        ...

    @property
    def add_bos(self) -> bool:
        """Return whether a text begins with `bos_id`."""
        ...


@dataclass(frozen=True)
class Fault:
    """A problem that makes a line of a training file invalid.

    Attributes:
        code: identifier of the type of problem, such as "missing_key", for programs.
        message: the sentence that follows "Example 7" or "Example 7, message 2", for people.
        param: path of the invalid field in the JSON object, such as "messages[1].role"; None if the
            problem is that of the whole line.
        location: the message with the problem, for people, such as "message 2"; empty if the
            problem is not in a message.
    """

    code: str
    message: str
    param: str | None = None
    location: str = ""


@dataclass(frozen=True)
class Example:
    """A training example: the tokens of a line and their weights in the loss.

    Attributes:
        ids: int32 [T], the token ids.
        weights: float32 [T], the weight of predicting each token from those before it. The first
            weight is 0, because no token precedes the first.
        line: the number of the line in the file, from 1; 0 if unknown.
    """

    ids: np.ndarray
    weights: np.ndarray
    line: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line of a file, from 1, and its bytes without the line feed.

    A line of more than `MAX_LINE` bytes is truncated to `MAX_LINE + 1` bytes.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            yield number, line.removesuffix(b"\n")
            while len(line) > MAX_LINE and not line.endswith(b"\n"):  # skip the rest of the line
                line = file.readline(MAX_LINE + 1)


def parse(line: bytes) -> dict[str, Any] | Fault:
    """Parse a line; return its JSON object, or the problem if the line is not one."""
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
    """Return the kind of example that the keys of a JSON object identify; None if they do not."""
    return next((kind for kind, keys in _KEYS.items() if any(key in row for key in keys)), None)


def faults(row: Mapping[str, Any], kind: Kind) -> list[Fault]:
    """Return all problems of a line that should be an example of the given kind.

    Args:
        row: the JSON object of the line.
        kind: the kind of example.

    Returns:
        The problems; empty if the line is valid.
    """
    problems = []
    for key in _KEYS[kind]:
        if key not in row:
            problems.append(Fault("missing_key", f'is missing key "{key}".', key))
    for key in sorted(key for key in row.keys() - set(_KEYS[kind]) if not _is_absent(row[key])):
        if kind == "chat" and key == "parallel_tool_calls":
            continue  # has no effect without tools, which are rejected
        if kind == "chat" and key in _TOOL_KEYS:
            problems.append(Fault("unsupported_tools", _NO_TOOLS, key))
        else:
            problems.append(Fault("extra_key", f'contains an extra "{key}".', key))
    if kind == "chat" and "messages" in row:
        return problems + _chat_faults(row["messages"])
    for key in _KEYS[kind]:
        if key in row and not isinstance(row[key], str):
            problems.append(Fault("invalid_type", f'has a "{key}" that is not a string.', key))
        elif row.get(key) == "" and key != "prompt":
            problems.append(Fault("nothing_to_learn", f'has an empty "{key}".', key))
    return problems


def encode(row: Mapping[str, Any], kind: Kind, tokenizer: Tokenizer, line: int = 0) -> Example:
    """Tokenize a valid line and weight its tokens.

    Args:
        row: the JSON object of the line, for which `faults` is empty.
        kind: the kind of example.
        tokenizer: the tokenizer of the model.
        line: the number of the line, for `Example.line`.

    Raises:
        ValueError: the model has no chat template, or the template rejects the messages.
    """
    if kind == "chat":
        return _encode_chat(row["messages"], tokenizer, line)
    encode = tokenizer.encoding.encode_ordinary
    context = [tokenizer.bos_id] if tokenizer.add_bos else []
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if kind == "completion":
        # Tokenize prompt and completion separately, because in generation the prompt is tokenized
        # without the completion.
        context, targets = context + encode(row["prompt"]), encode(row["completion"]) + end
    else:
        targets = encode(row["text"]) + end
    return _example(context + targets, [(len(context), len(context) + len(targets))], line)


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Tokenizer, line: int) -> Example:
    if tokenizer.chat_template is None:
        raise ValueError("this model has no chat template; use prompt and completion pairs")
    plain = []
    for message in messages:
        plain.append({"role": message["role"], "content": text_of(message["content"])})
        if message.get("name") is not None:
            plain[-1]["name"] = message["name"]
    ids, spans = tokenizer.chat_template.encode_with_assistant_spans(tokenizer.encoding, plain)
    replies = [message for message in messages if message["role"] == "assistant"]
    targets = [span for span, message in zip(spans, replies, strict=True) if _is_target(message)]
    return _example(ids, targets, line)


def _is_target(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _example(ids: list[int], targets: list[tuple[int, int]], line: int) -> Example:
    weights = np.zeros(len(ids), np.float32)
    for start, end in targets:
        weights[start:end] = 1
    weights[:1] = 0
    return Example(np.array(ids, np.int32), weights, line)


def text_of(content: str | list[dict[str, str]]) -> str:
    """Return the content of a message (a string or a list of text parts) as one string."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _chat_faults(messages: Any) -> list[Fault]:
    if not isinstance(messages, list) or not messages:
        message = 'must have a non-empty list as "messages".'
        return [Fault("invalid_type", message, "messages")]
    problems = [
        fault for i, message in enumerate(messages) for fault in _message_faults(message, i)
    ]
    if not problems and not any(map(_is_target, messages)):
        reason = "has no message of the assistant to train on."
        problems.append(Fault("nothing_to_learn", reason, "messages"))
    return problems


def _message_faults(message: Any, i: int) -> list[Fault]:
    def fault(code: str, message: str, inner: str = "") -> Fault:
        return Fault(code, message, f"messages[{i}]{inner}", location=f"message {i + 1}")

    if not isinstance(message, dict):
        return [fault("invalid_type", "is not a dictionary.")]
    problems = []
    role = message.get("role")
    if "role" not in message:
        problems.append(fault("missing_role", 'is missing key "role".', ".role"))
    elif role in ("tool", "function"):
        problems.append(fault("unsupported_tools", _NO_TOOLS, ".role"))
    elif role not in ROLES:
        reason = f"has the role {role!r}; it must be one of {', '.join(ROLES)}."
        problems.append(fault("invalid_role", reason, ".role"))
    for key, value in message.items():
        if _is_absent(value):
            continue  # messages copied from API responses have null keys; content is checked below
        if key in _TOOL_MESSAGE_KEYS:
            problems.append(fault("unsupported_tools", _NO_TOOLS, f".{key}"))
        elif key == "name":
            if not isinstance(value, str):
                problems.append(fault("invalid_type", "has a name that is not a string.", ".name"))
        elif key == "weight":
            if role != "assistant" or isinstance(value, bool) or value not in (0, 1):
                reason = (
                    f"has the weight {value!r}; only messages of the assistant have one, 0 or 1."
                )
                problems.append(fault("invalid_weight", reason, ".weight"))
        elif key not in ("role", "content"):
            problems.append(fault("extra_key", f'contains an extra "{key}".', f".{key}"))
    if any(problem.code == "unsupported_tools" for problem in problems):
        return problems  # the content of a message with tool calls can be null
    if (content := message.get("content")) is None:
        problems.append(fault("missing_content", 'is missing key "content".', ".content"))
    elif isinstance(content, list):
        for j, part in enumerate(content):
            inner = f".content[{j}]"
            if not isinstance(part, dict) or part.get("type") != "text":
                reason = "has a content part that is not of type text; only text is supported."
                problems.append(fault("unsupported_content", reason, inner))
            elif not isinstance(part.get("text"), str):
                problems.append(fault("missing_content", 'is missing key "text".', f"{inner}.text"))
    elif not isinstance(content, str):
        problems.append(
            fault(
                "invalid_type",
                "has content that is not a string or a list of text parts.",
                ".content",
            )
        )
    return problems


def _is_absent(value: Any) -> bool:
    """Return whether a value means that the key is absent, as in responses of OpenAI's API."""
    return value is None or value == [] or value == {}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")
