"""Tools of a chat request: from its fields to the prompt and the grammar of the answer.

The fields are those of OpenAI's API: `tools` and `tool_choice`, and `functions` and `function_call`
of 2023, which allow one call in an answer. `serve/models/tool_calls.py` has the notations.

Tools are part of the prompt in the format of the model's chat template. A template without tools,
or with a notation that is not known, gets them in the system message (`prompt_messages`), and the
model is asked to write calls as Hermes models do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from bpe import ChatTemplate
from serve.api.errors import APIError, missing_parameter, unsupported
from serve.api.requests import ChatBody, FunctionDefinition, FunctionName, Message, ToolChoice
from serve.api.structured_output import (
    checked_schema,
    compile_grammar,
    grammar_error,
    output_source,
)
from serve.models.decoder import DecoderModel
from serve.models.grammar import CompiledGrammar, GrammarSource
from serve.models.harmony import harmony_grammar
from serve.models.tool_calls import HARMONY, HERMES, MISTRAL, MISTRAL11, Notation, tool_grammar
from transformer.engine import GrammarError

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS = {"type": "object"}

_PROMPT = """\
You can call functions. Their names, descriptions and parameters (as JSON schemas) are:

{functions}

To call a function, answer only with its name and arguments as JSON in this form:
<tool_call>
{{"name": "name of the function", "arguments": {{"name of a parameter": "value"}}}}
</tool_call>
The results follow in <tool_response> tags."""


@dataclass(frozen=True)
class ToolSettings:
    """The tools of a request, and which of them the answer may or must call.

    Attributes:
        param: the field of the request that defines the tools, for messages.
        functions: all functions, in order.
        allowed: the functions that can be called: `functions` or some of them.
        is_required: whether the answer must be a call.
        max_calls: 1 for one call, None for any number.
        has_answer_format: whether an answer that is no call has a format.
    """

    param: Literal["tools", "functions"]
    functions: tuple[FunctionDefinition, ...]
    allowed: tuple[FunctionDefinition, ...]
    is_required: bool
    max_calls: int | None
    has_answer_format: bool

    @property
    def is_legacy(self) -> bool:
        """Whether the request has `functions`, so that the answer has `function_call`."""
        return self.param == "functions"

    @property
    def allowed_names(self) -> list[str]:
        """Return the names of the functions that can be called."""
        return [function.name for function in self.allowed]

    def path(self, index: int) -> str:
        """Return the path of a function in the request, for messages."""
        return f"functions[{index}]" if self.is_legacy else f"tools[{index}].function"


def read_tools(body: ChatBody) -> ToolSettings | None:
    """Return the tools of a request; None if it has none, or its `tool_choice` is "none".

    Raises:
        APIError: 400 for tools that are not functions, names that are not unique, and choices that
            do not fit the tools.
    """
    if body.tools and body.functions:
        raise _invalid("functions", "Only one of 'tools' and 'functions' can be set.")
    param = "functions" if body.functions else "tools"
    functions = body.functions or [_function(body, index) for index in range(len(body.tools))]
    names = [function.name for function in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            path = f"functions[{index}]" if body.functions else f"tools[{index}].function"
            raise _invalid(f"{path}.name", f"Invalid '{path}.name': {name!r} is not unique.")
    choice_param = "function_call" if body.function_call is not None else "tool_choice"
    if body.function_call is not None and body.tools:
        raise _invalid("function_call", "Use 'tool_choice' with 'tools'.")
    if body.tool_choice is not None and body.functions:
        raise _invalid("tool_choice", "Use 'function_call' with 'functions'.")
    choice = body.tool_choice if body.function_call is None else body.function_call
    if not functions:
        if choice not in (None, "none", "auto"):
            raise _invalid(choice_param, f"'{choice_param}' is only allowed with '{param}'.")
        return None
    mode, allowed, max_calls = _resolve_choice(choice, names)
    if mode == "none":
        return None
    if body.functions or body.parallel_tool_calls is False:
        max_calls = 1
    return ToolSettings(
        param,
        tuple(functions),
        tuple(function for function in functions if function.name in allowed),
        is_required=mode == "required",
        max_calls=max_calls,
        has_answer_format=output_source(body) is not None,
    )


def _function(body: ChatBody, index: int) -> FunctionDefinition:
    tool, path = body.tools[index], f"tools[{index}]"
    if tool.type != "function":
        raise unsupported(f"{path}.type", tool.type, "Only 'function' is supported.")
    if tool.function is None:
        raise missing_parameter(f"{path}.function")
    return tool.function


def _resolve_choice(
    choice: str | ToolChoice | FunctionName | None, names: Sequence[str]
) -> tuple[str, Sequence[str], int | None]:
    """Return "none", "auto" or "required"; the names that can be called; and their number."""
    if choice is None or isinstance(choice, str):
        return choice or "auto", names, None
    if isinstance(choice, FunctionName):
        return "required", [_known(choice.name, names, "function_call.name")], 1
    match choice.type:
        case "function":
            if choice.function is None:
                raise missing_parameter("tool_choice.function")
            return "required", [_known(choice.function.name, names, "tool_choice.function.name")], 1
        case "allowed_tools":
            if choice.allowed_tools is None:
                raise missing_parameter("tool_choice.allowed_tools")
            allowed = []
            for index, tool in enumerate(choice.allowed_tools.tools):
                path = f"tool_choice.allowed_tools.tools[{index}]"
                if tool.type != "function":
                    raise unsupported(f"{path}.type", tool.type, "Only 'function' is supported.")
                if tool.function is None:
                    raise missing_parameter(f"{path}.function")
                allowed.append(_known(tool.function.name, names, f"{path}.function.name"))
            return choice.allowed_tools.mode, allowed, None
    raise unsupported(
        "tool_choice.type", choice.type, "Supported values are: 'function' and 'allowed_tools'."
    )


def _known(name: str, names: Sequence[str], path: str) -> str:
    if name not in names:
        raise _invalid(path, f"Invalid '{path}': {name!r:.80} is not the name of a tool.")
    return name


def _invalid(param: str, message: str) -> APIError:
    return APIError(400, message, param=param, code="invalid_value")


# --- the grammar of the answer ----------------------------------------------------------------


def compile_tools(
    settings: ToolSettings, body: ChatBody, model: DecoderModel
) -> tuple[str, CompiledGrammar]:
    """Return the field of a request that defines its tools, and the grammar of its answer.

    In `auto` mode, a tool that is not `strict` may have a schema that is not supported: its
    arguments are limited to JSON objects. So are those of all such tools if the schemas are
    supported, but too large together.

    Raises:
        APIError: 400 for a schema that has an error, is not supported, or is too large.
    """
    answer = output_source(body)
    answer_schema = None
    if answer is not None:
        answer_param, source = answer
        if source.format != "json_schema":
            raise _invalid(
                answer_param,
                f"'{answer_param}' cannot be used with '{settings.param}': use 'response_format'.",
            )
        compile_grammar(answer_param, source, model)  # an error names this field
        answer_schema = json.loads(source.text)

    def compile(schemas: Mapping[str, Mapping[str, Any]]) -> CompiledGrammar:
        if model.has_channels:
            grammar = harmony_grammar(
                schemas,
                model.tokenizer.encoding,
                is_required=settings.is_required,
                answer_schema=answer_schema,
                is_continued=body.continue_final_message,
            )
        else:
            grammar = tool_grammar(
                model.tool_notation or HERMES,
                schemas,
                model.tokenizer.encoding,
                is_required=settings.is_required,
                max_calls=settings.max_calls,
                answer_schema=answer_schema,
            )
        return compile_grammar(settings.param, grammar, model)

    def argument_schemas(*, is_checked: bool) -> dict[str, Mapping[str, Any]]:
        return {
            function.name: _argument_schema(settings, function, model, is_checked=is_checked)
            for function in settings.allowed
        }

    try:
        return settings.param, compile(argument_schemas(is_checked=False))
    except APIError:  # find the tool that cannot be used
        schemas = argument_schemas(is_checked=True)
    try:
        return settings.param, compile(schemas)
    except APIError:  # the schemas are too large together
        if settings.is_required:
            raise
    for function in settings.allowed:
        if function.parameters is not None and not function.strict:
            schemas[function.name] = ANY_ARGUMENTS
    return settings.param, compile(schemas)


def _argument_schema(
    settings: ToolSettings, function: FunctionDefinition, model: DecoderModel, *, is_checked: bool
) -> Mapping[str, Any]:
    """Return the JSON schema of the arguments of a function; see `compile_tools`.

    Args:
        settings: the tools.
        function: one of them.
        model: the model.
        is_checked: whether to compile the schema.
    """
    if function.parameters is None:
        return NO_ARGUMENTS
    param = f"{settings.path(settings.functions.index(function))}.parameters"
    if function.parameters.get("type", "object") != "object":
        raise _invalid(param, f"Invalid '{param}': the schema must have the type 'object'.")
    try:
        schema = checked_schema(param, function.parameters)
        if not schema.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
            schema = {"type": "object"} | schema
        if is_checked:
            # Not kept: the grammar of all tools is the one that is compiled again.
            model.grammar_compiler.compile(GrammarSource.from_schema(schema), is_kept=False)
    except GrammarError as error:
        if settings.is_required or function.strict:
            raise grammar_error(param, str(error)) from None
        return ANY_ARGUMENTS
    except APIError:
        if settings.is_required or function.strict:
            raise
        return ANY_ARGUMENTS
    return schema


# --- messages ---------------------------------------------------------------------------------


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages for the chat template, with the keys that templates of transformers read.

    The arguments of a call are an object, as templates expect it, unless they are not valid JSON.
    A message of the role "function" gets the role "tool", and a `function_call` becomes a call.

    Raises:
        APIError: 400 for content that is not text, and for results of a call id that no call has.
    """
    names: dict[str, str] = {}  # of the called functions, by the id of the call
    last_ids: dict[str, str] = {}  # the id of the last call, by the name of the function
    result: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        calls = _template_calls(message, path, index)
        for call in calls:
            names[call["id"]] = call["function"]["name"]
            last_ids[call["function"]["name"]] = call["id"]
        is_optional = message.role in ("assistant", "function")
        rendered = {"role": message.role, "content": _text_content(message, path, is_optional)}
        if message.name is not None:
            rendered["name"] = message.name
        if message.role == "assistant" and message.reasoning_content:
            rendered["reasoning_content"] = message.reasoning_content
        if message.role == "tool":
            if (id := message.tool_call_id) is None:
                raise missing_parameter(f"{path}.tool_call_id")
            if id not in names:
                raise _invalid(
                    f"{path}.tool_call_id",
                    f"Invalid '{path}.tool_call_id': no message before it has a call {id!r:.80}, "
                    "to which this message would be the result.",
                )
            rendered |= {"tool_call_id": id, "name": names[id]}
        elif message.role == "function":
            if message.name is None:
                raise missing_parameter(f"{path}.name")
            rendered |= {
                "role": "tool",
                "tool_call_id": last_ids.get(message.name, f"call_{index}"),
                "name": message.name,
            }
        result.append(rendered | ({"tool_calls": calls} if calls else {}))
    return result


