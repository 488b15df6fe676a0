"""Tools over HTTP with the official client: decided answers of a scripted engine."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest

from bpe import ChatTemplate
from serve.models import tool_calls
from serve.models.grammar import GrammarCompiler, GrammarSource
from serve.models.tool_calls import CallPart, TextPart, ToolCallParser
from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.serve.tiny_data import TEMPLATE, TOOL_TEMPLATE
from transformer.engine import GrammarError

pytestmark = pytest.mark.heavy

LLAMA_TEMPLATE = (
    "{{ tools | tojson }}{% for message in messages %}{% if message.tool_calls %}"
    '{"name": "{{ message.tool_calls[0].function.name }}", "parameters": '
    "{{ message.tool_calls[0].function.arguments | tojson }}}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>{% endfor %}"
)
MISTRAL_TEMPLATE = (
    "{{ tools | tojson }}{% for message in messages %}{% if message.tool_calls %}"
    "[TOOL_CALLS][{% for call in message.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('bad id') }}{% endif %}{% set out = call.function | tojson %}"
    '{{ out[:-1] }}, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]'
    "{% else %}{{ message.content }}{% endif %}<|im_end|>{% endfor %}"
)
DEVSTRAL_TEMPLATE = (
    "{{ tools | tojson }}{% for message in messages %}{% for call in message.tool_calls or [] %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ message.content }}<|im_end|>{% endfor %}"
)
OTHER_TEMPLATE = (  # GLM's notation
    "{{ tools | tojson }}{% for message in messages %}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }}<arg_key>key</arg_key></tool_call>{% endfor %}"
    "{{ message.content }}<|im_end|>{% endfor %}"
)
ENCODING = scripted.byte_encoding(
    scripted.SPECIAL | {"<tool_call>": 259, "</tool_call>": 260, "[TOOL_CALLS]": 261}
)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
FUNCTIONS = [ADD["function"], NOW["function"]]
USER = {"role": "user", "content": "3 + 4?"}
CALL_ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
CALL_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def models():
    templates = {
        "hermes": TOOL_TEMPLATE,
        "prompted": TEMPLATE,
        "mistral": MISTRAL_TEMPLATE,
    }
    models = {
        name: replace(scripted.model(name, source, ENCODING), context=2048)
        for name, source in templates.items()
    }
    return models | {
        "long": replace(scripted.model("long", TOOL_TEMPLATE, ENCODING), context=2**20)
    }


@pytest.fixture(scope="module")
def client(models):
    with (
        scripted.serve_models(*models.values()) as address,
        open_client(address, strict=True) as client,
    ):
        yield client


@pytest.fixture
def ask(client, models):
    """Return a function that asks a model whose answer is decided."""

    def ask(answer, *, model="hermes", messages=(USER,), **fields):
        engine = models[model].engine
        engine.answer = answer
        if "functions" not in fields:
            fields = {"tools": [ADD, NOW]} | fields
        result = client.chat.completions.create(model=model, messages=[*messages], **fields)
        if fields.get("stream"):
            result = [*result]
        ask.prompt = ENCODING.decode(engine.requests[-1].prompt)
        ask.grammar = engine.requests[-1].grammar
        return result if fields.get("stream") else result.choices[0]

    return ask


def calls_of(message):
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [
        ("Hello.", "Hello.", []),
        (CALL_ADD, None, [("add", {"a": 3, "b": 4})]),
        (f"Let me see.\n{CALL_ADD}", "Let me see.", [("add", {"a": 3, "b": 4})]),
        (f"{CALL_NOW}\n{CALL_ADD}\n", None, [("now", {}), ("add", {"a": 3, "b": 4})]),
        (
            CALL_ADD.replace('"b": 4', '"x": {"y": ["}", "\\"{", "ö😀"]}'),
            None,
            [("add", {"a": 3, "x": {"y": ["}", '"{', "ö😀"]}})],
        ),
        ('{"name": "now", "arguments": {}}', None, [("now", {})]),
        ('```json\n{\n  "name": "now",\n  "arguments": {\n  }\n}\n```', None, [("now", {})]),
        (CALL_ADD.replace("add", "subtract"), CALL_ADD.replace("add", "subtract"), []),
        (CALL_ADD.replace('": 4', '": '), CALL_ADD.replace('": 4', '": '), []),
        ("if a <tool_b: <", "if a <tool_b: <", []),
    ],
    ids=[
        "text",
        "call",
        "text beside",
        "several",
        "nested",
        "bare",
        "fenced",
        "unknown name",
        "malformed",
        "like a call",
    ],
)
def test_calls_in_answer_become_tool_calls(ask, answer, content, calls):
    choice = ask(answer)
    assert choice.message.content == content and calls_of(choice.message) == calls
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    ids = [call.id for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == len(ids) and all(id.startswith("call_") for id in ids)
    assert all(call.type == "function" for call in choice.message.tool_calls or ())
    assert ask.grammar is not None


@pytest.mark.parametrize("answer", ["Hello <b> ", CALL_ADD, f"Let me see. {CALL_NOW}\n{CALL_ADD}"])
def test_streamed_calls_have_index_id_name_first_then_arguments(ask, answer):
    whole = ask(answer).message
    content, calls, reasons = "", {}, []
    for chunk in ask(answer, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for delta in choice.delta.tool_calls or ():
            if delta.index not in calls:
                assert delta.id and delta.type == "function" and delta.function.arguments == ""
                calls[delta.index] = [delta.function.name, []]
            else:
                assert delta.id is None and delta.function.name is None
                calls[delta.index][1].append(delta.function.arguments)
    assert (content or None) == whole.content
    assert [name for name, _ in calls.values()] == [name for name, _ in calls_of(whole)]
    assert ["".join(pieces) for _, pieces in calls.values()] == [
        call.function.arguments for call in whole.tool_calls or ()
    ]
    assert all(len(pieces) > 1 for _, pieces in calls.values())
    assert list(calls) == list(range(len(calls)))
    assert reasons[-1] == ("tool_calls" if calls else "stop") and not any(reasons[:-1])


def test_client_stream_helper_assembles_calls(client, models):
    models["hermes"].engine.answer = f"{CALL_NOW}\n{CALL_ADD}"
    tools = [
        ADD | {"function": ADD["function"] | {"strict": True}},
        NOW | {"function": NOW["function"] | {"strict": True}},
    ]
    with client.chat.completions.stream(model="hermes", messages=[USER], tools=tools) as stream:
        message = stream.get_final_completion().choices[0].message
    assert calls_of(message) == [("now", {}), ("add", {"a": 3, "b": 4})]
    assert message.content is None


@pytest.mark.parametrize("stream", [False, True])
def test_cut_call_keeps_its_arguments_and_finish_reason_length(ask, stream):
    max_tokens = len("x\n{'name': 'add', 'arguments': {'a'")
    if stream:
        chunks = ask(CALL_ADD, stream=True, max_tokens=max_tokens)
        deltas = [chunk.choices[0].delta for chunk in chunks]
        arguments = "".join(d.tool_calls[0].function.arguments for d in deltas if d.tool_calls)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = ask(CALL_ADD, max_tokens=max_tokens)
        arguments = choice.message.tool_calls[0].function.arguments
        reason = choice.finish_reason
    assert (arguments, reason) == ('{"a"', "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("answer", "fields", "content"),
    [
        (CALL_ADD, {"tool_choice": "required"}, ""),
        (CALL_ADD, {}, ""),
        (CALL_ADD, {"model": "prompted", "tool_choice": "required"}, ""),
        (CALL_ADD, {"functions": FUNCTIONS}, ""),
        (f"Yes. {CALL_ADD}", {}, "Yes."),
        ('{"name": "add", "arguments": {}}', {}, ""),
        ('[TOOL_CALLS][{"name": "add", "arguments": {}}]', {"model": "mistral"}, ""),
    ],
)
def test_call_cut_before_its_arguments_is_dropped(ask, answer, fields, content, stream):
    """Regression: the beginning of a call, `<tool_call>` with half a name, was in the content."""
    start = answer.index(content) + len(content)
    for max_tokens in range(start + 2, answer.index('": {') - 12, 7):
        result = ask(answer, max_tokens=max_tokens, stream=stream, **fields)
        choices = [chunk.choices[0] for chunk in result] if stream else [result]
        messages = [choice.delta if stream else choice.message for choice in choices]
        assert "".join(message.content or "" for message in messages) == content
        assert not any(message.tool_calls or message.function_call for message in messages)
        assert choices[-1].finish_reason == "length"


def test_call_cut_by_a_stop_string_is_dropped(ask):
    choice = ask(f"Yes. {CALL_ADD}", stop='name"')
    assert (choice.message.content, choice.message.tool_calls) == ("Yes.", None)
    assert choice.finish_reason == "stop"


def test_text_cut_at_max_tokens_keeps_its_white_space(ask):
    assert ask("Yes.\n\nNo.", max_tokens=6).message.content == "Yes.\n\n"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "format",
    [
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"guided_json": {"type": "object"}}},
        {"extra_body": {"structured_outputs": {"json_object": True}}},
    ],
)
def test_document_with_the_keys_of_a_call_is_content_if_the_answer_has_a_format(
    ask, format, stream
):
    """Regression: beside tools, such a document became a call."""
    document = '{"name": "now", "arguments": {}}'
    fields = format | {"stream": stream}
    assert ask(document, **format, tools=[]).message.content == document
    result = ask(document, **fields)
    messages = [chunk.choices[0].delta for chunk in result] if stream else [result.message]
    assert "".join(message.content or "" for message in messages) == document
    assert not any(message.tool_calls for message in messages)
    result = ask(CALL_NOW, **fields)
    assert (result[-1].choices[0] if stream else result).finish_reason == "tool_calls"


def test_logprobs_list_the_tokens_of_the_text_only(ask):
    for stream in (False, True):
        result = ask(f"Yes. {CALL_ADD}", logprobs=True, stream=stream)
        choices = [chunk.choices[0] for chunk in result] if stream else [result]
        entries = [e for c in choices if c.logprobs for e in c.logprobs.content]
        assert "".join(entry.token for entry in entries) == "Yes."


def test_functions_of_2023_return_function_call(ask):
    choice = ask(CALL_ADD, functions=FUNCTIONS)
    assert choice.finish_reason == "function_call" and choice.message.content is None
    assert choice.message.function_call.name == "add" and not choice.message.tool_calls
    assert json.loads(choice.message.function_call.arguments) == {"a": 3, "b": 4}
    deltas = [
        chunk.choices[0].delta.function_call
        for chunk in ask(CALL_ADD, functions=FUNCTIONS, function_call={"name": "add"}, stream=True)
    ]
    calls = [delta for delta in deltas if delta]
    assert calls[0].name == "add" and {delta.name for delta in calls[1:]} == {None}
    assert json.loads("".join(delta.arguments for delta in calls)) == {"a": 3, "b": 4}


def test_template_gets_tools_calls_and_results(ask):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'},
    }
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    ]
    ask("7", messages=messages)
    tools, *rest = ask.prompt.split("<|im_end|>\n")
    assert [json.loads(line) for line in tools.splitlines()[1:]] == [
        ADD,
        {
            "type": "function",
            "function": {
                "name": "now",
                "description": "",
                "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
            },
        },
    ]
    assert rest == [
        "<|im_start|>user\n3 + 4?",
        f"<|im_start|>assistant\n{CALL_ADD}",
        "<|im_start|>tool\n7",
        "<|im_start|>assistant\n",
    ]
    old = [
        USER,
        {"role": "assistant", "content": None, "function_call": call["function"]},
        {"role": "function", "name": "add", "content": "7"},
    ]
    prompt = ask.prompt
    ask("7", messages=old)
    assert ask.prompt == prompt
    ask("7", messages=[USER, old[-1]])  # OpenAI's schema does not ask for a call before it
    assert "<|im_start|>tool\n7" in ask.prompt


@pytest.mark.parametrize("param", ["tools", "response_format"])
def test_allowed_token_ids_beside_another_limit_return_400_naming_it(ask, param):
    fields = {"response_format": {"type": "json_object"}, "tools": []}
    if param == "tools":
        fields = {}
    with pytest.raises(openai.BadRequestError) as error:
        ask("", extra_body={"allowed_token_ids": [97]}, **fields)
    assert error.value.param == "allowed_token_ids" and f"'{param}'" in error.value.message


def test_template_without_tools_gets_them_in_the_system_message(ask):
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Yes.", "tool_calls": [call, call | {"id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
        {"role": "tool", "tool_call_id": "call_2", "content": "8"},
    ]
    choice = ask(CALL_ADD, model="prompted", messages=messages)
    assert calls_of(choice.message) == [("add", {"a": 3, "b": 4})]
    system, *rest = ask.prompt.split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n")
    assert json.dumps(ADD["function"]) in system and '"name": "now"' in system
    assert rest == [
        "<|im_start|>user\n3 + 4?",
        f"<|im_start|>assistant\nYes.\n{CALL_NOW}\n{CALL_NOW}",
        "<|im_start|>user\n<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n"
        "</tool_response>",
        "<|im_start|>assistant\n",
    ]


def test_mistral_template_gets_ids_of_nine_characters(ask):
    call = {
        "id": "call_0123456789abcdef",
        "type": "function",
        "function": {"name": "now", "arguments": "{}"},
    }
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "7"},
    ]
    answer = (
        '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "add", "arguments": {"a": 1}}]'
    )
    choice = ask(answer, model="mistral", messages=messages)
    assert calls_of(choice.message) == [("now", {}), ("add", {"a": 1})]
    assert '{"name": "now", "arguments": {}, "id": "789abcdef"}]' in ask.prompt


def test_tool_choice_none_leaves_tools_out_of_the_prompt(ask):
    choice = ask(CALL_ADD, tool_choice="none")
    assert choice.message.content == CALL_ADD and "Add two numbers" not in ask.prompt
    assert ask.grammar is None


def accepts(grammar, text):
    """Return whether a grammar allows a text and its end, and nothing after a proper prefix."""
    matcher = grammar.matcher()
    for token in [*ENCODING.encode(text, allowed_special="all"), scripted.IM_END]:
        words = matcher.token_bitmask()
        if not words[token // 32] >> (token % 32) & 1:
            return False
        matcher.accept(token)
    return True


ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {
        "mode": "required",
        "tools": [{"type": "function", "function": {"name": "now"}}],
    },
}


@pytest.mark.parametrize(
    ("fields", "allowed", "refused"),
    [
        (
            {},
            [
                "Hi.",
                "",
                CALL_ADD,
                f"Hi.\n{CALL_NOW}\n{CALL_ADD}",
                '{"a": 1}',
                '{"name": "now", "arguments": {}}',
                '{"name": "x", "arguments": [1]}',
            ],
            [
                CALL_ADD.replace("add", "x"),
                CALL_ADD.replace("3", '"3"'),
                CALL_ADD[:-12],
                f"{CALL_NOW} Hi",
                '{"name": "now", "arguments": {"x": 1}}',
            ],
        ),
        ({"parallel_tool_calls": False}, ["Hi.", CALL_ADD], [f"{CALL_NOW}\n{CALL_ADD}"]),
        ({"tool_choice": "required"}, [CALL_ADD, f"{CALL_NOW}\n{CALL_ADD}\n"], ["Hi.", ""]),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            [CALL_NOW],
            [f"{CALL_NOW}\n{CALL_ADD}"],
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "add"}}},
            [CALL_ADD],
            [CALL_NOW, f"{CALL_ADD}\n{CALL_ADD}", "Hi."],
        ),
        ({"tool_choice": ALLOWED}, [CALL_NOW], [CALL_ADD, "Hi."]),
        ({"response_format": {"type": "json_object"}}, ['{"a": 1}', CALL_NOW], ["Hi."]),
    ],
    ids=["auto", "auto one", "required", "required one", "named", "allowed", "response_format"],
)
def test_grammar_holds_the_answer_to_the_tool_choice(ask, fields, allowed, refused):
    ask("", **fields)
    assert [text for text in allowed if not accepts(ask.grammar, text)] == []
    assert [text for text in refused if accepts(ask.grammar, text)] == []


def test_schema_that_is_not_supported_limits_a_tool_to_json_in_auto_mode(ask):
    schema = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
    odd = {"type": "function", "function": {"name": "odd", "parameters": schema}}
    ask("", tools=[odd, ADD])
    assert accepts(ask.grammar, CALL_ADD.replace("add", "odd"))
    assert not accepts(ask.grammar, CALL_ADD.replace("3", '"3"'))
    for fields in (
        {"tool_choice": "required"},
        {"tools": [ADD, odd | {"function": odd["function"] | {"strict": True}}]},
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask("", **({"tools": [ADD, odd]} | fields))
        assert error.value.param == "tools[1].function.parameters"
        assert error.value.code == "invalid_grammar"


def function(**fields):
    return {"type": "function", "function": {"name": "f"} | fields}


LARGE = [
    function(name=f"f{index}", parameters={"type": "object", "title": f"{index}" + "x" * 2048})
    for index in range(128)
]


def test_tools_too_large_together_are_limited_to_json_in_auto_mode(ask):
    """Regression: 128 tools of 2 kB were a 400, though each of them is supported.

    Each request also compiled everything again, and the 128 schemas displaced all other grammars.
    """
    now = NOW | {"function": NOW["function"] | {"strict": True}}
    ask("", model="long")
    kept = ask.grammar
    with pytest.raises(openai.BadRequestError) as error:
        ask("", model="long", tools=LARGE, tool_choice="required")
    assert (error.value.param, error.value.code) == ("tools", "invalid_grammar")
    ask("", model="long", tools=[*LARGE[1:], now])
    assert accepts(ask.grammar, CALL_ADD.replace("add", "f9"))
    assert not accepts(ask.grammar, CALL_NOW.replace("{}", '{"a": 1}'))
    ask("", model="long")
    assert ask.grammar is kept


def test_error_of_a_grammar_is_cached(models, monkeypatch):
    """Regression: a grammar that cannot be used was compiled anew for each request."""
    compiler = GrammarCompiler(models["hermes"].tokenizer)
    source = GrammarSource("regex", "(")
    with pytest.raises(GrammarError):
        compiler.compile(source)
    monkeypatch.setattr(compiler, "_compile", None)
    with pytest.raises(GrammarError):
        compiler.compile(source)


RESULT = {"role": "tool", "content": "7", "tool_call_id": "call_9"}


@pytest.mark.parametrize(
    ("param", "code", "fields"),
    [
        (
            "tools",
            "array_above_max_length",
            {"tools": [function(name=f"f{i}") for i in range(1000)]},
        ),
        ("tools[0].function.name", "invalid_value", {"tools": [function(name="<|im_end|>")]}),
        ("tools[0].function.name", "invalid_value", {"tools": [function(name="f" * 65)]}),
        ("tools[1].function.name", "invalid_value", {"tools": [function(), function()]}),
        (
            "tools[0].function.parameters",
            "invalid_value",
            {"tools": [function(parameters={"type": "string"})]},
        ),
        (
            "tools[0].function.parameters",
            "invalid_grammar",
            {"tools": [function(parameters={"properties": {"a": {"type": "strng"}}}, strict=True)]},
        ),
        ("tools[0].function.parameters", "invalid_type", {"tools": [function(parameters=[])]}),
        ("tools[0].type", "unsupported_value", {"tools": [{"type": "web_search"}]}),
        (
            "tools[0].type",
            "unsupported_value",
            {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
        ),
        (
            "tools[0].function",
            "missing_required_parameter",
            {"tools": [{"type": "function", "name": "f"}]},
        ),
        ("tool_choice", "invalid_value", {"tools": [], "tool_choice": "required"}),
        ("tool_choice", "invalid_value", {"tool_choice": "any"}),
        ("tool_choice.function.name", "invalid_value", {"tool_choice": function(name="g")}),
        (
            "tool_choice.type",
            "unsupported_value",
            {"tool_choice": {"type": "custom", "custom": {"name": "add"}}},
        ),
        (
            "function_call.name",
            "invalid_value",
            {"functions": FUNCTIONS, "function_call": {"name": "g"}},
        ),
        ("functions", "invalid_value", {"tools": [ADD], "functions": FUNCTIONS}),
        ("guided_regex", "invalid_value", {"extra_body": {"guided_regex": "a"}}),
        ("messages[1].tool_call_id", "invalid_value", {"messages": [USER, RESULT]}),
        (
            "messages[1].name",
            "missing_required_parameter",
            {"messages": [USER, {"role": "function", "content": ""}]},
        ),
        (
            "messages[1].content",
            "invalid_value",
            {"messages": [USER, {"role": "user", "content": None}]},
        ),
    ],
)
def test_tools_that_cannot_be_used_return_400_naming_the_field(ask, param, code, fields):
    with pytest.raises(openai.BadRequestError) as error:
        ask("", **fields)
    assert (error.value.param, error.value.code) == (param, code)
    assert ask(CALL_ADD).finish_reason == "tool_calls"  # the server goes on


def test_model_list_says_how_models_call_tools(client):
    tools = {model.id: model.tools for model in client.models.list()}
    assert tools == {
        "hermes": "trained",
        "prompted": "prompted",
        "mistral": "trained",
        "long": "trained",
    }


# --- without a server -------------------------------------------------------------------------

NOTATIONS = {
    "hermes": TOOL_TEMPLATE,
    "llama3": LLAMA_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
    "mistral11": DEVSTRAL_TEMPLATE,
    None: TEMPLATE,
}


@pytest.mark.parametrize(
    ("name", "source"), [*NOTATIONS.items(), (None, OTHER_TEMPLATE), (None, "{% if x %}")]
)
def test_notation_is_detected_by_rendering_a_call(name, source):
    notation = tool_calls.detect_notation(ChatTemplate(source))
    assert (notation and notation.name) == name


ANSWERS = [
    (tool_calls.HERMES, f"a <tool\n{CALL_ADD} {CALL_NOW} b", "a <toolb", ["add", "now"]),
    (tool_calls.HERMES, f"{CALL_ADD[:45]}", "", ["add"]),
    (tool_calls.LLAMA3, '<|python_tag|>{"name": "now", "parameters": {}}', "", ["now"]),
    (tool_calls.LLAMA3, '\n{"name": "add", "parameters": {"a": 1}}', "", ["add"]),
    (tool_calls.LLAMA3, 'See {"name": "add", "parameters": {}}', None, []),
    (tool_calls.MISTRAL, '[1] [TOOL_CALLS] [{"name": "now", "arguments": {}}]', "[1]", ["now"]),
    (
        tool_calls.MISTRAL11,
        '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]add[ARGS]{"a": 1}',
        "",
        ["now", "add"],
    ),
]


@pytest.mark.parametrize(("notation", "text", "content", "names"), ANSWERS)
def test_parser_result_does_not_depend_on_the_pieces(notation, text, content, names):
    def parse(sizes):
        parser, parts, rest = ToolCallParser(notation, ["add", "now"]), [], text
        while rest:
            size = sizes()
            parts += parser.push(rest[:size])
            rest = rest[size:]
        parts += parser.flush()
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        calls = [part for part in parts if isinstance(part, CallPart)]
        arguments = [
            "".join(part.arguments for part in calls if part.index == index)
            for index in range(parser.num_calls)
        ]
        return "".join(texts), [part.name for part in calls if part.name], arguments

    whole = parse(lambda: len(text))
    assert whole[:2] == (text if content is None else content, names)
    rng = random.Random(0)
    for limit in (1, 2, 7, 7, 7):
        assert parse(lambda limit=limit: rng.randint(1, limit)) == whole


@pytest.mark.parametrize("template", NOTATIONS.values())
def test_required_grammar_allows_what_the_parser_reads(template):
    """Write a call token by token, always the first token that the grammar allows."""
    model = SimpleNamespace(tokenizer=scripted.tokenizer(template, ENCODING))
    notation = tool_calls.detect_notation(model.tokenizer.chat_template) or tool_calls.HERMES
    compiler = scripted.model("x", template, ENCODING).grammar_compiler
    source = tool_calls.tool_grammar(
        notation, {"now": {"enum": [{"x": "}"}]}}, ENCODING, is_required=True, max_calls=1
    )
    matcher, ids = compiler.compile(source).matcher(), []
    while not matcher.is_finished:
        words = matcher.token_bitmask()
        (token,) = [id for id in range(262) if words[id // 32] >> (id % 32) & 1][:1]
        matcher.accept(token)
        ids.append(token)
    parser = ToolCallParser(notation, ["now"], is_streaming=False)
    assert parser.push(ENCODING.decode(ids)) == [CallPart(0, "now", '{"x": "}"}')]


def test_message_of_the_assistant_without_content_is_taken(ask):
    """OpenAI's own form of a refusal was a 400."""
    refusal = {"role": "assistant", "content": None, "refusal": "I will not add."}
    ask("Hi.", messages=[USER, refusal, USER])
    assert "I will not add." in ask.prompt
