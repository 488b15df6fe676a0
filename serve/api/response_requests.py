"""The body of a request to /v1/responses, and the chat request that it stands for.

Items become messages, flat tools nested ones, and `text.format` a `response_format`. Errors of the
chat request are renamed to the fields that the client sent.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from serve.api.errors import APIError, missing_parameter, unsupported
from serve.api.requests import (
    AllowedTools,
    Body,
    ChatBody,
    FunctionDefinition,
    FunctionName,
    GenerationBody,
    JSONSchemaFormat,
    Message,
    Metadata,
    ModerationSettings,
    Name,
    ReasoningEffort,
    ResponseFormat,
    Tool,
    ToolChoice,
    ToolName,
    tag,
)
from serve.api.response_items import Items, qualified_name
from serve.api.unused_fields import UNUSED

LOGPROBS = "message.output_text.logprobs"
_TEXT = ResponseFormat(type="text")


class TextFormat(Body):
    """The format of the output text; the schema is beside the type, unlike in a chat request."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Body):
    """The format of the output text."""

    format: TextFormat = TextFormat()
    verbosity: Annotated[Literal["low", "medium", "high"] | None, UNUSED] = None


class FlatFunction(Body):
    """A function that the model may call."""

    type: str
    name: Name | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatTool(FlatFunction):
    """A function, or a namespace of functions. Other tools are not supported."""

    tools: Annotated[list[FlatFunction], Field(max_length=128, fail_fast=True)] = []
    external_web_access: bool = True  # of web_search


class FlatToolName(Body):
    """A reference to a tool."""

    type: str
    name: str | None = None


class FlatToolChoice(Body):
    """The tool that must be called, or several that can be."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[FlatToolName], Field(max_length=128)] = []


class ReasoningSettings(Body):
    """Settings of models that reason."""

    effort: ReasoningEffort | None = None
    summary: Annotated[str | None, UNUSED] = None
    generate_summary: Annotated[str | None, UNUSED] = None


class ConversationName(Body):
    """The id of a conversation."""

    id: str


class ResponseStreamOptions(Body):
    """Options of a streamed response."""

    include_obfuscation: Annotated[bool, UNUSED] = False


Input = Annotated[
    Annotated[str, Tag("a string")] | Annotated[Items, Tag("an array of objects")],
    Discriminator(lambda value: "a string" if isinstance(value, str) else "an array of objects"),
]


class InputTokensBody(Body):
    """Body of POST /v1/responses/input_tokens, and what it shares with POST /v1/responses."""

    model: str
    input: Input = []
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: (
        Annotated[
            Annotated[str, Tag("a string")] | Annotated[ConversationName, Tag("an object")],
            Discriminator(tag),
        ]
        | None
    ) = None
    tools: Annotated[list[FlatTool], Field(max_length=128, fail_fast=True)] = []
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("a string")]
            | Annotated[FlatToolChoice, Tag("an object")],
            Discriminator(tag),
        ]
        | None
    ) = None
    parallel_tool_calls: bool = True
    truncation: Literal["auto", "disabled"] = "disabled"
    text: TextSettings = TextSettings()
    reasoning: ReasoningSettings = ReasoningSettings()


class ResponseBody(InputTokensBody, GenerationBody):
    """Body of POST /v1/responses."""

    n: Annotated[int, Field(ge=1, le=1)] = 1
    stream_options: ResponseStreamOptions = ResponseStreamOptions()  # pyright: ignore[reportIncompatibleVariableOverride]
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None  # of OpenAI's own tools
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    include: list[str] = []
    store: bool = True
    background: bool = False
    moderation: ModerationSettings | None = None
    metadata: Metadata = {}
    safety_identifier: Annotated[str | None, Field(max_length=64), UNUSED] = None
    prompt_cache_key: Annotated[str | None, UNUSED] = None
    prompt_cache_retention: Annotated[str | None, UNUSED] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, UNUSED] = None
    service_tier: Annotated[str | None, UNUSED] = None
    client_metadata: Annotated[dict[str, Any] | None, UNUSED] = None
    context_management: Annotated[list[Any] | None, UNUSED] = None


# --- the chat request ---------------------------------------------------------------------------


def to_chat_body(body: InputTokensBody, messages: list[Message]) -> ChatBody:
    """Return the chat request that a request for a response stands for.

    Raises:
        APIError: 400 for a tool that is not a function.
    """
    fields = {
        name: getattr(body, name) for name in GenerationBody.model_fields if hasattr(body, name)
    }
    fields.pop("stream_options", None)
    text = body.text.format
    if text.type != "text" and fields.get("response_format", _TEXT) != _TEXT:
        raise APIError(
            400,
            "Only one of 'text.format' and 'response_format' can be set, because both limit the "
            "output.",
            param="text.format",
            code="invalid_value",
        )
    if text.type == "json_schema" and text.json_schema is None:
        raise missing_parameter("text.format.schema")
    if text.type == "json_schema":
        schema = JSONSchemaFormat(name=text.name, schema=text.json_schema)  # pyright: ignore[reportCallIssue]
        fields["response_format"] = ResponseFormat(type="json_schema", json_schema=schema)
    elif text.type == "json_object":
        fields["response_format"] = ResponseFormat(type="json_object")
    if isinstance(body, ResponseBody):
        has_logprobs = LOGPROBS in body.include or body.top_logprobs > 0
        fields |= {
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": has_logprobs,
            "top_logprobs": body.top_logprobs if has_logprobs else None,
        }
    return ChatBody.model_construct(
        **fields,
        messages=messages,
        tools=list(_functions(body.tools, "tools")),
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort,
    )


def namespaces(tools: Sequence[FlatTool]) -> dict[str, tuple[str, str]]:
    """Return the namespace and the name of each function in a namespace, by its qualified name."""
    return {
        qualified_name(tool.name, function.name or ""): (tool.name or "", function.name or "")
        for tool in tools
        if tool.type == "namespace"
        for function in tool.tools
    }


def needs_no_tool(tool: FlatFunction) -> bool:
    """Return whether a tool asks for nothing, such as Codex's web search without web access."""
    return isinstance(tool, FlatTool) and tool.type == "web_search" and not tool.external_web_access


