"""From generated text to the deltas of a message: its content, reasoning and calls of tools."""

import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from serve.api.detokenize import FinishReason, TextDelta, TokenWithOffset
from serve.api.generation import Choice, Usage
from serve.api.tools import ToolSettings
from serve.models.decoder import DecoderModel
from serve.models.harmony import HarmonyParser, marker_ids
from serve.models.tool_calls import HERMES, CallPart, ReasoningPart, TextPart, ToolCallParser


class DeltaReader:
    """Turn the text of one choice into the deltas of a message.

    A delta has one of `content`, `tool_calls` (or `function_call`), and for models with channels
    `reasoning_content`.

    Args:
        tools: The tools of the request.
        model: The model.
        is_streaming: Whether arguments are returned in pieces; see `ToolCallParser`.
        is_continued: Whether the text continues the last message of the request.

    Attributes:
        reasoning_tokens: Number of tokens of reasoning so far, without the markers of its messages.
    """

    def __init__(
        self,
        tools: ToolSettings | None,
        model: DecoderModel,
        *,
        is_streaming: bool = True,
        is_continued: bool = False,
    ):
        self._is_legacy = tools is not None and tools.is_legacy
        self._is_required = tools is not None and tools.is_required
        self._parser: HarmonyParser | ToolCallParser | None = None
        if model.has_channels:
            self._parser = HarmonyParser(
                tools.allowed_names if tools else (),
                is_streaming=is_streaming,
                is_continued=is_continued,
            )
            self._marker_ids = marker_ids(model.tokenizer.encoding)
        elif tools is not None:
            self._parser = ToolCallParser(
                model.tool_notation or HERMES,
                tools.allowed_names,
                max_calls=tools.max_calls,
                is_bare_allowed=not tools.has_answer_format,
                is_streaming=is_streaming,
            )
        self.reasoning_tokens = 0
        self._tokens: deque[TokenWithOffset] = deque()  # of text that the parser holds back

    def read(self, delta: TextDelta) -> Iterator[tuple[dict[str, Any], Sequence[TokenWithOffset]]]:
        """Yield the deltas of a message that a text delta completes, and the tokens of each.

        The tokens of reasoning and of calls are not reported.
        """
        if self._parser is None:
            if delta.text:
                yield {"content": delta.text}, delta.tokens
            return
        self._tokens += delta.tokens
        if isinstance(self._parser, HarmonyParser):
            offsets = (item.offset for item in delta.tokens if item.token.id in self._marker_ids)
            parts = self._parser.push(delta.text, offsets)
            parts += self._parser.flush() if delta.finish_reason else []
        else:
            parts = self._parser.push(delta.text)
            if delta.finish_reason:
                is_cut = delta.finish_reason == "length" or self._is_required
                parts += self._parser.flush(is_cut=is_cut)
        for part in parts:
            match part:
                case TextPart(text=text, offset=None):
                    yield {"content": text}, ()
                case TextPart(text=text, offset=int(start)):
                    yield {"content": text}, self._tokens_between(start, start + len(text))
                case ReasoningPart(text=text, offset=start):
                    if start is not None:
                        self.reasoning_tokens += len(self._tokens_between(start, start + len(text)))
                    yield {"reasoning_content": text}, ()
                case CallPart():
                    yield self._call(part), ()

    def _tokens_between(self, start: int, end: int) -> list[TokenWithOffset]:
        tokens: list[TokenWithOffset] = []
        while self._tokens and self._tokens[0].offset < end:
            token = self._tokens.popleft()
            if token.offset >= start:
                tokens.append(token)
        return tokens

    def _call(self, part: CallPart) -> dict[str, Any]:
        function = {"arguments": part.arguments}
        if part.name is not None:
            function = {"name": part.name} | function
        if self._is_legacy:
            return {"function_call": function}
        call: dict[str, Any] = {"index": part.index}
        if part.name is not None:
            call |= {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        return {"tool_calls": [call | {"function": function}]}

    def finish_reason(self, reason: FinishReason) -> str:
        """Return the finish reason of the message; a call that was cut has the reason of the text.

        Args:
            reason: The finish reason of the text.
        """
        if self._parser is None or not self._parser.num_calls or reason != "stop":
            return reason
        if self._parser.is_in_arguments:
            return reason
        return "function_call" if self._is_legacy else "tool_calls"


def read_message(
    choice: Choice,
    tools: ToolSettings | None,
    model: DecoderModel,
    usage: Usage,
    *,
    is_continued: bool = False,
) -> tuple[dict[str, Any], list[TokenWithOffset], str]:
    """Return the message of a finished choice, the tokens of its content, and its finish reason.

    The tokens of its reasoning are added to `usage`.
    """
    assert choice.finish_reason is not None
    reader = DeltaReader(tools, model, is_streaming=False, is_continued=is_continued)
    text, reasoning, tokens, calls = "", "", [], []
    whole = TextDelta(choice.text, tuple(choice.tokens), choice.finish_reason, len(choice.tokens))
    for delta, delta_tokens in reader.read(whole):
        text += delta.get("content", "")
        reasoning += delta.get("reasoning_content", "")
        tokens += delta_tokens
        calls += delta.get("tool_calls", ())
        calls += [delta["function_call"]] if "function_call" in delta else ()
    usage.reasoning_tokens += reader.reasoning_tokens
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["content"] = text or None
    if calls and tools is not None and tools.is_legacy:
        message["function_call"] = calls[0]
    elif calls:
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in calls
        ]
    return message, tokens, reader.finish_reason(choice.finish_reason)


def add_delta(choices: dict[int, dict[str, Any]], choice: dict[str, Any]) -> None:
    """Add the delta of a streamed choice to the whole choice.

    Args:
        choices: The choices so far, by index; changed.
        choice: The choice of a chunk.
    """
    index, delta = choice["index"], choice["delta"]
    message = {"role": "assistant", "content": None, "refusal": None}
    whole = choices.setdefault(
        index, {"index": index, "message": message, "logprobs": None, "finish_reason": None}
    )
    message = whole["message"]
    if delta.get("content") is not None:
        message["content"] = (message["content"] or "") + delta["content"]
    if (text := delta.get("reasoning_content")) is not None:
        message["reasoning_content"] = message.get("reasoning_content", "") + text
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            function = {"name": call["function"]["name"], "arguments": ""}
            calls.append({"id": call["id"], "type": "function", "function": function})
        calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if (function := delta.get("function_call")) is not None:
        whole_call = message.setdefault("function_call", {"name": "", "arguments": ""})
        for name, text in function.items():
            whole_call[name] += text
    if choice["logprobs"] is not None:
        logprobs = whole["logprobs"] = whole["logprobs"] or {"content": [], "refusal": None}
        logprobs["content"] += choice["logprobs"]["content"]
    whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
