"""POST /v1/decisions and /v1/systemone: the probabilities of the answers to closed questions.

``/v1/decisions`` has the types of OpenAI's client: a list of predicates, choices and scores about
one input. ``/v1/systemone`` is the same in the shape of TypeSafe's System One, which llama.cpp
serves too: a map of questions of the types noul, choice and score about a ``state``.

Nothing is generated. The input comes first in the prompt and the question after it, so the prefix
cache has the input after the first question. The likelihood of each label after the prompt is
normalized over the labels, and calibrated; see `transformer/scoring.py`. Extensions of both routes
are ``calibration``, ``temperature``, and ``min_confidence``: a question whose likeliest label has a
lower probability is a refusal (decisions), or is missing from the answers (systemone).
"""

import asyncio
import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request

from serve.api.context_window import RESPONSE_WORDING, refuse_too_long, resolve_max_tokens
from serve.api.errors import APIError, json_type_name, missing_parameter
from serve.api.generation import MAX_CHOICES, Generation, Prompt
from serve.api.openapi import route_docs
from serve.api.request_context import context_of
from serve.api.requests import Body, GenerationBody, read_json, tag
from serve.api.response_items import InputItem, ItemContent, texts_of, to_items, to_messages
from serve.api.response_requests import Input
from serve.api.responses import Decision, SystemOne
from serve.api.routes.chat import encode_chat
from serve.api.sse import cancel_on_disconnect
from serve.api.state import get_loaded_model
from serve.api.tools import template_messages
from serve.api.unused_fields import UNUSED, path_part
from serve.models.decoder import DecoderModel
from transformer import scoring

router = APIRouter(prefix="/v1")

MAX_QUESTIONS, MAX_LABELS = 400, 255
MAX_PRIORS = 1000  # of one model; see `DecoderModel.label_priors`

# --- requests -----------------------------------------------------------------------------------


class DecisionBody(Body):
    """The fields that both routes have."""

    model: str
    calibration: Annotated[
        Literal["contextual", "none"],
        Field(description="`contextual` divides out the preference for a label without input."),
    ] = "contextual"
    temperature: Annotated[
        float | None, Field(gt=0, le=100, description="Divides the logits of the labels.")
    ] = None
    min_confidence: Annotated[
        float, Field(ge=0, le=1, description="Refuse to answer below this probability.")
    ] = 0.0


Label = Annotated[str, Field(min_length=1)]
JSONContent = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[dict[str, Any], Tag("an object")]
    | Annotated[list[Any], Tag("an array")],
    Discriminator(json_type_name),
]


class ChoiceOption(Body):
    """A label of a choice. A string and a boolean with the same text are distinct."""

    value: Annotated[
        Annotated[Label, Tag("a string")] | Annotated[bool, Tag("a boolean")], Discriminator(tag)
    ]
    description: str = ""


class ScoreLevel(Body):
    """A level of a score, from low to high."""

    label: Label
    description: str = ""


class QuestionBody(Body):
    """What all questions have."""

    instructions: ItemContent
    name: str | None = None


class PredicateQuestion(QuestionBody):
    """A statement that is true or not, or a question that is answered by yes or no."""

    type: Literal["predicate", "choice", "score"]  # for messages; see `_question_tag`


class ChoiceQuestion(QuestionBody):
    """One of several labels."""

    type: Literal["choice"]
    choices: list[ChoiceOption]


class ScoreQuestion(QuestionBody):
    """A level of an ordered scale."""

    type: Literal["score"]
    levels: list[ScoreLevel]


def _question_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"a {kind}" if kind in ("choice", "score") else "another question"


AnyQuestion = Annotated[
    Annotated[PredicateQuestion, Tag("another question")]
    | Annotated[ChoiceQuestion, Tag("a choice")]
    | Annotated[ScoreQuestion, Tag("a score")],
    Discriminator(_question_tag),
]


class DecisionsBody(DecisionBody):
    """Body of POST /v1/decisions."""

    input: Input
    questions: Annotated[list[AnyQuestion], Field(min_length=1, max_length=MAX_QUESTIONS)]
    prompt_cache_key: Annotated[str | None, UNUSED] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, UNUSED] = None
    safety_identifier: Annotated[str | None, Field(max_length=64), UNUSED] = None


class SystemOneQuestion(Body):
    """A question; its criteria describe yes and no, each label, or each level in order."""

    type: Literal["noul", "choice", "score"]
    instructions: JSONContent = ""
    criteria: Annotated[
        Annotated[dict[Label, JSONContent | None], Tag("an object")]
        | Annotated[list[JSONContent], Tag("an array")],
        Discriminator(json_type_name),
    ] = {}


