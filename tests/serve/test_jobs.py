"""Fine-tuning jobs on a model of some thousand weights, which are real jobs and take seconds.

Through the official clients of today and of 2023, over a socket; and with what trains them, or who
serves them, killed.
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

LONG = {"n_epochs": 50, "batch_size": 1}  # some 3000 steps
OVER = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few programs to compile, and nobody waits for a busy machine's idle moments."""
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


def ended(openai, id, seconds=300):
    jobs = openai.fine_tuning.jobs
    wait_until(lambda: jobs.retrieve(id).status in OVER, seconds)
    return jobs.retrieve(id)


def messages(openai, id):
    return [event.message for event in openai.fine_tuning.jobs.list_events(id, limit=100)][::-1]


def steps_told(openai, id):
    events = openai.fine_tuning.jobs.list_events(id, limit=100)
    return [e.data["step"] for e in events if e.type == "metrics" and "train_loss" in e.data][::-1]


def chat(openai, model, text="1?"):
    answer = openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=4
    )
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def trained(openai):
    """A job that is done, as it was at first and at last."""
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
    return first, ended(openai, first.id)


def test_a_job_from_file_to_model(openai, trained):
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
    told = messages(openai, job.id)
    assert told[:2] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
    ]
    assert told[3:5] == ["Files validated, moving job to queued state", "Fine-tuning job started"]
    assert told[-2:] == [
        f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]


def test_its_events_tell_every_step_once(openai, trained):
    job = trained[1]
    found = list(openai.fine_tuning.jobs.list_events(job.id, limit=7))  # page by page
    assert [event.created_at for event in found] == sorted(
        (event.created_at for event in found), reverse=True
    )
    steps = [e for e in found[::-1] if e.type == "metrics" and "train_loss" in e.data]
    assert [event.data["step"] for event in steps] == list(range(1, 61))
    losses = [event.data["train_loss"] for event in steps]
    assert losses[-1] < losses[0]
    assert steps[0].message.startswith("Step 1/60: training loss=")  # OpenAI's own words
    assert 0 <= steps[0].data["train_mean_token_accuracy"] <= 1
    looks = [e for e in found if e.type == "metrics" and "full_valid_loss" in e.data]
    assert [event.data["step"] for event in looks] == list(range(60, 0, -3))


def test_its_checkpoints(openai, trained):
    job = trained[1]
    page = openai.fine_tuning.jobs.checkpoints.list(job.id)
    assert [checkpoint.step_number for checkpoint in page.data] == [60, 57, 54], "the last three"
    for checkpoint in page.data:
        assert checkpoint.fine_tuning_job_id == job.id and checkpoint.id.startswith("ftckpt_")
        expected = f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert checkpoint.fine_tuned_model_checkpoint == expected
        assert checkpoint.metrics.step == checkpoint.step_number
        assert checkpoint.metrics.train_loss > 0 and checkpoint.metrics.full_valid_loss > 0
    one = openai.fine_tuning.jobs.checkpoints.list(job.id, limit=1, after=page.data[0].id)
    assert one.data[0] == page.data[1] and one.has_more


def test_its_results(openai, trained):
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


def test_its_models_answer_beside_their_base(openai, trained, home):
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


def test_a_model_that_was_made_can_be_deleted_and_not_trained(openai, trained):
    job = trained[1]
    with pytest.raises(BadRequestError, match=naming("`tiny`")) as error:
        openai.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=upload(openai))
    assert (error.value.param, error.value.code) == ("model", "model_not_available")
    victim = f"{job.fine_tuned_model}:ckpt-step-54"
    assert openai.models.delete(victim).deleted
    with pytest.raises(NotFoundError):
        chat(openai, victim)
    assert victim not in [model.id for model in openai.models.list()]
    left = openai.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [checkpoint.step_number for checkpoint in left] == [60, 57]


