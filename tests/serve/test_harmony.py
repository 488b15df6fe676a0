"""gpt-oss over HTTP with the official client: its chat template, channels, calls and grammars.

The golden data is from openai-harmony, see `tests/golden/harmony/make_harmony.py`.
"""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import openai
import pytest

import bpe
from serve.api.requests import FunctionDefinition, Message
from serve.api.tools import prompt_with_tools, template_messages
from serve.cli.local_completion import LocalCompletion, Options, chat_prompt
from serve.models.grammar import GrammarCompiler
from serve.models.harmony import MARKERS, HarmonyParser, harmony_grammar, marker_ids
from serve.models.tool_calls import HARMONY, CallPart, ReasoningPart, TextPart
from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.serve.test_tools import ADD, NOW, USER, calls_of

pytestmark = pytest.mark.heavy

FOLDER = Path(__file__).parents[1] / "golden/harmony"
GOLDEN = json.loads((FOLDER / "harmony.json").read_text(encoding="utf-8"))
TEMPLATE = bpe.ChatTemplate((FOLDER / "gpt-oss.jinja").read_text(encoding="utf-8"))
SPECIAL = {"<|endoftext|>": 256} | {marker: 257 + i for i, marker in enumerate(MARKERS)}
ENCODING = scripted.byte_encoding(SPECIAL)
RETURN, CALL = SPECIAL["<|return|>"], SPECIAL["<|call|>"]

THINK = "<|channel|>analysis<|message|>A sum.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>Let me add.<|end|><|start|>assistant"
CALL_ADD = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 3, "b": 4}'
CALL_NOW = " to=functions.now<|channel|>commentary json<|message|>{}"
FINAL = "<|channel|>final<|message|>It is 7."


@pytest.fixture(scope="module")
def model():
    model = scripted.model("oss", TEMPLATE.source, ENCODING)
    stop_ids = frozenset({SPECIAL["<|endoftext|>"], RETURN, CALL})
    tokenizer = replace(model.tokenizer, eos_id=RETURN, stop_ids=stop_ids)
    return replace(model, tokenizer=tokenizer, context=4096)


@pytest.fixture(scope="module")
def client(model):
    with (
        scripted.serve_models(model) as address,
        open_client(address, strict=True) as client,
    ):
        yield client


@pytest.fixture
def ask(client, model):
    """Return a function that asks the model, whose answer is decided."""

    def ask(answer, *, messages=(USER,), **fields):
        model.engine.answer = answer
        result = client.chat.completions.create(model="oss", messages=[*messages], **fields)
        result = [*result] if fields.get("stream") else result.choices[0]
        ask.prompt = ENCODING.decode(model.engine.requests[-1].prompt)
        ask.grammar = model.engine.requests[-1].grammar
        return result

    return ask


