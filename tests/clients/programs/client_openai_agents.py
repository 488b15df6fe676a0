"""The OpenAI Agents SDK with both of its models: output types, a tool, a hand-off.

Its default model class sends requests to /v1/responses.

https://openai.github.io/openai-agents-python
"""

import asyncio

import pytest
from agents import (
    Agent,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
MAX_TURNS = 4


class Person(BaseModel):
    name: str
    age: int


def chat_model(base_url, model):
    client = AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0)
    return OpenAIChatCompletionsModel(model=model, openai_client=client)


@pytest.fixture(params=[OpenAIResponsesModel, OpenAIChatCompletionsModel])
def chat(request, base_url, model):
    client = AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0)
    return request.param(model=model, openai_client=client)


def settings(**options):
    return ModelSettings(temperature=0, max_tokens=100, **options)


def kinds(result):
    return [item.type for item in result.new_items]


def test_text_and_output_type(chat):
    agent = Agent(name="Greeter", instructions="Be brief.", model=chat, model_settings=settings())
    assert Runner.run_sync(agent, "Say hello.").final_output
    agent = agent.clone(name="Extractor", output_type=Person)
    result = Runner.run_sync(agent, "Ann is 31 years old.")
    assert isinstance(result.final_output, Person)


async def stream(agent, text):
    result = Runner.run_streamed(agent, text, max_turns=MAX_TURNS)
    return [event async for event in result.stream_events()], result


def test_streamed_output_type(chat):
    agent = Agent(name="Extractor", model=chat, model_settings=settings(), output_type=Person)
    events, result = asyncio.run(stream(agent, "Ann is 31 years old."))
    assert isinstance(result.final_output, Person)
    assert any(event.type == "raw_response_event" for event in events)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_required_tool_runs_and_its_result_is_sent_back(chat, is_streamed):
    asked = []

    @function_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        asked.append(city)
        return f"It is sunny in {city}."

    agent = Agent(
        name="Weather",
        instructions="Answer briefly.",
        model=chat,
        tools=[get_weather],
        model_settings=settings(tool_choice="required"),
    )
    question = "What is the weather in Oslo?"
    try:
        if is_streamed:
            _, result = asyncio.run(stream(agent, question))
        else:
            result = Runner.run_sync(agent, question, max_turns=MAX_TURNS)
    except (MaxTurnsExceeded, ModelBehaviorError):
        # The model repeats its call, too often or until `max_tokens` cuts it.
        assert asked
        return
    assert kinds(result)[:2] == ["tool_call_item", "tool_call_output_item"]
    assert asked and isinstance(result.final_output, str)


def test_hand_off_moves_to_the_other_agent(chat):
    spanish = Agent(
        name="Spanish agent",
        instructions="You speak Spanish.",
        model=chat,
        model_settings=settings(),
    )
    triage = Agent(
        name="Triage agent",
        instructions="Hand off to the Spanish agent if the user speaks Spanish.",
        model=chat,
        handoffs=[spanish],
        model_settings=settings(tool_choice="transfer_to_spanish_agent"),
    )
    result = Runner.run_sync(triage, "Hola, ¿cómo estás?")
    assert result.last_agent.name == "Spanish agent"
    assert kinds(result)[:2] == ["handoff_call_item", "handoff_output_item"]
    assert result.final_output


def test_model_decides_to_call_a_tool(base_url, model, cities, judge):
    def is_right(city):
        asked = []

        @function_tool
        def get_weather(city: str) -> str:
            """Get the weather in a city."""
            asked.append(city)
            return "It is sunny, 21 °C."

        chat = chat_model(base_url, model)
        agent = Agent(name="Weather", model=chat, tools=[get_weather], model_settings=settings())
        question = f"What is the weather in {city}?"
        try:
            result = asyncio.run(Runner.run(agent, question, max_turns=MAX_TURNS))
        except (MaxTurnsExceeded, ModelBehaviorError):  # the model repeats its call
            assert asked
            return False
        assert isinstance(result.final_output, str)
        return asked == [city]

    judge(is_right, cities)
