"""Test API keys, limits, metrics and logs of a server."""

import asyncio
import json
import logging
import os
import stat
import subprocess
import sys
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.api import auth, logs, rate_limit
from serve.api.app import create_app
from serve.api.body_limit import BodyLimit
from serve.api.rate_limit import RateLimiter
from serve.api.settings import ServerSettings
from serve.models.registry import Registry
from serve.models.spec import ModelSpec
from tests.naming import names, naming
from tests.serve import scripted

pytestmark = pytest.mark.heavy

BODY = {"model": "scripted", "prompt": "hello", "max_tokens": 100}


def post(http, path="/v1/completions", **changes):
    return http.post(path, json={**BODY, **changes})


def bearer(key):
    return {"authorization": f"Bearer {key}"}


# --- keys -----------------------------------------------------------------------------------------


def test_created_key_is_stored_as_digest(tmp_path):
    key = auth.create(tmp_path, "ann")
    file = tmp_path / auth.FILE
    assert key.startswith("sk-pellucid-") and len(key) > 50
    assert key not in file.read_text() and key.removeprefix("sk-pellucid-") not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (log_lines,) = auth.read(tmp_path)
    assert log_lines.name == "ann" and key.endswith(log_lines.hint)
    assert auth.create(tmp_path, "bob") != key


