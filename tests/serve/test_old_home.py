"""A data folder that an earlier version wrote opens, and what it left undone is done."""

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
    """The environment of a user who has a copy of the old folder."""
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


def test_commands_know_the_models_and_the_jobs(variables):
    listed = json.loads(run("models", "--json", **variables))
    cards = {card["id"]: card for card in listed["models"]}
    assert listed["default"] == "tiny" and cards["tiny"]["state"] == "pulled"
    assert cards["tiny"]["aliases"] == ["gpt-3.5-turbo"] and cards["tiny"]["publisher"] == "me"
    assert cards["tiny"]["tokens_per_second"] > 0
    assert cards[MADE["model"]]["state"] == "made" and cards[MADE["model"]]["base"] == "tiny"
    jobs = json.loads(run("finetune", "list", "--json", **variables))["jobs"]
    assert [(job["id"], job["status"]) for job in jobs] == [
        (MADE["half_done"], "stopped"),
        (MADE["done"], "succeeded"),
    ]


def test_keys_are_accepted(address):
    for key in MADE["keys"].values():
        with old.client(address, key) as openai:
            assert "tiny" in [model.id for model in openai.models.list()]
    with old.client(address, "sk-pellucid-another") as openai, pytest.raises(AuthenticationError):
        openai.models.list()


def test_adapter_answers_and_so_does_its_base(variables, openai):
    def answer(model):  # in a process of its own, which compiles for one conversation only
        options = ["--temperature", "0", "--max-tokens", "4"]
        return run("chat", "1?", "-m", model, *options, **variables).removesuffix("\n")

    assert answer(MADE["model"]) == ANSWER
    assert answer("tiny") == answer("gpt-3.5-turbo") != ANSWER
    checkpoints = openai.fine_tuning.jobs.checkpoints.list(MADE["done"]).data
    ids = {MADE["model"], *(found.fine_tuned_model_checkpoint for found in checkpoints)}
    assert len(ids) == 2 and ids < {model.id for model in openai.models.list()}


def test_files_are_listed_and_read(openai):
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
    """The job that was half done, once it is done."""
    wait_for(lambda: old.status(openai, MADE["half_done"]) == "succeeded")
    return openai.fine_tuning.jobs.retrieve(MADE["half_done"])


def test_half_done_job_goes_on_from_its_checkpoint(openai, resumed, home):
    out = home / "jobs" / MADE["half_done"] / "out"
    before = (old.HOME / out.relative_to(home) / "metrics.jsonl").read_text().splitlines()
    after = (out / "metrics.jsonl").read_text().splitlines()
    assert 10 <= len(before) < len(after) and after[: len(before)] == before
    events = openai.fine_tuning.jobs.list_events(MADE["half_done"], limit=100)
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == list(range(600, 0, -1))
    assert resumed.fine_tuned_model in [model.id for model in openai.models.list()]


def test_names_on_disk_stay(resumed, home):
    cleared = {
        "data.jsonl",
        "out/adapters/step-N/adapter_config.json",
        "out/adapters/step-N/adapter_model.safetensors",
        "out/checkpoints/step-N/checkpoint.json",
        "out/checkpoints/step-N/state.safetensors",
    }
    before, after = old.names(old.HOME, MADE), old.names(home, MADE)
    assert before - after == {f"jobs/HALF_DONE/{name}" for name in cleared}
    assert after - before == {"store.db-shm", "store.db-wal"}  # while the server runs


@pytest.mark.slow  # two jobs, one of them whole
def test_new_folder_has_the_names_of_the_old(tmp_path):
    """One name is gone: a model's own file of hashes, which are all in hashes.json now."""
    found = old.make(tmp_path / "home")
    names = old.names(tmp_path / "home", found)
    assert names == old.names(old.HOME, MADE) - {"models/tiny/verified.json"}
