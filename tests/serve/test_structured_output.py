"""Structured output of a tiny random model over HTTP: every finished text has its format."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

import bpe
from serve.api.structured_output import checked_schema, schema_source
from serve.models import grammar
from serve.models.grammar import GrammarCompiler, GrammarSource
from tests.serve import scripted

pytestmark = pytest.mark.heavy

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["size", "count", "tags"],
}
CONTRADICTION = {"type": "object", "properties": {"a": False}, "required": ["a"]}
MESSAGES = [{"role": "user", "content": "How many?"}]


@pytest.fixture(scope="module")
def client(tiny_address):
    with OpenAI(base_url=f"{tiny_address}/v1", api_key="any", max_retries=0) as client:
        yield client


def chat(client, **fields):
    return client.chat.completions.create(model="tiny", messages=MESSAGES, **fields)


@pytest.mark.parametrize(
    ("seed", "response_format"),
    [
        (0, {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
        (1, {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
        (2, {"type": "json_object", "schema": SCHEMA}),  # llama.cpp's spelling
    ],
)
def test_json_schema_random_model_answers_valid_document(client, seed, response_format):
    choice = chat(client, response_format=response_format, seed=seed, max_tokens=200).choices[0]
    assert choice.finish_reason == "stop"
    document = json.loads(choice.message.content)
    jsonschema.validate(document, SCHEMA)
    assert document.keys() == SCHEMA["properties"].keys()
    assert choice.message.content == json.dumps(document, ensure_ascii=False)


def test_parse_pydantic_model_returns_instance(client):
    class Answer(BaseModel):
        is_true: bool
        rating: int

    completion = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Answer, seed=1, max_tokens=200
    )
    assert isinstance(completion.choices[0].message.parsed, Answer)


def test_json_object_cut_at_max_tokens_is_reported_as_length(client):
    response_format = {"type": "json_object"}
    choice = chat(client, response_format=response_format, seed=0, max_tokens=1).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content == "{"


ARGUMENTS = {
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "s": {"enum": ["a", "b"]}},
    "required": ["n", "s"],
}
TOOLS = [  # short, because the context is 512 bytes
    {"type": "function", "function": {"name": "f", "parameters": ARGUMENTS}},
    {"type": "function", "function": {"name": "g"}},
]


def test_required_call_of_random_model_fits_the_schema(client):
    """A random model writes anything, so only the grammar can make it call a tool."""
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    for choice in chat(client, **fields, seed=0, n=4).choices:
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        schema = ARGUMENTS if call.function.name == "f" else {"const": {}}
        jsonschema.validate(json.loads(call.function.arguments), schema)


def test_streamed_call_of_named_tool_fits_the_schema(client):
    choice = {"type": "function", "function": {"name": "f"}}
    chunks = chat(client, tools=TOOLS, tool_choice=choice, seed=0, stream=True)
    calls = [call.function for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    assert calls[0].name == "f" and len(calls) > 2
    jsonschema.validate(json.loads("".join(call.arguments for call in calls)), ARGUMENTS)


def test_text_beside_tools_follows_the_response_format(client):
    fields = {"tools": TOOLS, "response_format": {"type": "json_object"}, "max_tokens": 120}
    choices = chat(client, **fields, seed=0, n=8).choices
    texts = [choice for choice in choices if not choice.message.tool_calls]
    assert texts
    for choice in texts:
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            json.loads(choice.message.content)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}),
        ({"guided_choice": ["ä", "ö"]}, {"ä", "ö"}),
        ({"structured_outputs": {"regex": "[ab]{2}"}}, {"aa", "ab", "ba", "bb"}),
        ({"guided_regex": "x|y"}, {"x", "y"}),
        ({"structured_outputs": {"json": {"enum": [1, None]}}}, {"1", "null"}),
        ({"guided_json": '{"const": [1, 2]}'}, {"[1, 2]"}),
        ({"json_schema": {"type": "boolean"}}, {"true", "false"}),
        ({"grammar": 'root ::= "a" | "b" "c"'}, {"a", "bc"}),
        ({"guided_grammar": 'start: "a" | "b" "c"'}, {"a", "bc"}),
    ],
)
def test_formats_of_other_servers_limit_text_of_every_route(client, fields, expected):
    texts = {choice.message.content for choice in chat(client, n=4, extra_body=fields).choices}
    completion = client.completions.create(
        model="tiny", prompt="a", n=2, max_tokens=20, extra_body=fields
    )
    edit = client.post(
        "/edits", body={"model": "tiny", "input": "a", "instruction": "b"} | fields, cast_to=object
    )
    texts |= {choice.text for choice in completion.choices} | {edit["choices"][0]["text"]}
    assert texts <= expected


def test_streamed_answer_with_schema_equals_whole_answer(client):
    fields = {"response_format": {"type": "json_object"}, "seed": 5, "max_tokens": 40}
    text = chat(client, **fields).choices[0].message.content
    chunks = chat(client, stream=True, **fields)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_rows_with_and_without_schema_in_one_batch_equal_rows_alone(client):
    """Eight choices share decoding steps; four of them have a grammar."""
    fields = {"seed": 3, "max_tokens": 24, "n": 4}
    limited = fields | {"response_format": {"type": "json_object"}}
    alone = [chat(client, **limited), chat(client, **fields)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda fields: chat(client, **fields), [limited, fields]))
    texts = [
        [[choice.message.content for choice in one.choices] for one in pair]
        for pair in (alone, together)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_json": {"enum": []}}, "guided_json"),
        ({"guided_json": {"type": "integer", "minimum": 2, "maximum": 1}}, "guided_json"),
        ({"guided_json": {"$ref": "https://example.com/schema"}}, "guided_json"),
        ({"guided_json": {"$ref": "#"}}, "guided_json"),
        ({"guided_json": CONTRADICTION}, "guided_json"),
        ({"guided_json": {"enum": [1], "type": "string"}}, "guided_json"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
        ({"json_schema": {"not": {}}}, "json_schema"),
        ({"guided_json": {"enum": ["x" * 2**19]}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"structured_outputs": {"structural_tag": {"a": 1}}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ],
)
def test_format_that_cannot_be_used_returns_400_naming_field(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, extra_body=fields, max_tokens=5)
    assert error.value.param == param
    assert chat(client, max_tokens=1).choices  # the server goes on


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
        {"type": "string", "pattern": "^(a|b)*a(a|b){500}$"},
        {"type": "array", "maxItems": 10**9, "items": {"type": "string", "maxLength": 10**9}},
        {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
         "$ref": "#/$defs/n"},
        {"properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
        {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)}},
    ],
    ids=["nested counts", "exponential", "huge bounds", "recursion", "many properties", "chain"],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_expensive_schema_is_answered_or_refused(client, schema):
    try:
        choice = chat(client, extra_body={"guided_json": schema}, max_tokens=30).choices[0]
    except openai.BadRequestError as error:
        assert error.code == "invalid_grammar"
    else:
        assert choice.finish_reason in ("stop", "length")


class Model:
    """A loaded model that has no engine."""

    def __init__(self):
        self.is_idle = False
        self.grammar_compiler = GrammarCompiler(scripted.tokenizer(None))


def grammar_threads():
    return [t for t in threading.enumerate() if t.name == "build-vocabulary-trie"]


def test_trie_is_built_once_when_the_model_is_idle(monkeypatch):
    """Regression: the first request with a grammar waited a second for the trie."""
    monkeypatch.setattr(grammar, "IDLE_SECONDS", 0.05)
    built = []
    create = grammar._Vocabulary
    monkeypatch.setattr(grammar, "_Vocabulary", lambda x: built.append(x) or create(x))
    model, before = Model(), grammar_threads()
    grammar.build_when_idle(model)
    (thread,) = [t for t in grammar_threads() if t not in before]
    thread.join(0.2)
    assert thread.is_alive() and not built  # a busy model is left alone
    model.is_idle = True
    with ThreadPoolExecutor(4) as pool:
        grammars = pool.map(model.grammar_compiler.compile, [GrammarSource("regex", "a")] * 4)
    thread.join(10)
    assert len([*grammars]) == 4 and len(built) == 1


def test_thread_that_waits_for_an_idle_model_ends_with_it(monkeypatch):
    monkeypatch.setattr(grammar, "IDLE_SECONDS", 0.05)
    model, before = Model(), grammar_threads()
    grammar.build_when_idle(model)
    (thread,) = [t for t in grammar_threads() if t not in before]
    del model
    thread.join(10)
    assert not thread.is_alive()


def test_bitmask_allows_exactly_the_bytes_that_continue_the_grammar():
    matcher = GrammarCompiler(scripted.tokenizer(None)).compile(GrammarSource("regex", "ab|a?c"))
    state = matcher.matcher()
    steps = []
    for byte in b"ab":
        bits = np.unpackbits(state.token_bitmask().view(np.uint8), bitorder="little")
        steps.append(bytes(np.flatnonzero(bits[:256]).astype(np.uint8)))
        state.accept(byte)
    assert steps == [b"ac", b"bc"]
    assert state.is_finished


@pytest.mark.parametrize("num_special_tokens", [31, 32, 33])
def test_bitmask_has_a_bit_per_token_and_no_word_more(num_special_tokens):
    """Regression: with 49,152 tokens, a multiple of 32, every step with a grammar failed."""
    special_tokens = {f"<{i}>": 256 + i for i in range(num_special_tokens)}
    tokenizer = bpe.Tokenizer(
        encoding=scripted.byte_encoding(special_tokens), bos_id=None, eos_id=256
    )
    grammar = GrammarCompiler(tokenizer).compile(GrammarSource("regex", "a"))
    assert len(grammar.matcher().token_bitmask()) == -(-(256 + num_special_tokens) // 32)


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"base": {"properties": {"a": {"const": 1}}, "required": ["a"]}},
         "$ref": "#/$defs/base", "properties": {"b": {"const": 2}}, "required": ["b"]},
        {"properties": {"a": {"const": 1}}, "required": ["a"],
         "anyOf": [{"properties": {"b": {"const": 2}}, "required": ["b"]}]},
        {"allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]},
                   {"properties": {"b": {"const": 2}}, "required": ["b"]}]},
    ],
    ids=["$ref", "anyOf", "allOf"],
)  # fmt: skip
def test_schemas_of_one_object_do_not_forbid_the_properties_of_each_other(schema):
    """Each was closed to the properties of the other, so that no document was allowed."""
    compiler = GrammarCompiler(scripted.tokenizer(None))
    matcher = compiler.compile(schema_source("schema", schema)).matcher()
    for byte in b'{"a": 1, "b": 2}':
        bits = np.unpackbits(matcher.token_bitmask().view(np.uint8), bitorder="little")
        assert bits[byte]
        matcher.accept(byte)


def test_one_branch_of_all_of_leaves_objects_closed():
    """Pydantic before 2.9 writes a field with a default so; all objects of the document opened."""
    schema = {
        "$defs": {"e": {"enum": ["x"]}},
        "properties": {"e": {"allOf": [{"$ref": "#/$defs/e"}]}},
    }
    assert checked_schema("schema", schema)["additionalProperties"] is False
