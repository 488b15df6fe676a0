"""Test /v1/decisions and /v1/systemone with a tiny model over a socket, through the client."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from serve.api import responses
from tests.serve.conftest import client as openai_client

pytestmark = pytest.mark.heavy

PREDICATE = {"type": "predicate", "name": "late", "instructions": "The parcel is late."}
CHOICE = {
    "type": "choice",
    "instructions": "What is the tone?",
    "choices": [{"value": "angry"}, {"value": "calm", "description": "no anger"}],
}
SCORE = {
    "type": "score",
    "name": "urgency",
    "instructions": "How urgent is it?",
    "levels": [{"label": "low"}, {"label": "middle"}, {"label": "high"}],
}
TEXT = "My parcel has not arrived."
SYSTEM_ONE = {
    "late": {"type": "noul", "instructions": "Is the parcel late?"},
    "tone": {"type": "choice", "criteria": {"angry": "rude words", "calm": None}},
    "urgency": {"type": "score", "instructions": {"ask": "urgency"}, "criteria": ["low", "high"]},
}


@pytest.fixture(scope="module")
def client(tiny_address):
    with openai_client(tiny_address, strict=True) as client:
        yield client


def decide(client: OpenAI, questions, input=TEXT, **extra):
    """Return the answers; check the response against /openapi.json's model."""
    raw = client.decisions.with_raw_response.create(
        model="tiny", input=input, questions=questions, extra_body=extra
    )
    responses.Decision.model_validate_json(raw.http_response.content, strict=True)
    return raw.parse()


def system_one(address, **fields):
    body = {"model": "tiny", "state": TEXT, "questions": SYSTEM_ONE} | fields
    answer = httpx.post(f"{address}/v1/systemone", json=body, timeout=60)
    kind = responses.Error if answer.is_error else responses.SystemOne
    kind.model_validate_json(answer.content, strict=True)
    return answer


def test_decisions_answer_each_question_in_order(client):
    decision = decide(client, [PREDICATE, CHOICE, SCORE])
    predicate, choice, score = decision.answers
    assert decision.model == "tiny"
    assert (predicate.type, predicate.name) == ("predicate", "late")
    assert 0 < predicate.probability < 1
    assert (choice.type, choice.name) == ("choice", None)
    assert [entry.value for entry in choice.probabilities] == ["angry", "calm"]
    assert sum(entry.probability for entry in choice.probabilities) == pytest.approx(1)
    best = max(choice.probabilities, key=lambda entry: entry.probability)
    assert (choice.choice, choice.confidence) == (best.value, best.probability)
    assert [(e.label, e.value) for e in score.probabilities] == [
        ("low", 0),
        ("middle", 1),
        ("high", 2),
    ]
    assert score.score == pytest.approx(sum(e.value * e.probability for e in score.probabilities))


def test_decisions_without_calibration_equal_echoed_logprobs(client, tiny_address):
    content = f"Text: {TEXT}\n\nHow urgent is it?"
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    prompt = httpx.post(f"{tiny_address}/tokenize", json=body).json()["tokens"]
    logprobs = []
    for label in (" low", " middle", " high"):
        ids = [*prompt, *b"Answer:", *label.encode()]  # the tokens of the tiny model are bytes
        body = {"model": "tiny", "prompt": ids, "max_tokens": 0, "logprobs": 0, "echo": True}
        echo = httpx.post(f"{tiny_address}/v1/completions", json=body, timeout=60).json()
        logprobs.append(sum(echo["choices"][0]["logprobs"]["token_logprobs"][-len(label) :]))
    expected = np.exp(logprobs) / np.exp(logprobs).sum()
    (answer,) = decide(client, [SCORE], calibration="none", temperature=1).answers
    np.testing.assert_allclose([e.probability for e in answer.probabilities], expected, rtol=1e-4)


def test_decisions_content_free_input_with_calibration_is_near_uniform(client):
    (answer,) = decide(client, [SCORE], input="N/A", temperature=1).answers
    (raw,) = decide(client, [SCORE], input="N/A", temperature=1, calibration="none").answers
    distance = [abs(entry.probability - 1 / 3) for entry in answer.probabilities]
    assert max(distance) < max(abs(entry.probability - 1 / 3) for entry in raw.probabilities)


