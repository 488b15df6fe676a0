"""Stored chat completions with the official client and a scripted engine."""

import httpx
import openai
import pytest

from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.serve.test_tools import ADD, CALL_ADD, ENCODING
from tests.serve.tiny_data import TOOL_TEMPLATE

USER = {"role": "user", "content": "Hello?"}


@pytest.fixture(scope="module")
def model():
    return scripted.model("hermes", TOOL_TEMPLATE, ENCODING)


@pytest.fixture
def client(model):
    with scripted.serve_models(model) as address, open_client(address, strict=True) as client:
        yield client


def create(client, model, answer="Hi.", **fields):
    model.engine.answer = answer
    return client.chat.completions.create(model="hermes", messages=[USER], store=True, **fields)


def test_stored_completion_is_read_changed_and_deleted(client, model):
    completion = create(client, model, metadata={"a": "b"})
    assert client.chat.completions.retrieve(completion.id) == completion
    # The client's type of these messages allows the role "assistant" only.
    path = f"/chat/completions/{completion.id}/messages"
    (message,) = client.get(path, cast_to=httpx.Response).json()["data"]
    assert message == USER | {"id": f"{completion.id}-0"}
    changed = client.chat.completions.update(completion.id, metadata={"a": "c"})
    assert changed.metadata == {"a": "c"}
    assert client.chat.completions.retrieve(completion.id).metadata == {"a": "c"}
    client.chat.completions.delete(completion.id)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(completion.id)


def test_list_selects_by_model_and_metadata_in_pages(client, model):
    ids = [create(client, model, metadata={"odd": str(n % 2)}).id for n in range(5)]
    assert [c.id for c in client.chat.completions.list(limit=2)] == ids  # follows the pages
    odd = client.chat.completions.list(metadata={"odd": "1"})
    assert [completion.id for completion in odd] == ids[1::2]
    assert client.chat.completions.list(model="other").data == []
    assert client.chat.completions.list(order="desc", limit=1).data[0].id == ids[-1]


def test_completion_without_store_is_not_stored(client):
    completion = client.chat.completions.create(model="hermes", messages=[USER])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(completion.id)


def test_streamed_completion_is_stored_whole(client, model):
    answer = f"Well.\n{CALL_ADD}"
    fields = {"tools": [ADD], "logprobs": True, "stream_options": {"include_usage": True}}
    *_, last = create(client, model, answer, stream=True, **fields)
    whole = client.chat.completions.retrieve(last.id)
    fields.pop("stream_options")
    expected = create(client, model, answer, **fields)
    for choice in (whole.choices[0], expected.choices[0]):
        choice.message.tool_calls[0].id = "call"
    assert whole.choices == expected.choices
    assert whole.usage == expected.usage


def test_store_on_a_server_without_store_is_refused(model):
    with (
        scripted.serve_models(model, store_responses=False) as address,
        open_client(address, strict=True) as client,
        pytest.raises(openai.BadRequestError) as error,
    ):
        create(client, model)
    assert error.value.param == "store"
