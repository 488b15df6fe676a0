"""Objects and blobs on disk: their order, what a kill leaves, and several at once."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading

import pytest

from serve.exceptions import Corrupt
from serve.jobs.store import Store, new_id
from tests.naming import naming


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


def fill(store, *names, kind="thing", parent=""):
    for name in names:
        store.add(kind, name, {"id": name}, parent)


def ids(page):
    found, more = page
    return [body["id"] for body in found], more


def received(store, id, data=b"data"):
    with store.open_blob(id) as incoming:
        incoming.write(data)
        incoming.commit({"id": id})


def test_an_object_is_made_changed_and_forgotten(store):
    store.add("job", "1", {"a": 1, "b": "ö😀"})
    assert store.get("job", "1") == {"a": 1, "b": "ö😀"}
    assert store.update("job", "1", a=2, c=None) == {"a": 2, "b": "ö😀", "c": None}
    assert store.get("file", "1") is None, "another kind"
    with pytest.raises(KeyError):
        store.update("job", "2", a=1)
    assert store.remove("job", "1") and not store.remove("job", "1")
    assert store.get("job", "1") is None
    with pytest.raises(sqlite3.IntegrityError):
        store.add("job", "1", {})  # an id is never given twice


def test_pages(store):
    fill(store, *"abcde")
    fill(store, "x", parent="other")
    assert ids(store.page("thing")) == (list("abcde"), False)
    assert ids(store.page("thing", limit=2)) == (["a", "b"], True)
    assert ids(store.page("thing", limit=3, after="b")) == (["c", "d", "e"], False)
    assert ids(store.page("thing", limit=2, newest_first=True)) == (["e", "d"], True)
    assert ids(store.page("thing", after="d", newest_first=True)) == (["c", "b", "a"], False)
    assert ids(store.page("thing", parent="other")) == (["x"], False)
    vowels = store.page("thing", limit=1, predicate=lambda body: body["id"] in "ae")
    assert ids(vowels) == (["a"], True), "more follow that count"
    for unknown in ("z", "x"):
        with pytest.raises(KeyError):
            store.page("thing", after=unknown)


def test_a_page_begins_after_what_was_deleted_since(store):
    """Whoever deletes what a page lists asks for the next page after the last one deleted."""
    fill(store, *"abcd")
    first, _ = store.page("thing", limit=2)
    for body in first:
        store.remove("thing", body["id"])
    assert ids(store.page("thing", limit=2, after="b")) == (["c", "d"], False)


def test_what_is_written_together_is_written_or_not(store, tmp_path):
    fill(store, "a")
    with pytest.raises(RuntimeError), store.transaction():
        store.update("thing", "a", n=1)
        store.add("thing", "b", {"id": "b"})
        raise RuntimeError("halfway")
    assert ids(store.page("thing")) == (["a"], False) and store.get("thing", "a") == {"id": "a"}
    other = Store(tmp_path)
    with store.transaction():
        store.add("thing", "c", {"id": "c"})
        assert other.get("thing", "c") is None, "not before it is all there"
    assert other.get("thing", "c") == {"id": "c"}
    other.close()


def test_many_threads_and_two_processes_count_right(store, tmp_path):
    store.add("thing", "n", {"n": 0})
    other = Store(tmp_path)  # as a second process has it

    def count(own):
        for _ in range(20):
            with own.transaction():
                own.update("thing", "n", n=own.get("thing", "n")["n"] + 1)

    threads = [threading.Thread(target=count, args=(own,)) for own in (store, other, store, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get("thing", "n") == {"n": 80}
    other.close()


def test_a_blob_is_seen_when_it_is_whole(store):
    with store.open_blob("file-1") as incoming:
        incoming.write(b"half")
        assert not store.blob_path("file-1").exists() and store.get("file", "file-1") is None
        incoming.write(b" and half")
        assert incoming.size == 13
        incoming.commit({"id": "file-1"})
    assert store.blob_path("file-1").read_bytes() == b"half and half"
    assert store.get("file", "file-1") == {"id": "file-1"}
    with pytest.raises(OSError, match="disk"), store.open_blob("file-2") as incoming:
        incoming.write(b"half")
        raise OSError("the disk is full")
    assert [path.name for path in store.blob_path("x").parent.iterdir()] == ["file-1"]
    assert store.delete_file("file-1") and not store.delete_file("file-1")
    assert not store.blob_path("file-1").exists()


def test_a_sweep_takes_what_a_kill_left_and_nothing_else(store, tmp_path):
    received(store, "file-kept")
    folder = store.blob_path("x").parent
    (folder / ".new-file-dead").write_bytes(b"half")
    (folder / "file-untold").write_bytes(b"whole, but killed before it was told of")
    with store.open_blob("file-alive") as incoming:
        incoming.write(b"half")
        Store(tmp_path).close()
        assert sorted(os.listdir(folder)) == [".new-file-alive", "file-kept"]
        incoming.write(b" and half")
        incoming.commit({"id": "file-alive"})
    Store(tmp_path).close()
    assert store.blob_path("file-alive").read_bytes() == b"half and half"


KILLED = """
    import sys
    from pathlib import Path
    from serve.jobs.store import Store

    store = Store(Path(sys.argv[1]))
    number = 0
    while True:
        with store.open_blob(f"file-{number}") as incoming:
            incoming.write(b"x" * 200_000)
            incoming.commit({"id": f"file-{number}"})
        print(number, flush=True)
        number += 1
"""


@pytest.mark.parametrize("lines", [3, 20])
def test_killed_while_writing(tmp_path, lines):
    """Everything that was acknowledged is there and whole; nothing else is to be seen."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], stdout=subprocess.PIPE
    )
    for _ in range(lines):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    process.wait()
    acknowledged = lines + len(rest)
    store = Store(tmp_path)
    found, _ = store.page("file")
    assert len(found) in (acknowledged, acknowledged + 1)
    names = {body["id"] for body in found}
    assert {f"file-{number}" for number in range(acknowledged)} <= names
    assert set(os.listdir(store.blob_path("x").parent)) == names
    assert all(store.blob_path(name).stat().st_size == 200_000 for name in names)
    store.close()


def test_others_may_not_read_it(tmp_path):
    store = Store(tmp_path / "home")
    received(store, "file-1")
    places = [tmp_path / "home", store.blob_path("file-1").parent, store.blob_path("file-1")]
    places += [tmp_path / "home" / name for name in ("store.db", "store.db-wal")]
    assert not any(stat.S_IMODE(place.stat().st_mode) & 0o077 for place in places)
    store.close()


def test_a_damaged_or_newer_database_is_named(tmp_path):
    (tmp_path / "store.db").write_bytes(b"this is no database, but it is long enough" * 100)
    with pytest.raises(Corrupt, match=naming(tmp_path / "store.db")):
        Store(tmp_path)
    newer = tmp_path / "newer"
    Store(newer).close()
    with sqlite3.connect(newer / "store.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(Corrupt, match=naming(newer / "store.db", 99)):
        Store(newer)


def test_ids_are_long_and_differ():
    made = {new_id("file-") for _ in range(1000)}
    assert len(made) == 1000 and all(len(id) == 29 and id[5:].isalnum() for id in made)