class SystemOneBody(DecisionBody):
    """Body of POST /v1/systemone."""

    state: JSONContent
    questions: Annotated[
        dict[str, SystemOneQuestion], Field(min_length=1, max_length=MAX_QUESTIONS)
    ]


# --- routes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question of either route.

    Attributes:
        path: Its path in the request, for messages.
        instructions: Its text; can be empty if there are descriptions.
        values: The labels as the client sent them; two booleans for a yes or no.
        descriptions: The description of each label; can be empty.
    """

    path: str
    instructions: str
    values: Sequence[str | bool] = (True, False)
    descriptions: Sequence[str] = ("", "")
    texts: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        names = {True: "yes", False: "no"}
        texts = [names[v] if isinstance(v, bool) else v for v in self.values]
        if len(set(texts)) < len(texts):  # a string and a boolean with the same text
            texts = [json.dumps(value, ensure_ascii=False) for value in self.values]
        object.__setattr__(self, "texts", texts)

    @property
    def prior_key(self) -> tuple[str, ...]:
        """Return the texts that the probabilities without input depend on."""
        return self.ask(), *self.texts

    def ask(self) -> str:
        """Return the end of the prompt."""
        if any(self.descriptions):
            lines = [
                f"- {text}: {description}" if description else f"- {text}"
                for text, description in zip(self.texts, self.descriptions, strict=True)
            ]
            return "\n".join([self.instructions, "Answer with one of:", *lines]).strip()
        if self.values == (True, False):
            question = "According to the text, is the following true?"
            return f"Question: {question} {self.instructions}"
        # Labels without descriptions are not listed: small models prefer the first of a list.
        return self.instructions


@router.post("/decisions", **route_docs(Decision, DecisionsBody))
async def create_decision(request: Request) -> dict[str, Any]:
    """Answer predicates, choices and scores about an input."""
    body = await read_json(request, DecisionsBody)
    questions = [_question(q, f"questions[{i}]") for i, q in enumerate(body.questions)]
    text = _transcript(body.input)
    model, rows, usage = await _decide(request, body, "input", text, questions)
    answers: list[dict[str, Any]] = []
    for question, asked, row in zip(questions, body.questions, rows, strict=True):
        confidence, best = float(row.max()), int(row.argmax())
        head = {"type": asked.type, "name": asked.name}
        if confidence < body.min_confidence:
            answers.append({"type": "refusal", "name": asked.name})
        elif isinstance(asked, PredicateQuestion):
            answers.append(head | {"probability": float(row[0])})
        elif isinstance(asked, ChoiceQuestion):
            pairs = zip(question.values, row.tolist(), strict=True)
            probabilities = [{"value": value, "probability": p} for value, p in pairs]
            fields = {"choice": question.values[best], "confidence": confidence}
            answers.append(head | fields | {"probabilities": probabilities})
        else:
            probabilities = [
                {"label": level.label, "value": value, "probability": float(row[value])}
                for value, level in enumerate(asked.levels)
            ]
            fields = {"score": float(row @ np.arange(len(row))), "confidence": confidence}
            answers.append(head | fields | {"probabilities": probabilities})
    return {"model": model.id, "answers": answers, "usage": usage}


@router.post("/systemone", **route_docs(SystemOne, SystemOneBody))
async def create_system_one(request: Request) -> dict[str, Any]:
    """Answer questions of the types noul, choice and score about a state."""
    body = await read_json(request, SystemOneBody)
    questions = [_system_one_question(name, q) for name, q in body.questions.items()]
    model, rows, usage = await _decide(request, body, "state", _text(body.state), questions)
    answers: dict[str, dict[str, Any]] = {}
    for (name, asked), row in zip(body.questions.items(), rows, strict=True):
        if (confidence := float(row.max())) < body.min_confidence:
            continue
        if asked.type == "noul":
            answers[name] = {"type": "noul", "noul": float(row[0])}
        elif isinstance(asked.criteria, dict):
            probabilities = dict(zip(asked.criteria, row.tolist(), strict=True))
            best = max(probabilities, key=probabilities.__getitem__)
            answers[name] = {"type": "choice", "choice": best, "confidence": confidence}
            answers[name]["probabilities"] = probabilities
        else:
            answers[name] = {
                "type": "score",
                "score": float(row @ np.arange(len(row))),
                "confidence": confidence,
                "legend": {str(i): level for i, level in enumerate(asked.criteria)},
                "probabilities": {str(i): p for i, p in enumerate(row.tolist())},
            }
    return {"model": model.id, "answers": answers, "usage": usage}


# --- questions and texts ------------------------------------------------------------------------


def _question(asked: AnyQuestion, path: str) -> Question:
    instructions = "\n".join(texts_of(asked.instructions, f"{path}.instructions"))
    if not instructions.strip():
        raise _invalid(f"{path}.instructions", "it is empty. Say what to decide.")
    if isinstance(asked, PredicateQuestion):
        return Question(path, instructions)
    if isinstance(asked, ChoiceQuestion):
        name, options, values = "choices", asked.choices, [c.value for c in asked.choices]
    else:
        name, options, values = "levels", asked.levels, [level.label for level in asked.levels]
    _check_labels(f"{path}.{name}", values)
    return Question(path, instructions, values, [option.description for option in options])


def _system_one_question(name: str, asked: SystemOneQuestion) -> Question:
    path, instructions = f"questions.{path_part(name)}", _text(asked.instructions).strip()
    is_list = isinstance(asked.criteria, list)
    if is_list != (asked.type == "score") and asked.criteria != {}:
        kind = "an array for a score, and an object otherwise"
        raise _invalid(f"{path}.criteria", f"expected {kind}.")
    if asked.type == "noul" and isinstance(asked.criteria, dict):
        descriptions = [_text(asked.criteria.get(key)) for key in ("true", "false")]
        if unknown := asked.criteria.keys() - {"true", "false"}:
            raise _invalid(f"{path}.criteria.{path_part(min(unknown))}", "use true and false.")
        if not (instructions or any(descriptions)):
            raise missing_parameter(f"{path}.instructions")
        return Question(path, instructions, descriptions=descriptions)
    labels = [_text(label) for label in asked.criteria]
    _check_labels(f"{path}.criteria", labels)
    if isinstance(asked.criteria, dict):
        descriptions = [_text(description) for description in asked.criteria.values()]
    else:
        descriptions = [""] * len(labels)
    return Question(path, instructions or "Choose what fits.", labels, descriptions)


def _check_labels(path: str, labels: Sequence[str | bool]) -> None:
    """Raise APIError unless there are 2 to 255 labels that differ, none of them empty."""
    if not 2 <= len(labels) <= MAX_LABELS:
        raise _invalid(path, f"expected 2 to {MAX_LABELS} labels, but got {len(labels)}.")
    typed = [(type(label), label) for label in labels]
    for i, label in enumerate(labels):
        if label == "" or typed[i] in typed[:i]:
            problem = "occurs twice" if label else "is empty"
            raise _invalid(f"{path}[{i}]", f"the label {json.dumps(label)[:80]} {problem}.")


def _text(value: JSONContent | None) -> str:
    """Return a text as it is, and other JSON as text."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def _transcript(input: str | Sequence[InputItem]) -> str:
    """Return an input as text: a single message alone, others with their roles."""
    if not input and not isinstance(input, str):
        raise missing_parameter("input[0]")
    items = to_items(input)
    for index, item in enumerate(items):
        if item["type"] == "item_reference":
            raise _invalid(f"input[{index}]", "send the item itself instead of its id.")
    messages = template_messages(to_messages(items))
    if not messages:
        raise _invalid("input", "it has no message, call or result to judge.")
    texts = [" ".join(filter(None, [m["content"], *_calls(m)])) for m in messages]
    if len(messages) == 1:
        return texts[0]
    roles = (message["role"] for message in messages)
    return "\n".join(f"{role}: {text}" for role, text in zip(roles, texts, strict=True))