def test_jobs_are_listed(openai, trained):
    job = trained[1]
    other = openai.fine_tuning.jobs.create(model="tiny", training_file=upload(openai))
    assert [found.id for found in openai.fine_tuning.jobs.list()][:2] == [other.id, job.id]
    page = openai.fine_tuning.jobs.list(limit=1)
    assert [found.id for found in page.data] == [other.id] and page.has_more
    mine = openai.fine_tuning.jobs.list(metadata={"who": "me"})
    assert [found.id for found in mine] == [job.id]
    assert openai.fine_tuning.jobs.cancel(other.id).status == "cancelled"


def test_checkpoints_go_with_their_model(openai, home):
    """They stayed: listed, served, and on the disk."""
    body = {"n_epochs": 2, "batch_size": 4}
    job = openai.fine_tuning.jobs.create(
        model="tiny", training_file=upload(openai), hyperparameters=body
    )
    job = ended(openai, job.id)
    name = job.fine_tuned_model
    mine = sorted(model.id for model in openai.models.list() if model.id.startswith(name))
    assert mine == adapters.ids_with_checkpoints(home, name) and len(mine) == 3
    assert chat(openai, mine[1])
    assert openai.models.delete(name).deleted
    assert not {model.id for model in openai.models.list()} & set(mine)
    assert adapters.ids_with_checkpoints(home, name) == []
    assert openai.fine_tuning.jobs.checkpoints.list(job.id).data == []
    with pytest.raises(NotFoundError):
        chat(openai, mine[1])


def test_cancelling(openai, home):
    """Of what waits and of what runs; the process is gone, and the next job has its turn."""
    file = upload(openai, tiny.examples(60))
    running, waiting = (
        openai.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters=LONG)
        for _ in range(2)
    )
    jobs = openai.fine_tuning.jobs
    wait_until(lambda: 5 in steps_told(openai, running.id), 300)
    pid = int((home / "jobs" / running.id / "train.pid").read_text())
    ours = os.getpriority(os.PRIO_PROCESS, 0)  # the tests may be niced themselves
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(ours + 1, 19)
    wait_until(lambda: jobs.retrieve(waiting.id).status == "queued", 120)
    estimate = jobs.retrieve(running.id).estimated_finish
    assert estimate is not None and estimate >= time.time() - 1
    assert jobs.cancel(waiting.id).status == "cancelled"
    assert jobs.cancel(running.id).finished_at is not None
    wait_until(lambda: not alive(pid), 120)
    assert jobs.retrieve(running.id).status == "cancelled"
    (last,) = jobs.list_events(running.id, limit=1).data
    assert (last.type, last.level) == ("message", "info"), "it says so, and no step follows"
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


