"""Stored chat completions with the official client and a scripted engine."""

import contextlib

import httpx
import openai
import pytest

from serve.jobs.store import Store
from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.serve.test_tools import ADD, CALL_ADD, ENCODING
from tests.serve.tiny_data import TOOL_TEMPLATE

pytestmark = pytest.mark.heavy

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


def test_10_000_completions_are_listed_in_pages_that_cost_the_same(model, tmp_path):
    """Regression: SQLite read all objects before a page."""
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        open_client(address, strict=True) as client,
        httpx.Client(base_url=address) as http,
    ):
        completion = create(client, model)
        with contextlib.closing(Store(tmp_path)) as store, store.transaction():
            record = store.get("chat.completion", completion.id)
            owner = record["owner"]
            for number in range(9_999):
                record["completion"]["id"] = id = f"chatcmpl-{number}"
                store.add("chat.completion", id, record, parent=owner)
        ids, page = [], {"last_id": None, "has_more": True}
        while page["has_more"]:
            params = {"limit": 100} | ({"after": page["last_id"]} if ids else {})
            page = http.get("/v1/chat/completions", params=params).json()
            ids += [completion["id"] for completion in page["data"]]
        assert ids == [completion.id, *(f"chatcmpl-{number}" for number in range(9_999))]
        assert client.chat.completions.list(order="desc", limit=1).data[0].id == ids[-1]
    with contextlib.closing(Store(tmp_path)) as store:
        costs = [
            num_instructions(store, after=after, newest_first=newest_first)
            for after in (None, ids[100], ids[5_000], ids[9_900])
            for newest_first in (False, True)
        ]
    assert max(costs) < 2 * min(costs)


def num_instructions(store, **fields):
    """Return the number of instructions of SQLite's virtual machine for a page, in hundreds."""
    counts = []
    store._database.set_progress_handler(lambda: counts.append(1), 100)
    store.page("chat.completion", limit=50, **fields)
    store._database.set_progress_handler(None, 0)
    return len(counts)


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