def test_decisions_temperature_changes_confidence_and_not_the_choice(client):
    (low,), (high,) = (decide(client, [CHOICE], temperature=value).answers for value in (0.1, 10))
    assert low.choice == high.choice and low.confidence > high.confidence


def test_decisions_below_min_confidence_are_refusals(client):
    questions = [PREDICATE, CHOICE]
    answers = decide(client, questions, min_confidence=1, temperature=100).answers
    assert [(answer.type, answer.name) for answer in answers] == [
        ("refusal", "late"),
        ("refusal", None),
    ]
    answers = decide(client, questions, min_confidence=0.5, temperature=100).answers
    assert [answer.type for answer in answers] == ["predicate", "choice"]


def test_decisions_booleans_and_strings_are_distinct_choices(client):
    choices = [{"value": True}, {"value": "yes"}, {"value": "true"}, {"value": False}]
    (answer,) = decide(client, [CHOICE | {"choices": choices}]).answers
    values = [entry.value for entry in answer.probabilities]
    assert values == [True, "yes", "true", False]
    assert [type(value) for value in values] == [bool, str, str, bool]


def test_decisions_label_that_begins_another_has_its_own_probability(client):
    choices = [{"value": "good"}, {"value": "good enough"}, {"value": "bad"}]
    (answer,) = decide(client, [CHOICE | {"choices": choices}], calibration="none").answers
    probabilities = [entry.probability for entry in answer.probabilities]
    assert sum(probabilities) == pytest.approx(1) and min(probabilities) > 0


def test_decisions_of_messages_calls_and_json(client):
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_json", "data": {"order": 7}}]},
        {"type": "function_call", "call_id": "a", "name": "track", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "lost"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Sorry."}]},
    ]
    whole, part = (decide(client, [PREDICATE], input=input) for input in (items, items[:2]))
    assert whole.answers != part.answers
    assert whole.usage.input_tokens > part.usage.input_tokens
    call = items[2] | {"arguments": '{"order": 7, "carrier": "any"}'}
    alone, shorter = (decide(client, [PREDICATE], input=[item]) for item in (call, items[2]))
    assert alone.usage.input_tokens > shorter.usage.input_tokens, "the call is judged"


def test_decisions_usage_counts_the_input_once_and_cached_tokens_of_the_second_request(client):
    text = "The parcel is late and I am not amused. " * 6
    one = decide(client, [PREDICATE], input=text).usage
    others = [PREDICATE | {"instructions": f"It is {word}."} for word in ("lost", "here")]
    many = decide(client, [PREDICATE, *others], input=text).usage
    assert one.input_tokens < many.input_tokens < 2 * one.input_tokens
    assert (many.output_tokens, many.total_tokens) == (0, many.input_tokens)
    assert one.input_tokens_details.cached_tokens < many.input_tokens_details.cached_tokens


def test_decisions_beside_other_requests_have_the_same_bits(client):
    questions = [PREDICATE, CHOICE, SCORE]
    alone = decide(client, questions).answers

    def other(number: int) -> None:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": TEXT * (number % 3 + 1)}],
            max_tokens=40,
            extra_body={"ignore_eos": True},
        )

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(other, number) for number in range(8)]
        beside = list(pool.map(lambda _: decide(client, questions).answers, range(4)))
        assert not any(task.exception() for task in others)
    assert beside == [alone] * 4


def test_decisions_400_questions_are_answered(client):
    questions = [PREDICATE | {"instructions": f"It is {i}."} for i in range(400)]
    answers = decide(client, questions, calibration="none").answers
    assert len(answers) == 400


def test_decisions_255_choices_are_answered(client):
    choices = [{"value": f"{i}."} for i in range(255)]
    (answer,) = decide(client, [CHOICE | {"choices": choices}], calibration="none").answers
    assert sum(entry.probability for entry in answer.probabilities) == pytest.approx(1)


