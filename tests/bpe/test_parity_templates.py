"""Real chat templates: the text of transformers, tools included.

    LLAMA_CPP=/path/to/llama.cpp pytest -m parity tests/bpe/test_parity_templates.py

The templates are those of `models/templates`; see `test_parity_vocabularies.py` for the folder.
"""

import json

import pytest

import bpe
from tests.bpe.test_parity_vocabularies import files

pytestmark = pytest.mark.parity
TEMPLATES = files("LLAMA_CPP", "models/templates/*.jinja")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Return the weather, "now" & <later>; ünïcode 世界.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "the city"},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "days": {"type": ["integer", "null"], "default": 1},
                    "where": {
                        "type": "object",
                        "properties": {"lat": {"type": "number"}, "tags": {"type": "array"}},
                    },
                    "list": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city"],
            },
            "return": {"type": "object", "description": "the weather"},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "Return the time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
SIMPLE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "one"},
                    "b": {"type": "integer", "description": "the other"},
                },
                "required": ["a", "b"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "  Hi <b>you</b> & 世界 🙂\n"}
ANSWER = {"role": "assistant", "content": "Hello\n\nthere "}
MORE = {"role": "user", "content": "And now?"}
THINKING = {"role": "assistant", "content": "Yes.", "reasoning_content": "Let me think.\nWell."}
TAGGED = {"role": "assistant", "content": "<think>\nLet me think.\n</think>\n\nYes."}


def call(arguments, content="", **more):
    function = {"name": "get_weather", "arguments": arguments}
    tool_call = {"id": "call00001", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [tool_call], **more}


ARGUMENTS = {"city": 'Köln "1"', "days": 2, "where": {"lat": 1.5, "tags": []}, "list": ["a", "b"]}
RESULT = {
    "role": "tool",
    "tool_call_id": "call00001",
    "name": "get_weather",
    "content": '{"degrees": 21}',
}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "2"}],
}

CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, MORE],
    "reasoning": [USER, THINKING, MORE],
    "reasoning last": [USER, THINKING],
    "tagged reasoning": [USER, TAGGED, MORE],
    "call": [USER, call(ARGUMENTS), RESULT],
    "call as text": [SYSTEM, USER, call(json.dumps(ARGUMENTS)), RESULT],
    "call and answer": [SYSTEM, USER, call(ARGUMENTS), RESULT, ANSWER, MORE],
    "call with reasoning": [USER, call(ARGUMENTS, "So:", reasoning_content="Hm."), RESULT],
    "call without content": [USER, call(ARGUMENTS, None), RESULT],
    "parts": [PARTS, ANSWER, PARTS],
    "tool without call": [USER, RESULT],
    "two users": [USER, MORE],
    "empty": [],
    "unknown role": [{"role": "critic", "content": "x"}],
}

# Templates that neither transformers nor we can render, with the reason.
NEVER_RENDERED = {
    "fireworks-ai-llama-3-firefunction-v2.jinja": "'functions' is undefined",
}
# We render tojson of a generator, where transformers fails.
RENDERED_BY_US_ONLY = {"llama-cpp-deepseek-r1.jinja"}


def rendered_by_transformers(source: str, messages: list, tools, prompt: bool) -> str | None:
    """Return the text, or None if the template fails."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
    except Exception:  # of any type, from the template
        return None
    return text


@pytest.mark.parametrize("path", TEMPLATES)
def test_template_renders_as_in_transformers(path):
    source = path.read_text(encoding="utf-8")
    template = bpe.ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    num_rendered = 0
    for name, messages in CHATS.items():
        for tools in (None, SIMPLE_TOOLS, TOOLS):
            for prompt in (True, False):
                expected = rendered_by_transformers(source, messages, tools, prompt)
                try:
                    text = template.render(messages, tools=tools, add_generation_prompt=prompt)
                except ValueError as error:
                    assert expected is None, (name, error)
                    assert NEVER_RENDERED.get(path.name, "") in str(error)
                    continue
                if expected is None and path.name in RENDERED_BY_US_ONLY:
                    continue
                assert text == expected, name
                num_rendered += 1
    assert (num_rendered == 0) == (path.name in NEVER_RENDERED)