def accepts(grammar, text):
    """Return whether a grammar allows a text and its end."""
    matcher = grammar.matcher()
    for token in [*ENCODING.encode(text, allowed_special="all"), RETURN]:
        if not matcher.token_bitmask()[token // 32] >> (token % 32) & 1:
            return False
        matcher.accept(token)
    return True


# --- against openai-harmony -------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["prompts"])
def test_prompt_equals_openai_harmony(case):
    messages, tools = prompt_with_tools(
        TEMPLATE,
        HARMONY,
        template_messages([Message.model_validate(message) for message in case["messages"]]),
        [FunctionDefinition.model_validate(tool) for tool in case["tools"]],
    )
    text = TEMPLATE.render(messages, tools=tools)
    text = re.sub("Current date: [0-9-]+", f"Current date: {GOLDEN['date']}", text)
    # The template writes a blank line after instructions even if no tools follow.
    assert text.replace("Be brief.\n\n<|end|>", "Be brief.<|end|>") == case["text"]


def read(text, sizes, *, is_streaming):
    """Return the content, reasoning and calls that the parser finds, in the tokens of a text."""
    parser, ids, parts = HarmonyParser(["add", "now"], is_streaming=is_streaming), {}, []
    offset, decoder, pending = 0, bpe.StreamDecoder(ENCODING), ""
    for id in ENCODING.encode(text, allowed_special="all"):
        if id in (RETURN, CALL):
            break
        if id in marker_ids(ENCODING):
            ids[offset] = id
        piece = decoder.push(id)
        pending, offset = pending + piece, offset + len(piece)
        if len(pending) >= sizes():
            parts += parser.push(pending, ids)
            pending, ids = "", {}
    parts += parser.push(pending, ids) + parser.flush()
    calls = [part for part in parts if isinstance(part, CallPart)]
    names = {part.index: part.name for part in calls if part.name}
    arguments = dict.fromkeys(names, "")
    for part in calls:
        arguments[part.index] += part.arguments
    return (
        "".join(part.text for part in parts if isinstance(part, TextPart)),
        "".join(part.text for part in parts if isinstance(part, ReasoningPart)),
        [(name, arguments[index]) for index, name in names.items()],
    )


def expected(messages):
    texts, reasoning, calls = [], [], []
    for channel, recipient, text in messages:
        if recipient in ("functions.add", "functions.now"):
            calls.append((recipient.removeprefix("functions."), text))
        elif recipient is None and channel != "analysis":
            texts.append(text)
        else:
            reasoning.append(text)
    return texts, reasoning, calls


def joined(texts):
    """Return texts with a line break before each one that follows another."""
    result = ""
    for text in texts:
        result += f"\n{text}" if result else text
    return result


@pytest.mark.parametrize("is_streaming", [False, True])
def test_parser_finds_the_messages_of_openai_harmony(is_streaming):
    """The result does not depend on the pieces in which the text arrives."""
    rng = random.Random(0)
    for case in GOLDEN["answers"]:
        texts, reasoning, calls = expected(case["messages"])
        for limit in (1, 7, 10_000):
            sizes = lambda limit=limit: rng.randint(1, limit)  # noqa: E731
            found = read(case["text"], sizes, is_streaming=is_streaming)
            assert found == (joined(texts), joined(reasoning), calls), case


# --- over HTTP --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "content", "reasoning", "calls"),
    [
        (THINK + FINAL, "It is 7.", "A sum.", []),
        (THINK + CALL_ADD, None, "A sum.", [("add", {"a": 3, "b": 4})]),
        (THINK + PREAMBLE + CALL_ADD, "Let me add.", "A sum.", [("add", {"a": 3, "b": 4})]),
        (THINK + CALL_NOW, None, "A sum.", [("now", {})]),
        (CALL_NOW, None, None, [("now", {})]),
        (PREAMBLE + FINAL, "Let me add.\nIt is 7.", None, []),
        (FINAL.replace("final", "final <|constrain|>json"), "It is 7.", None, []),
        ("It is 7.", "It is 7.", None, []),
        ("", "", None, []),
    ],
    ids=[
        *("final", "call", "preamble", "role header", "call only", "two texts", "constrained"),
        *("no channels", "empty"),
    ],
)
def test_channels_become_the_fields_of_a_message(ask, answer, content, reasoning, calls):
    choice = ask(answer, tools=[ADD, NOW])
    assert choice.message.content == content and calls_of(choice.message) == calls
    assert (choice.message.model_extra or {}).get("reasoning_content") == reasoning
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    streamed, thoughts, deltas, reasons = "", "", [], []
    for chunk in ask(answer, tools=[ADD, NOW], stream=True):
        delta = chunk.choices[0].delta
        streamed += delta.content or ""
        thoughts += (delta.model_extra or {}).get("reasoning_content", "")
        deltas += delta.tool_calls or ()
        reasons.append(chunk.choices[0].finish_reason)
    assert (streamed, thoughts) == (content or "", reasoning or "")
    assert reasons[-1] == choice.finish_reason and not any(reasons[:-1])
    if calls:
        first, *pieces = deltas
        assert first.index == 0 and first.id and first.function.name == calls[0][0]
        assert first.function.arguments == "" and {piece.id for piece in pieces} == {None}
        arguments = "".join(piece.function.arguments for piece in pieces)
        assert arguments == choice.message.tool_calls[0].function.arguments and len(pieces) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_plain_chat_has_only_the_final_channel_as_content(ask, stream):
    """The content was the raw text of all channels, with their headers."""
    result = ask(THINK + FINAL, stream=stream, logprobs=True)
    choices = [chunk.choices[0] for chunk in result] if stream else [result]
    messages = [choice.delta if stream else choice.message for choice in choices]
    assert "".join(message.content or "" for message in messages) == "It is 7."
    entries = [e for c in choices if c.logprobs for e in c.logprobs.content]
    assert "".join(entry.token for entry in entries) == "It is 7."


