"""What a request may say: the bodies of the generation routes, as pydantic models.

After OpenAI's specification, with its bounds. Types are strict ("1" is not 1), ``null`` means "not
given", and fields we do not know are ignored: clients send many that a local server has no use for
(``store``, ``reasoning_effort``, ``prompt_cache_key``), and a 400 would only keep them out. Three
samplers OpenAI lacks are understood as extensions: ``top_k``, ``min_p``, ``repetition_penalty``.

Unions are told apart by looking at the value first (`tag`), so that an error speaks of the one
branch that was meant instead of failing every branch in turn.
"""

from collections.abc import Sequence
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
from serve.models.generation_config import BOUNDS

# --- reading a body ---------------------------------------------------------------------------


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


AnyBody = TypeVar("AnyBody", bound=Body)


async def read_json(request: Request, model: type[AnyBody]) -> AnyBody:
    """Reads a request's body as ``model``.

    Raises:
        APIError: 415 for another content type (a web page can post a form or plain text to any
            server without asking, but not JSON), 400 for what is not JSON or not as ``model`` says.
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
        # Refuses NaN, bad UTF-8, numbers of thousands of digits and nesting deeper than 200.
        data = from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise APIError(
            400,
            "We could not parse the JSON body of your request. (HINT: This likely means you aren't "
            "using your HTTP library correctly. This API expects a JSON payload, but what was sent "
            f"was not valid JSON: {error}.)",
        ) from None
    if isinstance(data, dict) and "engine" in request.path_params:
        data["model"] = request.path_params["engine"]  # /v1/engines/ID/..., the older spelling
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from None


# --- pieces of the bodies ---------------------------------------------------------------------


def tag(value: object) -> str:
    """ "a string", "an array of integers", ...: an array is judged by its first element."""
    if isinstance(value, list) and value:
        return f"an array of {json_type_name(value[0]).split(' ', 1)[-1]}s"
    return "an array of strings" if value == [] else json_type_name(value)


# fail_fast: a million bad elements are one error, not a million.
Strings = Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
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
    """The bounds of a sampling setting."""
    low, high = BOUNDS[name]
    return Field(ge=low, le=high)


class StreamOptions(Body):
    include_usage: bool = False


class GenerationBody(Body):
    """What completions and chat have in common.

    A sampling setting that is left out is the model's own default; see `serve/models/generation_config.py`.
    """

    model: str
    temperature: Annotated[float, within("temperature")] | None = None
    top_p: Annotated[float, within("top_p")] | None = None
    top_k: Annotated[int, within("top_k")] | None = None
    min_p: Annotated[float, within("min_p")] | None = None
    presence_penalty: Annotated[float, within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, within("frequency_penalty")] | None = None
    repetition_penalty: Annotated[float, within("repetition_penalty")] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=300)] = {}
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings that are given."""
        values = {name: getattr(self, name) for name in BOUNDS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def stop_strings(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: CompletionPrompt = ""  # the start of a document
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str = ""
    best_of: Annotated[int, Field(ge=0, le=20)] = 0  # 0: as many as n


class ContentPart(Body):
    type: Literal["text", "refusal", "image_url", "input_audio", "file"]
    text: str | None = None
    refusal: str | None = None


Content = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[list[ContentPart], Field(min_length=1, fail_fast=True), Tag("an array of objects")],
    Discriminator(tag),
]


class Message(Body):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content | None = None
    tool_calls: list[Any] = []
    function_call: Any = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    modalities: Annotated[list[Literal["text", "audio"]], Field(max_length=2)] = []
    audio: Any = None
    tools: list[Any] = []
    tool_choice: Any = None
    functions: list[Any] = []
    function_call: Any = None
    metadata: dict[str, str] | None = None
