"""smolagents' ToolCallingAgent (https://huggingface.co/docs/smolagents)."""

import json

import pytest
from smolagents import OpenAIModel, ToolCallingAgent, tool
from smolagents.memory import ActionStep
from smolagents.monitoring import LogLevel


@tool
def get_weather(city: str) -> str:
    """Get the current weather in a city.

    Args:
        city: The name of the city.
    """
    return f"It is sunny in {city}, 21 °C."


@pytest.fixture
def chat(base_url, model):
    return OpenAIModel(
        model_id=model, api_base=base_url, api_key="any", temperature=0, max_tokens=150
    )


@pytest.mark.parametrize("is_streamed", [False, True])
def test_agent_calls_tools_in_every_step(chat, is_streamed, judge):
    agent = ToolCallingAgent(
        tools=[get_weather],
        model=chat,
        max_steps=3,
        stream_outputs=is_streamed,
        verbosity_level=LogLevel.OFF,
    )
    result = agent.run("What is the weather in Oslo?", return_full_result=True)
    steps = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    assert steps and result.output is not None
    names = [call.name for step in steps for call in step.tool_calls or []]
    assert names and {*names} <= {"get_weather", "final_answer"}
    # smolagents requires a call in every step; a step without one has an AgentParsingError.
    assert {type(step.error).__name__ for step in steps} <= {"NoneType", "AgentMaxStepsError"}
    judge(lambda wanted: names == wanted, [["get_weather", "final_answer"]])


def test_structured_generation_returns_json(chat):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    message = chat.generate(
        [{"role": "user", "content": [{"type": "text", "text": "Ann is 31 years old."}]}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": schema, "strict": True},
        },
    )
    assert {*json.loads(message.content)} == {"name", "age"}