def _functions(
    tools: Sequence[FlatFunction], path: str, namespace: str | None = None
) -> Iterator[Tool]:
    """Yield the functions of a list of tools and of its namespaces."""
    for index, tool in enumerate(tools):
        if needs_no_tool(tool):
            continue
        functions: Sequence[FlatFunction] | None = None
        if isinstance(tool, FlatTool) and tool.type == "namespace":
            functions = tool.tools
        if tool.type != "function" and functions is None:
            raise unsupported(
                f"{path}[{index}].type",
                tool.type,
                "This server runs no tools itself. Supported values are: 'function' and "
                "'namespace'.",
            )
        if tool.name is None:
            raise missing_parameter(f"{path}[{index}].name")
        if functions is not None:
            yield from _functions(functions, f"{path}[{index}].tools", tool.name)
            continue
        function = FunctionDefinition.model_construct(
            name=qualified_name(namespace, tool.name),
            description=tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        )
        yield Tool(type="function", function=function)


def _tool_choice(choice: str | FlatToolChoice | None) -> Any:
    if not isinstance(choice, FlatToolChoice):
        return choice
    function = None if choice.name is None else FunctionName(name=choice.name)
    allowed = None
    if choice.type == "allowed_tools":
        names = [
            ToolName(type=tool.type, function=FunctionName(name=tool.name or ""))
            for tool in choice.tools
        ]
        allowed = AllowedTools(mode=choice.mode, tools=names)
    return ToolChoice(type=choice.type, function=function, allowed_tools=allowed)


_PARAMS = (  # path in a chat request, path in a request for a response
    ("tool_choice.function", "tool_choice"),
    ("tool_choice.allowed_tools", "tool_choice"),
    ("messages", "input"),
    ("reasoning_effort", "reasoning.effort"),
)
_FORMAT_PARAMS = (("response_format.json_schema", "text.format"),)  # if `text.format` is set


@contextlib.contextmanager
def response_params(body: InputTokensBody) -> Iterator[None]:
    """Let errors of the chat request name the fields of the request for a response."""
    has_format = body.text.format.type != "text"
    try:
        yield
    except APIError as error:
        param = error.param or ""
        for chat_path, path in (*_PARAMS, *(_FORMAT_PARAMS if has_format else ())):
            if param.startswith(chat_path):
                param = path + param.removeprefix(chat_path)
                break
        param = re.sub(r"^(tools\[\d+\])\.function", r"\1", param)
        if error.param and param != error.param:
            error.message = error.message.replace(f"'{error.param}'", f"'{param}'")
            error.param = param
        raise
