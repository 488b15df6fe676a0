"""A data folder of an earlier version opens, and its unfinished job is completed."""

import json

import pytest
from openai import AuthenticationError

from tests.serve.old_home import make_old_home as old
from tests.serve.processes import run, serving, wait_for
from tests.serve.tiny_data import ANSWER, examples, pairs

pytestmark = pytest.mark.heavy

MADE = json.loads(old.MADE.read_text("utf-8"))


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    """Return environment variables for a copy of the old folder."""
    folder = tmp_path_factory.mktemp("old")
    old.put(old.HOME, folder / "home", old.PLACE, str(folder / "home"))
    return {
        "PELLUCID_HOME": str(folder / "home"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }


@pytest.fixture(scope="module")
def home(variables):
    return old.Path(variables["PELLUCID_HOME"])


@pytest.fixture(scope="module")
def address(variables):
    with serving(*old.SMALL_CACHE, **variables) as server:
        yield server.url


@pytest.fixture(scope="module")
def openai(address):
    with old.client(address, MADE["keys"]["ann"]) as openai:
        yield openai


def test_commands_list_models_and_jobs_of_old_data_folder(variables):
    response = json.loads(run("models", "--json", **variables))
    models = {model["id"]: model for model in response["models"]}
    assert response["default"] == "tiny" and models["tiny"]["state"] == "pulled"
    assert models["tiny"]["aliases"] == ["gpt-3.5-turbo"] and models["tiny"]["publisher"] == "me"
    assert models["tiny"]["tokens_per_second"] > 0
    assert models[MADE["model"]]["state"] == "made" and models[MADE["model"]]["base"] == "tiny"
    jobs = json.loads(run("finetune", "list", "--json", **variables))["jobs"]
    assert [(job["id"], job["status"]) for job in jobs] == [
        (MADE["half_done"], "stopped"),
        (MADE["done"], "succeeded"),
    ]


def test_old_api_keys_are_accepted(address):
    for key in MADE["keys"].values():
        with old.client(address, key) as openai:
            assert "tiny" in [model.id for model in openai.models.list()]
    with old.client(address, "sk-pellucid-another") as openai, pytest.raises(AuthenticationError):
        openai.models.list()


def test_old_adapter_and_base_generate(variables, openai):
    def generate(model):  # in a separate process, which compiles for one conversation only
        options = ["--temperature", "0", "--max-tokens", "4"]
        return run("chat", "1?", "-m", model, *options, **variables).removesuffix("\n")

    assert generate(MADE["model"]) == ANSWER
    assert generate("tiny") == generate("gpt-3.5-turbo") != ANSWER
    checkpoints = openai.fine_tuning.jobs.checkpoints.list(MADE["done"]).data
    ids = {MADE["model"], *(c.fine_tuned_model_checkpoint for c in checkpoints)}
    assert len(ids) == 2 and ids < {model.id for model in openai.models.list()}


def test_old_files_are_listed_and_read(openai):
    files = {file.id: file for file in openai.files.list()}
    job = openai.fine_tuning.jobs.retrieve(MADE["done"])
    assert files.keys() >= {*MADE["files"], *job.result_files}
    assert {id: files[id].filename for id in MADE["files"]} == MADE["files"]
    contents = {openai.files.content(id).content for id in MADE["files"]}
    assert contents == {examples(), pairs()}
    rows = openai.files.content(job.result_files[0]).text.splitlines()
    assert rows[0].startswith("step,") and len(rows) == 61


@pytest.fixture(scope="module")
def resumed(openai):
    """Wait for the unfinished job, and return it."""
    wait_for(lambda: old.status(openai, MADE["half_done"]) == "succeeded")
    return openai.fine_tuning.jobs.retrieve(MADE["half_done"])


@pytest.mark.slow  # trains
def test_unfinished_job_resumes_from_its_checkpoint(openai, resumed, home):
    out = home / "jobs" / MADE["half_done"] / "out"
    before = (old.HOME / out.relative_to(home) / "metrics.jsonl").read_text().splitlines()
    after = (out / "metrics.jsonl").read_text().splitlines()
    assert 10 <= len(before) < len(after) and after[: len(before)] == before
    events = openai.fine_tuning.jobs.list_events(MADE["half_done"], limit=100)
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == list(range(600, 0, -1))
    assert resumed.fine_tuned_model in [model.id for model in openai.models.list()]


@pytest.mark.slow  # trains
def test_completed_old_job_removes_only_its_temporary_files(resumed, home):
    removed = {
        "data.jsonl",
        "out/adapters/step-N/adapter_config.json",
        "out/adapters/step-N/adapter_model.safetensors",
        "out/checkpoints/step-N/checkpoint.json",
        "out/checkpoints/step-N/state.safetensors",
    }
    before, after = old.names(old.HOME, MADE), old.names(home, MADE)
    assert before - after == {f"jobs/HALF_DONE/{name}" for name in removed}
    while_running = {name for name in after - before if not name.startswith("servers/")}
    assert while_running == {"store.db-shm", "store.db-wal"}


@pytest.mark.slow  # two jobs, one of them whole
def test_new_data_folder_has_file_names_of_old_one(tmp_path):
    """Only the per-model hash files are gone: hashes.json now has the hashes of all files."""
    facts = old.make(tmp_path / "home")
    names = old.names(tmp_path / "home", facts)
    assert names == old.names(old.HOME, MADE) - {"models/tiny/verified.json"}
