r"""Tool calls in the text of a model: the notations, a parser for streams, and grammars.

A model calls a tool by writing its name and arguments in the notation that it was trained with:

    hermes     <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>    Hermes, Qwen
    llama3     {"name": "add", "parameters": {"a": 1}}      Llama 3, optionally after <|python_tag|>
    mistral    [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]                 Mistral Nemo
    mistral11  [TOOL_CALLS]add[ARGS]{"a": 1}                                        Devstral
    harmony    <|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}  gpt-oss

A chat template says which one by the way it renders a call (`detect_notation`). `ToolCallParser`
finds calls in generated text as it arrives. `tool_grammar` limits generated text to well-formed
calls of known tools. `serve/models/harmony.py` has both for harmony, which is more than a notation
of calls.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex

from bpe import ChatTemplate, Encoding
from serve.models.grammar import GrammarSource, lark_schema


@dataclass(frozen=True, kw_only=True)
class Notation:
    """A notation for tool calls: literal texts around names and arguments.

    A block is `start call (separator call)* end`, and a call is `before_name NAME before_arguments
    ARGUMENTS after_arguments`. White space is optional when calls are parsed.

    Attributes:
        name: the name of the notation.
        trigger: the text that a block begins with; empty if calls are bare.
        start: the text before the first call of a block, with the trigger.
        before_name: the text before a name.
        before_arguments: the text between name and arguments.
        after_arguments: the text after the arguments.
        end: the text that closes a block.
        separator: the text between two calls of a block; empty if a block has one call.
        between: the text between two blocks; None if an answer has one block.
        is_bare_allowed: whether a call may also be the whole answer, without `start` and `end`, and
            in a Markdown code block. Small models write it so.
        optional_trigger: a text that may come before a bare call.
    """

    name: str
    trigger: str
    start: str
    before_name: str
    before_arguments: str
    after_arguments: str = ""
    end: str = ""
    separator: str = ""
    between: str | None = None
    is_bare_allowed: bool = False
    optional_trigger: str = ""

    @property
    def has_parallel_calls(self) -> bool:
        """Whether an answer can have several calls."""
        return bool(self.separator) or self.between is not None


HERMES = Notation(
    name="hermes",
    trigger="<tool_call>",
    start="<tool_call>\n",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}",
    end="\n</tool_call>",
    between="\n",
    is_bare_allowed=True,
)
LLAMA3 = Notation(
    name="llama3",
    trigger="",
    start="",
    before_name='{"name": "',
    before_arguments='", "parameters": ',
    after_arguments="}",
    is_bare_allowed=True,
    optional_trigger="<|python_tag|>",
)
MISTRAL = Notation(
    name="mistral",
    trigger="[TOOL_CALLS]",
    start="[TOOL_CALLS][",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}",
    end="]",
    separator=", ",
)
MISTRAL11 = Notation(
    name="mistral11",
    trigger="[TOOL_CALLS]",
    start="[TOOL_CALLS]",
    before_name="",
    before_arguments="[ARGS]",
    between="",
)
NOTATIONS = (HERMES, LLAMA3, MISTRAL, MISTRAL11)
HARMONY = Notation(  # not read by `ToolCallParser`
    name="harmony",
    trigger="<|channel|>",
    start="<|channel|>commentary to=functions.",
    before_name="",
    before_arguments=" <|constrain|>json<|message|>",
    end="<|call|>",
)


def detect_notation(template: ChatTemplate | None) -> Notation | None:
    """Return the notation of a chat template: `HARMONY`, one of `NOTATIONS`, or None.

    The template renders a conversation with a tool and a call of it. It has a notation if the
    prompt names the tool, and the notation's parser finds the call.
    """
    if template is None:
        return None
    name, schema = "probed_tool", {"type": "object", "properties": {"key": {"type": "string"}}}
    tool = {"name": name, "description": "A tool.", "parameters": schema}
    call = {"name": name, "arguments": {"key": "value"}}
    tool_call = {"id": "123456789", "type": "function", "function": call}  # Mistral wants 9 digits
    messages = [
        {"role": "user", "content": "A question."},
        {"role": "assistant", "content": "", "tool_calls": [tool_call]},
    ]
    tools = [{"type": "function", "function": tool}]
    try:
        prompt = template.render(messages[:1], tools=tools)
        conversation = template.render(messages, tools=tools, add_generation_prompt=False)
    except ValueError:
        return None
    if name not in prompt:
        return None
    answer = conversation.removeprefix(prompt)
    if f"to=functions.{name}" in answer and "<|channel|>commentary" in answer:
        return HARMONY
    for notation in NOTATIONS:
        text = conversation if notation.trigger else answer
        parts = ToolCallParser(notation, [name]).push(text)
        if any(isinstance(part, CallPart) for part in parts):
            return notation
    return None


# --- parsing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPart:
    """Generated text that is not part of a call, and its offset in the whole text.

    The offset is None for a line break that the model did not generate.
    """

    text: str
    offset: int | None


@dataclass(frozen=True)
class ReasoningPart:
    """Generated text of the reasoning before an answer, and its offset as in `TextPart`."""

    text: str
    offset: int | None


@dataclass(frozen=True)
class CallPart:
    """The next part of a call: first its name, then pieces of its arguments.

    Attributes:
        index: the number of the call in the answer, from 0.
        name: the name of the tool, in the first part of the call; else None.
        arguments: the next text of the arguments, which are a JSON object.
    """

    index: int
    name: str | None = None
    arguments: str = ""


Part = TextPart | ReasoningPart | CallPart


class ToolCallParser:
    """Find the calls in one generated text, which arrives in pieces.

    Text is held back while it can be the beginning of a call. A call begins when the name of a tool
    is complete and its arguments begin; anything else is text. White space around calls is dropped.

    Args:
        notation: the notation of the calls.
        names: the names of the tools that can be called.
        max_calls: the maximum number of calls; further calls are text. None for no limit.
        is_bare_allowed: whether a call may be the whole answer if the notation has a trigger and
            allows it. If an answer has a format, a document with the keys of a call is no call.
        is_streaming: whether to return arguments in pieces. If not, they are returned when they are
            complete, and a call whose arguments are not valid JSON is text.
    """

    def __init__(
        self,
        notation: Notation,
        names: Sequence[str],
        *,
        max_calls: int | None = None,
        is_bare_allowed: bool = True,
        is_streaming: bool = True,
    ):
        self._max_calls = max_calls if notation.has_parallel_calls else 1
        self._is_streaming = is_streaming
        self._trigger = notation.trigger
        self._patterns = _patterns(notation, tuple(names))
        # Text that is not returned yet, and its offset in the whole text.
        self._buffer, self._offset = "", 0
        self._state: Literal["text", "arguments", "tail"] = "text"
        # Until there is text, or a call in a block.
        self._can_be_bare = notation.is_bare_allowed and (is_bare_allowed or not notation.trigger)
        self._form = ""  # of the last call: "block", "bare" or "fenced"
        self._is_after_call = False  # whether only white space has followed the last call
        self._scanner = ObjectScanner()
        # The last call, if it is not streamed: its name, arguments, text and offset.
        self._name = self._arguments = self._call_text = ""
        self._call_offset = 0
        self.num_calls = 0

    @property
    def is_in_arguments(self) -> bool:
        """Whether the arguments of a call have begun but not ended."""
        return self._state == "arguments"

    def push(self, text: str) -> list[Part]:
        """Add generated text, and return the parts that are certain."""
        self._buffer += text
        parts: list[Part] = []
        while self._buffer:
            before = self._state, self._offset
            match self._state:
                case "text":
                    parts += self._read_text()
                case "arguments":
                    parts += self._read_arguments()
                case "tail":
                    parts += self._read_tail()
            if before == (self._state, self._offset):
                break  # the rest is held back
        return parts

    def flush(self, *, is_cut: bool = False) -> list[Part]:
        """End the text, and return what was held back.

        Arguments that were cut are returned as far as they were generated. A call that was cut
        before its arguments is dropped.

        Args:
            is_cut: whether the text is incomplete, so that the beginning of a call in it is a call.
        """
        if self._state == "text" and not self._is_after_call:
            is_opened = bool(self._trigger) and self._trigger in self._buffer
            if is_opened or (is_cut and self._buffer.strip()):
                return []
            return list(self._text(len(self._buffer)))
        if self.is_in_arguments and not self._is_streaming:
            return [self._call()]
        return []  # the end of the last call is missing

    def _read_text(self) -> Iterator[Part]:
        if self._is_after_call:
            self._take(len(self._buffer) - len(self._buffer.lstrip()))
            self._is_after_call = not self._buffer
        if self.num_calls == self._max_calls:
            yield from self._text(len(self._buffer))
            return
        pattern = self._patterns.get("any" if self._can_be_bare else "block")
        if (match := pattern and pattern.search(self._buffer, partial=True)) is None:
            yield from self._text(len(self._buffer))
            return
        end = len(self._buffer[: match.start()].rstrip())
        yield from self._text(end)
        if not match.partial:
            self._take(match.start() - end)
            yield from self._begin_call(match)

    def _begin_call(self, match: regex.Match[str]) -> Iterator[Part]:
        """Read the text of a match, up to the arguments."""
        groups = match.groupdict()
        self._form = next((f for f in ("fenced", "bare") if groups.get(f) is not None), "block")
        self._can_be_bare = self._can_be_bare and self._form != "block"
        self._name, self._arguments = groups["name"], ""
        self._call_offset, self._call_text = self._offset, self._take(len(match[0]))
        self._state, self._scanner, self._is_after_call = "arguments", ObjectScanner(), False
        if self._is_streaming:
            yield self._call()

    def _call(self) -> CallPart:
        self.num_calls += 1
        return CallPart(self.num_calls - 1, self._name, self._arguments)

    def _read_arguments(self) -> Iterator[Part]:
        piece = self._take(self._scanner.feed(self._buffer))
        if self._scanner.is_complete:
            self._state = "tail"
        if self._is_streaming:
            yield CallPart(self.num_calls - 1, arguments=piece)
            return
        self._arguments += piece
        self._call_text += piece
        if self._scanner.is_complete:
            if _is_json(self._arguments):
                yield self._call()
            else:
                self._state, self._can_be_bare = "text", False
                yield TextPart(self._call_text, self._call_offset)

    def _read_tail(self) -> Iterator[Part]:
        match = self._patterns[f"{self._form} tail"].match(self._buffer, partial=True)
        if match is not None and match.partial:
            return
        if match is not None and match.groupdict().get("name"):
            yield from self._begin_call(match)
            return
        self._take(match.end() if match else 0)
        self._state, self._is_after_call = "text", True

    def _text(self, length: int) -> Iterator[TextPart]:
        offset = self._offset
        if text := self._take(length):
            self._can_be_bare = False
            yield TextPart(text, offset)

    def _take(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        self._offset += length
        return text


class ObjectScanner:
    """Finds the end of a JSON object by its braces and strings."""

    def __init__(self) -> None:
        self._depth, self._is_in_string, self._is_escaped = 0, False, False
        self.is_complete = False

    def feed(self, text: str) -> int:
        """Read text up to the end of the object, and return how many characters were read."""
        for position, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_in_string = character != '"'
                self._is_escaped = character == "\\"
            elif character == '"':
                self._is_in_string = True
            elif character in "{}":
                self._depth += 1 if character == "{" else -1
                if self._depth == 0:
                    self.is_complete = True
                    return position + 1
        return len(text)


@functools.lru_cache(maxsize=64)
def _patterns(notation: Notation, names: tuple[str, ...]) -> dict[str, regex.Pattern[str]]:
    """Return the patterns of the beginnings of calls, and of the text after their arguments.

    A pattern of a beginning ends before the brace of the arguments. The parser searches for partial
    matches, too.
    """
    call = _call_pattern(notation, f"(?P<name>{'|'.join(map(regex.escape, names))})") + r"\s*"
    block = rf"{_flexible(notation.start)}\s*{call}"
    optional = _flexible(notation.optional_trigger)
    bare = rf"\A\s*(?:(?P<fenced>```(?:json)?)|(?P<bare>(?:{optional})?))\s*{call}"
    after = rf"\s*{_flexible(notation.after_arguments)}" if notation.after_arguments else ""
    # In conversations, Mistral's templates write the id of a call behind its arguments.
    after_id = rf'(?:\s*,\s*"id"\s*:\s*"\w*")?{after}' if notation.separator else after
    end = rf"\s*{_flexible(notation.end)}" if notation.end else ""
    if notation.separator:
        end = rf"(?:{end}|\s*{_flexible(notation.separator)}\s*{call}(?={{))"
    patterns = {
        "any": rf"(?:{bare}|{block})(?={{)" if notation.trigger else rf"{bare}(?={{)",
        "block tail": after_id + end,
        "bare tail": after,
        "fenced tail": rf"{after}\s*```",
    }
    if notation.trigger:
        patterns["block"] = rf"{block}(?={{)"
    return {name: regex.compile(pattern) for name, pattern in patterns.items()}


def _call_pattern(notation: Notation, name: str) -> str:
    """Return the pattern of a call up to its arguments, in the syntax of Python and of Rust."""
    before = _flexible(notation.before_name)
    return rf"{before}{name}{_flexible(notation.before_arguments)}"


def _flexible(literal: str) -> str:
    """Return a pattern of a literal that allows white space between the tokens of JSON."""
    tokens = regex.findall(r"[{}\[\]:,]|[^\s{}\[\]:,]+", literal)
    return r"\s*".join(map(regex.escape, tokens))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# --- grammars ---------------------------------------------------------------------------------


def tool_grammar(
    notation: Notation,
    schemas: Mapping[str, Mapping[str, Any]],
    encoding: Encoding,
    *,
    is_required: bool,
    max_calls: int | None = None,
    answer_schema: Mapping[str, Any] | None = None,
) -> GrammarSource:
    """Return a grammar of text with calls of tools, in llguidance's variant of Lark.

    If no call is required, any text is allowed until the model opens a call. After a call only
    further calls can follow. A trigger that is a special token of the vocabulary can be written as
    the token, or in the tokens of its text.

    Args:
        notation: the notation of the calls.
        schemas: the JSON schema of the arguments, by the name of the tool.
        encoding: the vocabulary.
        is_required: whether the text must be a call.
        max_calls: 1 for one call, None for any number.
        answer_schema: the JSON schema of an answer without calls; None for any text. With a schema,
            no text comes before a call.
    """
    literal = functools.partial(lark_literal, encoding=encoding)
    can_repeat = max_calls != 1 and notation.has_parallel_calls

    def repeated(rule: str, separator: str | None) -> str:
        can_follow = can_repeat and separator is not None
        return f"{rule} ({literal(separator or '')} {rule})*" if can_follow else rule

    # Small models tend to write a line break after a call, which must not commit them to another.
    line_end = '"\\n"?' if notation.between == "\n" else ""
    trigger, after = literal(notation.trigger), literal(notation.after_arguments)
    rules = ["%llguidance {}", "start: calls" if is_required else "start: calls | answer"]
    for number, (name, schema) in enumerate(schemas.items()):
        before = literal(f"{notation.before_name}{name}{notation.before_arguments}")
        rules.append(f"call_{number}: {before} arguments_{number}")
        rules.append(f"arguments_{number}: {lark_schema(schema)} {after}")
    rules.append(f"call: {_any_of('call', len(schemas))}")
    if not notation.trigger:
        optional = literal(notation.optional_trigger)
        calls = ["call", f"{optional} call"] if _is_token(optional) else ["call"]
    else:
        in_block = repeated("call", notation.separator or None)
        after_trigger = literal(notation.start.removeprefix(notation.trigger))
        rules.append(f"rest: {after_trigger} {in_block} {literal(notation.end)}")
        rules.append(f"block: {trigger} rest")
        calls = [f"{repeated('block', notation.between)} {line_end}"]
    if answer_schema is not None:
        rules.append(f"answer: {lark_schema(answer_schema)}")
    elif not is_required:
        rules.append("answer: TEXT")
        text = r"/(.|\n)*/"
        if notation.trigger:
            further = calls[0].removeprefix("block")
            rules.append(f"opened[lazy]: TEXT {json.dumps(notation.trigger)}")
            calls = [f"opened rest {further}"]
            if _is_token(trigger):
                calls.append(f"TEXT {trigger} rest {further}")
        if notation.is_bare_allowed:
            calls = [call for call in calls if call != "call"]
            heads = []
            for form, start, end in (("bare", "", ""), ("fenced", r"```(?:json)?\s*", "\n```")):
                for number, name in enumerate(schemas):
                    head = rf"\s*{start}{_call_pattern(notation, name)}"
                    heads.append(head)
                    rule = f'/{head}/ " "? arguments_{number} {literal(end)}'
                    rules.append(f"{form}_{number}: {rule}")
                rules.append(f"{form}: {_any_of(form, len(schemas))}")
            calls += [f"{repeated('bare', notation.between)} {line_end}", "fenced"]
            text += rf" & ~/(?:{'|'.join(heads)})(.|\n)*/"
        rules.append(f"TEXT: {text}")
    rules.append(f"calls: {' | '.join(calls)}")
    return GrammarSource("lark", "\n".join(rules))


def lark_literal(text: str, encoding: Encoding) -> str:
    """Return a text in Lark, with special tokens of the vocabulary as their ids."""
    specials = sorted((s for s in encoding.special_tokens_set if s in text), key=len, reverse=True)
    parts = regex.split(f"({'|'.join(map(regex.escape, specials))})", text) if specials else [text]
    return " ".join(
        f"<[{encoding.encode_single_token(part)}]>" if part in specials else json.dumps(part)
        for part in parts
        if part
    )


def _is_token(literal: str) -> bool:
    return literal.startswith("<[")


def _any_of(rule: str, count: int) -> str:
    return " | ".join(f"{rule}_{number}" for number in range(count))
