"""Managing models: over HTTP, and by commands beside a running server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from serve.api import responses
from tests import hub_server
from tests.hub_server import Hub
from tests.serve import processes, scripted, tiny, tiny_gguf

pytestmark = pytest.mark.heavy

ROUTE = "/pellucid/v1/models"
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@dataclass
class Setup:
    hub: Hub
    home: Path
    variables: dict[str, str]
    server: processes.Server
    http: httpx.Client

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serve", *arguments],
            env=processes.environment(**self.variables),
            capture_output=True,
            text=True,
            timeout=processes.TIMEOUT,
        )

    def ids(self) -> list[str]:
        return [model["id"] for model in self.http.get("/v1/models").json()["data"]]

    def states(self) -> dict[str, dict]:
        response = self.http.get(ROUTE)
        responses.ManagedModels.model_validate_json(response.content, strict=True)
        return {model["id"]: model for model in response.json()["data"]}

    def pull(self, name: str) -> tuple[int, list[dict]]:
        """Pull over HTTP; return the status, and the events or the error."""
        response = self.http.post(f"{ROUTE}/pull", json={"model": name})
        if not response.is_success:
            return response.status_code, [response.json()["error"]]
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        for line in lines:
            if line != "[DONE]" and "error" not in json.loads(line):
                responses.PullProgress.model_validate_json(line, strict=True)
        return response.status_code, [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("manage")
    home = folder / "home"
    tiny_gguf.write_catalogue(home)
    (folder / "gguf").mkdir()
    tiny_gguf.write_gguf(folder / "gguf" / "tiny-qwen2-F16.gguf", "qwen2")
    with hub_server.serve_hub() as hub:
        hub.publish("people/tiny-llama", tiny.model(folder / "llama"))
        hub.publish("people/tiny-qwen2-GGUF", folder / "gguf")
        hub.publish("people/gated", folder / "gguf")
        hub.repositories["people/gated"].gated = True
        pickles = {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"}
        hub.commit("people/pickles", pickles)
        weights = (folder / "llama" / "model.safetensors").read_bytes()
        files = {p.name: p.read_bytes() for p in (folder / "llama").iterdir()}
        hub.commit("people/truncated", {**files, "model.safetensors": weights[:-100]})
        variables = hub_server.variables(hub, folder / "hf") | {"PELLUCID_HOME": str(home)}
        arguments = ("--allow-pull", "--dtype", "float32", "--cache-mb", "4")
        with (
            processes.serving(*arguments, **variables) as server,
            httpx.Client(base_url=server.url, timeout=processes.TIMEOUT) as http,
        ):
            yield Setup(hub, home, variables, server, http)


def test_model_entry_contains_context_dtype_and_capabilities(setup: Setup) -> None:
    entry = setup.http.get("/v1/models/tiny").json()
    assert entry["context_length"] == entry["max_model_len"] == tiny_gguf.CONTEXT
    assert entry["dtype"] == "float32" and entry["kind"] == "decoder"
    assert entry["capabilities"] == ["chat", "completions"]


def test_pull_over_http_reports_progress_and_serves_model(setup: Setup) -> None:
    status, events = setup.pull("hf:people/tiny-llama")
    assert status == 200 and events[-1]["status"] == "success"
    assert events[-1]["model"]["id"] == "people/tiny-llama"
    progress = [event for event in events if event.get("completed")]
    assert progress[-1]["completed"] == progress[-1]["total"] > 0
    for id in ("people/tiny-llama", "people%2Ftiny-llama"):
        entry = setup.http.get(f"/v1/models/{id}").json()
        assert entry["id"] == "people/tiny-llama" and entry["owned_by"] == "people"
        assert entry["dtype"] is None and entry["max_model_len"] == 512
    with OpenAI(base_url=f"{setup.server.url}/v1", api_key="any", max_retries=0) as client:
        answer = client.chat.completions.create(model="people/tiny-llama", **HI)
        assert answer.model == "people/tiny-llama" and answer.usage
        assert client.models.retrieve("people/tiny-llama").to_dict()["dtype"] == "float32"
    response = setup.http.post(f"{ROUTE}/pull", json={"model": "tiny", "stream": False})
    assert responses.ManagedModel.model_validate_json(response.content, strict=True).id == "tiny"


@pytest.mark.slow
def test_model_pulled_by_command_is_served_until_removed(setup: Setup) -> None:
    id = "people/tiny-qwen2-GGUF"
    assert id not in setup.ids()
    done = setup.run("pull", f"hf:{id}:F16", "--json")
    assert done.returncode == 0, done.stderr
    assert id in setup.ids()
    assert setup.http.post("/v1/chat/completions", json={"model": id, **HI}).status_code == 200
    listed = json.loads(setup.run("models", "--json").stdout)["models"]
    assert next(row for row in listed if row["id"] == id)["state"] == "pulled"
    checked = setup.run("models", "check", json.loads(done.stdout)["models"][0]["path"], "--json")
    report = json.loads(checked.stdout)
    assert (report["family"], report["template"]) == ("qwen2", "yes")
    assert report["memory"].keys() == {"int4", "int8", "bfloat16", "float32"}
    assert setup.run("rm", id).returncode == 0
    assert id not in setup.ids()
    error = setup.http.post("/v1/chat/completions", json={"model": id, **HI})
    assert (error.status_code, error.json()["error"]["code"]) == (404, "model_not_found")
    assert setup.run("rm", id).returncode == 3
    states = json.loads(setup.run("ps", "--host", setup.server.url, "--json").stdout)["models"]
    assert setup.states()["tiny"] in states


def test_load_and_unload_change_state_and_memory(setup: Setup) -> None:
    loaded = setup.http.post(f"{ROUTE}/load", json={"model": "gpt-3.5-turbo"}).json()
    assert (loaded["id"], loaded["state"], loaded["busy"]) == ("tiny", "loaded", False)
    assert loaded["memory"] > 0 and loaded["loaded_at"] > 1e9
    requests = loaded["requests"]
    setup.http.post("/v1/chat/completions", json={"model": "tiny", **HI})
    assert setup.states()["tiny"]["requests"] == requests + 1
    unloaded = setup.http.post(f"{ROUTE}/unload", json={"model": "tiny"}).json()
    assert (unloaded["state"], unloaded["loaded_at"]) == ("unloaded", None)
    assert unloaded["memory"] > 0, "an unloaded model has an estimate"
    assert setup.http.post("/v1/chat/completions", json={"model": "tiny", **HI}).is_success
    assert setup.states()["tiny"]["state"] == "loaded"


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("nope", 404, "model_not_found"),
        ("/etc/passwd", 404, "model_not_found"),
        ("mine=/etc/passwd", 404, "model_not_found"),
        ("mine=hf:people/tiny-llama", 404, "model_not_found"),
        ("https://example.org/model.gguf", 404, "model_not_found"),
        ("hf:https://example.org/model.gguf", 400, "invalid_value"),
        ("hf:people", 400, "invalid_value"),
        ("hf:people/tiny-llama:../../x", 400, "invalid_value"),
        ("hf:people/nothing", 404, "model_not_found"),
        ("hf:people/gated", 403, "model_gated"),
        ("hf:people/pickles", 400, "invalid_value"),  # was 500 pull_failed
        ("", 400, "empty_string"),
    ],
)
def test_pull_invalid_unknown_or_gated_name_is_refused(
    setup: Setup, name: str, status: int, code: str
) -> None:
    response = setup.pull(name)
    assert (response[0], response[1][0]["code"]) == (status, code)


@pytest.mark.slow
def test_complete_with_damaged_weights_exits_with_3(setup: Setup) -> None:
    done = setup.run("complete", "hi", "-m", "hf:people/truncated")
    assert done.returncode == 3 and "model.safetensors" in done.stderr
    assert setup.run("rm", "hf:people/truncated").returncode == 0


@pytest.mark.parametrize("route", ["load", "unload"])
def test_load_or_unload_unknown_model_returns_404(setup: Setup, route: str) -> None:
    response = setup.http.post(f"{ROUTE}/{route}", json={"model": "nope"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_pull_damaged_weights_reports_error_and_server_keeps_serving(setup: Setup) -> None:
    status, events = setup.pull("hf:people/truncated")
    assert status == 200 and events[-1]["error"]["code"] == "model_not_usable"
    assert "people/truncated" not in setup.ids()
    assert setup.http.post("/v1/chat/completions", json={"model": "tiny", **HI}).is_success


def test_pull_during_another_pull_returns_pull_in_progress(setup: Setup) -> None:
    setup.hub.rate_limited, setup.hub.retry_after = 1, 2
    request = setup.http.build_request(
        "POST", f"{ROUTE}/pull", json={"model": "hf:people/tiny-qwen2-GGUF"}
    )
    response = setup.http.send(request, stream=True)
    assert response.is_success, "the first pull runs: it waits, as the hub asks"
    assert setup.pull("hf:people/tiny-llama")[1][0]["code"] == "pull_in_progress"
    response.close()
    processes.wait_for(lambda: setup.pull("hf:people/tiny-llama")[0] == 200)


def test_pull_without_allow_pull_returns_403() -> None:
    with scripted.serve_models(scripted.model()) as address:
        response = httpx.post(f"{address}{ROUTE}/pull", json={"model": "tiny"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "pull_not_allowed")
