"""Test the checks of host, origin and key."""

import httpx
import pytest

from serve.api.middleware import host_name, mask
from tests.naming import names
from tests.serve import scripted

pytestmark = pytest.mark.heavy

BODY = {"model": "scripted", "prompt": "hello"}
PAGE = "https://app.example"


@pytest.fixture(scope="module")
def guarded():
    """Return a client of a server with keys, one allowed host and one allowed origin."""
    settings = {"api_keys": ("sk-secret-of-ann", "sk-secret-of-bob")}
    settings |= {"allowed_hosts": ("models.example",), "allowed_origins": (PAGE,)}
    with (
        scripted.serve_models(scripted.model(), **settings) as address,
        httpx.Client(
            base_url=address, headers={"authorization": "Bearer sk-secret-of-bob"}
        ) as http,
    ):
        yield http


@pytest.fixture
def keyless(guarded):
    """Return a client without a key for the same server."""
    with httpx.Client(base_url=guarded.base_url) as http:
        yield http


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    return response.json()["error"]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST:80", "localhost"),
        ("localhost.:80", "localhost"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:8000", "::1"),
        ("::1", "::1"),
        ("", ""),
        ("localhost:80@evil.example", ""),
        ("localhost@evil.example", ""),
        ("[::1].evil.example", ""),
    ],
)
def test_host_name_is_parsed(header, name):
    assert host_name(header) == name


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:8000", "[::1]:8000"])
def test_loopback_hosts_are_accepted(http, host):
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", "127.0.0.1.evil.example"]
)
def test_other_hosts_are_refused(http, host):
    error = error_of(http.get("/v1/models", headers={"host": host}), 403)
    assert error["code"] == "host_not_allowed"


def test_configured_host_is_accepted(guarded):
    assert guarded.get("/v1/models", headers={"host": "models.example:9"}).status_code == 200
    assert guarded.get("/v1/models", headers={"host": "other.example"}).status_code == 403


def test_wildcard_host_accepts_every_name():
    with scripted.serve_models(scripted.model(), allowed_hosts=("*",)) as address:
        assert httpx.get(f"{address}/health", headers={"host": "any.example"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1"]
)
def test_foreign_origin_is_refused(http, engine, origin):
    before = len(engine.requests)
    response = http.post("/v1/completions", json=BODY, headers={"origin": origin})
    assert error_of(response, 403)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in response.headers
    assert len(engine.requests) == before


def test_same_origin_is_accepted(http, address):
    assert http.post("/v1/completions", json=BODY, headers={"origin": address}).status_code == 200


def test_configured_origin_gets_cors_headers(guarded):
    response = guarded.post("/v1/completions", json=BODY, headers={"origin": PAGE})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert guarded.get("/v1/models", headers={"origin": "https://b.example"}).status_code == 403


LOCAL = ["http://localhost:3000", "http://localhost", "http://127.0.0.1:5173", "http://[::1]:1"]


@pytest.mark.parametrize("origin", LOCAL)
def test_page_of_this_machine_is_accepted_by_a_server_with_keys(guarded, origin):
    response = guarded.post("/v1/completions", json=BODY, headers={"origin": origin})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert guarded.options(
        "/v1/completions", headers={"origin": origin, "access-control-request-method": "POST"}
    ).is_success


def test_page_of_this_machine_needs_the_key(keyless):
    response = keyless.post("/v1/completions", json=BODY, headers={"origin": LOCAL[0]})
    assert response.status_code == 401


@pytest.mark.parametrize(
    "origin", ["http://localhost.evil.example", "http://localhost:3000.evil.example", "null"]
)
def test_origin_that_only_resembles_this_machine_is_refused(guarded, origin):
    response = guarded.post("/v1/completions", json=BODY, headers={"origin": origin})
    assert error_of(response, 403)["code"] == "origin_not_allowed"


def test_refused_host_and_origin_are_named_with_the_flag(http):
    response = http.get("/health", headers={"host": "host.docker.internal:8000"})
    message = error_of(response, 403)["message"]
    assert names(message, "--allowed-host host.docker.internal")
    response = http.get("/v1/models", headers={"origin": LOCAL[0]})
    assert names(error_of(response, 403)["message"], f"--allowed-origin {LOCAL[0]}")


def test_preflight_needs_no_key(keyless):
    headers = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    response = keyless.options("/v1/completions", headers=headers)
    assert response.status_code == 200
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    assert "POST" in response.headers["access-control-allow-methods"]


def test_server_with_keys_requires_one(keyless):
    assert keyless.get(
        "/v1/models", headers={"authorization": "Bearer sk-secret-of-ann"}
    ).is_success
    for headers in ({}, {"authorization": "Basic abc"}, {"authorization": "Bearer"}):
        error = error_of(keyless.get("/v1/models", headers=headers), 401)
        # This sentence and the next are OpenAI's own.
        assert error["message"].startswith("You didn't provide an API key.")
        assert error["code"] is None and error["type"] == "invalid_request_error"
    headers = {"authorization": "Bearer sk-secret-of-eve-the-spy"}
    response = keyless.get("/v1/models", headers=headers)
    error = error_of(response, 401)
    assert error["code"] == "invalid_api_key"
    assert error["message"].startswith("Incorrect API key provided: sk-se***py.")
    assert "secret" not in response.text
    assert response.headers["www-authenticate"] == "Bearer"


def test_malformed_keys_are_401(keyless):
    headers = {"authorization": "Bearer ключ".encode()}
    assert keyless.get("/v1/models", headers=headers).status_code == 401


def test_health_needs_no_key(keyless):
    assert keyless.get("/health").status_code == 200


def test_server_without_keys_accepts_any_key(http):
    for headers in ({}, {"authorization": "Bearer any"}, {"authorization": "nonsense"}):
        assert http.get("/v1/models", headers=headers).status_code == 200


def test_short_keys_are_masked_completely():
    assert mask("sk-abcdefghijklmnop") == "sk-ab***op"
    assert mask("secret") == "***"