BAD = [
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


def test_files_that_cannot_be_learned_from(openai):
    create = openai.fine_tuning.jobs.create
    jobs = [create(model="tiny", training_file=upload(openai, data)).id for data, _, _ in BAD]
    for id, (_, code, facts) in zip(jobs, BAD, strict=True):
        job = ended(openai, id)
        assert job.status == "failed" and job.error.code == code
        assert job.error.param == "training_file" and job.fine_tuned_model is None
        assert names(job.error.message, *facts)
        last = openai.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
        assert last.level == "error" and last.message == job.error.message


def test_a_file_with_repeated_examples_is_trained_with_a_warning(openai):
    """The job failed; OpenAI's service takes such files."""
    repeating = upload(openai, tiny.examples(10) + tiny.examples(3))
    options = {"n_epochs": 1, "batch_size": 12}
    id = openai.fine_tuning.jobs.create(
        model="tiny", training_file=repeating, validation_file=repeating, hyperparameters=options
    ).id
    assert ended(openai, id).status == "succeeded"
    events = openai.fine_tuning.jobs.list_events(id, limit=50).data
    assert sum(event.level == "warn" for event in events) == 2, "one a file"
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert max(steps) == 2, "thirteen examples, not ten"


@pytest.mark.slow
def test_a_file_of_300_megabytes_is_refused_for_its_size(openai):
    job = openai.fine_tuning.jobs.create(
        model="tiny", training_file=upload(openai, b" " * 300 * 2**20)
    )
    job = ended(openai, job.id)
    assert job.status == "failed" and job.error.code == "invalid_training_file"
    assert names(job.error.message, "300 MB", "256 MB")


def test_a_bad_validation_file_is_the_one_that_is_named(openai):
    job = openai.fine_tuning.jobs.create(
        model="tiny", training_file=upload(openai), validation_file=upload(openai, b"{}\n")
    )
    job = ended(openai, job.id)
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
def test_requests_that_are_refused(address, openai, changes, status, param):
    body = {"model": "tiny", "training_file": upload(openai), **changes}
    response = httpx.post(f"{address}/v1/fine_tuning/jobs", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["message"]


def test_names_too_long_for_the_file_system_are_refused(openai, monkeypatch, tmp_path):
    """Such a job was trained to its end, and failed when its model should have been made."""
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
def test_answers_are_as_described(address, trained, reply, path):
    answer = httpx.get(f"{address}/v1/{path.format(job=trained[1])}")
    assert reply.model_validate_json(answer.content, strict=True)


def test_events_are_streamed_until_the_end(address, trained):
    url = f"{address}/v1/fine_tuning/jobs/{trained[1].id}/events?stream=true"
    events = httpx.get(url).text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    shown = [responses.JobEvent.model_validate_json(event[6:], strict=True) for event in events]
    # In OpenAI's own words
    assert shown[0].message.startswith("Created fine-tuning job")
    assert shown[-1].message == "The job has successfully completed"


@pytest.mark.parametrize("path", ["fine_tuning/jobs", "fine-tunes"])
def test_a_stream_without_news_gives_a_sign_of_life(openai, address, monkeypatch, path):
    """A job that waited for ten minutes broke off who followed it."""
    monkeypatch.setattr(fine_tuning, "KEEPALIVE_SECONDS", 0.02)
    create, cancel = openai.fine_tuning.jobs.create, openai.fine_tuning.jobs.cancel
    ids = [create(model="tiny", training_file=upload(openai)).id for _ in range(3)]
    url = f"{address}/v1/{path}/{ids[-1]}/events?stream=true"
    with httpx.stream("GET", url, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": still here"
        for id in ids[::-1]:
            cancel(id)
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_a_file_of_another_purpose_is_refused(openai):
    file = openai.files.create(file=("x", b"x"), purpose="batch")
    with pytest.raises(BadRequestError, match=naming(file.id, "'batch'")) as error:
        openai.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert (error.value.param, error.value.code) == ("training_file", "invalid_file_purpose")


def test_what_is_not_there(address):
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
        assert error["message"] == "No such fine-tune job: ft-x"  # OpenAI's own sentence


# --- the client of 2023 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old(address):
    return OldClient(install(), address)


def test_the_command_of_2023(old, tmp_path):
    """`fine_tunes.create` uploads, makes the job and follows it to its end."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(tiny.pairs())
    text = old.command("api", "fine_tunes.create", "-t", str(path), "--suffix", "old")
    # The sentences are those of the client, and OpenAI's own of events.
    id = text.split("Created fine-tune: ")[1].split()[0]
    assert id.startswith("ft-") and "Streaming events until fine-tuning is complete" in text
    assert f"] Created fine-tuning job: {id}" in text and "] Step 1/48: training loss=" in text
    assert "Job complete! Status: succeeded" in text
    name = text.split("openai api completions.create -m ")[1].split()[0]
    assert name.startswith("ft:tiny:pellucid:old:")
    again = old.command("api", "fine_tunes.follow", "-i", id)
    assert again.count("] Step") == 48 and "Job complete!" in again
    assert "step,train_loss" in old.command("api", "fine_tunes.results", "-i", id)
    found = old.run(
        f"job = openai.FineTune.retrieve({id!r})\n"
        "listed = [job.id for job in openai.FineTune.list().data]\n"
        f"events = openai.FineTune.list_events({id!r})\n"
        f"said = openai.Completion.create(model={name!r}, prompt='1 ->', max_tokens=3)\n"
        "answer = [job, listed, len(events.data), said.choices[0].text]"
    )
    job, listed, count, said = found
    assert job["object"] == "fine-tune" and job["status"] == "succeeded"
    assert job["hyperparams"]["n_epochs"] == 4 and job["fine_tuned_model"] == name
    assert job["training_files"][0]["filename"] == "pairs.jsonl"
    assert job["result_files"][0]["purpose"] == "fine-tune-results"
    assert id in listed and len(job["events"]) == count > 50
    assert isinstance(said, str)


def test_the_jobs_of_2023_in_todays_words_and_back(old, openai):
    answer = old.run(
        f"file = {upload(openai)!r}\n"
        "job = openai.FineTuningJob.create(model='tiny', training_file=file,"
        " hyperparameters={'n_epochs': 1})\n"
        "same = openai.FineTune.retrieve(job.id)\n"
        "gone = openai.FineTune.cancel(job.id)\n"
        "events = openai.FineTuningJob.list_events(job.id, limit=2)\n"
        "answer = [job.id, same.status, gone.status, len(events.data)]"
    )
    assert answer[0].startswith("ftjob-") and answer[1:] == ["pending", "cancelled", 2]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt_loss_weight": 0.1}, "prompt_loss_weight"),
        ({"compute_classification_metrics": True}, "compute_classification_metrics"),
        ({"suffix": "x" * 41}, "suffix"),
        ({"n_epochs": 0}, "n_epochs"),
    ],
)
def test_what_no_trainer_here_does(address, openai, changes, param):
    body = {"training_file": upload(openai), **changes}
    response = httpx.post(f"{address}/v1/fine-tunes", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


# --- kills (slow: servers and trainers that start, one after the other) ------------------

SERVER = """
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
    """A server in a process of its own."""

    def __init__(self, home, folder):
        command = [sys.executable, "-c", textwrap.dedent(SERVER), str(home), str(folder)]
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
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.openai.close()
        self.process.stdin.close()
        assert self.process.wait(120) == 0


def make(openai, **hyperparameters):
    return openai.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(openai, tiny.examples(60)),
        seed=3,
        hyperparameters={"n_epochs": 25, "batch_size": 1, **hyperparameters},
    ).id


def stepped(openai, id, step):
    """Waits for a step."""

    def has_come():
        events = openai.fine_tuning.jobs.list_events(id, limit=3).data
        return any((event.data or {}).get("step", 0) >= step for event in events)

    wait_until(has_come, 300)


def adapter(home, job):
    return (
        adapters.adapter_folder(home, job.fine_tuned_model) / "adapter_model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(openai, home):
    """The weights of the same job when nothing happens to it."""
    job = ended(openai, make(openai))
    assert job.status == "succeeded"
    return adapter(home, job)


def killed(kills, folder, home):
    """What the job was in the end, after its trainer and its servers came to grief."""
    server = Server(home, folder)
    id = make(server.openai)

    def pid():
        return int((home / "jobs" / id / "train.pid").read_text())

    for number, kill in enumerate(kills, 1):
        stepped(server.openai, id, number * 200)
        before = pid()
        if kill in ("trainer", "both"):
            os.kill(before, signal.SIGKILL)
        if kill == "stop":  # in good order: nothing is left running
            server.stop()
            assert not alive(before)
        if kill in ("server", "both"):
            server.kill()
        if kill == "server":  # its trainer goes on, and the next server finds it
            assert alive(before)
        if kill != "trainer":
            server = Server(home, folder)
    job = ended(server.openai, id)
    told = messages(server.openai, id)
    assert job.status == "succeeded", told[-3:]
    assert steps_told(server.openai, id) == list(range(1, 1501)), "each is told once, in order"
    assert told.count("Fine-tuning job started") == 1
    assert any(names(line, "signal 9") for line in told) == ("trainer" in kills)
    assert chat(server.openai, job.fine_tuned_model)
    server.stop()
    return job


@pytest.mark.slow
def test_a_trainer_that_is_killed_goes_on(openai, home):
    id = make(openai, n_epochs=12)
    stepped(openai, id, 120)
    first = int((home / "jobs" / id / "train.pid").read_text())
    os.kill(first, signal.SIGKILL)
    job = ended(openai, id)
    told = messages(openai, id)
    assert job.status == "succeeded", told[-3:]
    assert sum(names(line, "signal 9") for line in told) == 1
    assert steps_told(openai, id) == list(range(1, 721)), "each is told once, in order"


@pytest.mark.slow
def test_killed_and_gone_on_with(undisturbed, folder, tmp_path):
    job = killed(["trainer", "server"], folder, tmp_path)
    assert adapter(tmp_path, job) == undisturbed, "to the bit"


@pytest.mark.slow
def test_killed_again_and_again(undisturbed, folder, tmp_path):
    job = killed(["trainer", "server", "both", "stop", "both"], folder, tmp_path)
    assert adapter(tmp_path, job) == undisturbed, "to the bit"


@pytest.mark.slow
def test_a_job_that_was_orphaned_can_be_cancelled(folder, tmp_path):
    server = Server(tmp_path, folder)
    id = make(server.openai, n_epochs=50)  # 3000 steps
    stepped(server.openai, id, 5)
    server.kill()
    pid = int((tmp_path / "jobs" / id / "train.pid").read_text())
    server = Server(tmp_path, folder)
    server.openai.fine_tuning.jobs.cancel(id)
    wait_until(lambda: not alive(pid), 120)
    server.stop()


@pytest.mark.slow
def test_a_server_with_nothing_to_do_takes_over(folder, tmp_path):
    """Its job runner had ended before the job was made; nobody woke it when the other was killed."""
    idle, first = Server(tmp_path, folder), Server(tmp_path, folder)
    id = make(first.openai, n_epochs=10)
    stepped(first.openai, id, 3)
    first.kill()
    assert ended(idle.openai, id).status == "succeeded"
    idle.stop()


@pytest.mark.slow
def test_of_two_servers_one_is_the_keeper(openai, address, home, folder):
    """Both answer for the same jobs, and each job is trained once."""
    with tiny.serving(home, folder) as second, client(second) as other:
        jobs = [make(one, n_epochs=1, batch_size=4) for one in (openai, other, openai)]
        for id in jobs:
            job = ended(other, id)
            assert job.status == "succeeded"
            assert messages(openai, id).count("Fine-tuning job started") == 1
            assert job.fine_tuned_model in [model.id for model in openai.models.list()]
            assert job.fine_tuned_model in [model.id for model in other.models.list()]


# --- parts ----------------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path):
    store = Store(tmp_path)
    with store.open_blob("file-1") as incoming:
        incoming.write(tiny.examples())
        incoming.commit({"id": "file-1"})
    yield JobStore(store, tmp_path)
    store.close()


def test_a_job_keeps_its_data_when_the_file_is_deleted(jobs, folder):
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    jobs.store.delete_file("file-1")
    assert (jobs.folder(id) / "data.jsonl").read_bytes() == tiny.examples()


@pytest.mark.parametrize("status", ["validating_files", "running"])
def test_a_job_whose_process_always_dies_is_given_up(jobs, folder, monkeypatch, status):
    """As one does for which there is not enough memory. A check was begun again for ever."""
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    jobs.set_status(id, status, weights="x")
    monkeypatch.setattr("serve.jobs.runner.POLL_SECONDS", 0.01)
    dies = ["-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr("serve.jobs.process._program", lambda *_: [sys.executable, *dies])
    job_runner = JobRunner(jobs)
    job_runner.wake()
    wait_until(lambda: jobs.get(id)["status"] == "failed", 60)
    job_runner.close()
    assert names(jobs.get(id)["error"]["message"], 3, 9)


def test_an_idle_server_finds_jobs_by_itself(jobs, folder, monkeypatch):
    """Who made one was killed: it was begun when somebody looked at it, and not before."""
    monkeypatch.setattr("serve.jobs.runner.IDLE_POLL_SECONDS", 0.05)
    monkeypatch.setattr("serve.jobs.runner.POLL_SECONDS", 0.01)
    fails = ["-c", "raise SystemExit('error 4711')"]
    monkeypatch.setattr("serve.jobs.process._program", lambda *_: [sys.executable, *fails])
    with closing(JobRunner(jobs)) as job_runner:
        job_runner.watch()
        id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
        wait_until(lambda: jobs.get(id)["status"] == "failed", 60)
        assert names(jobs.get(id)["error"]["message"], "error 4711")


def test_what_was_left_of_a_cancelled_job_is_removed(jobs, folder, monkeypatch):
    """Its server was killed before it stopped the trainer, which went on and kept its files."""
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    jobs.set_status(id, "running")
    waits = ["-c", "import time; time.sleep(600)"]
    monkeypatch.setattr("serve.jobs.process._program", lambda *_: [sys.executable, *waits])
    left = JobProcess.start(id, jobs.folder(id), "train", [])
    (jobs.folder(id) / "out" / "checkpoints").mkdir(parents=True)
    (jobs.home / "made" / ".new-x").mkdir(parents=True)
    jobs.cancel(id)
    assert not left.has_exited and not jobs.is_cleaned_up(id)
    with closing(JobRunner(jobs)) as job_runner:
        job_runner.watch()
        wait_until(lambda: left.has_exited and jobs.is_cleaned_up(id), 60)
    assert not (jobs.home / "made" / ".new-x").exists()


def test_what_passes_is_tried_again(jobs, folder, monkeypatch):
    """One moment without room on the disk ended the job, and deleted its checkpoints."""
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    start, failures = JobProcess.start, [OSError("no space left")] * 3

    def begin(*arguments, **options):
        if failures:
            raise failures.pop()
        return start(*arguments, **options)

    monkeypatch.setattr("serve.jobs.runner.POLL_SECONDS", 0.01)
    monkeypatch.setattr(JobProcess, "start", begin)
    job_runner = JobRunner(jobs)
    job_runner.wake()
    wait_until(lambda: jobs.get(id)["status"] not in ("validating_files",), 60)
    job_runner.close()
    assert not failures and jobs.get(id)["status"] in ("queued", "running")


def test_what_never_passes_ends_the_job(jobs, folder, monkeypatch):
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]

    def begin(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("serve.jobs.runner.POLL_SECONDS", 0.001)
    monkeypatch.setattr(JobProcess, "start", begin)
    job_runner = JobRunner(jobs)
    job_runner.wake()
    wait_until(lambda: jobs.get(id)["status"] == "failed", 60)
    job_runner.close()


def test_a_job_whose_model_is_gone_fails_and_says_so(jobs, tmp_path):
    id = jobs.create(model="tiny", model_path=tmp_path / "gone", training_file="file-1")["id"]
    job_runner = JobRunner(jobs)
    job_runner.wake()
    wait_until(lambda: jobs.get(id)["status"] == "failed", 120)
    job_runner.close()
    assert "gone" in jobs.get(id)["error"]["message"]


def test_only_one_can_end_a_job(jobs, folder):
    id = jobs.create(model="tiny", model_path=folder, training_file="file-1")["id"]
    jobs.cancel(id)
    assert not jobs.set_status(id, "succeeded", fine_tuned_model="x")
    jobs.fail(id, "server_error", "too late")
    assert jobs.get(id)["status"] == "cancelled" and jobs.get(id)["error"] is None


def test_lines_of_a_file_that_grows_and_is_written_anew(tmp_path):
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


def test_results_as_a_table():
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


def test_a_lock_is_the_process_s_that_has_it(tmp_path):
    lock = disk.try_lock(tmp_path / "x.lock")
    assert lock is not None and disk.try_lock(tmp_path / "x.lock") is None
    os.close(lock)
    process = JobProcess.start("job", tmp_path, "x", ["json.tool", "/dev/stdin"])
    assert process.job_id == "job"
    wait_until(lambda: process.has_exited)
    assert JobProcess.find_running("job", tmp_path, "x") is None
    assert process.exit_code == 1 and names(process.failure_message(), "line 1")