def test_key_file_is_not_written_through_symlink(tmp_path):
    """Regression: keys were written through a predictable temporary name or a symlink."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".keys-{os.getpid()}").symlink_to(victim)
    (tmp_path / f".keys.json-{os.getpid()}").symlink_to(victim)
    auth.create(tmp_path, "ann")
    assert victim.read_text() == "mine"
    assert (tmp_path / auth.FILE).stat().st_mode & 0o777 == 0o600
    assert [key.name for key in auth.read(tmp_path)] == ["ann"]


def test_invalid_key_names_are_refused(tmp_path):
    auth.create(tmp_path, "ann@example.org")
    with pytest.raises(ValueError, match=naming("'ann@example.org'")):
        auth.create(tmp_path, "ann@example.org")
    with pytest.raises(ValueError, match=naming("'no spaces'")):
        auth.create(tmp_path, "no spaces")
    with pytest.raises(LookupError, match=naming("'bob'", "ann@example.org")):
        auth.delete(tmp_path, "bob")
    auth.delete(tmp_path, "ann@example.org")
    assert auth.read(tmp_path) == []


def test_read_damaged_key_file_raises_value_error(tmp_path):
    (tmp_path / auth.FILE).write_text("[{")
    with pytest.raises(ValueError, match=naming(tmp_path / auth.FILE)):
        auth.KeyRing([], tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path / auth.FILE)):
        ServerSettings(home=tmp_path)


def test_running_server_applies_changes_of_the_key_file(tmp_path):
    with (
        scripted.serve_models(scripted.model(), home=tmp_path) as address,
        httpx.Client(base_url=address) as http,
    ):
        assert post(http).status_code == 200, "a server without keys accepts any request"
        ann, bob = auth.create(tmp_path, "ann"), auth.create(tmp_path, "bob")
        assert post(http).status_code == 401
        for key, status in ((ann, 200), (bob, 200), (ann[:-1], 401), ("-", 401)):
            response = http.post("/v1/completions", json=BODY, headers=bearer(key))
            assert response.status_code == status
        auth.delete(tmp_path, "ann")
        assert http.get("/v1/models", headers=bearer(ann)).status_code == 401
        assert http.get("/v1/models", headers=bearer(bob)).status_code == 200
        auth.delete(tmp_path, "bob")
        assert post(http).status_code == 401, "a key is required even after the last one is deleted"
        assert http.get("/health").status_code == http.get("/ready").status_code == 200


def test_stored_key_allows_public_host(tmp_path):
    with pytest.raises(ValueError, match="pellucid keys create"):
        ServerSettings(host="0.0.0.0", home=tmp_path)
    auth.create(tmp_path, "ann")
    assert ServerSettings(host="0.0.0.0", home=tmp_path).api_keys == ()


def test_keys_command_creates_lists_and_deletes(tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "serve", "keys", *arguments],
            env={**os.environ, "PELLUCID_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    process = command("create", "ann")
    key = process.stdout.strip()
    assert auth.KeyRing([], tmp_path).owner(key.encode()) == "ann"
    assert process.stderr and key not in process.stderr
    assert json.loads(command("create", "bob", "--json").stdout)["name"] == "bob"
    again = command("create", "bob")
    assert again.returncode == 2 and names(again.stderr, "'bob'")
    assert command("list").stdout.splitlines()[1].startswith(f"ann   ...{key[-4:]}  20")
    assert [k["name"] for k in json.loads(command("list", "--json").stdout)["keys"]] == [
        "ann",
        "bob",
    ]
    assert command("delete", "ann").returncode == 0 and command("delete", "ann").returncode == 3
    (tmp_path / auth.FILE).write_text("[1]")
    damaged = command("list")
    assert damaged.returncode == 4 and names(damaged.stderr, tmp_path / auth.FILE)


# --- limits ---------------------------------------------------------------------------------------


def test_rate_limiter_refills_bucket_per_client():
    now = 0.0
    rate = RateLimiter(3, clock=lambda: now)
    assert [rate.take("ann") for _ in range(4)] == [(True, 2), (True, 1), (True, 0), (False, 0)]
    assert rate.take("bob") == (True, 2)
    now = 10.0
    granted, left = rate.take("ann")
    assert not granted and left == pytest.approx(0.5)
    assert rate.seconds_until(1, left) == pytest.approx(10)
    now = 1000.0
    assert rate.take("ann") == (True, 2), "the bucket holds at most one minute's requests"


def test_rate_limiter_evicts_idle_clients(monkeypatch):
    monkeypatch.setattr(rate_limit, "MAX_CLIENTS", 3)
    now = 0.0
    rate = RateLimiter(60, clock=lambda: now)
    for client in "abc":
        rate.take(client)
        now += 1
    rate.take("d")
    assert len(rate._buckets) < 4


def test_request_over_rate_limit_returns_429_with_headers():
    with (
        scripted.serve_models(scripted.model(), requests_per_minute=2) as address,
        httpx.Client(base_url=address) as http,
    ):
        first = post(http)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] in ("30s", "29.9s")
        assert post(http, model="nobody").status_code == 404, "a failed request counts"
        refused = post(http)
        error = refused.json()["error"]
        assert refused.status_code == 429
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        # the sentence of OpenAI's API, from which clients read how long to wait
        assert "Limit 2, Used 2, Requested 1. Please try again in " in error["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert http.get("/v1/models").status_code == 200, "GET requests are not limited"


def test_no_rate_limit_sends_no_headers(http):
    assert not any(name.startswith("x-ratelimit") for name in post(http).headers)


def test_answer_that_takes_longer_than_timeout_is_504(http):
    response = post(http, prompt="never in time")
    error = response.json()["error"]
    assert response.status_code == 504 and error["code"] == "timeout"
    assert names(error["message"], "600 seconds")
    assert response.headers["x-should-retry"] == "false"
    streamed = post(http, prompt="never in time", stream=True)
    assert streamed.status_code == 504, "the status is not sent before the first token"


def test_body_that_stops_arriving_is_408():
    """The test calls the middleware directly, with an ASGI channel on which the body stops."""

    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    async def play():
        arrived, sent = asyncio.Queue(), []
        arrived.put_nowait({"type": "http.request", "body": b"{", "more_body": True})

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": "/", "method": "POST", "headers": []}
        await BodyLimit(app, limit=100, timeout=0.05)(scope, arrived.get, send)
        return sent

    start, body = asyncio.run(play())
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
    error = json.loads(body["body"])["error"]
    assert error["code"] == "request_timeout" and names(error["message"], "0.05 seconds")


# --- shutdown -------------------------------------------------------------------------------------


def test_draining_server_finishes_streams_and_refuses_new_requests(tmp_path):
    model = scripted.model()
    app = create_app(ServerSettings(home=tmp_path), Registry([model], {}))
    with scripted.serve_app(app) as address, httpx.Client(base_url=address) as http:
        assert http.get("/ready").json() == {"status": "ready"}
        body = {**BODY, "prompt": "endless", "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            app.state.is_draining = True
            with httpx.Client(base_url=address) as other:
                assert other.get("/ready").status_code == 503
                assert other.get("/health").status_code == 200
                refused = post(other)
                assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
                assert refused.json()["error"]["type"] == "server_error"
            assert [*lines][-2] == "data: [DONE]", "the running stream is finished"


# --- metrics --------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path):
    later = ModelSpec(id="later", created=0, owned_by="x", memory=1, load=scripted.model)
    with (
        scripted.serve_models(scripted.model(), later, home=tmp_path) as address,
        httpx.Client(base_url=address) as http,
    ):
        yield http


def numbers(http):
    """Return every sample of /metrics by name and labels."""
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_requests_and_tokens(counted):
    length = len(scripted.HELLO.encode())
    for _ in range(2):
        post(counted, prompt="cached hello")
    post(counted, stream=True)
    post(counted, model="nobody")
    counted.get("/no/such/path")
    scripted.wait_until(
        lambda: numbers(counted).get(("pellucid_requests_total", "GET", "unknown", "404")) == 1
    )
    samples = numbers(counted)
    route = "/v1/completions"
    assert samples["pellucid_requests_total", "POST", route, "200"] == 3
    assert samples["pellucid_requests_total", "POST", route, "404"] == 1
    assert samples["pellucid_request_seconds_count", route] == 4
    assert samples["pellucid_prompt_tokens_total", "scripted"] == 2 * len("cached hello") + 5
    assert samples["pellucid_cached_prompt_tokens_total", "scripted"] == 8
    assert samples["pellucid_generated_tokens_total", "scripted"] == 3 * length
    assert samples["pellucid_time_to_first_token_seconds_count", "scripted"] == 3
    assert samples["pellucid_time_per_token_seconds_count", "scripted"] == 3
    assert samples["pellucid_engine_running_requests", "scripted"] == 0
    assert samples["pellucid_engine_slots", "scripted"] == 16
    assert samples[("pellucid_requests_in_progress",)] == 1, (
        "only the request for /metrics is in progress"
    )
    assert samples[("process_resident_memory_bytes",)] > 1e6


def test_unknown_paths_and_methods_add_no_metric_series(counted):
    def ask(number):
        counted.request(f"METHOD{number}", f"/path/{number}")

    ask(0)
    before = len(numbers(counted))
    for number in range(1, 9):
        ask(number)
    assert len(numbers(counted)) - before < 25, "only series of /metrics itself are added"


def test_disconnected_client_is_counted_in_metrics(counted):
    with counted.stream("POST", "/v1/completions", json={**BODY, "prompt": "endless"}):
        pass
    with pytest.raises(httpx.ReadTimeout):
        counted.post("/v1/completions", json={**BODY, "prompt": "endless"}, timeout=0.05)
    scripted.wait_until(lambda: numbers(counted)[("pellucid_requests_in_progress",)] == 1)


# --- logs -----------------------------------------------------------------------------------------


class Kept(logging.Handler):
    """A logging handler that keeps the formatted lines in a list."""

    def __init__(self, formatter):
        super().__init__()
        self.setFormatter(formatter)
        self.lines = []

    def emit(self, record):
        self.lines.append(self.format(record))


@pytest.fixture
def log_lines(request, http):
    handler, logger = Kept(request.param()), logging.getLogger("serve")
    logger.addHandler(handler)
    logs.access_log.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logs.access_log.setLevel(logging.NOTSET)


@pytest.mark.parametrize("log_lines", [logs.JsonFormatter], indirect=True)
def test_json_log_line_has_fields(http, log_lines):
    response = post(http, prompt="cached secret words")
    scripted.wait_until(lambda: log_lines.lines)
    line = json.loads(log_lines.lines[0])
    assert line["request_id"] == response.headers["x-request-id"]
    assert line["time"].startswith(time.strftime("%Y-")) and line["level"] == "info"
    expected = {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "client": "127.0.0.1",
        "model": "scripted",
        "prompt_tokens": 19,
        "cached_tokens": 4,
        "generated_tokens": len(scripted.HELLO.encode()),
    }
    assert expected.items() <= line.items()
    assert 0 < line["first_token_milliseconds"] <= line["milliseconds"]
    assert "secret" not in log_lines.lines[0] and "Hello" not in log_lines.lines[0]


@pytest.mark.parametrize("log_lines", [logs.TextFormatter], indirect=True)
def test_text_log_line_escapes_path(http, log_lines):
    response = http.get("/v1/models/a%0Ab%1b[31m%C3%A9?x=secret")
    scripted.wait_until(lambda: log_lines.lines)
    (line,) = log_lines.lines
    assert response.headers["x-request-id"] in line
    assert r"GET /v1/models/a\nb\x1b[31mé 404 " in line and line.endswith(" ms, 127.0.0.1")


@pytest.mark.parametrize("log_lines", [logs.JsonFormatter], indirect=True)
def test_unhandled_exception_is_logged_with_request_id(http, log_lines):
    response = post(http, prompt="crash")
    assert response.status_code == 500
    scripted.wait_until(lambda: len(log_lines.lines) == 2)
    crash = json.loads(log_lines.lines[0])
    assert crash["request_id"] == response.headers["x-request-id"]
    assert "a bug in the engine" in crash["traceback"]
    assert "secret" not in response.text


def test_name_of_a_fixed_key_does_not_depend_on_other_keys(tmp_path):
    """Bug: after a restart with fewer keys, a key had the name and the objects of another."""
    both, one = auth.KeyRing(["sk-a", "sk-b"], tmp_path), auth.KeyRing(["sk-b"], tmp_path)
    assert both.owner(b"sk-b") == one.owner(b"sk-b") != both.owner(b"sk-a")