def _calls(message: dict[str, Any]) -> list[str]:
    return [_text(call["function"]) for call in message.get("tool_calls", ())]


def _invalid(param: str, message: str) -> APIError:
    return APIError(400, f"Invalid '{param}': {message}", param=param, code="invalid_value")


# --- scoring ------------------------------------------------------------------------------------

# A prompt and the token ids of the labels that are scored after it.
Scored = tuple[list[int], list[scoring.Tokens]]


async def _decide(
    request: Request, body: DecisionBody, param: str, text: str, questions: Sequence[Question]
) -> tuple[DecoderModel, list[np.ndarray], dict[str, Any]]:
    """Return the model, the probabilities of the labels of each question, and the token counts."""
    model = await get_loaded_model(request, body.model, DecoderModel)
    keys = [question.prior_key for question in questions]
    priors = {key: model.label_priors[key] for key in keys if key in model.label_priors}
    missing: dict[tuple[str, ...], Question] = {}
    if body.calibration == "contextual":
        missing = {k: q for k, q in zip(keys, questions, strict=True) if k not in priors}
    inputs = [(text, question) for question in questions]
    inputs += [(t, question) for question in missing.values() for t in scoring.CONTENT_FREE_INPUTS]
    # Megabytes of text take seconds to encode, which would block the event loop.
    scored = await asyncio.to_thread(lambda: [_encode(model, param, *pair) for pair in inputs])
    rows, cached_tokens = await _logprobs(request, body, model, scored)
    content_free = iter(rows[len(questions) :])
    new_priors = {
        key: np.stack([next(content_free) for _ in scoring.CONTENT_FREE_INPUTS]) for key in missing
    }
    if len(model.label_priors) + len(new_priors) > MAX_PRIORS:
        model.label_priors.clear()
    model.label_priors.update(new_priors)
    priors |= new_priors
    rows = rows[: len(questions)]
    if body.calibration == "contextual":
        rows = [scoring.calibrate(row, priors[key]) for key, row in zip(keys, rows, strict=True)]
    temperature = body.temperature or model.decision_temperature
    prompts = [ids for ids, _ in scored[: len(questions)]]
    shared = len(os.path.commonprefix(prompts)) if len(prompts) > 1 else 0
    context = context_of(request.scope)
    context.prompt_tokens = shared + sum(len(ids) - shared for ids in prompts)
    usage = {
        "input_tokens": context.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": context.prompt_tokens,
    }
    probabilities = [np.exp(scoring.log_softmax(row, temperature)) for row in rows]
    return model, probabilities, usage


