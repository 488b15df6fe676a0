"""Test GET /v1/models and the health check."""

import pytest


def test_models_list_contains_served_models(strict):
    page = strict.models.list()
    assert [model.id for model in page.data][:2] == ["scripted", "org/with-slash"]
    assert page.object == "list"
    assert page.data[0].created == 1_700_000_000 and page.data[0].owned_by == "pellucid"


def test_lookup_by_id_or_alias_returns_model(strict):
    assert strict.models.retrieve("scripted").id == "scripted"
    assert strict.models.retrieve("gpt-4").id == "scripted"


@pytest.mark.parametrize("separator", ["/", "%2F", "%2f"])
def test_model_ids_with_slashes_are_found_in_every_path(http, separator):
    id, unknown = f"org{separator}with-slash", f"org{separator}nothing"
    assert http.get(f"/v1/models/{id}").json()["id"] == "org/with-slash"
    assert http.head(f"/v1/models/{id}").status_code == 200
    assert http.get(f"/v1/engines/{id}").json()["id"] == "org/with-slash"
    for route, body in (
        ("completions", {"prompt": "hi"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        answer = http.post(f"/v1/engines/{id}/{route}", json=body)
        assert answer.json()["model"] == "org/with-slash"
        assert http.post(f"/v1/engines/{unknown}/{route}", json=body).status_code == 404
    for path in (f"/v1/models/{unknown}", f"/v1/engines/{unknown}"):
        assert http.get(path).json()["error"]["code"] == "model_not_found"
    refused = http.delete(f"/v1/models/{id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_deletable")
    assert http.delete(f"/v1/models/{unknown}").json()["error"]["code"] == "model_not_found"


def test_client_finds_model_ids_with_slashes(strict):
    assert strict.models.retrieve("org/with-slash").id == "org/with-slash"


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/v1/models", "/v1/models/scripted"])
def test_get_and_head_requests_are_supported(http, path):
    assert http.get(path).status_code == 200
    head = http.head(path)
    assert head.status_code == 200 and head.content == b""


def test_responses_have_openai_headers(http):
    sent = {"openai-organization": "org-1"}
    for path, status in (("/v1/models", 200), ("/v1/models/none", 404), ("/nowhere", 404)):
        response = http.get(path, headers=sent)
        assert response.status_code == status
        assert response.headers["x-request-id"].startswith("req_")
        assert int(response.headers["openai-processing-ms"]) >= 0
        assert response.headers["openai-version"] == "2020-10-01"
        assert response.headers["openai-organization"] == "org-1"
    ids = {http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
