"""A new model kind (a task, such as "decoder") needs only one file and one route."""

import json

import httpx
import pytest

from serve.api.app import create_app
from serve.api.settings import ServerSettings
from serve.cli.banner import banner
from serve.exceptions import Unusable
from serve.models import catalogue, download, kinds, resolve
from serve.models.registry import Registry
from serve.models.spec import LoadOptions
from tests.serve import scripted, toy_kind

pytestmark = pytest.mark.heavy


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "toy"
    path.mkdir()
    (path / "toy.json").write_text(json.dumps({"word": "hello"}))
    return path


def test_new_model_kind_with_one_file_and_one_route_is_served(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "toy", toy_kind.KIND)
    files = download.resolve_model(f"mine={folder}", catalogue.load(), tmp_path, notify=print)
    options = LoadOptions(cache_budget=2**20, dtype="auto", home=tmp_path, notify=print)
    spec = resolve.describe(files, options)
    registry = Registry([spec, scripted.model()], {"word-1": "mine"})
    app = create_app(ServerSettings(home=tmp_path / "home"), registry)
    app.include_router(toy_kind.router)
    with scripted.serve_app(app) as address:
        entries = httpx.get(f"{address}/v1/models").json()["data"]
        assert [entry["kind"] for entry in entries] == ["toy", "decoder"]
        created = httpx.post(f"{address}/v1/words", json={"model": "word-1"}).json()
        assert created == {"object": "word", "model": "mine", "word": "hello"}
        wrong_kind = httpx.post(f"{address}/v1/words", json={"model": entries[1]["id"]})
        assert (wrong_kind.status_code, wrong_kind.json()["error"]["param"]) == (404, "model")
        chat = {"model": "mine", "messages": [{"role": "user", "content": "hi"}]}
        chat_reply = httpx.post(f"{address}/v1/chat/completions", json=chat)
        assert (chat_reply.status_code, chat_reply.json()["error"]["code"]) == (
            404,
            "model_not_found",
        )
    text = banner("http://here", registry, has_keys=False)
    assert "/v1/words" in text and "client.words.create(" in text
    assert "word-1" in text, "regression: one to three aliases were left out"
    app.state.job_runner.close()


def test_catalogue_kinds_equal_keys_of_kinds_table():
    assert tuple(kinds.KINDS) == catalogue.KINDS


def test_resolve_folder_of_unknown_model_kind_raises_unusable(folder, tmp_path):
    with pytest.raises(Unusable):
        download.resolve_model(f"mine={folder}", catalogue.load(), tmp_path, notify=print)
