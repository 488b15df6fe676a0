"""Fine-tuning jobs on a tiny model: real jobs that take seconds.

The tests use the official clients of today and of 2023 over a socket. Some kill the trainer or the
server.
"""

import csv
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from serve.api import responses
from serve.api.routes import fine_tuning
from serve.jobs import runner
from serve.jobs.jobs import JobStore, check_name, check_suffix
from serve.jobs.process import JobProcess
from serve.jobs.progress import JsonlTail, results_csv
from serve.jobs.runner import JobRunner
from serve.jobs.store import Store
from serve.models import adapters, decoder, disk
from tests.naming import names, naming
from tests.serve import tiny
from tests.serve.old_client import OldClient, install
from tests.waiting import wait_until

pytestmark = pytest.mark.heavy

LONG_JOB = {"n_epochs": 50, "batch_size": 1}  # some 3000 steps
FINISHED = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module", autouse=True)
def fast_jobs():
    """Compile few programs, and do not wait for idle CPU time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "MAX_BATCH_SIZE", 2)
        patch.setattr(runner, "NICENESS", 1)
        patch.setattr(runner, "POLL_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def address(home, folder):
    with tiny.serving(home, folder) as address:
        yield address


def client(address):
    return OpenAI(
        base_url=f"{address}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    )


@pytest.fixture(scope="module")
def openai(address):
    with client(address) as openai:
        yield openai


def upload(openai, data=None, name="train.jsonl"):
    data = tiny.examples() if data is None else data
    return openai.files.create(file=(name, data), purpose="fine-tune").id


def wait_for_end(openai, id, seconds=300):
    jobs = openai.fine_tuning.jobs
    wait_until(lambda: jobs.retrieve(id).status in FINISHED, seconds)
    return jobs.retrieve(id)


def messages(openai, id):
    return [event.message for event in openai.fine_tuning.jobs.list_events(id, limit=100)][::-1]


def reported_steps(openai, id):
    events = openai.fine_tuning.jobs.list_events(id, limit=100)
    return [e.data["step"] for e in events if e.type == "metrics" and "train_loss" in e.data][::-1]


def chat(openai, model, text="1?"):
    response = openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=4
    )
    return response.choices[0].message.content


@pytest.fixture(scope="module")
def trained(openai):
    """Run a job to its end; return the job as created and as finished."""
    first = openai.fine_tuning.jobs.create(
        model="gpt-3.5-turbo",
        training_file=upload(openai),
        validation_file=upload(openai, tiny.examples(15)[-200:].split(b"\n", 1)[1]),
        suffix="letters",
        seed=7,
        metadata={"who": "me"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 20,
                    "batch_size": 4,
                    "learning_rate_multiplier": 20.0,
                }
            },
        },
    )
    return first, wait_for_end(openai, first.id)


def test_job_succeeds_with_model_and_events(openai, trained):
    first, job = trained
    assert first.status == "validating_files" and first.model == "tiny" and first.seed == 7
    assert first.fine_tuned_model is None and first.result_files == [] and first.error is None
    assert job.status == "succeeded", messages(openai, job.id)
    assert job.id == first.id and job.id.startswith("ftjob-")
    name = job.fine_tuned_model
    assert name.startswith("ft:tiny:pellucid:letters:") and len(name.rsplit(":", 1)[1]) == 8
    assert job.finished_at >= job.created_at and job.trained_tokens > 500
    assert job.hyperparameters.n_epochs == 20 and job.hyperparameters.batch_size == 4
    assert job.method.type == "supervised" and job.metadata == {"who": "me"}
    job_messages = messages(openai, job.id)
    assert job_messages[:2] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
    ]
    assert job_messages[3:5] == [
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    assert job_messages[-2:] == [
        f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]


def test_job_events_report_each_step_once(openai, trained):
    job = trained[1]
    events = list(openai.fine_tuning.jobs.list_events(job.id, limit=7))  # page by page
    assert [event.created_at for event in events] == sorted(
        (event.created_at for event in events), reverse=True
    )
    steps = [e for e in events[::-1] if e.type == "metrics" and "train_loss" in e.data]
    assert [event.data["step"] for event in steps] == list(range(1, 61))
    losses = [event.data["train_loss"] for event in steps]
    assert losses[-1] < losses[0]
    assert steps[0].message.startswith("Step 1/60: training loss=")  # OpenAI's message
    assert 0 <= steps[0].data["train_mean_token_accuracy"] <= 1
    validations = [e for e in events if e.type == "metrics" and "full_valid_loss" in e.data]
    assert [event.data["step"] for event in validations] == list(range(60, 0, -3))


def test_job_checkpoints_are_last_three(openai, trained):
    job = trained[1]
    page = openai.fine_tuning.jobs.checkpoints.list(job.id)
    assert [checkpoint.step_number for checkpoint in page.data] == [60, 57, 54], (
        "only the last three checkpoints are kept"
    )
    for checkpoint in page.data:
        assert checkpoint.fine_tuning_job_id == job.id and checkpoint.id.startswith("ftckpt_")
        expected = f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert checkpoint.fine_tuned_model_checkpoint == expected
        assert checkpoint.metrics.step == checkpoint.step_number
        assert checkpoint.metrics.train_loss > 0 and checkpoint.metrics.full_valid_loss > 0
    one = openai.fine_tuning.jobs.checkpoints.list(job.id, limit=1, after=page.data[0].id)
    assert one.data[0] == page.data[1] and one.has_more


def test_job_result_file_has_row_for_each_step(openai, trained):
    job = trained[1]
    file = openai.files.retrieve(job.result_files[0])
    assert file.purpose == "fine-tune-results" and file.filename == "step_metrics.csv"
    rows = list(csv.DictReader(io.StringIO(openai.files.content(file.id).text)))
    assert list(rows[0]) == [
        *("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
    ]
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert rows[0]["valid_loss"] == "" and float(rows[2]["valid_loss"]) > 0
    assert file.bytes == len(openai.files.content(file.id).content)


def test_job_models_and_base_are_served(openai, trained, home):
    job = trained[1]
    ids = [model.id for model in openai.models.list()]
    checkpoints = [f"{job.fine_tuned_model}:ckpt-step-{step}" for step in (54, 57, 60)]
    assert set(ids) >= {"tiny", job.fine_tuned_model, *checkpoints}
    assert openai.models.retrieve(job.fine_tuned_model).owned_by == "local"
    before = chat(openai, "tiny")
    assert {chat(openai, job.fine_tuned_model, f"{i}?") for i in range(6)} == {tiny.ANSWER}
    assert chat(openai, checkpoints[-1]) == tiny.ANSWER
    assert chat(openai, "tiny") == before != tiny.ANSWER
    assert (adapters.adapter_folder(home, job.fine_tuned_model) / "adapter_config.json").is_file()


def test_fine_tuned_model_can_be_deleted_but_not_trained(openai, trained):
    job = trained[1]
    with pytest.raises(BadRequestError, match=naming("`tiny`")) as error:
        openai.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=upload(openai))
    assert (error.value.param, error.value.code) == ("model", "model_not_available")
    victim = f"{job.fine_tuned_model}:ckpt-step-54"
    assert openai.models.delete(victim).deleted
    with pytest.raises(NotFoundError):
        chat(openai, victim)
    assert victim not in [model.id for model in openai.models.list()]
    remaining = openai.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [checkpoint.step_number for checkpoint in remaining] == [60, 57]


def test_list_jobs_by_page_and_metadata(openai, trained):
    job = trained[1]
    other = openai.fine_tuning.jobs.create(model="tiny", training_file=upload(openai))
    assert [listed.id for listed in openai.fine_tuning.jobs.list()][:2] == [other.id, job.id]
    page = openai.fine_tuning.jobs.list(limit=1)
    assert [listed.id for listed in page.data] == [other.id] and page.has_more
    own_jobs = openai.fine_tuning.jobs.list(metadata={"who": "me"})
    assert [listed.id for listed in own_jobs] == [job.id]
    assert openai.fine_tuning.jobs.cancel(other.id).status == "cancelled"


@pytest.mark.slow  # one more whole job
def test_delete_model_deletes_its_checkpoints(openai, home):
    """Regression: the checkpoints of a deleted model stayed listed, served, and on the disk."""
    body = {"n_epochs": 2, "batch_size": 4}
    job = openai.fine_tuning.jobs.create(
        model="tiny", training_file=upload(openai), hyperparameters=body
    )
    job = wait_for_end(openai, job.id)
    name = job.fine_tuned_model
    own_models = sorted(model.id for model in openai.models.list() if model.id.startswith(name))
    assert own_models == adapters.ids_with_checkpoints(home, name) and len(own_models) == 3
    assert chat(openai, own_models[1])
    assert openai.models.delete(name).deleted
    assert not {model.id for model in openai.models.list()} & set(own_models)
    assert adapters.ids_with_checkpoints(home, name) == []
    assert openai.fine_tuning.jobs.checkpoints.list(job.id).data == []
    with pytest.raises(NotFoundError):
        chat(openai, own_models[1])


def test_cancel_running_job_stops_its_process_and_waiting_job_never_starts(openai, home):
    """The files that both jobs need only for training are removed."""
    file = upload(openai, tiny.examples(60))
    running, waiting = (
        openai.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters=LONG_JOB)
        for _ in range(2)
    )
    jobs = openai.fine_tuning.jobs
    wait_until(lambda: 5 in reported_steps(openai, running.id), 300)
    pid = int((home / "jobs" / running.id / "train.pid").read_text())
    niceness = os.getpriority(os.PRIO_PROCESS, 0)  # the tests may be niced too
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(niceness + 1, 19)
    wait_until(lambda: jobs.retrieve(waiting.id).status == "queued", 120)
    estimate = jobs.retrieve(running.id).estimated_finish
    assert estimate is not None and estimate >= time.time() - 1
    assert jobs.cancel(waiting.id).status == "cancelled"
    assert jobs.cancel(running.id).finished_at is not None
    wait_until(lambda: not alive(pid), 120)
    assert jobs.retrieve(running.id).status == "cancelled"
    (last,) = jobs.list_events(running.id, limit=1).data
    assert (last.type, last.level) == ("message", "info"), "the last event reports the cancellation"
    with pytest.raises(BadRequestError) as error:
        jobs.cancel(running.id)
    assert error.value.code == "invalid_job_status"
    wait_until(lambda: not (home / "jobs" / running.id / "out" / "checkpoints").exists(), 60)
    assert not (home / "jobs" / waiting.id / "data.jsonl").exists()
    assert jobs.retrieve(running.id).fine_tuned_model is None


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


INVALID_FILES = [
    (b"\x00\x01\xff" * 100, "invalid_training_file", ["binary"]),
    (
        tiny.examples(12) + b'{"messages": [{"role": "assistent", "content": "x"}]}\n',
        "invalid_training_file",
        ["Example 13", "message 1", "'assistent'"],
    ),
    (tiny.examples(3), "invalid_n_examples", [3, 10]),
    (
        tiny.examples(12) + b'{"messages": "caf\xe9"}\n',
        "invalid_training_file",
        ["Example 13", "UTF-8"],
    ),
    (
        tiny.examples(12) + tiny.examples(1).replace(b"0?", b"?" * 600),
        "invalid_training_file",
        ["Example 13", 512],
    ),
]


def test_job_with_invalid_file_fails_with_code(openai):
    create = openai.fine_tuning.jobs.create
    jobs = [
        create(model="tiny", training_file=upload(openai, data)).id for data, _, _ in INVALID_FILES
    ]
    for id, (_, code, facts) in zip(jobs, INVALID_FILES, strict=True):
        job = wait_for_end(openai, id)
        assert job.status == "failed" and job.error.code == code
        assert job.error.param == "training_file" and job.fine_tuned_model is None
        assert names(job.error.message, *facts)
        last = openai.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
        assert last.level == "error" and last.message == job.error.message


@pytest.mark.slow  # one more whole job
def test_job_with_repeated_examples_succeeds_with_warning(openai):
    """Regression: the job failed, although OpenAI's service accepts repeated examples."""
    repeating = upload(openai, tiny.examples(10) + tiny.examples(3))
    options = {"n_epochs": 1, "batch_size": 12}
    id = openai.fine_tuning.jobs.create(
        model="tiny", training_file=repeating, validation_file=repeating, hyperparameters=options
    ).id
    assert wait_for_end(openai, id).status == "succeeded"
    events = openai.fine_tuning.jobs.list_events(id, limit=50).data
    assert sum(event.level == "warn" for event in events) == 2, "one warning per file"
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert max(steps) == 2, "13 examples in batches of 12 take two steps"


