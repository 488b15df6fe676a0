"""LiteLLM, which programs use to talk to any provider (https://docs.litellm.ai)."""

import json

import litellm
import pytest
from litellm import completion
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


@pytest.fixture
def ask(base_url, model):
    def ask(text, **options):
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return completion(
            **{
                "model": f"openai/{model}",
                "api_base": base_url,
                "api_key": "any",
                "messages": messages,
                "temperature": 0,
                "max_tokens": 80,
                "num_retries": 0,
            }
            | options
        )

    return ask


def test_text_and_stream(ask):
    response = ask("Say hello.")
    assert response.choices[0].message.content and response.usage.total_tokens > 0
    chunks = [*ask("Say hello.", stream=True, stream_options={"include_usage": True})]
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    text = "".join(delta.content or "" for delta in deltas)
    assert text == response.choices[0].message.content
    assert litellm.stream_chunk_builder(chunks).usage.total_tokens == response.usage.total_tokens


def test_response_format_of_a_class_and_of_json(ask):
    response = ask("Ann is 31 years old.", response_format=Person)
    assert Person.model_validate_json(response.choices[0].message.content)
    response = ask("Ann is 31. Reply in JSON.", response_format={"type": "json_object"})
    assert isinstance(json.loads(response.choices[0].message.content), dict)


def test_errors_have_the_classes_of_litellm(ask):
    with pytest.raises(litellm.NotFoundError):
        ask("hi", model="openai/nothing")
    with pytest.raises(litellm.BadRequestError):
        ask("hi", temperature=7)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask("hello " * 40_000)


@pytest.mark.parametrize("tool_choice", ["required", WEATHER["function"]["name"]])
def test_call_that_must_be_made_has_valid_arguments(ask, tool_choice):
    if tool_choice != "required":
        tool_choice = {"type": "function", "function": {"name": tool_choice}}
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    response = ask(messages, tools=[WEATHER], tool_choice=tool_choice)
    message = response.choices[0].message
    assert response.choices[0].finish_reason in ("tool_calls", "stop")
    for call in message.tool_calls:
        assert call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        assert isinstance(arguments["city"], str)

    # Send the answer and the results back, as an agent does.
    messages.append(message)
    messages += [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "name": call.function.name,
            "content": "Sunny, 21 °C",
        }
        for call in message.tool_calls
    ]
    assert ask(messages, tools=[WEATHER]).choices[0].message is not None


def test_streamed_call_is_the_call_of_the_whole_response(ask):
    options = {"tools": [WEATHER], "tool_choice": "required"}
    whole = ask("What is the weather in Oslo?", **options)
    chunks = [*ask("What is the weather in Oslo?", stream=True, **options)]
    built = litellm.stream_chunk_builder(chunks)
    functions = [
        [(call.function.name, call.function.arguments) for call in r.choices[0].message.tool_calls]
        for r in (whole, built)
    ]
    assert functions[0] == functions[1]
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason


def test_model_decides_to_call_a_tool(ask, cities, judge):
    def is_right(city):
        message = ask(f"What is the weather in {city}?", tools=[WEATHER]).choices[0].message
        arguments = [json.loads(call.function.arguments) for call in message.tool_calls or []]
        return [argument["city"] for argument in arguments] == [city]

    judge(is_right, cities)


def test_responses_return_text_and_stream_events(base_url, model):
    options = {"api_base": base_url, "api_key": "any", "temperature": 0, "max_output_tokens": 40}
    response = litellm.responses(model=f"openai/{model}", input="Say hello.", **options)
    assert response.status == "completed"
    assert response.output[0].content[0].text
    events = litellm.responses(model=f"openai/{model}", input="Say hello.", stream=True, **options)
    types = [str(getattr(event.type, "value", event.type)) for event in events]
    assert types[0] == "response.created"
    assert types[-1] == "response.completed"
