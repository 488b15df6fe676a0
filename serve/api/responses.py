"""Pydantic models of responses, for /openapi.json, after OpenAI's specification.

Routes return dictionaries, which are not validated against these models at run time; a test
compares the two (`tests/serve/test_schema.py`). The routes of /v1/responses are in
`routes/responses.py`.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from serve.models.catalogue import KINDS


class ResponseModel(BaseModel):
    """Base class of responses and their parts. Additional fields are forbidden."""

    model_config = ConfigDict(extra="forbid")


Item = TypeVar("Item")
Count = Annotated[int, Field(ge=0)]


class ListResponse(ResponseModel, Generic[Item]):
    """A list that is returned as a whole, without pages."""

    object: Literal["list"]
    data: list[Item]


class PageResponse(ListResponse[Item], Generic[Item]):
    """A page of a list; see `pagination.py`."""

    first_id: str | None
    last_id: str | None
    has_more: bool


# --- errors -----------------------------------------------------------------------------------


class ErrorDetail(ResponseModel):
    """The description of an error: message, class, invalid field and machine-readable code."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(ResponseModel):
    """The body of a response with a status from 400 on."""

    error: ErrorDetail


# --- models -----------------------------------------------------------------------------------


class Model(ResponseModel):
    """A served model, with its task (`kind`) and its default sampling parameters."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal[KINDS]  # pyright: ignore[reportInvalidTypeForm]
    sampling: dict[str, float] | None
    context_length: Count | None
    max_model_len: Count | None
    dtype: str | None
    capabilities: list[str]
    evaluation: dict[str, Any] | None = Field(description="Results on held-out data.")
    tools: Literal["trained", "prompted"] | None  # whether the chat template has tools


class Models(ListResponse[Model]):
    """The models of the server."""


class ManagedModel(ResponseModel):
    """The state of a model: whether it is in memory, since when, and how often it was asked for."""

    id: str
    object: Literal["model.status"]
    kind: Literal[KINDS]  # pyright: ignore[reportInvalidTypeForm]
    state: Literal["loaded", "loading", "unloaded"]
    memory: Count = Field(description="Bytes; an estimate if the model is not loaded.")
    loaded_at: int | None = Field(description="Seconds since 1970.")
    requests: Count = Field(description="Requests since the server started.")
    busy: bool = Field(description="Whether a request waits or runs.")


class ManagedModels(ListResponse[ManagedModel]):
    """The states of all models."""


class PullProgress(ResponseModel):
    """An event of a pull; the last one has the status "success" and the model."""

    status: str
    completed: Count | None = Field(None, description="Bytes that have arrived.")
    total: Count | None = Field(None, description="Bytes to fetch.")
    model: ManagedModel | None = None


class Deleted(ResponseModel):
    """The confirmation that a model was deleted."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class EngineReply(ResponseModel):
    """A model in the format of OpenAI's API of 2021, which called models engines."""

    id: str
    object: Literal["engine"]
    created: int | None
    owner: str
    permissions: None
    ready: bool


class Engines(ListResponse[EngineReply]):
    """The models of the server in the format of OpenAI's API of 2021."""


# --- generation -------------------------------------------------------------------------------

FinishReason = Literal["stop", "length"]
LogprobValue = Annotated[float, Field(le=0, ge=-9999)]


class PromptTokensDetails(ResponseModel):
    """Numbers of prompt tokens that were read from the prefix cache or encode audio."""

    cached_tokens: Count
    audio_tokens: Count


class CompletionTokensDetails(ResponseModel):
    """Numbers of reasoning, audio and predicted tokens in a completion; all 0 on this server."""

    reasoning_tokens: Count
    audio_tokens: Count
    accepted_prediction_tokens: Count
    rejected_prediction_tokens: Count


class UsageReply(ResponseModel):
    """Token counts of a request."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionLogprobs(ResponseModel):
    """Logprobs of a completion, as lists with one entry per token."""

    tokens: list[str]
    token_logprobs: list[LogprobValue | None]
    top_logprobs: list[dict[str, LogprobValue] | None]
    text_offset: list[Count]


class PromptTokenLogprob(ResponseModel):
    """The logprob of a token at a position of the prompt, and its rank if it is among the top."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]


class CompletionChoice(ResponseModel):
    """One of the generated continuations of a prompt."""

    text: str
    index: Count
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | None = None


