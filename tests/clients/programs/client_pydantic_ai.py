"""pydantic-ai: structured output in its three forms, tools, streams (https://ai.pydantic.dev)."""

import pytest
from pydantic import BaseModel
from pydantic_ai import (
    Agent,
    ModelHTTPError,
    NativeOutput,
    PromptedOutput,
    RunContext,
    ToolOutput,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
    UsageLimits,
)
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    """A person."""

    name: str
    age: int


class City(BaseModel):
    """A city."""

    city: str


def chat_model(base_url, model):
    return OpenAIChatModel(model, provider=OpenAIProvider(base_url=base_url, api_key="any"))


@pytest.fixture
def chat(base_url, model):
    return chat_model(base_url, model)


def agent(chat, output_type=str, **options):
    return Agent(
        chat,
        output_type=output_type,
        model_settings={"temperature": 0, "max_tokens": 120},
        **options,
    )


@pytest.mark.parametrize("kind", [NativeOutput, ToolOutput])
def test_output_is_an_object(base_url, model, kind, people, judge):
    def is_right(right):
        extractor = agent(chat_model(base_url, model), kind(Person))
        person = extractor.run_sync("{} is {} years old.".format(*right)).output
        assert isinstance(person, Person)
        return (person.name, person.age) == right

    judge(is_right, people)


def test_prompted_output_is_an_object(base_url, model, people, judge):
    """The schema is in the prompt, and the request asks for a JSON object."""

    def is_right(right):
        extractor = agent(chat_model(base_url, model), PromptedOutput(Person), retries=0)
        try:
            person = extractor.run_sync("{} is {} years old.".format(*right)).output
        except UnexpectedModelBehavior:  # JSON of another schema
            return False
        return (person.name, person.age) == right

    judge(is_right, people)


@pytest.mark.parametrize("kind", [NativeOutput, ToolOutput])
def test_streamed_output_is_an_object(chat, kind):
    with agent(chat, kind(Person)).run_stream_sync("Ann is 31 years old.") as result:
        *_, last = result.stream_output(debounce_by=None)
    assert isinstance(last, Person)


def test_output_of_two_types_is_one_of_them(chat):
    output = agent(chat, NativeOutput([Person, City])).run_sync("Oslo is a city.").output
    assert isinstance(output, Person | City)


def test_text_has_usage(chat):
    result = agent(chat).run_sync("Say hello.")
    assert result.output and result.usage.output_tokens > 0


def test_unknown_model_is_an_http_error(base_url):
    chat = OpenAIChatModel("nothing", provider=OpenAIProvider(base_url=base_url, api_key="any"))
    with pytest.raises(ModelHTTPError) as caught:
        agent(chat).run_sync("hi")
    assert caught.value.status_code == 404


def test_tool_is_called_and_its_result_sent_back(chat):
    """`ToolOutput` requires calls, so the model calls a tool until it calls the one that ends."""
    weather = agent(chat, ToolOutput(City), deps_type=str)
    asked = []

    @weather.tool
    def get_city(ctx: RunContext[str]) -> str:
        """Return the city where the user is. Call it first."""
        asked.append(ctx.deps)
        return ctx.deps

    limits = UsageLimits(request_limit=4)
    try:
        result = weather.run_sync("Which city am I in?", deps="Oslo", usage_limits=limits)
    except (UsageLimitExceeded, UnexpectedModelBehavior):  # the model repeats its call
        assert asked
        return
    assert isinstance(result.output, City)
    parts = [part for message in result.all_messages() for part in message.parts]
    assert any(isinstance(part, ToolCallPart) for part in parts)
    assert len(asked) == sum(
        isinstance(part, ToolReturnPart) and part.tool_name == "get_city" for part in parts
    )


def test_model_decides_to_call_a_tool(base_url, model, cities, judge):
    def is_right(city):
        asked = []
        weather = agent(chat_model(base_url, model))

        @weather.tool_plain
        def get_weather(city: str) -> str:
            """Get the current weather in a city."""
            asked.append(city)
            return "It is sunny, 21 °C."

        try:
            result = weather.run_sync(f"What is the weather in {city}?")
        except UnexpectedModelBehavior:  # an answer without text, twice
            return False
        assert isinstance(result.output, str)
        return asked == [city]

    judge(is_right, cities)