@pytest.mark.slow
def test_job_with_file_of_300_mb_fails(openai):
    job = openai.fine_tuning.jobs.create(
        model="tiny", training_file=upload(openai, b" " * 300 * 2**20)
    )
    job = wait_for_end(openai, job.id)
    assert job.status == "failed" and job.error.code == "invalid_training_file"
    assert names(job.error.message, "300 MB", "256 MB")


def test_job_with_invalid_validation_file_names_it(openai):
    job = openai.fine_tuning.jobs.create(
        model="tiny", training_file=upload(openai), validation_file=upload(openai, b"{}\n")
    )
    job = wait_for_end(openai, job.id)
    assert job.status == "failed" and job.error.param == "validation_file"


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"training_file": "file-nobody"}, 404, "training_file"),
        ({"validation_file": "file-nobody"}, 404, "validation_file"),
        ({"training_file": None}, 400, "training_file"),
        ({"suffix": "x" * 65}, 400, "suffix"),
        ({"suffix": "a:b"}, 400, "suffix"),
        ({"suffix": "../x"}, 400, "suffix"),
        ({"seed": -1}, 400, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "all"}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 1.5}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, 400, "hyperparameters.batch_size"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 0}},
            400,
            "hyperparameters.learning_rate_multiplier",
        ),
        ({"method": {"type": "dpo"}}, 400, "method.type"),
        ({"method": {"type": "magic"}}, 400, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 400, "integrations"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
    ],
)
def test_create_job_invalid_request_is_rejected(address, openai, changes, status, param):
    body = {"model": "tiny", "training_file": upload(openai), **changes}
    response = httpx.post(f"{address}/v1/fine_tuning/jobs", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["message"]


def test_create_job_name_too_long_for_file_system_is_rejected(openai, monkeypatch, tmp_path):
    """Regression: the job was trained to the end, and failed when its model was saved."""
    check_suffix("tiny", f"a{'.' * 62}z")
    with pytest.raises(ValueError, match=naming("'suffix'", f"'a{'.' * 62}z'")):
        check_suffix("smollm2-135m-instruct", f"a{'.' * 62}z")
    check_suffix("smollm2-135m-instruct", "a" * 64)
    with pytest.raises(ValueError, match=naming("'model'")):
        check_name("x" * 200)
    assert not adapters.exists(tmp_path, "x" * 300)
    monkeypatch.setattr(adapters, "MAX_NAME_BYTES", 75)
    with pytest.raises(BadRequestError, match=naming("'abcdefghijklmn'")) as error:
        openai.fine_tuning.jobs.create(
            model="tiny", training_file=upload(openai), suffix="abcdefghijklmn"
        )
    assert error.value.param == "suffix"
    monkeypatch.setattr(adapters, "MAX_NAME_BYTES", 40)
    with pytest.raises(BadRequestError, match=naming("'tiny'")) as error:
        openai.fine_tuning.jobs.create(model="tiny", training_file=upload(openai))
    assert error.value.param == "model"


@pytest.mark.parametrize(
    ("reply", "path"),
    [
        (responses.Files, "files"),
        (responses.FileReply, "files/{job.training_file}"),
        (responses.Jobs, "fine_tuning/jobs"),
        (responses.JobReply, "fine_tuning/jobs/{job.id}"),
        (responses.JobEvents, "fine_tuning/jobs/{job.id}/events?limit=100"),
        (responses.JobCheckpoints, "fine_tuning/jobs/{job.id}/checkpoints"),
        (responses.FineTunes, "fine-tunes"),
        (responses.FineTune, "fine-tunes/{job.id}"),
        (responses.FineTuneEvents, "fine-tunes/{job.id}/events"),
    ],
)
def test_responses_match_models(address, trained, reply, path):
    response = httpx.get(f"{address}/v1/{path.format(job=trained[1])}")
    assert reply.model_validate_json(response.content, strict=True)


def test_event_stream_ends_after_last_event(address, trained):
    url = f"{address}/v1/fine_tuning/jobs/{trained[1].id}/events?stream=true"
    events = httpx.get(url).text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    events = [responses.JobEvent.model_validate_json(event[6:], strict=True) for event in events]
    # OpenAI's messages
    assert events[0].message.startswith("Created fine-tuning job")
    assert events[-1].message == "The job has successfully completed"


@pytest.mark.parametrize("path", ["fine_tuning/jobs", "fine-tunes"])
def test_event_stream_without_events_sends_keepalive(openai, address, monkeypatch, path):
    """Regression: the event stream of a job that waited for ten minutes timed out."""
    monkeypatch.setattr(fine_tuning, "KEEPALIVE_SECONDS", 0.02)
    create, cancel = openai.fine_tuning.jobs.create, openai.fine_tuning.jobs.cancel
    ids = [create(model="tiny", training_file=upload(openai)).id for _ in range(3)]
    url = f"{address}/v1/{path}/{ids[-1]}/events?stream=true"
    with httpx.stream("GET", url, timeout=30) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": still here"
        for id in ids[::-1]:
            cancel(id)
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_create_job_with_file_of_wrong_purpose_is_rejected(openai):
    file = openai.files.create(file=("x", b"x"), purpose="batch")
    with pytest.raises(BadRequestError, match=naming(file.id, "'batch'")) as error:
        openai.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert (error.value.param, error.value.code) == ("training_file", "invalid_file_purpose")


def test_unknown_job_returns_404(address):
    for method, path in [
        ("GET", "fine_tuning/jobs/ft-x"),
        ("POST", "fine_tuning/jobs/ft-x/cancel"),
        ("GET", "fine_tuning/jobs/ft-x/events"),
        ("GET", "fine_tuning/jobs/ft-x/checkpoints"),
        ("GET", "fine-tunes/ft-x"),
        ("GET", "fine-tunes/ft-x/events?stream=true"),
    ]:
        response = httpx.request(method, f"{address}/v1/{path}")
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (404, "id", "not_found")
        assert error["message"] == "No such fine-tune job: ft-x"  # OpenAI's message


# --- the client of 2023 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_client(address):
    return OldClient(install(), address)


@pytest.mark.slow
def test_client_of_2023_command_creates_and_follows_job(old_client, tmp_path):
    """`fine_tunes.create` uploads the file, creates the job, and follows it to the end."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(tiny.pairs())
    text = old_client.command("api", "fine_tunes.create", "-t", str(path), "--suffix", "old")
    # The sentences are those of the client, and of OpenAI's events.
    id = text.split("Created fine-tune: ")[1].split()[0]
    assert id.startswith("ft-") and "Streaming events until fine-tuning is complete" in text
    assert f"] Created fine-tuning job: {id}" in text and "] Step 1/48: training loss=" in text
    assert "Job complete! Status: succeeded" in text
    name = text.split("openai api completions.create -m ")[1].split()[0]
    assert name.startswith("ft:tiny:pellucid:old:")
    again = old_client.command("api", "fine_tunes.follow", "-i", id)
    assert again.count("] Step") == 48 and "Job complete!" in again
    assert "step,train_loss" in old_client.command("api", "fine_tunes.results", "-i", id)
    results = old_client.run(
        f"job = openai.FineTune.retrieve({id!r})\n"
        "listed = [job.id for job in openai.FineTune.list().data]\n"
        f"events = openai.FineTune.list_events({id!r})\n"
        f"completion = openai.Completion.create(model={name!r}, prompt='1 ->', max_tokens=3)\n"
        "answer = [job, listed, len(events.data), completion.choices[0].text]"
    )
    job, listed, count, completion = results
    assert job["object"] == "fine-tune" and job["status"] == "succeeded"
    assert job["hyperparams"]["n_epochs"] == 4 and job["fine_tuned_model"] == name
    assert job["training_files"][0]["filename"] == "pairs.jsonl"
    assert job["result_files"][0]["purpose"] == "fine-tune-results"
    assert id in listed and len(job["events"]) == count > 50
    assert isinstance(completion, str)


def test_client_of_2023_reads_jobs_of_both_routes(old_client, openai):
    response = old_client.run(
        f"file = {upload(openai)!r}\n"
        "job = openai.FineTuningJob.create(model='tiny', training_file=file,"
        " hyperparameters={'n_epochs': 1})\n"
        "same = openai.FineTune.retrieve(job.id)\n"
        "gone = openai.FineTune.cancel(job.id)\n"
        "events = openai.FineTuningJob.list_events(job.id, limit=2)\n"
        "answer = [job.id, same.status, gone.status, len(events.data)]"
    )
    assert response[0].startswith("ftjob-") and response[1:] == ["pending", "cancelled", 2]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt_loss_weight": 0.1}, "prompt_loss_weight"),
        ({"compute_classification_metrics": True}, "compute_classification_metrics"),
        ({"suffix": "x" * 41}, "suffix"),
        ({"n_epochs": 0}, "n_epochs"),
    ],
)
def test_create_fine_tune_unsupported_option_is_rejected(address, openai, changes, param):
    body = {"training_file": upload(openai), **changes}
    response = httpx.post(f"{address}/v1/fine-tunes", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


# --- killed servers and trainers ------------------------------------------------------------------

SERVER_SCRIPT = """
    import sys
    from pathlib import Path
    from serve.jobs import runner
    from serve.models import decoder
    from tests.serve import tiny

    decoder.MAX_BATCH_SIZE, runner.NICENESS, runner.POLL_SECONDS = 2, 1, 0.1
    with tiny.serving(Path(sys.argv[1]), Path(sys.argv[2])) as address:
        print(address, flush=True)
        sys.stdin.read()
"""


class Server:
    """A server in a separate process, which tests can stop or kill."""

    def __init__(self, home, folder):
        command = [sys.executable, "-c", textwrap.dedent(SERVER_SCRIPT), str(home), str(folder)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        self.openai = client(self.process.stdout.readline().strip())

    def kill(self):
        self.openai.close()
        with self.process:  # closes its pipes
            self.process.kill()

    def stop(self):
        self.openai.close()
        with self.process:
            self.process.stdin.close()
            assert self.process.wait(120) == 0


def create_long_job(openai, **hyperparameters):
    return openai.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(openai, tiny.examples(60)),
        seed=3,
        hyperparameters={"n_epochs": 25, "batch_size": 1, **hyperparameters},
    ).id


def wait_for_step(openai, id, step):
    """Wait until a step is reported."""

    def is_reported():
        events = openai.fine_tuning.jobs.list_events(id, limit=3).data
        return any((event.data or {}).get("step", 0) >= step for event in events)

    wait_until(is_reported, 300)


def adapter_bytes(home, job):
    return (
        adapters.adapter_folder(home, job.fine_tuned_model) / "adapter_model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def expected_weights(openai, home):
    """Return the adapter weights, as bytes, of the same job trained without interruption."""
    job = wait_for_end(openai, create_long_job(openai))
    assert job.status == "succeeded"
    return adapter_bytes(home, job)


def run_with_kills(kills, folder, home):
    """Run a job, kill its trainer or server several times, and return the finished job."""
    server = Server(home, folder)
    id = create_long_job(server.openai)

    def pid():
        return int((home / "jobs" / id / "train.pid").read_text())

    for number, kill in enumerate(kills, 1):
        wait_for_step(server.openai, id, number * 200)
        before = pid()
        if kill in ("trainer", "both"):
            os.kill(before, signal.SIGKILL)
        if kill == "stop":  # a clean stop leaves no process
            server.stop()
            assert not alive(before)
        if kill in ("server", "both"):
            server.kill()
        if kill == "server":  # the trainer continues, and the next server finds it
            assert alive(before)
        if kill != "trainer":
            server = Server(home, folder)
    job = wait_for_end(server.openai, id)
    job_messages = messages(server.openai, id)
    assert job.status == "succeeded", job_messages[-3:]
    assert reported_steps(server.openai, id) == list(range(1, 1501)), (
        "each step is reported once, in order"
    )
    assert job_messages.count("Fine-tuning job started") == 1
    assert any(names(line, "signal 9") for line in job_messages) == ("trainer" in kills)
    assert chat(server.openai, job.fine_tuned_model)
    server.stop()
    return job


@pytest.mark.slow
def test_killed_trainer_resumes_and_reports_each_step_once(openai, home):
    id = create_long_job(openai, n_epochs=12)
    wait_for_step(openai, id, 120)
    first = int((home / "jobs" / id / "train.pid").read_text())
    os.kill(first, signal.SIGKILL)
    job = wait_for_end(openai, id)
    job_messages = messages(openai, id)
    assert job.status == "succeeded", job_messages[-3:]
    assert sum(names(line, "signal 9") for line in job_messages) == 1
    assert reported_steps(openai, id) == list(range(1, 721)), "each step is reported once, in order"


@pytest.mark.slow
def test_killed_trainer_and_server_give_uninterrupted_weights(expected_weights, folder, tmp_path):
    job = run_with_kills(["trainer", "server"], folder, tmp_path)
    assert adapter_bytes(tmp_path, job) == expected_weights, "bit for bit"


@pytest.mark.slow
def test_repeated_kills_give_uninterrupted_weights(expected_weights, folder, tmp_path):
    job = run_with_kills(["trainer", "server", "both", "stop", "both"], folder, tmp_path)
    assert adapter_bytes(tmp_path, job) == expected_weights, "bit for bit"


@pytest.mark.slow
def test_cancel_job_of_killed_server_stops_its_trainer(folder, tmp_path):
    server = Server(tmp_path, folder)
    id = create_long_job(server.openai, n_epochs=50)  # 3000 steps
    wait_for_step(server.openai, id, 5)
    server.kill()
    pid = int((tmp_path / "jobs" / id / "train.pid").read_text())
    server = Server(tmp_path, folder)
    server.openai.fine_tuning.jobs.cancel(id)
    wait_until(lambda: not alive(pid), 120)
    server.stop()


@pytest.mark.slow
def test_idle_server_takes_over_job_of_killed_server(folder, tmp_path):
    """Regression: the job runner of the idle server did not start when the other was killed."""
    idle, first = Server(tmp_path, folder), Server(tmp_path, folder)
    id = create_long_job(first.openai, n_epochs=10)
    wait_for_step(first.openai, id, 3)
    first.kill()
    assert wait_for_end(idle.openai, id).status == "succeeded"
    idle.stop()


@pytest.mark.slow
def test_two_servers_train_each_job_once(openai, address, home, folder):
    """Jobs are created through two servers that share a data folder."""
    with tiny.serving(home, folder) as second, client(second) as other:
        jobs = [create_long_job(one, n_epochs=1, batch_size=4) for one in (openai, other, openai)]
        for id in jobs:
            job = wait_for_end(other, id)
            assert job.status == "succeeded"
            assert messages(openai, id).count("Fine-tuning job started") == 1
            assert job.fine_tuned_model in [model.id for model in openai.models.list()]
            assert job.fine_tuned_model in [model.id for model in other.models.list()]


# --- parts ----------------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path):
    store = Store(tmp_path)
    with store.open_blob("file-1") as blob:
        blob.write(tiny.examples())
        blob.commit({"id": "file-1"})
    yield JobStore(store, tmp_path)
    store.close()


def test_training_data_of_job_survives_deletion_of_uploaded_file(jobs, folder):
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    jobs.store.delete_file("file-1")
    assert (jobs.folder(id) / "data.jsonl").read_bytes() == tiny.examples()


@pytest.mark.parametrize("status", ["validating_files", "running"])
def test_job_whose_process_is_always_killed_fails(jobs, folder, monkeypatch, status):
    """Regression: a validation that was killed for lack of memory was restarted forever."""
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    jobs.set_status(id, status, weights="x")
    monkeypatch.setattr("serve.jobs.runner.POLL_SECONDS", 0.01)
    arguments = ["-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr("serve.jobs.process._program", lambda *_: [sys.executable, *arguments])
    job_runner = JobRunner(jobs)
    job_runner.wake()
    wait_until(lambda: jobs.get(id)["status"] == "failed", 60)
    job_runner.close()
    assert names(jobs.get(id)["error"]["message"], 3, 9)


def test_idle_runner_finds_new_jobs(jobs, folder, monkeypatch):
    """Regression: a job of a killed server started only when a client requested it."""
    monkeypatch.setattr("serve.jobs.runner.IDLE_POLL_SECONDS", 0.05)
    monkeypatch.setattr("serve.jobs.runner.POLL_SECONDS", 0.01)
    arguments = ["-c", "raise SystemExit('error 4711')"]
    monkeypatch.setattr("serve.jobs.process._program", lambda *_: [sys.executable, *arguments])
    with closing(JobRunner(jobs)) as job_runner:
        job_runner.watch()
        id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
        wait_until(lambda: jobs.get(id)["status"] == "failed", 60)
        assert names(jobs.get(id)["error"]["message"], "error 4711")


def test_runner_cleans_up_cancelled_job_of_killed_server(jobs, folder, monkeypatch):
    """Regression: if a server was killed before it stopped the trainer, the trainer continued."""
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    jobs.set_status(id, "running")
    arguments = ["-c", "import time; time.sleep(600)"]
    monkeypatch.setattr("serve.jobs.process._program", lambda *_: [sys.executable, *arguments])
    remaining = JobProcess.start(id, jobs.folder(id), "train", [])
    (jobs.folder(id) / "out" / "checkpoints").mkdir(parents=True)
    (jobs.home / "made" / ".new-x").mkdir(parents=True)
    jobs.cancel(id)
    assert not remaining.has_exited and not jobs.is_cleaned_up(id)
    with closing(JobRunner(jobs)) as job_runner:
        job_runner.watch()
        wait_until(lambda: remaining.has_exited and jobs.is_cleaned_up(id), 60)
    assert not (jobs.home / "made" / ".new-x").exists()


def test_runner_retries_after_temporary_error(jobs, folder, monkeypatch):
    """Regression: a disk that was full for a moment failed the job and deleted its checkpoints."""
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    start, failures = JobProcess.start, [OSError("no space left")] * 3

    def failing_start(*arguments, **options):
        if failures:
            raise failures.pop()
        return start(*arguments, **options)

    monkeypatch.setattr("serve.jobs.runner.POLL_SECONDS", 0.01)
    monkeypatch.setattr(JobProcess, "start", failing_start)
    job_runner = JobRunner(jobs)
    job_runner.wake()
    wait_until(lambda: jobs.get(id)["status"] not in ("validating_files",), 60)
    job_runner.close()
    assert not failures and jobs.get(id)["status"] in ("queued", "running")


def test_runner_permanent_error_fails_job(jobs, folder, monkeypatch):
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]

    def failing_start(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("serve.jobs.runner.POLL_SECONDS", 0.001)
    monkeypatch.setattr(JobProcess, "start", failing_start)
    job_runner = JobRunner(jobs)
    job_runner.wake()
    wait_until(lambda: jobs.get(id)["status"] == "failed", 60)
    job_runner.close()


def test_job_with_missing_model_fails(jobs, tmp_path):
    id = jobs.create(model="tiny", model_path=tmp_path / "gone", training_file="file-1")["id"]
    job_runner = JobRunner(jobs)
    job_runner.wake()
    wait_until(lambda: jobs.get(id)["status"] == "failed", 120)
    job_runner.close()
    assert "gone" in jobs.get(id)["error"]["message"]


def test_finished_job_keeps_its_status(jobs, folder):
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    jobs.cancel(id)
    assert not jobs.set_status(id, "succeeded", fine_tuned_model="x")
    jobs.fail(id, "server_error", "too late")
    assert jobs.get(id)["status"] == "cancelled" and jobs.get(id)["error"] is None


def test_jsonl_tail_returns_new_lines_of_growing_and_replaced_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonlTail(path)
    assert lines.read_new() == []
    path.write_text('{"step": 1}\n{"ste')
    assert lines.read_new() == [{"step": 1}]
    with path.open("a") as file:
        file.write('p": 2}\n')
    assert lines.read_new() == [{"step": 2}] and lines.read_new() == []
    (tmp_path / "new").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "new").rename(path)
    assert lines.read_new() == [{"step": 1}, {"step": 2}]


def test_results_csv_has_row_for_each_step():
    lines = [
        {"step": 1, "loss": 2.123456789, "accuracy": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 2, "valid_loss": 1.5, "valid_accuracy": 0.25},
    ]
    assert results_csv(lines) == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
        "1,2.12346,0.5,,\n"
        "2,1.0,,1.5,0.25\n"
    )


def test_locked_file_and_ended_job_process_are_detected(tmp_path):
    lock = disk.try_lock(tmp_path / "x.lock")
    assert lock is not None and disk.try_lock(tmp_path / "x.lock") is None
    os.close(lock)
    process = JobProcess.start("job", tmp_path, "x", ["json.tool", "/dev/stdin"])
    assert process.job_id == "job"
    wait_until(lambda: process.has_exited)
    assert JobProcess.find_running("job", tmp_path, "x") is None
    assert process.exit_code == 1 and names(process.failure_message(), "line 1")
