"""simonw/llm, the command: prompts, --schema and tools (https://llm.datasette.io)."""

import json
import os
import subprocess
import sys

import pytest
import sqlite_utils
from llm.migrations import migrate

FUNCTIONS = """
def get_weather(city: str) -> str:
    "Get the current weather in a city."
    return f"It is sunny in {city}."
"""


@pytest.fixture
def llm(base_url, model, tmp_path):
    """Return a function that runs `llm` with the server as documented: in a file of its folder."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"""
- model_id: coder
  model_name: {model}
  api_base: {base_url}
  api_key_name: pellucid
  supports_schema: true
  supports_tools: true
"""
    )
    (tmp_path / "keys.json").write_text('{"pellucid": "any"}')
    # Every command makes the tables of its log, also with `-n`, and those at the same time collide.
    migrate(sqlite_utils.Database(tmp_path / "logs.db"))

    def run(*arguments, returncode=0):
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert returncode in (None, done.returncode), done.stderr
        return done.stdout or done.stderr

    return run


OPTIONS = ["-m", "coder", "-o", "temperature", "0", "-o", "max_tokens", "100"]


def test_prompt_with_a_system_prompt_streams_text(llm):
    assert llm(*OPTIONS, "-s", "Be brief.", "Say hello.").strip()
    assert llm(*OPTIONS, "--no-stream", "Say hello.").strip()


def test_conversation_goes_on(llm):
    llm(*OPTIONS, "My name is Ann.")
    assert llm("-c", "Say my name.").strip()


def test_schema_returns_an_object(llm, people, judge):
    def is_right(right):
        text = "{} is {} years old.".format(*right)
        person = json.loads(llm(*OPTIONS, "-n", "--schema", "name, age int", text))
        assert isinstance(person["name"], str) and isinstance(person["age"], int)
        return (person["name"], person["age"]) == right

    judge(is_right, people)


def test_schema_multi_returns_objects(llm):
    people = json.loads(
        llm(*OPTIONS, "--no-stream", "--schema-multi", "name, age int", "Ann is 31, Bob is 7.")
    )
    assert all(set(person) == {"name", "age"} for person in people["items"])


def test_json_object_option_returns_json(llm):
    text = llm(*OPTIONS, "-o", "json_object", "1", "Reply in JSON: Ann is 31.")
    assert isinstance(json.loads(text), dict)


def test_error_is_shown(llm):
    message = llm("-m", "coder", "-o", "logit_bias", '{"999999": 1}', "hi", returncode=1)
    assert "logit_bias" in message


def test_model_decides_to_call_a_tool(llm, cities, judge):
    """With the result, the model may call again; `llm` fails if `max_tokens` cut that call."""

    def is_right(city):
        options = [*OPTIONS, "-n", "--functions", FUNCTIONS, "--td"]
        question = f"What is the weather in {city}?"
        return f"sunny in {city}" in llm(*options, question, returncode=None)

    judge(is_right, cities)
