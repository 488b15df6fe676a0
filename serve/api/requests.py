"""Request bodies of the generation routes, as pydantic models.

The models follow OpenAI's specification and its bounds. Types are strict ("1" is not 1), and
``null`` counts as absent. Clients send many fields that do not apply to a local server
(``verbosity``, ``prompt_cache_key``): `unused_fields.py` says what becomes of them. Some
settings are extensions with the names of vLLM, transformers and llama.cpp: ``top_k``, ``min_p``,
``typical_p``, ``repetition_penalty``, ``min_tokens``, ``stop_token_ids``, ...

Unions are discriminated by the type of the value (`tag`), so that an error reports one branch
instead of the failures of every branch.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json
from starlette.requests import Request

from serve.api.errors import APIError, from_validation, json_type_name
from serve.api.request_context import context_of
from serve.api.state import state_of
from serve.api.unused_fields import (
    MAX_PATHS,
    UNUSED,
    Unused,
    check_names,
    refuse_unused,
    unused_fields,
)
from serve.models.generation_config import BOUNDS

# --- reading a body ---------------------------------------------------------------------------


class Body(BaseModel):
    """Base class of JSON objects in requests."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


AnyBody = TypeVar("AnyBody", bound=Body)


async def read_json(request: Request, model: type[AnyBody]) -> AnyBody:
    """Parse the JSON body of a request into ``model``.

    Raises:
        APIError: 415 for another content type (a web page can post forms and plain text to any
            server without CORS preflight, but not JSON); 400 for invalid JSON, or a body that does
            not match ``model``.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise APIError(
            415,
            f"Invalid Content-Type header ({content_type[:80]}), expected application/json. "
            "(HINT: If you're using curl, you can pass -H 'Content-Type: application/json')",
            code="unsupported_content_type",
        )
    try:
        # Refuses NaN, invalid UTF-8, numbers of thousands of digits and nesting deeper than 200.
        data = from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise APIError(
            400,
            "We could not parse the JSON body of your request. (HINT: This likely means you aren't "
            "using your HTTP library correctly. This API expects a JSON payload, but what was sent "
            f"was not valid JSON: {error}.)",
        ) from None
    if isinstance(data, dict) and "engine" in request.path_params:
        data["model"] = request.path_params["engine"]  # /v1/engines/ID/..., the older path
    return validate(request, model, data)


def validate(
    request: Request, model: type[AnyBody], data: Any, *, is_form: bool = False
) -> AnyBody:
    """Check the fields of a request, and report those without effect in a response header.

    Args:
        request: The request.
        model: The class of the body.
        data: The JSON value or the fields of the form.
        is_form: Whether numbers and booleans are text, as in a form.

    Raises:
        APIError: 400 if ``data`` does not match ``model``, or as in `unused_fields`.
    """
    check_names(data, model)
    try:
        body = model.model_validate(data, strict=not is_form)
    except ValidationError as error:
        raise from_validation(error) from None
    report_unused(request, islice(unused_fields(data, body), MAX_PATHS + 1))
    return body


def report_unused(request: Request, fields: Iterable[Unused]) -> None:
    """Name fields without effect in the response header; with ``--strict``, refuse the request.

    Raises:
        APIError: 400 for the first of the fields.
    """
    found = list(fields)
    if state_of(request).is_strict:
        refuse_unused(found)
    context_of(request.scope).unused_fields += found


# --- types of fields --------------------------------------------------------------------------


def tag(value: object) -> str:
    """Return the tag of the union branch that a value belongs to, such as "an array of integers".

    An array's tag is chosen by the type of its first element.
    """
    if isinstance(value, list) and value:
        return f"an array of {json_type_name(value[0]).split(' ', 1)[-1]}s"
    return "an array of strings" if value == [] else json_type_name(value)


# fail_fast: validation of an array stops at its first invalid element.
Strings = Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
SomeTokenIds = Annotated[list[int], Field(max_length=2**18, fail_fast=True)]
CompletionPrompt = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[Strings, Tag("an array of strings")]
    | Annotated[TokenIds, Tag("an array of integers")]
    | Annotated[list[TokenIds], Field(max_length=2048, fail_fast=True), Tag("an array of arrays")],
    Discriminator(tag),
]
StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    Annotated[StopString, Tag("a string")]
    | Annotated[list[StopString], Field(max_length=4), Tag("an array of strings")],
    Discriminator(tag),
]
Bias = Annotated[float, Field(ge=-100, le=100)]


def within(name: str) -> Any:
    """Return a pydantic field with the bounds of the sampling setting `name`."""
    low, high = BOUNDS[name]
    return Field(ge=low, le=high)


class StreamOptions(Body):
    """Options of a streamed response: whether its last event has the token counts."""

    include_usage: bool = False
    include_obfuscation: Annotated[bool, UNUSED] = False


class JSONSchemaFormat(Body):
    """A named JSON schema of `response_format`.

    `strict` changes nothing: every schema limits the output.
    """

    name: str = ""
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The requested format of the output: text, a JSON object, or JSON with a schema.

    `schema` beside the type json_object is the spelling of llama.cpp's servers.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None
    object_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class StructuredOutputs(Body):
    """The fields of vLLM's `structured_outputs`; at most one of them limits the output."""

    json_schema: Annotated[Any, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: Any = None


class GenerationBody(Body):
    """The fields that completions, chat and edits share.

    An absent sampling setting takes the model's default; see `serve/models/generation_config.py`.
    """

    model: str
    temperature: Annotated[float, within("temperature")] | None = None
    top_p: Annotated[float, within("top_p")] | None = None
    top_k: Annotated[int, within("top_k")] | None = None
    min_p: Annotated[float, within("min_p")] | None = None
    presence_penalty: Annotated[float, within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, within("frequency_penalty")] | None = None
    typical_p: Annotated[float, within("typical_p")] | None = None
    repetition_penalty: Annotated[float, within("repetition_penalty")] | None = None
    repeat_penalty: Annotated[
        float | None,
        within("repetition_penalty"),
        Field(description="The name of `repetition_penalty` in llama.cpp."),
    ] = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=300)] = {}
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Annotated[str | None, UNUSED] = None
    # When a text ends, and which tokens it can have; see `token_limits.py`.
    ignore_eos: Annotated[bool, Field(description="Never generate the tokens that end a text.")] = (
        False
    )
    min_tokens: Annotated[
        int,
        Field(ge=0, description="Number of tokens before the text can end, also at a stop string."),
    ] = 0
    stop_token_ids: Annotated[
        SomeTokenIds, Field(description="More tokens that end the text.")
    ] = []
    allowed_token_ids: Annotated[
        SomeTokenIds, Field(description="Generate only these tokens.")
    ] = []
    # The format of the output; see `structured_output.py`.
    response_format: ResponseFormat = ResponseFormat(type="text")
    structured_outputs: StructuredOutputs = StructuredOutputs()
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: Any = None

    @property
    def guided(self) -> StructuredOutputs:
        """The `guided_*` fields, the older names of `structured_outputs`."""
        return StructuredOutputs.model_construct(
            json_schema=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings that are present, by name."""
        values = {name: getattr(self, name) for name in BOUNDS}
        if values["repetition_penalty"] is None:
            values["repetition_penalty"] = self.repeat_penalty
        return {name: value for name, value in values.items() if value is not None}

    @property
    def stop_strings(self) -> Sequence[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


PromptLogprobs = Annotated[
    int | None,
    Field(ge=0, le=20, description="Logprobs of the prompt's tokens, in vLLM's form."),
]


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: CompletionPrompt = ""  # empty: generate a document from its start
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str = ""
    best_of: Annotated[int, Field(ge=0, le=20)] = 0  # 0: the same as n
    prompt_logprobs: PromptLogprobs = None


class ContentPart(Body):
    """A part of the content of a message. Only text and refusals are supported."""

    type: Literal["text", "refusal", "image_url", "input_audio", "file"]
    text: str | None = None
    refusal: str | None = None


Content = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[list[ContentPart], Field(min_length=1, fail_fast=True), Tag("an array of objects")],
    Discriminator(tag),
]


class CalledFunction(Body):
    """The name of a called function and its arguments: JSON text, or an object from some agents."""

    name: str
    arguments: Annotated[
        Annotated[str, Tag("a string")] | Annotated[dict[str, Any], Tag("an object")],
        Discriminator(tag),
    ] = "{}"


class MessageToolCall(Body):
    """A call of a tool in a message of the assistant."""

    id: str = ""
    type: str = "function"
    function: CalledFunction | None = None


class Message(Body):
    """A message of a conversation: its role, its content, and calls of tools or their results."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] = []
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = None


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(Body):
    """A function that the model may call: its name, description, and parameters (JSON schema)."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionName(Body):
    """The name of a function."""

    name: str


class Tool(Body):
    """A tool. Only functions are supported."""

    type: str
    function: FunctionDefinition | None = None


class ToolName(Body):
    """A reference to a tool."""

    type: str
    function: FunctionName | None = None


class AllowedTools(Body):
    """The tools that can be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolName], Field(min_length=1, max_length=128, fail_fast=True)]