def _template_calls(message: Message, path: str, index: int) -> list[dict[str, Any]]:
    """Return the calls of an assistant message."""
    if message.role != "assistant":
        return []
    calls = []
    for number, call in enumerate(message.tool_calls):
        if call.function is None:
            raise unsupported(
                f"{path}.tool_calls[{number}].type", call.type, "Only 'function' is supported."
            )
        calls.append((call.id, call.function))
    if message.function_call is not None:
        calls.append((f"call_{index}", message.function_call))
    return [
        {
            "id": id,
            "type": "function",
            "function": {"name": function.name, "arguments": _parsed(function.arguments)},
        }
        for id, function in calls
    ]


def _parsed(arguments: str | dict[str, Any]) -> Any:
    if isinstance(arguments, dict):
        return arguments
    try:
        return from_json(arguments or "{}")
    except ValueError:  # a call that was cut
        return arguments


def _text_content(message: Message, path: str, is_optional: bool) -> str:
    """Return the content of a message as one string."""
    content = message.content
    if content is None and is_optional:
        return message.refusal or ""
    if content is None:
        raise APIError(
            400,
            "Invalid value for 'content': expected a string, got null.",
            param=f"{path}.content",
            code="invalid_value",
        )
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for number, part in enumerate(content):
        part_path = f"{path}.content[{number}]"
        if part.type not in ("text", "refusal"):
            raise unsupported(
                f"{part_path}.type", part.type, "Supported values are: 'text' and 'refusal'."
            )
        text: str | None = getattr(part, part.type)
        if text is None:
            raise missing_parameter(f"{part_path}.{part.type}")
        texts.append(text)
    return "".join(texts)


