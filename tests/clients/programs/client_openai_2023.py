"""The official client of 2023 with `functions`, as programs of that year call them.

https://github.com/openai/openai-python/tree/v0.28.1
"""

import json

import openai
import pytest

GET_WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


@pytest.fixture
def ask(base_url, model):
    def ask(*messages, **options):
        return openai.ChatCompletion.create(
            api_base=base_url,
            api_key="any",
            messages=[*messages],
            **{"model": model, "temperature": 0, "max_tokens": 80} | options,
        )

    return ask


def user(text):
    return {"role": "user", "content": text}


def test_text_and_stream(ask):
    whole = ask(user("Say hello."))
    assert whole.choices[0].message.content and whole.usage.total_tokens > 0
    deltas = [chunk.choices[0].delta for chunk in ask(user("Say hello."), stream=True)]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == whole.choices[0].message.content


def test_named_function_is_called_and_its_result_sent_back(ask):
    question = user("What is the weather in Oslo?")
    forced = {"functions": [GET_WEATHER], "function_call": {"name": "get_weather"}}
    choice = ask(question, **forced).choices[0]
    call = choice.message.function_call
    assert call.name == "get_weather" and isinstance(json.loads(call.arguments)["city"], str)
    assert choice.message.content is None and choice.finish_reason in ("function_call", "stop")

    result = {"role": "function", "name": call.name, "content": '{"weather": "sunny"}'}
    answer = ask(question, choice.message, result, functions=[GET_WEATHER], function_call="none")
    assert answer.choices[0].message.content
    assert "function_call" not in answer.choices[0].message


def test_streamed_function_call_is_that_of_the_whole_response(ask):
    question = user("What is the weather in Oslo?")
    forced = {"functions": [GET_WEATHER], "function_call": {"name": "get_weather"}}
    whole = ask(question, **forced).choices[0].message.function_call
    deltas = [chunk.choices[0].delta for chunk in ask(question, stream=True, **forced)]
    calls = [delta.function_call for delta in deltas if "function_call" in delta]
    assert [call.name for call in calls if "name" in call] == ["get_weather"]
    assert "".join(call.get("arguments", "") for call in calls) == whole.arguments


def test_name_of_a_model_of_2023_reaches_the_model_for_tools(ask, model):
    response = ask(
        user("What is the weather in Oslo?"),
        model="gpt-3.5-turbo-0613",
        functions=[GET_WEATHER],
        function_call={"name": "get_weather"},
    )
    assert response.model == model
    assert response.choices[0].message.function_call.name == "get_weather"


def test_errors_have_the_classes_of_the_client(ask):
    with pytest.raises(openai.error.InvalidRequestError) as caught:
        ask(user("hi"), functions=[GET_WEATHER], function_call={"name": "nothing"})
    assert caught.value.http_status == 400 and caught.value.param == "function_call.name"
    with pytest.raises(openai.error.InvalidRequestError) as caught:
        ask(user("hi"), model="nothing")
    assert caught.value.http_status == 404


def test_model_decides_to_call_a_function(ask, cities, judge):
    def is_right(city):
        message = (
            ask(user(f"What is the weather in {city}?"), functions=[GET_WEATHER]).choices[0].message
        )
        if "function_call" not in message:
            return False
        return json.loads(message.function_call.arguments) == {"city": city}

    judge(is_right, cities)