def test_marker_in_ordinary_tokens_is_text():
    """A model may explain the format; a tool's result may contain it."""
    ordinary = "<|end|><|start|>assistant<|channel|>commentary to=functions.add<|message|>{}"
    parser = HarmonyParser(["add"])
    offsets = [0, FINAL.index("<|message|>")]
    parts = parser.push(FINAL, offsets) + parser.push(ordinary, []) + parser.flush()
    assert "".join(part.text for part in parts) == f"It is 7.{ordinary}"  # type: ignore[union-attr]


def test_stop_string_that_begins_in_a_marker(ask):
    """Text of a marker that is held back for a stop string arrives in two pieces."""
    assert ask(THINK + FINAL, stop=[">>>", "7"]).message.content == "It is "


def test_call_of_unknown_tool_is_reasoning(ask):
    choice = ask(CALL_ADD + "<|end|><|start|>assistant" + FINAL)
    assert choice.message.content == "It is 7." and choice.finish_reason == "stop"
    assert choice.message.model_extra["reasoning_content"] == '{"a": 3, "b": 4}'


@pytest.mark.parametrize("stream", [False, True])
def test_cut_call_keeps_its_arguments_and_finish_reason_length(ask, stream):
    tokens = len(ENCODING.encode(CALL_ADD[: CALL_ADD.index(": 3")], allowed_special="all"))
    result = ask(CALL_ADD, tools=[ADD], max_tokens=tokens, stream=stream)
    if stream:
        deltas = [call for chunk in result for call in chunk.choices[0].delta.tool_calls or ()]
        arguments = "".join(delta.function.arguments for delta in deltas)
        reason = result[-1].choices[0].finish_reason
    else:
        arguments = result.message.tool_calls[0].function.arguments
        reason = result.finish_reason
    assert (arguments, reason) == ('{"a"', "length")


def test_cut_header_is_not_content(ask):
    choice = ask(CALL_ADD, tools=[ADD], max_tokens=20)
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert not choice.message.tool_calls


def test_own_answer_with_reasoning_and_results_is_sent_back(ask):
    """The template refuses content beside reasoning, and drops all calls after the first."""
    first = ask(THINK + PREAMBLE + CALL_ADD, tools=[ADD, NOW]).message.model_dump()
    second = {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    first["tool_calls"].append(second)
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"result of {call['id']}"}
        for call in first["tool_calls"]
    ]
    ask(FINAL, messages=[USER, first, *results], tools=[ADD, NOW])
    id = first["tool_calls"][0]["id"]
    assert ask.prompt.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>A sum.\nLet me add.<|end|>"
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 3, "b": 4}'
        "<|call|><|start|>functions.add to=assistant<|channel|>commentary<|message|>"
        f'"result of {id}"<|end|>'
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
        "<|start|>functions.now to=assistant<|channel|>commentary<|message|>"
        '"result of call_2"<|end|><|start|>assistant'
    )


def test_continued_message_begins_in_the_final_channel(ask):
    messages = [USER, {"role": "assistant", "content": "It"}]
    fields = {"continue_final_message": True}
    choice = ask(" is 7.", messages=messages, extra_body=fields)
    assert ask.prompt.endswith("<|channel|>final<|message|>It")
    assert choice.message.content == " is 7."
    ask("", messages=messages, tools=[ADD], extra_body=fields)
    assert accepts(ask.grammar, " is 7.")
    assert accepts(ask.grammar, f" is 7.<|end|><|start|>assistant{CALL_ADD}")


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_body": {"chat_template_kwargs": {"reasoning_effort": "low"}}},
        {"reasoning_effort": "low"},
    ],
)
def test_reasoning_effort_is_a_variable_of_the_template(ask, fields):
    ask(FINAL, **fields)
    assert "\nReasoning: low\n" in ask.prompt


def test_response_with_reasoning_effort_has_it_in_the_prompt(client, model):
    raw = client.responses.with_raw_response.create(
        model="oss", input="3 + 4?", reasoning={"effort": "high"}
    )
    assert "\nReasoning: high\n" in ENCODING.decode(model.engine.requests[-1].prompt)
    assert raw.parse().reasoning.effort == "high"
    assert "x-pellucid-ignored" not in raw.headers