def _encode(model: DecoderModel, param: str, text: str, question: Question) -> Scored:
    """Return the prompt of a question about a text, and its labels.

    Raises:
        APIError: 400 for an empty label, or a prompt that exceeds the context.
    """
    tokenizer, ask = model.tokenizer, question.ask()
    encoding = tokenizer.encoding
    # The longer one of input and question is the one to shorten.
    wording = RESPONSE_WORDING._replace(param=param if len(text) > len(ask) else question.path)
    content = f"Text: {text}\n\n{ask}"
    if tokenizer.chat_template is None:
        refuse_too_long(wording, model.context, encoding, content)
        start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        ids = [*start, *encoding.encode_ordinary(f"{content}\n")]
    else:
        message = {"role": "user", "content": content}
        # Without a variable for reasoning the template does not read it.
        ids = encode_chat(wording, model, [message], variables={"enable_thinking": False})
    if model.has_channels:
        ids += encoding.encode("<|channel|>final<|message|>", allowed_special="all")
    ids += encoding.encode_ordinary("Answer:")
    labels = [tuple(encoding.encode_ordinary(f" {text}")) for text in question.texts]
    if scoring.has_prefix(labels):  # the end of the answer tells "good" from "good enough"
        labels = [(*label, min(tokenizer.stop_ids, default=0)) for label in labels]
    longest = max(map(len, labels))
    resolve_max_tokens(wording, model.context, len(ids) + longest, None, default=1)
    return ids, labels


async def _logprobs(
    request: Request, body: DecisionBody, model: DecoderModel, scored: Sequence[Scored]
) -> tuple[list[np.ndarray], int]:
    """Return the log-probabilities of the labels after each prompt.

    Returns:
        One array [N] for each prompt with N labels; and the number of tokens of the first prompt
        that the prefix cache had.
    """
    tries = [scoring.trie(labels) for _, labels in scored]
    prompts = [
        Prompt(token_ids=[*ids, *prefix], max_tokens=1, logprob_token_ids=following)
        for (ids, _), prefixes in zip(scored, tries, strict=True)
        for prefix, following in prefixes.items()
    ]
    settings = GenerationBody(model=body.model, temperature=0.0)
    # The first prompt runs alone, so that the others find their beginning in the prefix cache.
    starts = [0, *range(1, len(prompts), MAX_CHOICES)]
    generations = [
        Generation(
            model,
            prompts[start : start + MAX_CHOICES if start else 1],
            settings,
            choices_per_prompt=1,
            top_logprobs=None,
            request_context=context_of(request.scope),
            is_likelihood_scored=True,
        )
        for start in starts
    ]
    choices = [
        choice
        for generation in generations
        for choice in await cancel_on_disconnect(request.receive, generation.choices())
    ]
    tokens = iter([*choice.tokens, choice.end_token][0] for choice in choices)
    rows = [
        scoring.label_logprobs(
            labels, {prefix: dict(next(tokens).token.top_logprobs) for prefix in prefixes}
        )
        for (_, labels), prefixes in zip(scored, tries, strict=True)
    ]
    return rows, generations[0].usage.cached_tokens