class Completion(ResponseModel):
    """The response of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageReply


class CompletionChunkChoice(CompletionChoice):
    """The next text of a choice of a streamed completion."""

    finish_reason: FinishReason | None  # pyright: ignore[reportIncompatibleVariableOverride]


class CompletionChunk(Completion):
    """A server-sent event of a streamed completion."""

    choices: list[CompletionChunkChoice]  # pyright: ignore[reportIncompatibleVariableOverride]
    usage: UsageReply | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class TopLogprob(ResponseModel):
    """A token with its logprob and bytes."""

    token: str
    logprob: LogprobValue
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class TokenLogprob(TopLogprob):
    """A generated token with its likeliest alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Logprobs of an answer, with one entry per token."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(ResponseModel):
    """A called function, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(ResponseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(ResponseModel):
    """The message that the model generated: text, calls of tools, or both."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None  # of models that answer on channels
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None  # for a request with `functions`


ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class ChatChoice(ResponseModel):
    """One of the generated answers to a conversation."""

    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(ResponseModel):
    """The response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    service_tier: Literal["default"]
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageReply
    metadata: dict[str, str] | None
    prompt_logprobs: PromptLogprobs | None = None
    moderation: "ChatModeration | None" = None


class ChatCompletions(PageResponse[ChatCompletion]):
    """A page of stored chat completions."""


class ChatCompletionDeleted(ResponseModel):
    """The confirmation that a stored chat completion was deleted."""

    id: str
    object: Literal["chat.completion.deleted"]
    deleted: Literal[True]


class FunctionCallDelta(ResponseModel):
    """The next part of a called function: first its name, then pieces of its arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """The next part of a call of a tool; the first one has its id and type."""

    index: Count
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(ResponseModel):
    """The next text or call of a streamed answer; its first event has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionCallDelta | None = None


class ResponseReply(BaseModel):
    """The response of POST /v1/responses; `output` has messages and function calls."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]


class ResponseEvent(BaseModel):
    """An event of a streamed response; its type says which other fields it has."""

    type: str
    sequence_number: Count


class ResponseDeleted(ResponseModel):
    """The confirmation that a response was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputTokens(ResponseModel):
    """The number of tokens of the prompt of a response."""

    object: Literal["response.input_tokens"]
    input_tokens: Count


class ConversationReply(ResponseModel):
    """A conversation, without its items."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(ResponseModel):
    """The confirmation that a conversation was deleted."""

    id: str
    object: Literal["conversation.deleted"]
    deleted: Literal[True]


class ItemReply(BaseModel):
    """An item of a conversation: a message, a call, or its result."""

    id: str
    type: str


class ItemPage(PageResponse[dict[str, Any]]):
    """A page of items."""


class ChatChunkChoice(ResponseModel):
    """The next text of a choice of a streamed chat completion."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatChunk(ResponseModel):
    """A server-sent event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    service_tier: Literal["default"]
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageReply | None = None
    moderation: "ChatModeration | None" = None


class EditChoice(ResponseModel):
    """One of the generated edits of a text."""

    text: str
    index: Count
    logprobs: None
    finish_reason: FinishReason


class Edit(ResponseModel):
    """The response of POST /v1/edits."""

    object: Literal["edit"]
    created: int
    choices: list[EditChoice]
    usage: UsageReply


# --- tokens and health ------------------------------------------------------------------------


class PieceReply(ResponseModel):
    """A token with its id and its text, or its bytes if they are not UTF-8."""

    id: int
    piece: str | list[int]
    special: bool


class Tokens(ResponseModel):
    """The tokens of a text or conversation, in the fields of both vLLM and llama.cpp."""

    tokens: list[int] | list[PieceReply]
    count: Count
    max_model_len: int
    token_strs: list[str] | None


class Text(ResponseModel):
    """A decoded text, under the field names of vLLM (`prompt`) and llama.cpp (`content`)."""

    prompt: str
    content: str
    text: str


class TokenizerInfo(ResponseModel):
    """A model's tokenizer: vocabulary size, special tokens and chat template."""

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
    """The health or readiness of the server, in words."""

    status: str


class Version(ResponseModel):
    """The version of Pellucid that the server runs."""

    version: str


# --- embeddings -------------------------------------------------------------------------------


class Embedding(ResponseModel):
    """The embedding vector of one input."""

    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str  # base64 of little-endian float32, if requested


