"""Test the OpenAPI description: responses match it, and no request crashes the server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from serve.api import responses
from serve.models import adapters
from tests.serve import scripted

pytestmark = pytest.mark.heavy

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "emoji"}]}
TEXT = {"model": "scripted", "prompt": ["emoji", "hello"], "logprobs": 2, "echo": True}


@pytest.fixture(scope="module")
def description(address):
    return httpx.get(f"{address}/openapi.json").json()


def test_openapi_describes_every_route(description):
    assert {
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/edits",
        "/v1/engines",
        "/v1/engines/{engine}",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/v1/rerank",
        "/v1/score",
        "/pellucid/v1/models",
        "/pellucid/v1/models/load",
        "/pellucid/v1/models/unload",
        "/pellucid/v1/models/pull",
    } <= set(description["paths"])
    assert description["paths"]["/pellucid/v1/models/pull"]["post"]["responses"].keys() >= {
        "200", "400", "403", "404", "409", "502", "503", "507", "4XX", "5XX",
    }  # fmt: skip
    assert "delete" in description["paths"]["/v1/models/{model_id}"]
    bodies = description["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    reference = bodies["application/json"]["schema"]["$ref"]
    assert "suffix" in description["components"]["schemas"][reference.rsplit("/")[-1]]["properties"]


def test_openapi_references_resolve(description):
    found = json.dumps(description).split('"$ref": "')[1:]
    names = {
        reference.partition('"')[0].removeprefix("#/components/schemas/") for reference in found
    }
    assert names <= set(description["components"]["schemas"])


@pytest.mark.parametrize(
    ("reply", "method", "path", "body"),
    [
        (responses.Models, "GET", "/v1/models", None),
        (responses.Model, "GET", "/v1/models/gpt-4", None),
        (responses.Engines, "GET", "/v1/engines", None),
        (responses.EngineReply, "GET", "/v1/engines/scripted", None),
        (responses.ChatCompletion, "POST", "/v1/chat/completions", CHAT),
        (
            responses.ChatCompletion,
            "POST",
            "/v1/chat/completions",
            {**CHAT, "logprobs": True, "top_logprobs": 3, "n": 2, "metadata": {"a": "b"}},
        ),
        (responses.Completion, "POST", "/v1/completions", TEXT),
        (responses.Completion, "POST", "/v1/completions", {**TEXT, "logprobs": None}),
        (responses.Edit, "POST", "/v1/edits", {"model": "scripted", "instruction": "x"}),
        (responses.Tokens, "POST", "/tokenize", {"text": "ö", "return_token_strs": True}),
        (responses.Tokens, "POST", "/tokenize", {"text": "ö", "with_pieces": True}),
        (responses.Text, "POST", "/detokenize", {"tokens": [65]}),
        (responses.TokenizerInfo, "GET", "/tokenizer_info", None),
        (responses.Status, "GET", "/health", None),
        (responses.Status, "GET", "/ready", None),
        (responses.Version, "GET", "/version", None),
        (responses.Error, "GET", "/no/such/path", None),
        (responses.Error, "POST", "/v1/edits", {}),
    ],
)
def test_responses_match_schema(http, reply, method, path, body):
    answer = http.request(method, path, json=body)
    assert reply.model_validate_json(answer.content, strict=True)


@pytest.mark.parametrize(
    ("reply", "path", "body"),
    [
        (
            responses.ChatChunk,
            "/v1/chat/completions",
            {**CHAT, "logprobs": True, "top_logprobs": 1},
        ),
        (responses.CompletionChunk, "/v1/completions", TEXT),
    ],
)
@pytest.mark.parametrize("include_usage", [False, True])
def test_events_match_schema(http, reply, path, body, include_usage):
    options = {"stream": True, "stream_options": {"include_usage": include_usage}}
    events = http.post(path, json={**body, **options}).text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]" and len(events) > 3
    for event in events:
        reply.model_validate_json(event.removeprefix("data: "), strict=True)


def test_docs_page_loads_no_external_resources(http):
    page = http.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none';")
    assert "//" not in page.text.replace("<!doctype html>", "")
    assets = re.findall(r'(?:href|src)="(/[^"]+)"', page.text)
    assert {"/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js"} < set(assets)
    for path in assets:
        asset = http.get(path)
        assert asset.status_code == 200 and asset.headers["x-content-type-options"] == "nosniff"
        again = http.get(path, headers={"if-none-match": asset.headers["etag"]})
        assert again.status_code == 304 and not again.content


def test_fine_tuned_model_is_deleted(tmp_path):
    adapter = "ft:scripted:me::Ab/1..2"
    (adapters.adapter_folder(tmp_path, adapter) / "checkpoints").mkdir(parents=True)
    models = [scripted.model(), scripted.model(adapter)]
    with (
        scripted.serve_models(*models, home=tmp_path) as address,
        httpx.Client(base_url=address) as http,
    ):
        refused = http.delete("/v1/models/scripted")
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_deletable"
        for unknown in (
            "gpt-4",
            "nobody",
            "../made",
        ):  # "gpt-4" is an alias, which cannot be deleted
            assert http.delete(f"/v1/models/{unknown}").status_code in (404, 405), unknown
        with OpenAI(
            base_url=f"{address}/v1", api_key="any", _strict_response_validation=True
        ) as client:
            deleted = client.models.delete(adapter)
        assert deleted.id == adapter and deleted.object == "model" and deleted.deleted
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["scripted"]
        assert http.delete(f"/v1/models/{adapter}").status_code == 404
        assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("separator", ["/", "%2F"])
def test_fine_tuned_model_of_a_hub_model_is_deleted_by_raw_and_encoded_id(tmp_path, separator):
    adapter = "ft:people/tiny:me::x"
    adapters.adapter_folder(tmp_path, adapter).mkdir(parents=True)
    models = [scripted.model(), scripted.model(adapter)]
    with scripted.serve_models(*models, home=tmp_path) as address:
        deleted = httpx.delete(f"{address}/v1/models/{adapter.replace('/', separator)}")
        assert deleted.json() == {"id": adapter, "object": "model", "deleted": True}
        cards = httpx.get(f"{address}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["scripted"]
    assert list((tmp_path / "made").iterdir()) == []


def test_model_with_undeletable_files_stays_listed(tmp_path, monkeypatch):
    """Regression: the model disappeared from the list, and returned at the next start."""
    adapter = "ft:scripted:me::x"
    adapters.adapter_folder(tmp_path, adapter).mkdir(parents=True)
    models = [scripted.model(), scripted.model(adapter)]
    with (
        scripted.serve_models(*models, home=tmp_path) as address,
        httpx.Client(base_url=address) as http,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
            assert http.delete(f"/v1/models/{adapter}").status_code == 500
        assert adapter in [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert http.delete(f"/v1/models/{adapter}").json()["deleted"]


def test_model_ids_map_to_distinct_folders(tmp_path):
    ids = ["a", "A", "a/b", "a%2Fb", "..", ".", "a.b", "x" * 60]
    folders = [adapters.adapter_folder(tmp_path, id) for id in ids]
    assert len(set(folders)) == len(ids)
    assert all(folder.parent == tmp_path / "made" and ".." not in folder.name for folder in folders)


CHECKS = [
    "not_a_server_error",
    "response_schema_conformance",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
]


@pytest.mark.slow  # thousands of requests
def test_generated_requests_never_crash_server(address):
    """Schemathesis generates valid and invalid requests from openapi.json."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", "50", "--generation-deterministic", "--no-color"]
    done = subprocess.run(
        command,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.serve.schema_hooks", "PYTHONPATH": "."},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    generated = re.search(r"(\d[\d,]*) generated, .* passed", done.stdout)
    assert generated and int(generated[1].replace(",", "")) > 2000, done.stdout[-2000:]
