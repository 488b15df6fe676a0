"""The events of a streamed response of /v1/responses, and the response that they build.

An event has a type and a sequence number. The order for each output item is: the item is added, its
content part is added, deltas, the done events in reverse. A call has deltas of its arguments and no
content part. The response itself is sent in the first two events and in the last one.

`ResponseWriter` is the only code that makes events: a response that is not streamed is the one that
its last event holds, and the events of a stored response are made again from its parts.
"""

import copy
import time
from collections.abc import Iterable, Iterator
from typing import Any

from serve.api.errors import APIError

Event = dict[str, Any]
# ["reasoning", text], ["text", text, logprobs], ["call", call_id, name, namespace] or
# ["arguments", text]
Part = list[Any]


class ResponseWriter:
    """Build the output of a response from its parts, and the events of each part.

    Args:
        response: The response without output, in OpenAI's shape. It is updated.

    Attributes:
        response: The response so far.
        parts: The parts so far, to make the same events again.
        error: Why the response failed, if it did.
        last_event: The last event, once there is one.
    """

    def __init__(self, response: dict[str, Any]):
        self.response = response
        self.parts: list[Part] = []
        self.error: APIError | None = None
        self.last_event: Event | None = None
        self._sequence_number = 0
        self._suffix = response["id"].partition("_")[2]

    def _event(self, type: str, **fields: Any) -> Event:
        event = {"type": f"response.{type}", "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return event

    def _state_event(self, type: str) -> Event:
        return self._event(type, response=copy.deepcopy(self.response))

    def begin(self) -> Iterator[Event]:
        """Yield the events that start the response."""
        if self.response["status"] == "queued":
            yield self._state_event("created")
            yield self._state_event("queued")
            self.response["status"] = "in_progress"
        else:
            yield self._state_event("created")
        yield self._state_event("in_progress")

    def write(self, part: Part) -> Iterator[Event]:
        """Yield the events of the next part.

        Args:
            part: A piece of reasoning; a piece of text with the logprobs of its tokens; a call with
                its id and name, or a piece of the arguments of the last call.
        """
        self.parts.append(part)
        match part:
            case ["reasoning", text]:
                if self._open_type != "reasoning":
                    yield from self._close_item("completed")
                    yield from self._open_item("rs_", type="reasoning", summary=[], content=[])
                    yield from self._open_part({"type": "reasoning_text", "text": ""})
                self.response["output"][-1]["content"][0]["text"] += text
                yield self._event("reasoning_text.delta", **self._content_place(), delta=text)
            case ["text", text, logprobs]:
                if self._open_type != "message":
                    yield from self._close_item("completed")
                    yield from self._open_message()
                content = self.response["output"][-1]["content"][0]
                content["text"] += text
                content["logprobs"] += logprobs
                yield self._event(
                    "output_text.delta",
                    **self._content_place(),
                    delta=text,
                    logprobs=logprobs,
                )
            case ["call", call_id, name, namespace]:
                yield from self._close_item("completed")
                fields = {"call_id": call_id, "name": name, "arguments": ""}
                if namespace is not None:
                    fields["namespace"] = namespace
                yield from self._open_item("fc_", type="function_call", **fields)
            case ["arguments", text]:
                self.response["output"][-1]["arguments"] += text
                yield self._event("function_call_arguments.delta", **self._place(), delta=text)
            case _:
                raise ValueError(f"expected a text, a call or arguments, got {part}")

    def end(self, finish_reason: str, usage: dict[str, Any]) -> Iterator[Event]:
        """Yield the last events of a response.

        Args:
            finish_reason: Why the text ended: "length" leaves the response incomplete.
            usage: The token counts, in the shape of /v1/responses.
        """
        is_cut = finish_reason == "length"
        if all(item["type"] == "reasoning" for item in self.response["output"]):
            yield from self._close_item("completed")  # clients expect a message
            yield from self._open_message()
        yield from self._close_item("incomplete" if is_cut else "completed")
        self.response["usage"] = usage
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            yield self._finish("incomplete")
        else:
            self.response["completed_at"] = int(time.time())
            yield self._finish("completed")

    def fail(self, message: str, code: str = "server_error") -> Event:
        """Return the last event of a response that failed."""
        self.response["error"] = {"code": code, "message": message}
        return self._finish("failed")

    def cancel(self) -> Event:
        """Return the last event of a response that was cancelled.

        The API has no event type for it; clients end a stream at "response.incomplete".
        """
        return self._finish("cancelled", "incomplete")

    def _finish(self, status: str, event_type: str | None = None) -> Event:
        if self._open_type is not None:
            self.response["output"][-1]["status"] = "incomplete"
        self.response["status"] = status
        self.last_event = self._state_event(event_type or status)
        return self.last_event

    # -- items ---------------------------------------------------------------------------------

    @property
    def _open_type(self) -> str | None:
        """The type of the item that is being written; None between items."""
        output = self.response["output"]
        return output[-1]["type"] if output and output[-1]["status"] == "in_progress" else None

    def _place(self) -> dict[str, Any]:
        output = self.response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _content_place(self) -> dict[str, Any]:
        return {**self._place(), "content_index": 0}

    def _open_item(self, prefix: str, **fields: Any) -> Iterator[Event]:
        index = len(self.response["output"])
        id = f"{prefix}{self._suffix}{index:03d}"
        self.response["output"].append({"id": id, "status": "in_progress", **fields})
        yield self._event(
            "output_item.added",
            output_index=index,
            item=copy.deepcopy(self.response["output"][-1]),
        )

    def _open_message(self) -> Iterator[Event]:
        yield from self._open_item("msg_", type="message", role="assistant", content=[])
        yield from self._open_part(
            {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        )

    def _open_part(self, part: dict[str, Any]) -> Iterator[Event]:
        yield self._event("content_part.added", **self._content_place(), part=copy.deepcopy(part))
        self.response["output"][-1]["content"].append(part)

    def _close_item(self, status: str) -> Iterator[Event]:
        kind = self._open_type
        if kind is None:
            return
        item = self.response["output"][-1]
        if kind in ("message", "reasoning"):
            part = copy.deepcopy(item["content"][0])
            place = {**self._content_place(), "text": part["text"]}
            if kind == "message":
                yield self._event("output_text.done", **place, logprobs=part["logprobs"])
            else:
                yield self._event("reasoning_text.done", **place)
            yield self._event("content_part.done", **self._content_place(), part=part)
        else:
            yield self._event(
                "function_call_arguments.done",
                **self._place(),
                name=item["name"],
                arguments=item["arguments"],
            )
        item["status"] = status
        yield self._event(
            "output_item.done",
            output_index=len(self.response["output"]) - 1,
            item=copy.deepcopy(item),
        )


def replay(response: dict[str, Any], parts: Iterable[Part]) -> Iterator[Event]:
    """Yield the events of a finished response again, from its parts.

    Args:
        response: The finished response.
        parts: `ResponseWriter.parts` of it.
    """
    started = {
        "status": "queued" if response["background"] else "in_progress",
        "output": [],
        "usage": None,
        "error": None,
        "incomplete_details": None,
        "completed_at": None,
    }
    if "moderation" in response:
        started["moderation"] = None
    writer = ResponseWriter(copy.deepcopy(response) | started)
    yield from writer.begin()
    for part in parts:
        yield from writer.write(part)
    if response["status"] in ("completed", "incomplete"):
        reason = "length" if response["status"] == "incomplete" else "stop"
        *events, last = writer.end(reason, response["usage"])
        yield from events
        yield last | {"response": response}
    elif response["status"] == "failed":
        yield writer.fail(response["error"]["message"])
    elif response["status"] == "cancelled":
        yield writer.cancel()
