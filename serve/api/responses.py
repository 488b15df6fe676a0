"""What answers look like: the models behind /openapi.json.

After OpenAI's specification; what is null there may be null here. Routes answer with dictionaries
and these are not run on the way out: a test compares the two (`tests/serve/test_schema.py`).
"""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from serve.models.catalogue import KINDS


class ResponseModel(BaseModel):
    """An answer, or part of one. It has no other fields than these."""

    model_config = ConfigDict(extra="forbid")


Item = TypeVar("Item")


class ListResponse(ResponseModel, Generic[Item]):
    """A whole list."""

    object: Literal["list"]
    data: list[Item]


class PageResponse(ListResponse[Item], Generic[Item]):
    """A part of a list; see `pagination.py`."""

    first_id: str | None
    last_id: str | None
    has_more: bool


# --- errors -----------------------------------------------------------------------------------


class ErrorDetail(ResponseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(ResponseModel):
    error: ErrorDetail


# --- models -----------------------------------------------------------------------------------


class Model(ResponseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal[KINDS]  # pyright: ignore[reportInvalidTypeForm]
    sampling: dict[str, float] | None


class Models(ListResponse[Model]): ...


class Deleted(ResponseModel):
    id: str
    object: Literal["model"]
    deleted: Literal[True]


class EngineReply(ResponseModel):
    id: str
    object: Literal["engine"]
    created: int | None
    owner: str
    permissions: None
    ready: bool


class Engines(ListResponse[EngineReply]): ...


# --- what they generate -----------------------------------------------------------------------

FinishReason = Literal["stop", "length"]
Count = Annotated[int, Field(ge=0)]
LogprobValue = Annotated[float, Field(le=0, ge=-9999)]


class PromptTokensDetails(ResponseModel):
    cached_tokens: Count
    audio_tokens: Count


class CompletionTokensDetails(ResponseModel):
    reasoning_tokens: Count
    audio_tokens: Count
    accepted_prediction_tokens: Count
    rejected_prediction_tokens: Count


class UsageReply(ResponseModel):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionLogprobs(ResponseModel):
    tokens: list[str]
    token_logprobs: list[LogprobValue | None]
    top_logprobs: list[dict[str, LogprobValue] | None]
    text_offset: list[Count]


class CompletionChoice(ResponseModel):
    text: str
    index: Count
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(ResponseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageReply


class CompletionChunkChoice(CompletionChoice):
    finish_reason: FinishReason | None  # pyright: ignore[reportIncompatibleVariableOverride]


class CompletionChunk(Completion):
    choices: list[CompletionChunkChoice]  # pyright: ignore[reportIncompatibleVariableOverride]
    usage: UsageReply | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class TopLogprob(ResponseModel):
    token: str
    logprob: LogprobValue
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(ResponseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(ResponseModel):
    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(ResponseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    service_tier: Literal["default"]
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageReply
    metadata: dict[str, str] | None


class ChatDelta(ResponseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(ResponseModel):
    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(ResponseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    service_tier: Literal["default"]
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageReply | None = None


class EditChoice(ResponseModel):
    text: str
    index: Count
    logprobs: None
    finish_reason: FinishReason


class Edit(ResponseModel):
    object: Literal["edit"]
    created: int
    choices: list[EditChoice]
    usage: UsageReply


# --- tokens and health ------------------------------------------------------------------------


class PieceReply(ResponseModel):
    id: int
    piece: str | list[int]
    special: bool


class Tokens(ResponseModel):
    tokens: list[int] | list[PieceReply]
    count: Count
    max_model_len: int
    token_strs: list[str] | None


class Text(ResponseModel):
    prompt: str
    content: str
    text: str


class TokenizerInfo(ResponseModel):
    model: str
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool
    chat_template: str | None


class Status(ResponseModel):
    status: str


class Version(ResponseModel):
    version: str


# --- embeddings -------------------------------------------------------------------------------


class Embedding(ResponseModel):
    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str  # base64 of little-endian float32, if that was asked for


class EmbeddingsUsage(ResponseModel):
    prompt_tokens: Count
    total_tokens: Count


class Embeddings(ListResponse[Embedding]):
    model: str
    usage: EmbeddingsUsage


# --- files ------------------------------------------------------------------------------------


class FileReply(ResponseModel):
    id: str
    object: Literal["file"]
    bytes: Count
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class Files(PageResponse[FileReply]): ...


class FileDeleted(ResponseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


# --- fine-tuning ------------------------------------------------------------------------------

Auto = Literal["auto"]


class JobError(ResponseModel):
    code: str
    message: str
    param: str | None


class JobNumbers(ResponseModel):
    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


class JobSupervised(ResponseModel):
    hyperparameters: JobNumbers


class JobMethod(ResponseModel):
    type: Literal["supervised"]
    supervised: JobSupervised


class JobReply(ResponseModel):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    error: JobError | None
    model: str
    fine_tuned_model: str | None
    hyperparameters: JobNumbers
    method: JobMethod
    seed: int
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    estimated_finish: int | None
    organization_id: str
    integrations: list[str]
    metadata: dict[str, str] | None


class Jobs(PageResponse[JobReply]): ...


class JobMetrics(ResponseModel):
    step: Count | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class JobEventMetrics(JobMetrics):
    total_steps: Count | None = None


class JobEvent(ResponseModel):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: JobEventMetrics


class JobEvents(PageResponse[JobEvent]): ...


class JobCheckpoint(ResponseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    step_number: Count
    metrics: JobMetrics
    fine_tuning_job_id: str


class JobCheckpoints(PageResponse[JobCheckpoint]): ...


class FineTuneEvent(ResponseModel):
    object: Literal["fine-tune-event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str


class FineTuneEvents(ListResponse[FineTuneEvent]): ...


class FineTuneNumbers(ResponseModel):
    n_epochs: int | None
    batch_size: int | None
    learning_rate_multiplier: float | None
    prompt_loss_weight: float


class FineTune(ResponseModel):
    id: str
    object: Literal["fine-tune"]
    created_at: int
    updated_at: int
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["pending", "running", "succeeded", "failed", "cancelled"]
    hyperparams: FineTuneNumbers
    training_files: list[FileReply]
    validation_files: list[FileReply]
    result_files: list[FileReply]
    events: list[FineTuneEvent] = []


class FineTunes(ListResponse[FineTune]): ...


# --- images -----------------------------------------------------------------------------------


ImageFormat = Literal["png", "jpeg", "webp"]


class ImageTokens(ResponseModel):
    text_tokens: int
    image_tokens: int


class ImageUsage(ResponseModel):
    """Tokens of the prompt that were read; pictures are not drawn in tokens."""

    input_tokens: int
    input_tokens_details: ImageTokens
    output_tokens: Literal[0]
    total_tokens: int


class Image(ResponseModel):
    """One of the two."""

    url: str | None = None
    b64_json: str | None = None


class Images(ResponseModel):
    created: int
    data: list[Image]
    background: Literal["transparent", "opaque"]
    output_format: ImageFormat
    quality: Literal["low", "medium", "high"]
    usage: ImageUsage


class ImageEvent(ResponseModel):
    """`partial_image` with `partial_image_index`, or `completed` with `usage`."""

    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    b64_json: str
    created_at: int
    size: str
    quality: Literal["low", "medium", "high"]
    background: Literal["transparent", "opaque"]
    output_format: ImageFormat
    index: int
    partial_image_index: int | None = None
    usage: ImageUsage | None = None
