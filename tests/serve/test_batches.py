"""/v1/batches with the official client and a scripted engine."""

import json
import os
import threading
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.jobs.batches import Batches
from serve.jobs.server_lock import ServerLock
from serve.models import disk
from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.serve.tiny_data import TEMPLATE
from tests.waiting import wait_until

pytestmark = pytest.mark.heavy

CHAT = "/v1/chat/completions"
FINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def model():
    return scripted.model("scripted", TEMPLATE)


@pytest.fixture
def client(model):
    with scripted.serve_models(model) as address, open_client(address, strict=True) as client:
        yield client


def line(number, text="hi", **fields):
    body = {"model": "scripted", "messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body}


def create(client, lines, endpoint=CHAT):
    data = "".join(json.dumps(line) + "\n" if isinstance(line, dict) else line for line in lines)
    file = client.files.create(file=("requests.jsonl", data.encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )


def finish(client, batch):
    wait_until(lambda: client.batches.retrieve(batch.id).status in FINAL)
    return client.batches.retrieve(batch.id)


def results(client, file_id):
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def test_batch_answers_each_line_in_order(client):
    batch = create(client, [line(number, "echo") for number in range(20)])
    assert (batch.status, batch.metadata) == ("validating", {"a": "b"})
    batch = finish(client, batch)
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    answers = results(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(20)]
    for answer in answers:
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["object"] == "chat.completion"
        assert answer["error"] is None
    assert batch.error_file_id is None
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"


def test_failed_request_goes_to_the_error_file(client):
    batch = finish(client, create(client, [line(0), line(1, max_tokens=10_000), line(2)]))
    assert (batch.status, batch.request_counts.failed) == ("completed", 1)
    (failed,) = results(client, batch.error_file_id)
    assert failed["custom_id"] == "line-1"
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert len(results(client, batch.output_file_id)) == 2


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        ("{\n", "invalid_json_line", None),
        ("[1]\n", "invalid_json_line", None),
        (line(0), "duplicate_custom_id", "custom_id"),
        (line(1) | {"custom_id": ""}, "missing_required_parameter", "custom_id"),
        (line(1) | {"method": "GET"}, "invalid_method", "method"),
        (line(1) | {"url": "/v1/embeddings"}, "mismatched_url", "url"),
        (line(1) | {"body": []}, "missing_required_parameter", "body"),
        (line(1, stream=True), "invalid_value", "body.stream"),
        (line(1, temperature=7), "decimal_above_max_value", "body.temperature"),
        (line(1) | {"body": {"model": "none", "messages": line(0)["body"]["messages"]}},
         "model_not_found", "body.model"),
        (line(1, temprature=1), "unknown_parameter", "body.temprature"),
        (line(1, audio={"voice": "alloy"}), "unsupported_parameter", "body.audio"),
    ],
)  # fmt: skip
def test_invalid_line_fails_the_batch_and_is_named(client, bad, code, param):
    batch = finish(client, create(client, [line(0), bad]))
    assert batch.status == "failed"
    (error,) = batch.errors.data
    assert (error.code, error.param, error.line) == (code, param, 2)
    assert batch.output_file_id is None


def test_batch_of_another_purpose_or_without_file_is_refused(client):
    file = client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune")
    for id, status in ((file.id, 400), ("file-none", 404)):
        with pytest.raises(openai.APIStatusError) as error:
            client.batches.create(input_file_id=id, endpoint=CHAT, completion_window="24h")
        assert (error.value.status_code, error.value.param) == (status, "input_file_id")


def test_cancelled_batch_keeps_the_results_so_far(client):
    batch = create(client, [line(number, "endless") for number in range(40)])
    wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    client.batches.cancel(batch.id)
    batch = finish(client, batch)
    assert batch.status == "cancelled"
    assert batch.request_counts.completed < 40
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


def test_other_endpoints_are_answered(client):
    for endpoint, body in (
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
    ):
        request = {
            "custom_id": "a",
            "method": "POST",
            "url": endpoint,
            "body": {"model": "scripted", **body},
        }
        batch = finish(client, create(client, [request], endpoint))
        assert batch.status == "completed", batch
        (answer,) = results(client, batch.output_file_id)
        assert answer["response"]["status_code"] == 200