class EmbeddingsUsage(ResponseModel):
    """Token counts of a request for embeddings."""

    prompt_tokens: Count
    total_tokens: Count


class Embeddings(ListResponse[Embedding]):
    """The embedding vectors of all inputs, in the order of the inputs."""

    model: str
    usage: EmbeddingsUsage


# --- moderation -------------------------------------------------------------------------------


class ModerationResult(ResponseModel):
    """The scores of a text, by category. Those without an applied input type are not assessed."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]


class Moderations(ResponseModel):
    """The response of POST /v1/moderations."""

    id: str
    model: str
    results: list[ModerationResult]


class ChatModerationResult(ModerationResult):
    """The scores of the messages or of a choice of a chat."""

    type: Literal["moderation_result"]
    model: str


class ChatModerationResults(ResponseModel):
    """The results of the messages, or of the choices in their order."""

    type: Literal["moderation_results"]
    model: str
    results: list[ChatModerationResult]


class ChatModerationError(ResponseModel):
    """Why there are no results."""

    type: Literal["error"]
    code: str
    message: str


class ChatModeration(ResponseModel):
    """The results that a chat with the field `moderation` asks for."""

    input: ChatModerationResults | ChatModerationError
    output: ChatModerationResults | ChatModerationError


# --- reranking --------------------------------------------------------------------------------

RerankMethod = Annotated[
    Literal["cross_encoder", "embeddings"],
    Field(description="embeddings: scores are cosines, because the model is no cross-encoder."),
]


class RerankDocument(ResponseModel):
    """A document of a request."""

    text: str


class RerankResult(ResponseModel):
    """The relevance of a document."""

    index: Count = Field(description="The position of the document in the request.")
    relevance_score: float
    document: RerankDocument | None = Field(
        None, description="Absent if return_documents is false."
    )


class Rerank(ResponseModel):
    """The most relevant documents, the best one first."""

    id: str
    model: str
    method: RerankMethod
    results: list[RerankResult]
    usage: EmbeddingsUsage


class Score(ResponseModel):
    """The relevance of a pair of texts."""

    object: Literal["score"]
    index: Count
    score: float


class Scores(ListResponse[Score]):
    """The relevance of all pairs."""

    id: str
    created: Count
    model: str
    method: RerankMethod
    usage: EmbeddingsUsage


# --- decisions --------------------------------------------------------------------------------

Probability = Annotated[float, Field(ge=0, le=1)]


class LabelProbability(ResponseModel):
    """A label of a choice (`value`), or a level of a score (`label`) with its position from 0."""

    label: str | None = None
    value: str | bool | int
    probability: Probability


class DecisionAnswer(ResponseModel):
    """An answer; a predicate has `probability`, the likeliest label's is the `confidence`."""

    type: Literal["predicate", "choice", "score", "refusal"]
    name: str | None
    probability: Probability | None = None
    choice: str | bool | None = None
    score: float | None = Field(None, description="The expected value.")
    confidence: Probability | None = None
    probabilities: list[LabelProbability] | None = None


class DecisionUsage(ResponseModel):
    """Token counts. The beginning that all prompts share counts once; nothing is generated."""

    input_tokens: Count
    input_tokens_details: dict[Literal["cached_tokens", "cache_write_tokens"], Count]
    output_tokens: Count
    output_tokens_details: dict[Literal["reasoning_tokens"], Count]
    total_tokens: Count


class Decision(ResponseModel):
    """The answers, in the order of the questions."""

    model: str
    answers: list[DecisionAnswer]
    usage: DecisionUsage


class SystemOneAnswer(ResponseModel):
    """An answer; `noul` is the probability of yes, the likeliest label's is the `confidence`."""

    type: Literal["noul", "choice", "score"]
    noul: Probability | None = None
    choice: str | None = None
    score: float | None = Field(None, description="The expected level.")
    confidence: Probability | None = None
    legend: dict[str, Any] | None = None
    probabilities: dict[str, Probability] | None = None


class SystemOne(ResponseModel):
    """The answers by name, without those below `min_confidence`."""

    model: str
    answers: dict[str, SystemOneAnswer]
    usage: DecisionUsage


# --- files ------------------------------------------------------------------------------------


class FileReply(ResponseModel):
    """The description of an uploaded file, without its content."""

    id: str
    object: Literal["file"]
    bytes: Count
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class Files(PageResponse[FileReply]):
    """A page of the list of uploaded files."""