def test_decisions_long_instructions_return_400_naming_the_question(client):
    with pytest.raises(BadRequestError) as error:
        decide(client, [PREDICATE, CHOICE | {"instructions": "x" * 600}])
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "questions[1]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [PREDICATE] * 401}, "questions"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}]}]}, "questions[0].choices"),
        (
            {"questions": [CHOICE | {"choices": [{"value": str(i)} for i in range(256)]}]},
            "questions[0].choices",
        ),
        (
            {"questions": [PREDICATE, CHOICE | {"choices": [{"value": "a"}, {"value": "a"}]}]},
            "questions[1].choices[1]",
        ),
        (
            {"questions": [SCORE | {"levels": [{"label": "a"}, {"label": "a"}]}]},
            "questions[0].levels[1]",
        ),
        ({"questions": [SCORE | {"levels": [{"label": "a"}]}]}, "questions[0].levels"),
        ({"questions": [PREDICATE | {"instructions": " "}]}, "questions[0].instructions"),
        ({"questions": [{"type": "predicate"}]}, "questions[0].instructions"),
        ({"questions": [PREDICATE | {"type": "box"}]}, "questions[0].type"),
        ({"input": "x" * 600}, "input"),
        ({"input": []}, "input[0]"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            "input[0].call_id",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"temperature": 0}, "temperature"),
        ({"min_confidence": 2}, "min_confidence"),
        ({"calibration": "platt"}, "calibration"),
    ],
)
def test_decisions_invalid_field_returns_400_naming_it(client, fields, param):
    body = {"model": "tiny", "input": TEXT, "questions": [PREDICATE]} | fields
    with pytest.raises(BadRequestError) as error:
        client.post("/decisions", body=body, cast_to=object)
    assert error.value.param == param


def test_decisions_of_unknown_model_return_404(client):
    with pytest.raises(NotFoundError):
        client.decisions.create(model="nope", input=TEXT, questions=[PREDICATE])


def test_decisions_fields_without_effect_are_named(client):
    raw = client.decisions.with_raw_response.create(
        model="curie", input=TEXT, questions=[PREDICATE], prompt_cache_key="a"
    )
    assert raw.headers["x-pellucid-ignored"] == "prompt_cache_key"


def test_system_one_answers_by_name(tiny_address, client):
    answers = system_one(tiny_address).json()["answers"]
    assert {name: answer["type"] for name, answer in answers.items()} == {
        "late": "noul",
        "tone": "choice",
        "urgency": "score",
    }
    assert answers["urgency"]["legend"] == {"0": "low", "1": "high"}
    assert answers["urgency"]["score"] == answers["urgency"]["probabilities"]["1"]
    # The same question on both routes.
    question = {"type": "predicate", "instructions": "Is the parcel late?"}
    assert decide(client, [question]).answers[0].probability == answers["late"]["noul"]


def test_system_one_below_min_confidence_leaves_the_answer_out(tiny_address):
    answer = system_one(tiny_address, min_confidence=1, temperature=100)
    assert answer.json()["answers"] == {}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"questions": {}}, "questions"),
        ({"questions": {"a": {"type": "noul"}}}, "questions.a.instructions"),
        ({"questions": {"a": {"type": "choice", "criteria": {"b": None}}}}, "questions.a.criteria"),
        (
            {"questions": {"a": {"type": "score", "criteria": ["b", "b"]}}},
            "questions.a.criteria[1]",
        ),
        (
            {"questions": {"a": {"type": "score", "criteria": ["b", ""]}}},
            "questions.a.criteria[1]",
        ),
        ({"questions": {"a": {"type": "noul", "criteria": []}}}, "questions.a.criteria"),
        ({"questions": {"a": {"type": "score", "criteria": {"b": "c"}}}}, "questions.a.criteria"),
        ({"questions": {"a": {"type": "box"}}}, "questions.a.type"),
        ({"questions": {"a": 5}}, "questions.a"),
        ({"state": "x" * 600}, "state"),
        ({"state": 5}, "state"),
        ({"assets": {"b": {"type": "image"}}}, "assets"),
    ],
)
def test_system_one_invalid_field_returns_400_naming_it(tiny_address, fields, param):
    answer = system_one(tiny_address, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
