"""The official client: `.parse()`, streams, tools and errors.

https://github.com/openai/openai-python/blob/main/helpers.md
"""

import enum
import json

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


class Person(BaseModel):
    name: str
    age: int


class Step(BaseModel):
    explanation: str
    output: int


class Solution(BaseModel):
    steps: list[Step]
    final_answer: int


@pytest.fixture
def client(base_url):
    with OpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def test_parse_returns_an_object(client, model, people, judge):
    def is_right(person):
        name, age = person
        completion = client.chat.completions.parse(
            model=model,
            messages=user(f"My name is {name} and I am {age} years old."),
            response_format=Person,
            temperature=0,
            max_completion_tokens=60,
        )
        message = completion.choices[0].message
        assert isinstance(message.parsed, Person) and message.refusal is None
        assert completion.usage.completion_tokens > 0
        return message.parsed == Person(name=name, age=age)

    judge(is_right, people)


def test_parse_with_nested_lists_and_references_returns_objects(client, model):
    completion = client.chat.completions.parse(
        model=model,
        messages=[
            {"role": "developer", "content": "Solve the equation in at most two short steps."},
            {"role": "user", "content": "8x + 7 = 23"},
        ],
        response_format=Solution,
        temperature=0,
        max_completion_tokens=300,
    )
    solution = completion.choices[0].message.parsed
    assert isinstance(solution, Solution)
    assert all(isinstance(step, Step) for step in solution.steps)


def test_parse_of_a_cut_document_raises(client, model):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=model,
            messages=user("Ann is 31."),
            response_format=Person,
            temperature=0,
            max_tokens=3,
        )


def test_stream_parses_partial_and_whole_documents(client, model):
    with client.chat.completions.stream(
        model=model,
        messages=user("Ann is 31 years old."),
        response_format=Person,
        temperature=0,
        max_completion_tokens=60,
        stream_options={"include_usage": True},
    ) as stream:
        events = list(stream)
        completion = stream.get_final_completion()
    kinds = {event.type for event in events}
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(completion.choices[0].message.parsed, Person)
    assert completion.usage.total_tokens > 0


def test_json_schema_with_an_enum_limits_the_answer(client, model):
    class Answer(BaseModel):
        colour: Colour

    completion = client.chat.completions.parse(
        model=model,
        messages=user("What colour is grass?"),
        response_format=Answer,
        temperature=0,
    )
    assert completion.choices[0].message.parsed.colour in Colour


def test_errors_have_the_classes_of_the_client(client, model):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=user("hi"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=user("hi"), temperature=7)
    assert caught.value.param == "temperature"
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=user("hi"), response_format=broken)
    assert caught.value.param.startswith("response_format.json_schema")


ADD = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}


def test_responses_stream_and_parse(client, model):
    fields = {"model": model, "input": "Ann is 31 years old.", "temperature": 0}
    parsed = client.responses.parse(text_format=Person, **fields)
    assert isinstance(parsed.output_parsed, Person)
    with client.responses.stream(text_format=Person, **fields) as stream:
        types = [event.type for event in stream]
        final = stream.get_final_response()
    assert types[0] == "response.created" and types[-1] == "response.completed"
    assert isinstance(final.output_parsed, Person)


def test_responses_call_and_continue(client, model):
    first = client.responses.create(
        model=model, input="3 + 4?", tools=[ADD], tool_choice="required", max_output_tokens=80
    )
    (call,) = first.output
    assert call.type == "function_call" and set(json.loads(call.arguments)) == {"a", "b"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    second = client.responses.create(
        model=model, input=[result], previous_response_id=first.id, max_output_tokens=40
    )
    assert second.output_text
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]


def test_conversation_collects_items(client, model):
    conversation = client.conversations.create()
    client.responses.create(
        model=model, input="Hello.", conversation=conversation.id, max_output_tokens=40
    )
    items = client.conversations.items.list(conversation.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant"]
    client.conversations.delete(conversation.id)