def test_batch_belongs_to_a_key(model):
    keys = ("first-key", "second-key")
    with scripted.serve_models(model, api_keys=keys) as address:
        first, second = (openai.OpenAI(base_url=f"{address}/v1", api_key=key) for key in keys)
        batch = finish(first, create(first, [line(0)]))
        assert [found.id for found in first.batches.list()] == [batch.id]
        assert second.batches.list().data == []
        for call in (second.batches.retrieve, second.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(batch.id)


def test_output_expires_after_limits_the_output_file(client):
    data = (json.dumps(line(0)) + "\n").encode()
    file = client.files.create(file=("a.jsonl", data), purpose="batch")
    fields = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    expiry = {"anchor": "created_at", "seconds": 3600}
    batch = finish(client, client.batches.create(**fields, output_expires_after=expiry))
    output = client.files.retrieve(batch.output_file_id)
    assert output.expires_at == output.created_at + 3600
    for wrong in ({"seconds": 1}, {"anchor": "completed_at"}):
        with pytest.raises(openai.BadRequestError) as error:
            client.batches.create(**fields, output_expires_after=expiry | wrong)
        assert error.value.param == f"output_expires_after.{next(iter(wrong))}"


def test_metrics_count_batches_and_their_requests(client):
    finish(client, create(client, [line(0), line(1, max_tokens=10_000), line(2)]))
    finish(client, create(client, ["{}\n"]))
    text = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    samples = {
        (sample.name, sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("pellucid_batch")
    }
    assert samples["pellucid_batches", "completed"] == samples["pellucid_batches", "failed"] == 1
    assert samples["pellucid_batches", "in_progress"] == 0
    requests = [samples["pellucid_batch_requests", n] for n in ("total", "completed", "failed")]
    assert requests == [3, 2, 1]


def test_batches_are_listed_newest_first(client):
    ids = [finish(client, create(client, [line(0)])).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]


def test_stopped_server_continues_the_batch_and_repeats_no_line(model, tmp_path):
    lines = [line(number, "endless", max_tokens=30) for number in range(60)]
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client,
    ):
        batch = create(client, lines)
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client,
    ):
        batch = finish(client, batch)
        answers = results(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(60)]
    assert batch.request_counts.completed == 60


def test_batch_waits_for_a_server_with_its_model(model, tmp_path):
    lines = [line(number, "endless", max_tokens=30) for number in range(60)]
    other = scripted.model("other", TEMPLATE)
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        open_client(address, strict=True) as client,
    ):
        batch = create(client, lines)
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    with (
        scripted.serve_models(other, home=tmp_path) as address,
        open_client(address, strict=True) as client,
    ):
        request = line(0, model="other")
        assert finish(client, create(client, [request])).status == "completed"
        assert client.batches.retrieve(batch.id).status == "in_progress"
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        open_client(address, strict=True) as client,
    ):
        assert finish(client, batch).request_counts.completed == 60


def test_expired_batch_reports_the_unanswered_lines(client, monkeypatch):
    monkeypatch.setattr("serve.jobs.batches.WINDOW_SECONDS", 1)
    batch = finish(client, create(client, [line(number, "endless") for number in range(200)]))
    assert batch.status == "expired"
    codes = {result["error"]["code"] for result in results(client, batch.error_file_id)}
    assert codes == {"batch_expired"}
    assert time.time() >= batch.expires_at


def test_half_of_a_surrogate_pair_as_id_comes_back(client):
    """Bug: the file could not be written, and all answers were lost."""
    batch = finish(client, create(client, [line(0) | {"custom_id": "x\ud83d"}]))
    assert batch.status == "completed"
    (answer,) = results(client, batch.output_file_id)
    assert answer["custom_id"] == "x\ud83d"


def test_batch_goes_on_after_an_unexpected_error(client, monkeypatch):
    """Bug: a full disk made the batch fail, and its answers were lost."""
    monkeypatch.setattr("serve.api.batch_runner.RETRY_SECONDS", 0.1)
    monkeypatch.setattr("serve.api.batch_runner.POLL_SECONDS", 0.1)
    finalize, failures = Batches.finalize, []

    def fail_twice(*args, **kwargs):
        if len(failures) < 2:
            failures.append(1)
            raise OSError(28, "No space left on device")
        return finalize(*args, **kwargs)

    monkeypatch.setattr(Batches, "finalize", fail_twice)
    batch = finish(client, create(client, [line(0), line(1)]))
    assert (batch.status, len(failures)) == ("completed", 2)
    assert len(results(client, batch.output_file_id)) == 2


def test_server_stops_after_what_it_writes(model, tmp_path, monkeypatch):
    """Bug: the lock of the server was free while a thread still wrote the output file."""
    finalize, ended = Batches.finalize, []

    def slow(*args, **kwargs):
        time.sleep(1)
        ended.append(finalize(*args, **kwargs))

    monkeypatch.setattr(Batches, "finalize", slow)
    close = ServerLock.close
    monkeypatch.setattr(ServerLock, "close", lambda lock: (ended.append("close"), close(lock)))
    with (
        scripted.serve_models(model, home=tmp_path) as address,
        open_client(address, strict=True) as client,
    ):
        batch = create(client, [line(0)])
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1)
        time.sleep(0.3)
    assert ended == [None, "close"]


def test_lock_is_of_the_file_at_the_path(tmp_path):
    """Bug: after a rename, a second writer held the lock of the renamed file, and truncated it."""
    path, renamed = tmp_path / "new", tmp_path / "final"
    first = disk.lock(path)
    os.write(first, b"answers")
    second = threading.Thread(target=lambda: os.ftruncate(disk.lock(path), 0))
    second.start()
    time.sleep(0.3)
    path.rename(renamed)
    os.close(first)
    second.join()
    assert renamed.read_bytes() == b"answers"
