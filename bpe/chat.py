"""Apply chat templates: convert a list of messages to the text or token ids that a model expects.

A template is a small Jinja program that comes with the model. Its variables and helper functions
follow `apply_chat_template` of transformers. This module also answers two questions that the
rendered text alone cannot answer:

- Which special tokens come from the template, and which from a user? (`ChatTemplate.encode`)
- Which part of the text comes from the assistant? (`ChatTemplate.assistant_spans`, and in tokens
  `ChatTemplate.encode_with_assistant_spans`)

Both use noncharacters, the 32 code points U+FDD0 to U+FDEF that Unicode never assigns. They are
inserted as marks before rendering and removed afterwards.

jinja2 is imported when the first template is rendered.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from bpe.encoding import Encoding

if TYPE_CHECKING:
    import jinja2

RESERVED_VARIABLES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"),
        "generation_marks",
    }
)
"""The template variables that a caller's `variables` cannot set."""

Message = Mapping[str, Any]
"""One message: `role`, `content`, and other keys that the template uses (`tool_calls`, ...)."""


class ChatTemplate:
    """A model's chat template: converts messages to text, ids, and spans of assistant messages.

    Attributes:
        source: the Jinja source.
        bos_token: the template variable `bos_token`.
        eos_token: the template variable `eos_token`.
        stop_tokens: the tokens that end a message, including `eos_token`.
        tool_use_template: the template to use instead when a request has tools, or None.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        stop_tokens: Collection[str] = (),
        tool_use_template: ChatTemplate | None = None,
    ):
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.stop_tokens = frozenset({eos_token, *stop_tokens} - {""})
        self.tool_use_template = tool_use_template

    def __repr__(self) -> str:
        return f"<ChatTemplate of {len(self.source)} characters>"

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as text.

        The role "developer" is passed to the template as "system" unless its source mentions it.

        Args:
            messages: the conversation; `content` must have the type that the template expects,
                usually a string.
            add_generation_prompt: whether to append the header of the next assistant message.
            tools: JSON schemas of the functions that the model may call.
            continue_final_message: whether the text ends with the content of the last message, so
                that the model continues it. As in transformers, whitespace at its end is removed if
                the template removes it.
            variables: more variables of the template, such as `enable_thinking`. Their names must
                not be in `RESERVED_VARIABLES`.

        Raises:
            ValueError: if the last message cannot be continued, or the template fails, rejects the
                messages, or exceeds the limits on size and time in `bpe.sandbox`.
        """
        if tools is not None and self.tool_use_template is not None:
            return self.tool_use_template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                continue_final_message=continue_final_message,
                variables=variables,
            )
        messages, tools = self._prepare(messages, tools)
        variables = dict(variables or {})
        (mark,) = self._unused_marks((messages, tools, variables), 1)
        return self._render(
            messages,
            tools,
            add_generation_prompt,
            variables,
            mark if continue_final_message else None,
        )

    def encode(
        self,
        encoding: Encoding,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the conversation as token ids, with special tokens from the template only.

        A user who types "<|im_end|>" gets the ordinary tokens of those ten characters. Text without
        special tokens gives the same ids as encoding the rendered text.

        Before rendering, a mark is inserted in front of every special token that occurs in a
        message or a tool, and in front of every part of a special token at the beginning or end of
        a string, because adjacent text might complete the token. In the rendered text, special
        tokens after a mark are ordinary text, and the marks are removed. The caller must check the
        roles: a template can build a special token from a role, as in `"<|" + role + "|>"`.

        Args:
            encoding: the vocabulary.
            messages: as in `render`.
            add_generation_prompt: as in `render`.
            tools: as in `render`.
            continue_final_message: as in `render`.
            variables: as in `render`.

        Raises:
            ValueError: as in `render`.
        """
        parts = list(
            self._parts(
                encoding,
                messages,
                tools,
                add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
        )
        return list(itertools.chain.from_iterable(encoding.encode_parts(parts)))

    def encode_with_assistant_spans(
        self,
        encoding: Encoding,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a complete conversation as token ids, and the spans of assistant messages.

        The text is split at both ends of each span, and the segments are encoded separately.
        Therefore the ids before a span are those that the model reads before it answers.

        Args:
            encoding: the vocabulary.
            messages: as in `render`.
            tools: as in `render`.

        Returns:
            The ids, and (start, end) in tokens of each assistant message, see `assistant_spans`.

        Raises:
            ValueError: as in `assistant_spans`, or if a span begins or ends within a special token.
        """
        spans = self.assistant_spans(messages, tools=tools)
        boundaries = sorted({offset for span in spans for offset in span})
        segments: list[tuple[str, bool]] = []
        starts: list[int] = []  # the character offset of each segment
        start = 0
        for part, is_special in self._parts(encoding, messages, tools, False):
            end = start + len(part)
            inside = [] if is_special else [b for b in boundaries if start < b < end]
            for left, right in itertools.pairwise([start, *inside, end]):
                starts.append(left)
                segments.append((part[left - start : right - start], is_special))
            start = end
        ids: list[int] = []
        token_offsets: dict[int, int] = {}  # character offset of a segment -> index of its first id
        for left, segment_ids in zip(starts, encoding.encode_parts(segments), strict=True):
            token_offsets[left] = len(ids)
            ids += segment_ids
        token_offsets[start] = len(ids)
        if not token_offsets.keys() >= set(boundaries):
            raise ValueError(
                "cannot return spans in tokens: an assistant message begins or ends within a "
                "special token of the template"
            )
        return ids, [(token_offsets[start], token_offsets[end]) for start, end in spans]

    def _parts(
        self,
        encoding: Encoding,
        messages: Any,
        tools: Any,
        add_generation_prompt: bool,
        *,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[str, bool]]:
        """Yield the parts of the rendered text: (part, whether it is a special token).

        Special tokens in messages and tools are ordinary text.
        """
        if tools is not None and self.tool_use_template is not None:
            yield from self.tool_use_template._parts(
                encoding,
                messages,
                tools,
                add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
            return
        messages, tools = self._prepare(messages, tools)
        extra = dict(variables or {})
        specials = frozenset(encoding.special_tokens)
        mark, end_mark = self._unused_marks((messages, tools, extra), 2)
        if specials:
            pattern = _special_text_pattern(specials)
            messages, tools, extra = _map_strings(
                lambda s: pattern.sub(mark, s), (messages, tools, extra)
            )
        rendered = self._render(
            messages,
            tools,
            add_generation_prompt,
            extra,
            end_mark if continue_final_message else None,
        )
        if not specials:
            yield rendered, False
            return
        for i, part in enumerate(_unmarked_pattern(specials, mark).split(rendered)):
            if i % 2:
                yield part, True
            elif part := part.replace(mark, ""):
                yield part, False

    def assistant_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[tuple[int, int]]:
        """Return the spans of assistant text in `render(messages, add_generation_prompt=False)`.

        A span begins where generation would begin and includes the end-of-turn token after the
        message, so that a model trained on it learns to stop. It does not include what the template
        writes after that token, often a newline. If the template marks the generated text itself,
        with `{% generation %}`, those spans are returned unchanged.

        Args:
            messages: as in `render`.
            tools: as in `render`.

        Returns:
            (start, end) in characters, one for each assistant message, in order.

        Raises:
            ValueError: as in `render`, or if a message cannot be found in the rendered text.
        """
        if tools is not None and self.tool_use_template is not None:
            return self.tool_use_template.assistant_spans(messages, tools=tools)
        messages, tools = self._prepare(messages, tools)
        text = self._run(messages, tools, False)
        open_mark, close_mark = marks = self._unused_marks((messages, tools), 2)
        marked = self._run(messages, tools, False, generation_marks=marks)
        if open_mark in marked:
            return _marked_spans(marked, open_mark, close_mark)
        return [
            self._assistant_span(messages, tools, text, i, open_mark)
            for i, message in enumerate(messages)
            if message.get("role") == "assistant"
        ]

    def _assistant_span(
        self, messages: list[Any], tools: list[Any] | None, text: str, i: int, mark: str
    ) -> tuple[int, int]:
        """Return the span of message `i`: the part of `text` that changes with its content.

        The conversation is rendered again with `mark` as the content of the message, and compared
        with `text`. So the template may trim a message, remove its reasoning, or write its tool
        calls.
        """
        replaced = [*messages[:i], {"role": "assistant", "content": mark}, *messages[i + 1 :]]
        rendered = self._run(replaced, tools, False)
        if rendered.count(mark) != 1:
            raise ValueError(
                f"expected the template to write the content of message {i} once, got "
                f"{rendered.count(mark)} times; mark it with {{% generation %}} in the template"
            )
        start = len(commonprefix([text, rendered]))
        end = len(text) - len(commonprefix([text[start:][::-1], rendered[start:][::-1]]))
        # The model may also have to generate text before the content ("<think>"). Some templates
        # reject a truncated conversation; then the span begins at the content.
        with contextlib.suppress(ValueError):
            prompt = self._run(messages[:i], tools, True)
            if text.startswith(prompt):
                start = min(start, len(prompt))
        return start, end + _end_of_turn_length(text[end:], self.stop_tokens)

    def _prepare(self, messages: Any, tools: Any) -> tuple[list[Any], list[Any] | None]:
        """Return copies of the arguments in plain lists, dicts and strings, never subclasses."""
        messages, tools = _map_strings(str.__str__, (list(messages), tools))
        if "developer" not in self.source:
            for message in messages:
                if isinstance(message, dict) and message.get("role") == "developer":
                    message["role"] = "system"
        return [_with_reasoning_names(message) for message in messages], tools

    def _render(
        self,
        messages: list[Any],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
        end_mark: str | None,
    ) -> str:
        """Return the text of messages from `_prepare`.

        With `end_mark`, a character that occurs in no argument, the text ends with the content of
        the last message.
        """
        if reserved := RESERVED_VARIABLES & variables.keys():
            raise ValueError(f"the template variable {min(reserved)!r} is reserved: leave it out")
        if end_mark is None:
            return self._run(messages, tools, add_generation_prompt, **variables)
        last = messages[-1] if messages else None
        if not isinstance(last, dict) or not isinstance(last.get("content"), str):
            raise ValueError("the last message has no text to continue")
        # A space after the mark shows whether the template removes whitespace at the end.
        messages = [*messages[:-1], {**last, "content": f"{last['content']}{end_mark} "}]
        text, mark, rest = self._run(messages, tools, False, **variables).rpartition(end_mark)
        if not mark:
            raise ValueError("the template does not write the content of the last message")
        return text if rest.startswith(" ") else text.rstrip()

    def _run(self, messages: Any, tools: Any, add_generation_prompt: bool, **variables: Any) -> str:
        from bpe.sandbox import MAX_SIZE, metered, value_size

        template = self._template
        try:
            value_size([messages, tools, variables])
        except ValueError:
            raise ValueError(
                f"messages and tools have more than {MAX_SIZE} characters; shorten them"
            ) from None
        parts, length = [], 0
        try:
            with metered():
                for part in template.generate(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self.bos_token,
                    eos_token=self.eos_token,
                    **variables,
                ):
                    parts.append(part)
                    length += len(part)
                    if length > MAX_SIZE:
                        raise ValueError(f"the output has more than {MAX_SIZE} characters")
        except Exception as error:  # caused by the template or the messages, of any type
            raise ValueError(f"chat template failed: {error}") from error
        return "".join(parts)

    def compile(self) -> None:
        """Compile the template now instead of at the first rendering.

        Raises:
            ValueError: if the template is too long or has a syntax error.
        """
        _ = self._template

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads, such as "messages" and "enable_thinking"."""
        from bpe.sandbox import Sandbox

        names = frozenset(Sandbox().variables(self.source))
        other = self.tool_use_template
        return names if other is None else names | other.variables

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        from bpe.sandbox import Sandbox

        return Sandbox().load(self.source)

    def _unused_marks(self, value: Any, count: int) -> list[str]:
        """Return `count` noncharacters that occur neither in the template nor in `value`."""
        used = set(self.source)
        _map_strings(lambda s: used.update(s) or s, value)
        free = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in used]
        if len(free) < count:
            raise ValueError(
                "the messages contain all the noncharacters from U+FDD0 to U+FDEF; remove one"
            )
        return free[:count]


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    """Copy a JSON-like value with `function` applied to every string, including keys."""
    if isinstance(value, str):
        return function(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_map_strings(function, k): _map_strings(function, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(function, item) for item in value]
    raise ValueError(f"messages and tools must have JSON types only, got {type(value).__name__}")


_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


def _with_reasoning_names(message: Any) -> Any:
    """Return a message with its reasoning in `thinking` and `reasoning_content`.

    Templates read one of these keys. transformers copies the reasoning in the same way.
    """
    if not isinstance(message, dict):
        return message
    values = (message[name] for name in _REASONING_NAMES if message.get(name) is not None)
    if (reasoning := next(values, None)) is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=16)
def _special_text_pattern(specials: frozenset[str]) -> re.Pattern[str]:
    """Return a zero-width pattern that matches before every special token in a string.

    The pattern also matches before a part of a special token at the beginning or end of the string,
    because adjacent text might complete the token.
    """
    splits = [(token, n) for token in specials for n in range(1, len(token))]
    prefixes = _any_of({token[:n] for token, n in splits}) or "(?!)"
    suffixes = _any_of({token[n:] for token, n in splits}) or "(?!)"
    first = "".join(re.escape(token[0]) for token in specials)  # to fail fast on other text
    return re.compile(
        f"(?=[{first}])(?=(?:{_any_of(specials)})|(?:{prefixes})\\Z)|\\A(?={suffixes})"
    )


@functools.lru_cache(maxsize=16)
def _unmarked_pattern(specials: frozenset[str], mark: str) -> re.Pattern[str]:
    return re.compile(f"(?<!{mark})({_any_of(specials)})")


def _any_of(strings: Collection[str]) -> str:
    return "|".join(map(re.escape, sorted(strings, key=lambda s: (-len(s), s))))


def _marked_spans(marked: str, open_mark: str, close_mark: str) -> list[tuple[int, int]]:
    spans, position, start = [], 0, 0
    for character in marked:
        if character == open_mark:
            start = position
        elif character == close_mark:
            spans.append((start, position))
        else:
            position += 1
    return spans


def _end_of_turn_length(text: str, stop_tokens: Collection[str]) -> int:
    """Return the length of the end-of-turn token at the beginning of `text`, 0 without one.

    An end-of-turn token is a stop token, optionally after whitespace, or text in angle brackets.
    """
    if stop_tokens and (match := re.match(rf"\s*(?:{_any_of(stop_tokens)})", text)):
        return match.end()
    match = re.match(r"<[^<>\s]+>", text)
    return match.end() if match else 0