class ToolChoice(ToolName):
    """The tool that must be called, or several that can be."""

    allowed_tools: AllowedTools | None = None


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class PromptCacheOptions(Body):
    """How OpenAI caches the prompt. This server always caches the blocks of a prompt."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: str | None = None


class Prediction(Body):
    """A prediction of the answer, which speeds up OpenAI's models."""

    type: Literal["content"]
    content: Content


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ModerationMode(Body):
    """What happens to a text that is flagged: only its scores are reported."""

    mode: Literal["score"]


class ModerationPolicy(Body):
    """What happens to flagged messages and answers."""

    input: ModerationMode | None = None
    output: ModerationMode | None = None


class ModerationSettings(Body):
    """The moderation of a chat's messages and answers."""

    model: str
    policy: ModerationPolicy | None = None


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: PromptLogprobs = None
    add_generation_prompt: Annotated[
        bool | None, Field(description="Whether the start of an answer follows the messages.")
    ] = None
    continue_final_message: Annotated[
        bool, Field(description="Continue the last message instead of writing the next one.")
    ] = False
    chat_template_kwargs: Annotated[
        dict[str, Any], Field(max_length=64, description="Variables of the chat template.")
    ] = {}
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] = []
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("a string")]
            | Annotated[ToolChoice, Tag("an object")],
            Discriminator(tag),
        ]
        | None
    ) = None
    parallel_tool_calls: bool = True
    functions: Annotated[list[FunctionDefinition], Field(max_length=128, fail_fast=True)] = []
    function_call: (
        Annotated[
            Annotated[Literal["none", "auto"], Tag("a string")]
            | Annotated[FunctionName, Tag("an object")],
            Discriminator(tag),
        ]
        | None
    ) = None
    metadata: Metadata | None = None
    moderation: ModerationSettings | None = None
    store: bool = False
    safety_identifier: Annotated[str | None, Field(max_length=64), UNUSED] = None
    prompt_cache_key: Annotated[str | None, UNUSED] = None
    prompt_cache_retention: Annotated[Literal["in_memory", "in-memory", "24h"] | None, UNUSED] = (
        None
    )
    prompt_cache_options: Annotated[PromptCacheOptions | None, UNUSED] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"], UNUSED
    ] = "auto"
    verbosity: Annotated[Literal["low", "medium", "high"] | None, UNUSED] = None
    reasoning_effort: Annotated[
        ReasoningEffort | None,
        Field(description="A variable of the chat template; models without it ignore the field."),
    ] = None
    prediction: Annotated[Prediction | None, UNUSED] = None