class FileDeleted(ResponseModel):
    """The confirmation that a file was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class UploadReply(ResponseModel):
    """An upload of a file in parts."""

    id: str
    object: Literal["upload"]
    created_at: int
    filename: str
    bytes: Count
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    expires_at: int
    file: FileReply | None


class UploadPart(ResponseModel):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


# --- batches ----------------------------------------------------------------------------------


class BatchError(ResponseModel):
    """Why a line of the input file is no request; `line` counts from 1."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(ResponseModel):
    """The errors of a batch whose input file is invalid."""

    object: Literal["list"]
    data: list[BatchError]


class BatchCounts(ResponseModel):
    """Numbers of requests of a batch."""

    total: Count
    completed: Count
    failed: Count


class BatchReply(ResponseModel):
    """A batch of requests."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class BatchesReply(PageResponse[BatchReply]):
    """A page of batches."""


# --- fine-tuning ------------------------------------------------------------------------------

Auto = Literal["auto"]


class JobError(ResponseModel):
    """The reason why a job failed."""

    code: str
    message: str
    param: str | None


class JobNumbers(ResponseModel):
    """The hyperparameters of a fine-tuning job; "auto" until the server has chosen the value."""

    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


class JobSupervised(ResponseModel):
    """The hyperparameters of supervised fine-tuning, as a part of the method."""

    hyperparameters: JobNumbers


class JobMethod(ResponseModel):
    """The training method of a job: supervised fine-tuning."""

    type: Literal["supervised"]
    supervised: JobSupervised


class JobReply(ResponseModel):
    """A fine-tuning job."""

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


class Jobs(PageResponse[JobReply]):
    """A page of the list of fine-tuning jobs."""


class JobMetrics(ResponseModel):
    """The losses and token accuracies of one training step, as far as they were computed."""

    step: Count | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class JobEventMetrics(JobMetrics):
    """The metrics that an event of a job reports; empty for other events."""

    total_steps: Count | None = None


class JobEvent(ResponseModel):
    """An entry in the log of a fine-tuning job, such as a new status or a training step."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: JobEventMetrics


class JobEvents(PageResponse[JobEvent]):
    """A page of the events of a job."""


class JobCheckpoint(ResponseModel):
    """A model that a job saved after an epoch, and its metrics."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    step_number: Count
    metrics: JobMetrics
    fine_tuning_job_id: str


class JobCheckpoints(PageResponse[JobCheckpoint]):
    """A page of the checkpoints of a job."""


class FineTuneEvent(ResponseModel):
    """An event of a fine-tuning job in the format of OpenAI's API of 2021."""

    object: Literal["fine-tune-event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str


class FineTuneEvents(ListResponse[FineTuneEvent]):
    """The events of a fine-tuning job in the format of OpenAI's API of 2021."""


class FineTuneNumbers(ResponseModel):
    """The hyperparameters of a fine-tuning job in the format of OpenAI's API of 2021."""

    n_epochs: int | None
    batch_size: int | None
    learning_rate_multiplier: float | None
    prompt_loss_weight: float


class FineTune(ResponseModel):
    """A fine-tuning job in the format of OpenAI's API of 2021."""

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


class FineTunes(ListResponse[FineTune]):
    """The fine-tuning jobs in the format of OpenAI's API of 2021."""


# --- images -----------------------------------------------------------------------------------


ImageFormat = Literal["png", "jpeg", "webp"]


class ImageTokens(ResponseModel):
    """The input tokens of an image request, split into text and images."""

    text_tokens: int
    image_tokens: int


class ImageUsage(ResponseModel):
    """Token counts of the prompt. Images are not made of tokens, so `output_tokens` is 0."""

    input_tokens: int
    input_tokens_details: ImageTokens
    output_tokens: Literal[0]
    total_tokens: int


class Image(ResponseModel):
    """A generated image: either its URL or its bytes in base64."""

    url: str | None = None
    b64_json: str | None = None


class Images(ResponseModel):
    """The generated images of a request, with their format."""

    created: int
    data: list[Image]
    background: Literal["transparent", "opaque"]
    output_format: ImageFormat
    quality: Literal["low", "medium", "high"]
    usage: ImageUsage


class ImageEvent(ResponseModel):
    """A `partial_image` event with `partial_image_index`, or a `completed` event with `usage`."""

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
