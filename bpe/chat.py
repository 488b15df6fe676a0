"""Chat templates: from a list of messages to the text, or the token ids, that a model was tuned on.

A template is a small Jinja program that comes with the model; what it sees and which helpers it may
call follow `apply_chat_template` of transformers. Beyond rendering, this module answers two
questions that text alone cannot:

- Which special tokens did the template write, and which did a user type? (`ChatTemplate.encode`)
- Which part of the text did the assistant say? (`ChatTemplate.spans`, in tokens `encode_turns`)

Both use noncharacters: 32 code points (U+FDD0 to U+FDEF) that Unicode promises never to assign, so
they can travel through a template as marks and be taken out again.

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

Message = Mapping[str, Any]
"""One message: `role`, `content`, and whatever else the template knows (`tool_calls`, ...)."""


class ChatTemplate:
    """A model's chat template.

    Attributes:
        source: the Jinja source.
        bos_token: what the template gets as `bos_token`.
        eos_token: what the template gets as `eos_token`.
        stop_tokens: the tokens that end a turn, `eos_token` among them.
        tool_use: the template that takes its place where tools are given, if there is one.
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
    ) -> str:
        """The conversation as text.

        The role "developer" is given to the template as "system" unless its source mentions it.

        Args:
            messages: the conversation; `content` must be what the template expects, usually a
                string.
            add_generation_prompt: whether to end with the beginning of the assistant's next turn.
            tools: JSON schemas of the functions that the model may call.

        Raises:
            ValueError: if the template fails, refuses the messages, or exceeds its limits.
        """
        if tools is not None and self.tool_use_template is not None:
            return self.tool_use_template.render(
                messages, add_generation_prompt=add_generation_prompt, tools=tools
            )
        messages, tools = self._prepare(messages, tools)
        return self._run(messages, tools, add_generation_prompt)

    def encode(
        self,
        encoding: Encoding,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The conversation as token ids, in which only the template can write special tokens.

        A user who types "<|im_end|>" gets the ordinary tokens of those ten characters. Text that
        spells no special token gives the same ids as encoding the rendered text would.

        How: before rendering, a mark is put in front of every special token that is spelled in a
        message or a tool, and of every part of one at the beginning or end of a string (what comes
        before or after might complete it). In the rendered text, special tokens with a mark before
        them do not count, and the marks are removed. One thing is up to the caller: a template that
        writes `"<|" + role + "|>"` means it, so roles must be checked.

        Raises:
            ValueError: as `render` does.
        """
        ids: list[int] = []
        for part, is_special in self._parts(encoding, messages, tools, add_generation_prompt):
            if is_special:
                ids.append(encoding.special_tokens[part])
            else:
                ids += encoding.encode_ordinary(part)
        return ids

    def encode_with_assistant_spans(
        self,
        encoding: Encoding,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """A finished conversation as token ids, and where among them the assistant speaks.

        The text is cut where a turn begins and where it ends, and what stands between is encoded by
        itself: so the ids before a turn are those that the model reads before it answers.

        Returns:
            The ids, and (start, end) in tokens for each assistant message, as `spans` gives them.

        Raises:
            ValueError: as `spans` does.
        """
        spans = self.assistant_spans(messages, tools=tools)
        cuts = sorted({at for span in spans for at in span})
        ids: list[int] = []
        token_at: dict[int, int] = {}  # where in the text each part begins, and where among the ids
        start = 0
        for part, is_special in self._parts(encoding, messages, tools, False):
            end = start + len(part)
            inside = [] if is_special else [at for at in cuts if start < at < end]
            for left, right in itertools.pairwise([start, *inside, end]):
                token_at[left] = len(ids)
                if is_special:
                    ids.append(encoding.special_tokens[part])
                else:
                    ids += encoding.encode_ordinary(part[left - start : right - start])
            start = end
        token_at[start] = len(ids)
        if not token_at.keys() >= set(cuts):
            raise ValueError("the template lets a turn begin or end within a special token")
        return ids, [(token_at[start], token_at[end]) for start, end in spans]

    def _parts(
        self, encoding: Encoding, messages: Any, tools: Any, add_generation_prompt: bool
    ) -> Iterator[tuple[str, bool]]:
        """The rendered text in parts: (text, whether it is one special token of the template)."""
        if tools is not None and self.tool_use_template is not None:
            yield from self.tool_use_template._parts(
                encoding, messages, tools, add_generation_prompt
            )
            return
        messages, tools = self._prepare(messages, tools)
        specials = frozenset(encoding.special_tokens)
        if not specials:
            yield self._run(messages, tools, add_generation_prompt), False
            return
        (mark,) = self._unused_marks((messages, tools), 1)
        spelled = _spelled_pattern(specials)
        messages, tools = _map_strings(lambda s: spelled.sub(mark, s), (messages, tools))
        rendered = self._run(messages, tools, add_generation_prompt)
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
        """Where the assistant speaks in `render(messages, add_generation_prompt=False)`.

        A span begins where the model would take over and includes the end-of-turn token that
        follows the message: who learns from it must learn to stop. It does not include what the
        template puts after that token (often a newline). If the template says itself what the
        model writes, by `{% generation %}`, that is returned unchanged.

        Returns:
            (start, end) in characters, one for each assistant message, in order.

        Raises:
            ValueError: as `render` does, or if a turn cannot be found in the rendered text.
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
        """The span of message `i`: replace it by a mark and see which part of `text` changes.

        So whatever the template does with a message (trim it, cut its reasoning, write its tool
        calls), we take what came of it.
        """
        replaced = [*messages[:i], {"role": "assistant", "content": mark}, *messages[i + 1 :]]
        other = self._run(replaced, tools, False)
        if other.count(mark) != 1:
            raise ValueError(
                f"cannot find message {i} in the rendered text: the template writes its content "
                f"{other.count(mark)} times; mark it by {{% generation %}} in the template"
            )
        start = len(commonprefix([text, other]))
        end = len(text) - len(commonprefix([text[start:][::-1], other[start:][::-1]]))
        # What stands before the content may be the model's to write as well ("<think>"). Some
        # templates refuse a conversation cut short; then we cannot tell.
        with contextlib.suppress(ValueError):
            prompt = self._run(messages[:i], tools, True)
            if text.startswith(prompt):
                start = min(start, len(prompt))
        return start, end + _end_of_turn_length(text[end:], self.stop_tokens)

    def _prepare(self, messages: Any, tools: Any) -> tuple[list[Any], list[Any] | None]:
        """Plain copies of the arguments: lists and dicts of JSON's types, nothing with methods."""
        messages, tools = _map_strings(str.__str__, (list(messages), tools))
        if "developer" not in self.source:
            for message in messages:
                if isinstance(message, dict) and message.get("role") == "developer":
                    message["role"] = "system"
        return messages, tools

    def _run(self, messages: Any, tools: Any, add_generation_prompt: bool, **variables: Any) -> str:
        from bpe.sandbox import MAX_SIZE, metered, value_size

        template = self._template
        try:
            value_size([messages, tools])
        except ValueError:
            raise ValueError(f"messages and tools hold more than {MAX_SIZE} characters") from None
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
                        raise ValueError(f"it writes more than {MAX_SIZE} characters")
        except Exception as error:  # whatever it is, the template or the messages caused it
            raise ValueError(f"chat template failed: {error}") from error
        return "".join(parts)

    def compile(self) -> None:
        """Compile the template now, not when a conversation is first rendered.

        Raises:
            ValueError: it has a mistake.
        """
        _ = self._template

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        from bpe.sandbox import Sandbox

        return Sandbox().load(self.source)

    def _unused_marks(self, value: Any, count: int) -> list[str]:
        """Noncharacters that neither the template nor any string in `value` contains."""
        used = set(self.source)
        _map_strings(lambda s: used.update(s) or s, value)
        free = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in used]
        if len(free) < count:
            raise ValueError("the messages contain all the noncharacters from U+FDD0 to U+FDEF")
        return free[:count]


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    """A copy of a JSON-like value with `function` applied to every string, keys included."""
    if isinstance(value, str):
        return function(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_map_strings(function, k): _map_strings(function, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(function, item) for item in value]
    raise ValueError(f"messages and tools hold only JSON's types, not {type(value).__name__}")


@functools.lru_cache(maxsize=16)
def _spelled_pattern(specials: frozenset[str]) -> re.Pattern[str]:
    """Matches, without width, where a special token or a part of one that can be joined begins."""
    cuts = [(token, n) for token in specials for n in range(1, len(token))]
    beginnings = _any_of({token[:n] for token, n in cuts}) or "(?!)"
    endings = _any_of({token[n:] for token, n in cuts}) or "(?!)"
    first = "".join(re.escape(token[0]) for token in specials)  # to fail fast on other text
    return re.compile(
        f"(?=[{first}])(?=(?:{_any_of(specials)})|(?:{beginnings})\\Z)|\\A(?={endings})"
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
    """Length of the end-of-turn token at the beginning of `text`, 0 if there is none.

    That is a stop token, perhaps after white space, or else what looks like one special token.
    """
    if stop_tokens and (match := re.match(rf"\s*(?:{_any_of(stop_tokens)})", text)):
        return match.end()
    match = re.match(r"<[^<>\s]+>", text)
    return match.end() if match else 0
