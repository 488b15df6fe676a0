"""Write the data folder that later versions must open.

    python -m tests.serve.old_home.make_old_home

Written beside this file:

    home/       the folder
    made.json   what the tests expect in the folder: keys in plain text, ids, names

`make` writes the folder with commands and requests, as a user would: the user's models.toml with a
tiny model, two API keys, the database with files and jobs, a fine-tuning job that has succeeded,
its adapter, a job that was unfinished when the server stopped, its checkpoint, and the caches of
file hashes, dtypes and speeds. Only models.toml and the model are written directly, as `pellucid
pull` would do.

Do not write the folder again after a change of the code: the tests check that the old folder still
opens. `main` does not overwrite it.

Files of a data folder contain absolute paths. In `home/`, `PLACE` stands for the path of the
folder; `put` copies a folder and replaces a path in its files.
"""

import json
import re
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.serve import tiny_gguf
from tests.serve.processes import TIMEOUT, run, serving, wait_for
from tests.serve.tiny_data import examples, pairs

HERE = Path(__file__).parent
HOME, MADE = HERE / "home", HERE / "made.json"
PLACE = "/a/place/that/is/none"
SMALL_CACHE = ("--cache-mb", "1", "--dtype", "float32")


def make(home: Path) -> dict[str, Any]:
    """Write a data folder as a user would, and return the content of made.json."""
    tiny_gguf.write_catalogue(home)
    variables = {
        "PELLUCID_HOME": str(home),
        "JAX_COMPILATION_CACHE_DIR": str(home.with_name("compiled")),
    }
    # The dtype of a file outside the catalogue is measured and cached.
    own = f"own={home / 'models' / 'tiny' / 'tiny.gguf'}"
    run("complete", "a", "--max-tokens", "2", "-m", own, **variables)
    keys = {
        name: json.loads(run("keys", "create", name, "--json", **variables))["key"]
        for name in ("ann", "bob")
    }
    with serving(*SMALL_CACHE, **variables) as server, client(server.url, keys["ann"]) as openai:
        # Long enough for its speed to be recorded: no token ends it.
        endless = {str(id): -100 for id in range(257, 260)}
        openai.completions.create(model="tiny", prompt="a", max_tokens=100, logit_bias=endless)
        train = upload(openai, "train.jsonl", examples())
        done = start(openai, train, n_epochs=20, batch_size=4, learning_rate_multiplier=20.0)
        wait_for(lambda: status(openai, done) == "succeeded")
        name = openai.fine_tuning.jobs.retrieve(done).fine_tuned_model
        assert name is not None
        for checkpoint in openai.fine_tuning.jobs.checkpoints.list(done).data[1:]:
            openai.models.delete(checkpoint.fine_tuned_model_checkpoint)
        more = upload(openai, "more.jsonl", pairs())
        half_done = start(openai, more, n_epochs=50, batch_size=1, learning_rate_multiplier=1.0)
        wait_for(lambda: steps(openai, half_done) >= 10)
    return {
        "keys": keys,
        "files": {train: "train.jsonl", more: "more.jsonl"},
        "model": name,
        "done": done,
        "half_done": half_done,
    }


def client(address: str, key: str) -> OpenAI:
    """Return the official client for a server."""
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=TIMEOUT)


def upload(openai: OpenAI, name: str, data: bytes) -> str:
    """Upload a file, and return its id."""
    return openai.files.create(file=(name, data), purpose="fine-tune").id


def start(openai: OpenAI, file: str, **hyperparameters: Any) -> str:
    """Create a job, and return its id."""
    return openai.fine_tuning.jobs.create(
        model="tiny", training_file=file, seed=7, hyperparameters=hyperparameters
    ).id


def status(openai: OpenAI, job: str) -> str:
    """Return the status of a job, and assert that it has not failed."""
    retrieved = openai.fine_tuning.jobs.retrieve(job)
    assert retrieved.status != "failed", retrieved.error
    return retrieved.status


def steps(openai: OpenAI, job: str) -> int:
    """Return the last step in a job's events."""
    events = openai.fine_tuning.jobs.list_events(job, limit=1).data
    return int(events[0].data.get("step", 0)) if isinstance(events[0].data, dict) else 0


def put(source: Path, target: Path, old: str, new: str) -> None:
    """Copy a data folder, with the path `old` in its files replaced by `new`."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file() and path.suffix in ("", ".json", ".jsonl", ".log", ".out", ".toml"):
            text = path.read_text("utf-8")
            if old in text:
                path.write_text(text.replace(old, new), "utf-8")
    with closing(sqlite3.connect(target / "store.db")) as database, database:
        database.execute("UPDATE objects SET body = replace(body, ?, ?)", (old, new))


def names(home: Path, facts: dict[str, Any]) -> set[str]:
    """Return the names of all files of a data folder, with placeholders for random ids."""
    file_names = set()
    for path in home.rglob("*"):
        if path.is_file():
            name = path.relative_to(home).as_posix()
            name = name.replace(facts["done"], "DONE").replace(facts["half_done"], "HALF_DONE")
            name = re.sub(r"file-\w{24}", "FILE", name)
            name = re.sub(r"ft%3Atiny%3Apellucid%3A%3A\w{8}", "MODEL", name)
            file_names.add(re.sub(r"step-\d+", "step-N", name))
    return file_names


def main() -> None:
    """Write `home` and `made.json`."""
    if HOME.exists():
        sys.exit(f"{HOME} exists, and is old on purpose: remove it first to replace it")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "home"
        facts = make(home)
        put(home, HOME, str(home), PLACE)
    MADE.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