# --- the prompt -------------------------------------------------------------------------------


def prompt_with_tools(
    template: ChatTemplate,
    notation: Notation | None,
    messages: list[dict[str, Any]],
    functions: Sequence[FunctionDefinition],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return the messages and tools to render with a chat template.

    Args:
        template: the chat template.
        notation: its notation for tools; None if the tools are described in the system message.
        messages: the result of `template_messages`.
        functions: the functions that the prompt describes; empty for none.
    """
    definitions = [
        {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or NO_ARGUMENTS,
        }
        for function in functions
    ]
    if notation is None:
        messages = _without_tool_roles(messages)
        if definitions:
            text = _PROMPT.format(functions="\n".join(map(json.dumps, definitions)))
            messages = _with_instruction(template, messages, text)
        return messages, None
    if notation in (MISTRAL, MISTRAL11):
        messages = [_with_short_ids(message) for message in messages]
    if notation is HARMONY:
        messages = _with_single_calls(messages)
    tools = [{"type": "function", "function": definition} for definition in definitions]
    return messages, tools or None


def _without_tool_roles(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages of which calls and results are text, for a template without tools."""
    result: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if was_result:  # many templates want the roles to alternate
                content = f"{result.pop()['content']}\n{content}"
            role = "user"
        for call in message.get("tool_calls", ()):
            text = json.dumps(call["function"], ensure_ascii=False)
            content += f"{content and chr(10)}<tool_call>\n{text}\n</tool_call>"
        result.append({"role": role, "content": content})
        was_result = message["role"] == "tool"
    return result


def _with_instruction(
    template: ChatTemplate, messages: list[dict[str, Any]], text: str
) -> list[dict[str, Any]]:
    """Add a text to the system message, or to the first message if there can be none."""
    system = {"role": "system", "content": text}
    first, *rest = messages
    if first["role"] in ("system", "developer"):
        return [first | {"content": f"{first['content']}\n\n{text}"}, *rest]
    try:
        template.render([system, {"role": "user", "content": "?"}])
    except ValueError:  # such as Gemma's: "System role not supported"
        return [first | {"content": f"{text}\n\n{first['content']}"}, *rest]
    return [system, *messages]


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose ids of calls have nine characters, which Mistral's templates want."""
    message = dict(message)
    if "tool_call_id" in message:
        message["tool_call_id"] = _short_id(message["tool_call_id"])
    if "tool_calls" in message:
        message["tool_calls"] = [
            call | {"id": _short_id(call["id"])} for call in message["tool_calls"]
        ]
    return message


def _with_single_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for the template of gpt-oss, which renders one call of a message.

    It writes the name of the last call before a result, so each call is followed by its results. It
    refuses content beside the reasoning of a call, and renders either as reasoning.

    Raises:
        ValueError: the template would write a result as that of another call.
    """
    result: list[dict[str, Any]] = []
    placed: set[int] = set()  # indexes of results that follow their call
    last_name: str | None = None  # of the last call
    for index, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if not calls and index not in placed:
            if message["role"] == "tool" and message["name"] != last_name:
                raise ValueError(
                    f"the result of {message['name']!r:.80} does not follow its call, as the "
                    "template of this model requires"
                )
            result.append(message)
        indexes: dict[str | None, list[int]] = {}  # of the results, by the id of the call
        for at in range(index + 1, len(messages)) if calls else ():
            if messages[at]["role"] == "assistant":
                break
            indexes.setdefault(messages[at].get("tool_call_id"), []).append(at)
        for number, call in enumerate(calls):
            texts = [message.get("reasoning_content"), message["content"]] if number == 0 else []
            text = "\n".join(filter(None, texts))
            result.append({"role": "assistant", "content": text, "tool_calls": [call]})
            last_name = call["function"]["name"]
            for at in indexes.pop(call["id"], ()):
                placed.add(at)
                result.append(messages[at])
    return result


def _short_id(id: str) -> str:
    return re.sub("[^A-Za-z0-9]", "", id)[-9:].rjust(9, "0")
