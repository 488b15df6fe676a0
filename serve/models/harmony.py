r"""Harmony, the format of gpt-oss: an answer is a sequence of messages on channels.

    <|channel|>analysis<|message|>The user wants a sum.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}

A header, before `<|message|>`, has the channel of a message: `analysis` for reasoning, `commentary`
for calls of tools and for text before them, `final` for the answer. A call has the tool as its
recipient, in the channel part of the header or before it (`<|start|>assistant to=functions.add`).
The prompt ends with `<|start|>assistant`; `<|call|>` and `<|return|>` end the generation.

`HarmonyParser` reads such text as it arrives; `harmony_grammar` and `final_grammar` limit it. The
format is defined by https://github.com/openai/harmony, whose parser is the reference of the tests.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import regex

from bpe import Encoding
from serve.models.grammar import GrammarSource, lark_schema
from serve.models.tool_calls import (
    CallPart,
    ObjectScanner,
    Part,
    ReasoningPart,
    TextPart,
    lark_literal,
)

MARKERS = (
    *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"),
    *("<|end|>", "<|call|>", "<|return|>"),
)
_MARKER = regex.compile("|".join(map(regex.escape, MARKERS)))
_CHANNEL = regex.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = regex.compile(r"\bto=([^\s<]+)")


def marker_ids(encoding: Encoding) -> frozenset[int]:
    """Return the ids of the special tokens in `MARKERS`."""
    special = encoding.special_tokens
    return frozenset(special[marker] for marker in MARKERS if marker in special)


# --- parsing ----------------------------------------------------------------------------------


class HarmonyParser:
    """Find content, reasoning and calls in one generated text, which arrives in pieces.

    Text of the channels `final` and `commentary` is content, as is text without a header. Text of
    other channels is reasoning, and so is a message to a recipient that is not a tool of `names`.
    Two messages of the same kind are separated by a line break. A header that was cut is dropped.

    Args:
        names: the names of the tools that can be called.
        is_streaming: whether to return arguments in pieces, not when they are complete.
        is_continued: whether the text continues a message of the channel `final`.
    """

    def __init__(
        self, names: Sequence[str], *, is_streaming: bool = True, is_continued: bool = False
    ):
        self._names, self._is_streaming = frozenset(names), is_streaming
        # Text that is not read yet, its offset in the whole text, and the offsets of its markers.
        self._buffer, self._offset = "", 0
        self._marker_offsets: deque[int] = deque()
        self._state: Literal["header", "text", "reasoning", "call"] = "header"
        if is_continued:
            self._state = "text"
        self._header = ""
        self._begun: set[str] = set()  # states of which there was text
        self._scanner = ObjectScanner()
        self._name = self._arguments = ""  # of the last call
        self.num_calls = 0

    @property
    def is_in_arguments(self) -> bool:
        """Whether the arguments of a call have begun but not ended."""
        return self._state == "call" and not self._scanner.is_complete

    def push(self, text: str, marker_offsets: Iterable[int]) -> list[Part]:
        """Add generated text, and return the parts that are certain.

        Args:
            text: the next text.
            marker_offsets: the offsets in the whole text of new special tokens that are `MARKERS`.
                The same text in ordinary tokens is not a marker.
        """
        self._buffer += text
        self._marker_offsets.extend(marker_offsets)
        return list(self._read())

    def flush(self) -> list[Part]:
        """End the text, and return what was held back.

        Arguments that were cut are returned as far as they were generated.
        """
        return [*self._read(is_end=True), *self._end_message()]

    def _read(self, *, is_end: bool = False) -> Iterator[Part]:
        for piece, offset, is_marker in self._pieces(is_end):
            is_header = self._state == "header"
            if not is_marker:
                yield from (
                    self._read_header(piece, offset)
                    if is_header
                    else self._read_body(piece, offset)
                )
            elif is_header and piece == "<|message|>":
                yield from self._begin_message()
            elif is_header and piece in ("<|start|>", "<|channel|>", "<|constrain|>"):
                self._header += piece
            else:
                yield from self._end_message()
                self._state = "header"
                self._header = piece if piece in ("<|start|>", "<|channel|>") else ""

    def _pieces(self, is_end: bool) -> Iterator[tuple[str, int, bool]]:
        """Take text from the buffer: (text, offset, whether it is a marker)."""
        position = 0
        while match := _MARKER.search(self._buffer, position, partial=not is_end):
            if match.partial:
                break
            position = match.end()
            if self._marker_offsets and self._marker_offsets[0] <= self._offset + match.start():
                self._marker_offsets.popleft()
                if match.start():
                    yield (*self._take(match.start()), False)
                yield (*self._take(len(match[0])), True)
                position = 0
        if end := match.start() if match else len(self._buffer):
            yield (*self._take(end), False)

    def _take(self, length: int) -> tuple[str, int]:
        text, offset = self._buffer[:length], self._offset
        self._buffer, self._offset = self._buffer[length:], offset + length
        return text, offset

    def _read_header(self, text: str, offset: int) -> Iterator[Part]:
        before = self._header.lstrip()
        self._header += text
        if not before.startswith("<|") and not "to=".startswith(self._header.lstrip()[:3]):
            self._state = "text"  # an answer without channels
            yield from self._read_body(self._header, offset - len(self._header) + len(text))

    def _begin_message(self) -> Iterator[Part]:
        channels, recipients = _CHANNEL.findall(self._header), _RECIPIENT.findall(self._header)
        channel = channels[-1] if channels else "final"
        recipient = recipients[-1] if recipients else "assistant"
        name = recipient.removeprefix("functions.")
        if name != recipient and name in self._names:
            self._state, self._scanner = "call", ObjectScanner()
            self._name, self._arguments = name, ""
            self.num_calls += 1
            if self._is_streaming:
                yield CallPart(self.num_calls - 1, name)
        elif recipient == "assistant" and channel in ("final", "commentary"):
            self._state = "text"
            if "text" in self._begun:
                yield TextPart("\n", None)
        else:
            self._state = "reasoning"
            if "reasoning" in self._begun:
                yield ReasoningPart("\n", None)

    def _read_body(self, text: str, offset: int) -> Iterator[Part]:
        self._begun.add(self._state)
        match self._state:
            case "text":
                yield TextPart(text, offset)
            case "reasoning":
                yield ReasoningPart(text, offset)
            case "call" if not self._scanner.is_complete:
                piece = text[: self._scanner.feed(text)]
                self._arguments += piece
                if self._is_streaming:
                    yield CallPart(self.num_calls - 1, arguments=piece)

    def _end_message(self) -> Iterator[Part]:
        if self._state == "call" and not self._is_streaming:
            yield CallPart(self.num_calls - 1, self._name, self._arguments)


# --- grammars ---------------------------------------------------------------------------------


def harmony_grammar(
    schemas: Mapping[str, Mapping[str, Any]],
    encoding: Encoding,
    *,
    is_required: bool,
    answer_schema: Mapping[str, Any] | None = None,
    is_continued: bool = False,
) -> GrammarSource:
    """Return a grammar of answers with at most one call, which ends the answer.

    Args:
        schemas: the JSON schema of the arguments, by the name of the tool.
        encoding: the vocabulary.
        is_required: whether the answer must be a call. It may begin with reasoning.
        answer_schema: the JSON schema of the final message; None for any text.
        is_continued: whether the answer continues a final message.
    """
    marks = {marker: lark_literal(marker, encoding) for marker in MARKERS}
    channel, message = marks["<|channel|>"], marks["<|message|>"]
    rules = []
    for number, (name, schema) in enumerate(schemas.items()):
        to = f" to=functions.{name}"
        rules.append(
            f"call_{number}: ({channel} {json.dumps('commentary' + to)} | {json.dumps(to)} "
            f'{channel} "commentary") type {message} {lark_schema(schema)}'
        )
    calls = " | ".join(f"call_{number}" for number in range(len(schemas)))
    rules.append(f"last: {calls}" if is_required else f"last: {calls} | final")
    answer = "TEXT" if answer_schema is None else lark_schema(answer_schema)
    return GrammarSource(
        "lark", "\n".join([*_messages(marks, answer, is_continued, is_required), *rules])
    )


def final_grammar(source: GrammarSource, encoding: Encoding) -> GrammarSource:
    """Return a grammar of answers whose final message has the format `source`."""
    marks = {marker: lark_literal(marker, encoding) for marker in MARKERS}
    frame = "\n".join([*_messages(marks, "@output"), "last: final"])
    return replace(source, frame=frame)


def _messages(
    marks: Mapping[str, str], answer: str, is_continued: bool = False, is_required: bool = False
) -> list[str]:
    """Return the rules of an answer: any number of messages, and a message `last`."""
    channel, message = marks["<|channel|>"], marks["<|message|>"]
    following = f'{marks["<|end|>"]} {marks["<|start|>"]} "assistant"'
    start = "before* last"
    if is_continued:
        start = f"TEXT {following} {start}" + ("" if is_required else " | TEXT")
    rules = [
        "%llguidance {}",
        f"start: {start}",
        f'before: {channel} ("analysis" | "commentary") {message} TEXT {following}',
        f'type: (" "? {marks["<|constrain|>"]} "json" | " json")?',
        "TEXT: /(.|\\n)*/",
    ]
    return rules if is_required else [*rules, f'final: {channel} "final" type {message} {answer}']
