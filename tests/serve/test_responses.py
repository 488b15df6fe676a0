"""/v1/responses with the official client: decided answers of a scripted engine, real sockets."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel

from serve.api.routes.chat import build_generation
from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.serve.test_tools import ADD, CALL_ADD, CALL_NOW, ENCODING
from tests.serve.tiny_data import TOOL_TEMPLATE
from tests.waiting import wait_until

pytestmark = pytest.mark.heavy

FLAT_ADD = {"type": "function", "strict": False, **ADD["function"]}
FLAT_NOW = {"type": "function", "name": "now", "parameters": None, "strict": False}


@pytest.fixture(scope="module")
def model():
    return replace(scripted.model("hermes", TOOL_TEMPLATE, ENCODING), context=2048)


@pytest.fixture(scope="module")
def client(model):
    with scripted.serve_models(model) as address, open_client(address, strict=True) as client:
        yield client


@pytest.fixture
def ask(client, model):
    """Return a function that creates a response whose text is decided."""

    def ask(answer="Hi there.", input="Hello?", **fields):
        model.engine.answer = answer
        response = client.responses.create(model="hermes", input=input, **fields)
        ask.prompt = ENCODING.decode(model.engine.requests[-1].prompt)
        return response

    return ask


def test_text_is_one_message_item(ask):
    response = ask(instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=50)
    assert (response.status, response.output_text, response.error) == (
        "completed",
        "Hi there.",
        None,
    )
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert response.metadata == {"a": "b"}
    assert response.max_output_tokens == 50
    assert response.usage.total_tokens == response.usage.input_tokens + len("Hi there.")
    assert ask.prompt.index("Be kind.") < ask.prompt.index("Hello?")


def test_stream_has_events_in_official_order(ask):
    events = list(ask(stream=True))
    types = [event.type.removeprefix("response.") for event in events]
    deltas = types.count("output_text.delta")
    assert deltas > 1
    assert types == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type.endswith("delta")) == "Hi there."
    assert events[-1].response.output_text == "Hi there."
    assert events[0].response.output == []


def test_calls_are_items_with_streamed_arguments(ask):
    answer = f"Let me see.\n{CALL_ADD}\n{CALL_NOW}"
    events = list(ask(answer, tools=[FLAT_ADD, FLAT_NOW], stream=True))
    response = events[-1].response
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    add, now = response.output[1:]
    assert (add.name, json.loads(add.arguments)) == ("add", {"a": 3, "b": 4})
    assert (now.name, json.loads(now.arguments)) == ("now", {})
    pieces = [
        e.delta
        for e in events
        if e.type == "response.function_call_arguments.delta" and e.item_id == add.id
    ]
    assert len(pieces) > 1
    assert "".join(pieces) == add.arguments
    for event_type in ("response.output_item.added", "response.output_item.done"):
        assert [e.output_index for e in events if e.type == event_type] == [0, 1, 2]


def test_results_of_calls_and_own_items_go_into_the_prompt(ask):
    first = ask(CALL_ADD, tools=[FLAT_ADD])
    items = [
        {"role": "user", "content": "3 + 4?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        *[item.model_dump() for item in first.output],
        {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "seven"},
    ]
    ask("It is 7.", items, tools=[FLAT_ADD])
    assert "seven" in ask.prompt
    assert '"add"' in ask.prompt


def test_previous_response_is_continued_without_its_instructions(ask, client):
    first = ask("One.", "Count.", instructions="Count slowly.")
    second = ask("Two.", "Go on.", previous_response_id=first.id)
    assert "Count slowly." not in ask.prompt
    places = [ask.prompt.index(text) for text in ("Count.", "One.", "Go on.")]
    assert places == sorted(places)
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in items] == ["Count.", "One.", "Go on."]
    page = client.responses.input_items.list(second.id, order="desc", limit=2)
    assert page.has_more
    assert [item.content[0].text for item in page.data] == ["Go on.", "One."]


def test_stored_response_is_read_and_deleted(ask, client):
    response = ask()
    assert client.responses.retrieve(response.id) == response
    client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    with pytest.raises(openai.BadRequestError) as error:
        ask(previous_response_id=response.id)
    assert error.value.code == "previous_response_not_found"


def test_store_false_stores_nothing(ask, client):
    response = ask(store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_events_of_a_stored_response_are_repeated_from_a_sequence_number(ask, client):
    events = list(ask(f"Yes.\n{CALL_ADD}", tools=[FLAT_ADD], stream=True))
    id = events[0].response.id
    assert list(client.responses.retrieve(id, stream=True)) == events
    assert list(client.responses.retrieve(id, stream=True, starting_after=4)) == events[5:]


def test_background_response_is_followed_and_read(ask, client):
    response = ask(background=True)
    assert response.status == "queued"
    types = [event.type for event in client.responses.retrieve(response.id, stream=True)]
    assert types[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert types[-1] == "response.completed"
    assert client.responses.retrieve(response.id).output_text == "Hi there."


def test_background_response_is_cancelled(ask, client):
    """Regression: the stream ended without a last event."""
    response = ask("x" * 1500, "endless", background=True)
    wait_until(lambda: client.responses.retrieve(response.id).status == "in_progress")
    stream = client.responses.retrieve(response.id, stream=True)
    events = [next(stream) for _ in range(8)]
    cancelled = client.responses.cancel(response.id)
    events += stream
    assert cancelled.status == "cancelled"
    assert client.responses.retrieve(response.id) == cancelled
    assert cancelled.output[0].status == "incomplete"
    assert 0 < len(cancelled.output_text) < 1500
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[-1].type, events[-1].response) == ("response.incomplete", cancelled)
    assert list(client.responses.retrieve(response.id, stream=True)) == events
    assert client.responses.cancel(response.id) == cancelled
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(ask().id)


def test_cut_response_is_incomplete(ask):
    response = ask(max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"


def test_text_format_limits_the_text(ask, client):
    class Answer(BaseModel):
        n: int

    response = ask('{"n": 1}', text={"format": {"type": "json_object"}})
    assert json.loads(response.output_text) == {"n": 1}
    parsed = client.responses.parse(model="hermes", input="Hello?", text_format=Answer)
    assert parsed.output_parsed == Answer(n=1)


def test_logprobs_are_included_on_request(ask):
    response = ask(include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == "Hi there."
    assert not ask().output[0].content[0].logprobs


def test_truncation_auto_drops_the_oldest_turns(ask):
    long = "a" * 900
    items = [{"role": "user", "content": f"{number}{long}"} for number in range(4)]
    with pytest.raises(openai.BadRequestError) as error:
        ask(input=items)
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "input"
    ask(input=items, truncation="auto", instructions="Stay.")
    assert "Stay." in ask.prompt
    assert f"3{long}" in ask.prompt
    assert f"0{long}" not in ask.prompt


def test_truncation_drops_as_few_turns_as_possible_in_few_attempts(ask, monkeypatch):
    """Regression: the conversation was rendered again for each dropped turn."""
    attempts = []

    def count(*arguments):
        attempts.append(arguments)
        return build_generation(*arguments)

    monkeypatch.setattr("serve.api.routes.responses.build_generation", count)
    for num_turns in (1, 2, 3, 63, 64, 65):
        items = [{"role": "developer", "content": "Stay."}]
        items += [{"role": "user", "content": f"<{n}>{'a' * 200}"} for n in range(num_turns)]
        attempts.clear()
        ask(input=items, truncation="auto")
        kept = [n for n in range(num_turns) if f"<{n}>" in ask.prompt]
        assert kept == [*range(num_turns)][-len(kept) :]
        assert "Stay." in ask.prompt
        assert len(attempts) <= 1 + num_turns.bit_length()
        if len(kept) < num_turns:  # one more would not fit
            with pytest.raises(openai.BadRequestError):
                ask(input=[items[0], *items[-len(kept) - 1 :]])
    with pytest.raises(openai.BadRequestError) as error:
        ask(input="a" * 3000, truncation="auto")
    assert error.value.code == "context_length_exceeded"


def test_input_tokens_equal_those_of_the_response(ask, client):
    fields = {"model": "hermes", "input": "Hello?", "tools": [FLAT_ADD]}
    count = client.responses.input_tokens.count(**fields)
    assert count.input_tokens == ask(tools=[FLAT_ADD]).usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [FLAT_ADD, FLAT_ADD]}, "tools[1].name"),
        (
            {"tools": [FLAT_ADD], "tool_choice": {"type": "function", "name": "sub"}},
            "tool_choice.name",
        ),
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]},
         "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].id"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
         "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "conv_x", "previous_response_id": "resp_x"}, "conversation"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ],
)  # fmt: skip
def test_bad_request_names_the_field(ask, fields, param):
    with pytest.raises(openai.APIStatusError) as error:
        ask(**{"input": "Hello?"} | fields)
    assert error.value.status_code in (400, 404)
    assert error.value.param == param
    assert ask().output_text == "Hi there."


# --- conversations ----------------------------------------------------------------------------


def test_conversation_collects_the_items_of_its_responses(ask, client):
    conversation = client.conversations.create(
        items=[{"type": "message", "role": "developer", "content": "Count."}], metadata={"a": "b"}
    )
    ask("One.", "Go on.", conversation=conversation.id)
    second = ask("Two.", "Go on!", conversation={"id": conversation.id})
    assert second.conversation.id == conversation.id
    places = [ask.prompt.index(text) for text in ("Count.", "Go on.", "One.", "Go on!")]
    assert places == sorted(places)
    items = client.conversations.items.list(conversation.id, order="asc").data
    texts = [item.content[0].text for item in items]
    assert texts == ["Count.", "Go on.", "One.", "Go on!", "Two."]
    assert client.conversations.retrieve(conversation.id).metadata == {"a": "b"}


def test_conversation_items_are_added_read_and_deleted(client):
    id = client.conversations.create().id
    (item,) = client.conversations.items.create(
        id, items=[{"type": "message", "role": "user", "content": "Hello?"}]
    ).data
    assert client.conversations.items.retrieve(item.id, conversation_id=id) == item
    assert client.conversations.update(id, metadata={"x": "y"}).metadata == {"x": "y"}
    assert client.conversations.items.delete(item.id, conversation_id=id).id == id
    assert client.conversations.items.list(id).data == []
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(item.id, conversation_id=id)
    client.conversations.delete(id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(id)


def test_deleted_texts_are_overwritten_on_disk(model, tmp_path):
    secret = "wxyzzy-7f3a"
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        open_client(address, strict=True) as client,
    ):
        response = client.responses.create(model="hermes", input=secret)
        conversation = client.conversations.create(
            items=[{"type": "message", "role": "user", "content": secret}]
        )
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert any(secret.encode() in path.read_bytes() for path in files)
        client.responses.delete(response.id)
        client.conversations.delete(conversation.id)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(secret.encode() in path.read_bytes() for path in files)


def test_stored_objects_belong_to_a_key(model):
    keys = ("first-key", "second-key")
    with scripted.serve_models(model, api_keys=keys) as address:
        first, second = (openai.OpenAI(base_url=f"{address}/v1", api_key=key) for key in keys)
        response = first.responses.create(model="hermes", input="Hello?")
        assert first.responses.retrieve(response.id).id == response.id
        reads = second.responses
        for call in (reads.retrieve, reads.delete, reads.cancel, reads.input_items.list):
            with pytest.raises(openai.NotFoundError):
                call(response.id)
        item = {"type": "item_reference", "id": response.output[0].id}
        with pytest.raises(openai.NotFoundError):
            second.responses.create(model="hermes", input=[item])
        conversation = first.conversations.create(items=[item])
        (copy,) = first.conversations.items.list(conversation.id)
        for call in (second.conversations.retrieve, second.conversations.items.list):
            with pytest.raises(openai.NotFoundError):
                call(conversation.id)
        with pytest.raises(openai.NotFoundError):
            second.conversations.items.retrieve(copy.id, conversation_id=conversation.id)
        messages = [{"role": "user", "content": "Hello?"}]
        first.chat.completions.create(model="hermes", messages=messages, store=True)
        assert len(first.chat.completions.list().data) == 1
        assert second.chat.completions.list().data == []
        with pytest.raises(openai.BadRequestError):
            second.responses.create(model="hermes", input="And?", previous_response_id=response.id)


def test_oldest_responses_are_deleted_beyond_the_limit(model):
    with (
        scripted.serve_models(model, max_stored_bytes=10_000) as address,
        open_client(address, strict=True) as client,
    ):
        ids = [client.responses.create(model="hermes", input="Hello?").id for _ in range(20)]
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(ids[0])
        assert client.responses.retrieve(ids[-1]).id == ids[-1]


def test_server_without_store_stores_nothing(model):
    with (
        scripted.serve_models(model, store_responses=False) as address,
        open_client(address, strict=True) as client,
    ):
        response = client.responses.create(model="hermes", input="Hello?")
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError):
            client.conversations.create()


def test_server_restarted_without_store_adds_nothing_to_a_conversation(model, tmp_path):
    message = {"type": "message", "role": "user", "content": "Hello?"}
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        open_client(address, strict=True) as client,
    ):
        conversation = client.conversations.create(items=[message]).id
    with (
        scripted.serve_models(model, home=tmp_path, store_responses=False) as address,
        open_client(address, strict=True) as client,
    ):
        with pytest.raises(openai.BadRequestError):
            client.conversations.items.create(conversation, items=[message])
        with pytest.raises(openai.BadRequestError):
            client.conversations.update(conversation, metadata={"a": "b"})
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="hermes", input="Hello?", conversation=conversation)
        assert error.value.param == "conversation"
        assert len(client.conversations.items.list(conversation).data) == 1


def test_response_that_is_not_stored_cannot_join_a_conversation(client):
    """Bug: the conversation was read, and the answer never added to it."""
    conversation = client.conversations.create().id
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(
            model="hermes", input="Hello?", conversation=conversation, store=False
        )
    assert error.value.param == "conversation"


# --- other clients ----------------------------------------------------------------------------


def test_recorded_codex_session_is_answered(model):
    """Codex 0.171: `codex exec "say hi"`, whose model called exec_command once; texts cut short."""
    session = Path(__file__).parents[1] / "golden/codex/session.json"
    model.engine.answer = "Done."
    large = replace(model, context=2**16)
    with scripted.serve_models(large) as address:
        for body in json.loads(session.read_text("utf-8")):
            with httpx.stream(
                "POST", f"{address}/v1/responses", json=body | {"model": "hermes"}
            ) as response:
                assert response.status_code == 200
                assert "tools[8]" in response.headers["x-pellucid-ignored"]  # web_search
                lines = [*response.iter_lines()]
            assert "event: response.completed" in lines
        prompt = ENCODING.decode(model.engine.requests[-1].prompt)
        assert "multi_agent_v1__spawn_agent" in prompt
        assert "exec_command" in prompt


def test_call_of_a_function_in_a_namespace_names_both(ask):
    namespace = {"type": "namespace", "name": "math", "description": "", "tools": [FLAT_ADD]}
    answer = CALL_ADD.replace('"add"', '"math__add"')
    (call,) = ask(answer, tools=[namespace]).output
    assert (call.namespace, call.name) == ("math", "add")
    items = [
        {"role": "user", "content": "3 + 4?"},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "7"},
    ]
    ask("7.", items, tools=[namespace])
    assert ask.prompt.count("math__add") == 2


def test_background_response_of_a_stopped_server_has_failed(model, tmp_path):
    """Regression: it had the status "cancelled", though no client had cancelled it."""
    model.engine.answer = "x" * 1500
    serve = partial(scripted.serve_models, model, home=tmp_path)
    with serve() as address, open_client(address, strict=True) as client:
        id = client.responses.create(model="hermes", input="endless", background=True).id
    with serve() as address, open_client(address, strict=True) as client:
        response = client.responses.retrieve(id)
        assert (response.status, response.error.code) == ("failed", "server_error")


# --- what is stored ---------------------------------------------------------------------------


def test_item_of_a_conversation_can_be_referred_to_in_it(ask, client):
    """The conversation would have had one id twice, which ended the response with an error."""
    conversation = client.conversations.create()
    ask("One.", "Count.", conversation=conversation.id)
    items = client.conversations.items.list(conversation.id, order="asc").data
    reference = {"type": "item_reference", "id": items[0].id}
    assert ask("Two.", [reference], conversation=conversation.id).status == "completed"
    items = client.conversations.items.list(conversation.id, order="asc").data
    assert [item.content[0].text for item in items] == ["Count.", "One.", "Count.", "Two."]
    assert len({item.id for item in items}) == 4


def test_reference_finds_input_and_output_items_of_responses(ask, client):
    """Regression: only items of conversations and of outputs were found."""
    first = ask("One.", [{"role": "user", "content": "Ann."}, {"role": "user", "content": "Bob."}])
    second = ask("Two.", "Go on.", previous_response_id=first.id)
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in items] == ["Ann.", "Bob.", "One.", "Go on."]
    for item in [*items, *second.output]:
        ask("Yes.", [{"type": "item_reference", "id": item.id}], store=False)
        assert item.content[0].text in ask.prompt


def test_conversation_with_reference_has_a_copy_of_the_item(ask, client):
    """Regression: the reference itself was stored, so that it could refer to itself."""
    response = ask("One.", "Count.")
    reference = {"type": "item_reference", "id": response.output[0].id}
    conversation = client.conversations.create(items=[reference])
    (item,) = client.conversations.items.list(conversation.id).data
    reference["id"] = item.id  # to the conversation's own item
    client.conversations.items.create(conversation.id, items=[reference])
    items = client.conversations.items.list(conversation.id, order="asc").data
    assert [item.content[0].text for item in items] == ["One.", "One."]
    assert len({item.id for item in items}) == 2
    reference["id"] = "msg_x"
    with pytest.raises(openai.NotFoundError) as error:
        client.conversations.items.create(conversation.id, items=[reference])
    assert error.value.param == "items[0].id"


def test_previous_responses_cannot_form_a_cycle(ask, client):
    """A response names an earlier one, and its id is chosen by the server when it is created."""
    first = ask("One.", "Count.")
    second = ask("Two.", "Go on.", previous_response_id=first.id, extra_body={"id": first.id})
    assert second.id != first.id
    client.responses.delete(first.id)  # the second has a copy of its items
    third = ask("Three.", "And?", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    assert [ask.prompt.count(text) for text in ("Count.", "One.", "Two.")] == [1, 1, 1]


def test_refused_request_leaves_nothing_in_the_store(model, tmp_path):
    """A response was stored before its first token, also if the queue was full."""
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        open_client(address, strict=True) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.responses.create(model="hermes", input="busy wxyzzy-51")
    stored = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"wxyzzy-51" in data for data in stored)


def test_two_output_formats_are_refused(ask):
    formats = {
        "text": {"format": {"type": "json_object"}},
        "extra_body": {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    }
    with pytest.raises(openai.BadRequestError) as error:
        ask(**formats)
    assert error.value.param == "text.format"


def test_error_of_response_format_names_that_field(ask):
    bad = {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as error:
        ask(extra_body={"response_format": bad})
    assert error.value.param == "response_format.json_schema.schema"