@pytest.mark.parametrize("effort", ["none", "minimal", "xhigh"])
def test_reasoning_effort_that_the_model_does_not_know_returns_400(ask, client, effort):
    with pytest.raises(openai.BadRequestError) as error:
        ask(FINAL, reasoning_effort=effort)
    assert (error.value.param, error.value.code) == ("reasoning_effort", "unsupported_value")
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="oss", input="3 + 4?", reasoning={"effort": effort})
    assert (error.value.param, error.value.code) == ("reasoning.effort", "unsupported_value")


def test_usage_counts_the_tokens_of_reasoning(client, model):
    """The vocabulary has a token for each byte, so the text has as many tokens as characters."""
    model.engine.answer = THINK + THINK.replace("A sum.", "Of two.") + FINAL
    fields = {"model": "oss", "messages": [USER]}
    usage = client.chat.completions.create(**fields, n=2).usage
    assert usage.completion_tokens_details.reasoning_tokens == 2 * len("A sum.Of two.")
    *_, last = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage.completion_tokens_details.reasoning_tokens == len("A sum.Of two.")
    usage = client.responses.create(model="oss", input="3 + 4?").usage
    assert usage.output_tokens_details.reasoning_tokens == len("A sum.Of two.")


def test_result_of_another_call_returns_400(ask):
    """The template would write it as the result of the last call."""
    call = {"name": "now", "arguments": "{}"}
    messages = [
        USER,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "add", "content": "7"},
    ]
    with pytest.raises(openai.BadRequestError) as error:
        ask(FINAL, messages=messages)
    assert error.value.param == "messages"


def test_many_calls_and_results_are_placed_in_linear_time():
    """4,000 calls with results took 8 million comparisons."""
    count, reads = 4000, 0

    class Result(dict):
        def get(self, *args):
            nonlocal reads
            reads += 1
            return super().get(*args)

    function = {"name": "now", "arguments": {}}
    calls = [{"id": f"call_{i}", "function": function} for i in range(count)]
    results = [
        Result(role="tool", tool_call_id=f"call_{i}", name="now", content=f"{i}")
        for i in reversed(range(count))
    ]
    assistant = {"role": "assistant", "content": "", "tool_calls": calls}
    messages, _ = prompt_with_tools(TEMPLATE, HARMONY, [USER, assistant, *results], [])
    assert [m["content"] for m in messages[2::2]] == [f"{i}" for i in range(count)]
    assert reads <= 4 * count


def test_functions_of_2023_return_function_call(ask):
    choice = ask(THINK + CALL_ADD, functions=[ADD["function"]])
    assert choice.finish_reason == "function_call" and choice.message.function_call.name == "add"


def test_edit_has_only_the_final_channel(client, model):
    model.engine.answer = THINK + FINAL
    response = client.post(
        "/edits", body={"model": "oss", "instruction": "add", "input": "3"}, cast_to=object
    )
    assert response["choices"][0]["text"] == "It is 7."


def test_command_line_chat_prints_only_the_final_channel(model):
    """The reply had all channels, and the template refused it in the next question."""

    class Engine(scripted.ScriptedEngine):
        def generate(self, request):
            return (
                self.token(id, request)
                for id in ENCODING.encode(THINK + FINAL, allowed_special="all")
            )

    chat = replace(model, engine=Engine(ENCODING))
    reply = LocalCompletion(chat, chat_prompt(chat, [USER]), Options(), is_chat=True)
    assert "".join(reply) == reply.text == "It is 7."


# --- grammars ---------------------------------------------------------------------------------

SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}}},
}
JSON = FINAL.replace("It is 7.", '{"a": 1}')
NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("fields", "allowed", "refused"),
    [
        (
            {"tools": [ADD, NOW]},
            [FINAL, CALL_ADD, CALL_NOW, THINK + PREAMBLE + CALL_ADD, THINK + THINK + FINAL],
            [
                *("Hi.", "", THINK, PREAMBLE, FINAL + PREAMBLE, CALL_ADD + " "),
                *(CALL_ADD[:-1], CALL_ADD.replace("3", '"3"'), CALL_ADD.replace("add", "x")),
                f"{CALL_NOW}<|end|><|start|>assistant{CALL_ADD}",
            ],
        ),
        (
            {"tools": [ADD, NOW], "tool_choice": "required"},
            [CALL_ADD, THINK + CALL_ADD, CALL_NOW, CALL_ADD.replace(" <|constrain|>json", "")],
            [FINAL, THINK + FINAL, CALL_ADD.replace("3", '"3"'), THINK],
        ),
        ({"tools": [ADD, NOW], "tool_choice": NAMED}, [CALL_NOW], [CALL_ADD, FINAL]),
        (
            {"tools": [ADD], "response_format": SCHEMA},
            [JSON, THINK + JSON, CALL_ADD],
            [FINAL, '{"a": 1}', JSON.replace("1", "2")],
        ),
        (
            {"response_format": SCHEMA},
            [JSON, THINK + JSON, JSON.replace("final", "final <|constrain|>json")],
            [FINAL, THINK + FINAL, CALL_ADD, '{"a": 1}', JSON.replace("1", "2")],
        ),
        ({"response_format": {"type": "json_object"}}, [THINK + JSON], [FINAL]),
        ({"extra_body": {"guided_regex": "It .*[.]"}}, [THINK + FINAL], [JSON]),
        ({"extra_body": {"guided_choice": ["It is 7."]}}, [THINK + FINAL], [JSON]),
        ({"extra_body": {"grammar": 'root ::= "It is " [0-9] "."'}}, [THINK + FINAL], [JSON]),
    ],
    ids=[
        *("auto", "required", "named", "tools and schema", "schema", "json_object", "regex"),
        *("choice", "gbnf"),
    ],
)
def test_grammar_holds_the_channels(ask, fields, allowed, refused):
    ask("", **fields)
    assert [text for text in allowed if not accepts(ask.grammar, text)] == []
    assert [text for text in refused if accepts(ask.grammar, text)] == []


def test_schema_with_an_error_is_named(ask):
    bad = ADD | {"function": {"name": "add", "parameters": {"properties": {"a": {"type": "x"}}}}}
    for fields, param in (
        ({"tools": [bad], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask("", **fields)
        assert (error.value.param, error.value.code) == (param, "invalid_grammar")


def test_card_says_trained(client):
    assert [model.tools for model in client.models.list()] == ["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("is_required", [False, True])
def test_grammar_allows_answers_in_the_vocabulary_of_gpt_oss(is_required):
    """Headers are written in tokens such as "comment", "ary" and " to"."""
    encoding = bpe.get_encoding("o200k_harmony")
    special = encoding.special_tokens
    stop_ids = frozenset({special["<|return|>"], special["<|call|>"]})
    tokenizer = replace(scripted.tokenizer(None, encoding), stop_ids=stop_ids)
    schemas = dict.fromkeys(["add", "now"], {"type": "object"})
    source = harmony_grammar(schemas, encoding, is_required=is_required)
    grammar = GrammarCompiler(tokenizer).compile(source)
    counts = {True: 0, False: 0}
    for case in GOLDEN["answers"]:
        channel, recipient, _ = case["messages"][-1]
        is_call = recipient in ("functions.add", "functions.now") and channel == "commentary"
        expected = is_call or (channel == "final" and not is_required)
        matcher, allowed = grammar.matcher(), True
        for id in encoding.encode(case["text"], allowed_special="all"):
            if not (allowed := bool(matcher.token_bitmask()[id // 32] >> (id % 32) & 1)):
                break
            matcher.accept(id)
        assert allowed == expected, case
        counts[allowed] += 1
    assert min(counts.values()) > 5


def test_response_has_the_analysis_as_a_reasoning_item(client, model):
    model.engine.answer = THINK + FINAL
    fields = {"model": "oss", "input": "3 + 4?"}
    *events, last = client.responses.create(**fields, stream=True)
    types = [event.type.removeprefix("response.") for event in events]
    assert types.index("reasoning_text.done") < types.index("output_text.delta")
    reasoning, message = last.response.output
    assert reasoning.content[0].text == "A sum."
    assert message.content[0].text == "It is 7."
    items = [{"role": "user", "content": "3 + 4?"}, reasoning.model_dump()]
    model.engine.answer = FINAL
    client.responses.create(model="oss", input=[*items, message.model_dump(), *items[:1]])
    assert "It is 7." in ENCODING.decode(model.engine.requests[-1].prompt)
