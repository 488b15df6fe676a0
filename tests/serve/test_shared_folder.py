"""Two servers in their own processes share a data folder, and one of them is killed."""

import contextlib
from collections import Counter

import openai
import pytest

from serve.api.batch_runner import MAX_CONCURRENT_LINES
from serve.jobs.store import Store
from tests.serve.conftest import client as open_client
from tests.serve.scripted_server import REQUESTS, killable_server
from tests.serve.test_batches import FINAL, create, line, results
from tests.waiting import wait_until

pytestmark = pytest.mark.heavy

ANSWER_SECONDS = 60  # a busy machine


@pytest.fixture
def servers(tmp_path):
    """Return two clients and the process of the first server."""
    with (
        killable_server(tmp_path) as (first_address, first_process),
        killable_server(tmp_path) as (second_address, _),
        open_client(first_address, strict=True) as first,
        open_client(second_address, strict=True) as second,
    ):
        yield first, second, first_process


def test_background_response_fails_only_when_its_server_is_gone(servers, tmp_path):
    first, second, process = servers
    id = first.responses.create(model="scripted", input="endless", background=True).id
    with killable_server(tmp_path) as (address, _), open_client(address, strict=True) as third:
        for client in (second, third):  # the third was started after the response
            assert client.responses.retrieve(id).status in ("queued", "in_progress")
            with pytest.raises(openai.ConflictError):
                client.responses.cancel(id)
            with pytest.raises(openai.ConflictError):
                client.responses.retrieve(id, stream=True)
        process.kill()
        wait_until(lambda: third.responses.retrieve(id).status == "failed", ANSWER_SECONDS)
    response = second.responses.retrieve(id)
    assert (response.status, response.error.code) == ("failed", "server_error")


def test_batch_is_run_by_one_server_and_taken_over_from_a_killed_one(servers, tmp_path):
    first, second, process = servers
    batch = create(first, [line(number, "endless", max_tokens=100) for number in range(60)])
    wait_until(
        lambda: second.batches.retrieve(batch.id).request_counts.completed > 8, ANSWER_SECONDS
    )
    process.kill()
    process.wait()
    num_sent = num_requests(tmp_path)
    assert num_sent.keys() == {process.pid}
    wait_until(lambda: second.batches.retrieve(batch.id).status in FINAL, ANSWER_SECONDS)
    batch = second.batches.retrieve(batch.id)
    assert batch.request_counts.completed == 60
    answers = results(second, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(60)]
    assert 60 <= num_requests(tmp_path).total() <= 60 + MAX_CONCURRENT_LINES


def num_requests(home):
    """Return the number of requests of the engines, by the process id of the server."""
    return Counter(map(int, (home / REQUESTS).read_text().split()))


@pytest.mark.slow
def test_batch_of_2000_lines_under_twenty_kills_answers_each_line_once(tmp_path):
    total, kills = 2000, 20
    lines = [
        line(number, max_tokens=10_000_000 if number % 100 == 7 else 5) for number in range(total)
    ]
    id = ""
    for kill in range(kills):
        with killable_server(tmp_path) as (address, _), open_client(address, strict=True) as client:
            id = id or create(client, lines).id
            # The first kill is during the validation, the last one while the files are written.
            wait_for_results(client, id, total * kill // (kills - 1))
    with killable_server(tmp_path) as (address, _), open_client(address, strict=True) as client:
        wait_until(lambda: client.batches.retrieve(id).status in FINAL, ANSWER_SECONDS)
        batch = client.batches.retrieve(id)
        answered = results(client, batch.output_file_id)
        failed = results(client, batch.error_file_id)
        assert len(client.files.list(purpose="batch_output").data) == 2
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (total, total - 20, 20)
    ids = [[result["custom_id"] for result in part] for part in (answered, failed)]
    expected = [f"line-{number}" for number in range(total)]
    assert ids[1] == expected[7::100]
    assert sorted(ids[0] + ids[1]) == sorted(expected) and len(set(ids[0])) == len(ids[0])
    processes = num_requests(tmp_path)
    print(f"{len(processes)} servers, {processes.total() - len(ids[0])} requests repeated")
    assert len(processes) > kills // 2
    with contextlib.closing(Store(tmp_path)) as store:
        assert store.page("batch.result", parent=id) == ([], False)


def wait_for_results(client, id, count):
    def has_results():
        counts = client.batches.retrieve(id).request_counts
        return counts.completed + counts.failed >= count

    wait_until(has_results, ANSWER_SECONDS)
