"""The store: objects, pages, transactions, blobs, and killed or concurrent processes."""

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
    bodies, more = page
    return [body["id"] for body in bodies], more


def write_blob(store, id, data=b"data"):
    with store.open_blob(id) as blob:
        blob.write(data)
        blob.commit({"id": id})


def test_object_can_be_added_updated_and_removed_once(store):
    store.add("job", "1", {"a": 1, "b": "ö😀"})
    assert store.get("job", "1") == {"a": 1, "b": "ö😀"}
    assert store.update("job", "1", a=2, c=None) == {"a": 2, "b": "ö😀", "c": None}
    assert store.get("file", "1") is None, "an id belongs to one kind"
    with pytest.raises(KeyError):
        store.update("job", "2", a=1)
    assert store.remove("job", "1") and not store.remove("job", "1")
    assert store.get("job", "1") is None
    with pytest.raises(sqlite3.IntegrityError):
        store.add("job", "1", {})  # an id is never reused


def test_page_applies_limit_order_and_predicate(store):
    fill(store, *"abcde")
    fill(store, "x", parent="other")
    assert ids(store.page("thing")) == (list("abcde"), False)
    assert ids(store.page("thing", limit=2)) == (["a", "b"], True)
    assert ids(store.page("thing", limit=3, after="b")) == (["c", "d", "e"], False)
    assert ids(store.page("thing", limit=2, newest_first=True)) == (["e", "d"], True)
    assert ids(store.page("thing", after="d", newest_first=True)) == (["c", "b", "a"], False)
    assert ids(store.page("thing", parent="other")) == (["x"], False)
    vowels = store.page("thing", limit=1, predicate=lambda body: body["id"] in "ae")
    assert ids(vowels) == (["a"], True), "more matching objects follow"
    for unknown in ("z", "x"):
        with pytest.raises(KeyError):
            store.page("thing", after=unknown)


def test_page_after_removed_object_starts_with_the_next(store):
    """A client that deletes each listed object requests the page after a deleted object."""
    fill(store, *"abcd")
    first, _ = store.page("thing", limit=2)
    for body in first:
        store.remove("thing", body["id"])
    assert ids(store.page("thing", limit=2, after="b")) == (["c", "d"], False)


def test_transaction_with_error_is_rolled_back(store, tmp_path):
    fill(store, "a")
    with pytest.raises(RuntimeError), store.transaction():
        store.update("thing", "a", n=1)
        store.add("thing", "b", {"id": "b"})
        raise RuntimeError("halfway")
    assert ids(store.page("thing")) == (["a"], False) and store.get("thing", "a") == {"id": "a"}
    other = Store(tmp_path)
    with store.transaction():
        store.add("thing", "c", {"id": "c"})
        assert other.get("thing", "c") is None, "not visible before the commit"
    assert other.get("thing", "c") == {"id": "c"}
    other.close()


def test_transaction_concurrent_increments_are_not_lost(store, tmp_path):
    store.add("thing", "n", {"n": 0})
    other = Store(tmp_path)  # as in a second process

    def count(own_store):
        for _ in range(20):
            with own_store.transaction():
                own_store.update("thing", "n", n=own_store.get("thing", "n")["n"] + 1)

    threads = [
        threading.Thread(target=count, args=(own_store,))
        for own_store in (store, other, store, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get("thing", "n") == {"n": 80}
    other.close()


def test_blob_is_visible_only_after_commit(store):
    with store.open_blob("file-1") as blob:
        blob.write(b"half")
        assert not store.blob_path("file-1").exists() and store.get("file", "file-1") is None
        blob.write(b" and half")
        assert blob.size == 13
        blob.commit({"id": "file-1"})
    assert store.blob_path("file-1").read_bytes() == b"half and half"
    assert store.get("file", "file-1") == {"id": "file-1"}
    with pytest.raises(OSError, match="disk"), store.open_blob("file-2") as blob:
        blob.write(b"half")
        raise OSError("the disk is full")
    assert [path.name for path in store.blob_path("x").parent.iterdir()] == ["file-1"]
    assert store.delete_file("file-1") and not store.delete_file("file-1")
    assert not store.blob_path("file-1").exists()


def test_open_removes_only_leftover_blobs(store, tmp_path):
    write_blob(store, "file-kept")
    folder = store.blob_path("x").parent
    (folder / ".new-file-dead").write_bytes(b"half")
    (folder / "file-untold").write_bytes(b"whole, but killed before it was told of")
    with store.open_blob("file-alive") as blob:
        blob.write(b"half")
        Store(tmp_path).close()
        assert sorted(os.listdir(folder)) == [".new-file-alive", "file-kept"]
        blob.write(b" and half")
        blob.commit({"id": "file-alive"})
    Store(tmp_path).close()
    assert store.blob_path("file-alive").read_bytes() == b"half and half"


WRITER_SCRIPT = """
    import sys
    from pathlib import Path
    from serve.jobs.store import Store

    store = Store(Path(sys.argv[1]))
    number = 0
    while True:
        with store.open_blob(f"file-{number}") as blob:
            blob.write(b"x" * 200_000)
            blob.commit({"id": f"file-{number}"})
        print(number, flush=True)
        number += 1
"""


@pytest.mark.parametrize("num_lines", [3, 20])
def test_process_killed_while_writing_leaves_whole_files_only(tmp_path, num_lines):
    """Every file whose commit has returned is complete, and no other file is listed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER_SCRIPT), str(tmp_path)],
        stdout=subprocess.PIPE,
    )
    for _ in range(num_lines):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    with process:  # closes its pipe
        rest = process.stdout.read().splitlines()
    acknowledged = num_lines + len(rest)
    store = Store(tmp_path)
    bodies, _ = store.page("file")
    assert len(bodies) in (acknowledged, acknowledged + 1)
    names = {body["id"] for body in bodies}
    assert {f"file-{number}" for number in range(acknowledged)} <= names
    assert set(os.listdir(store.blob_path("x").parent)) == names
    assert all(store.blob_path(name).stat().st_size == 200_000 for name in names)
    store.close()


def test_files_are_private_to_the_user(tmp_path):
    store = Store(tmp_path / "home")
    write_blob(store, "file-1")
    paths = [tmp_path / "home", store.blob_path("file-1").parent, store.blob_path("file-1")]
    paths += [tmp_path / "home" / name for name in ("store.db", "store.db-wal")]
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths)
    store.close()


def test_open_damaged_or_newer_database_raises_corrupt(tmp_path):
    (tmp_path / "store.db").write_bytes(b"this is no database, but it is long enough" * 100)
    with pytest.raises(Corrupt, match=naming(tmp_path / "store.db")):
        Store(tmp_path)
    newer = tmp_path / "newer"
    Store(newer).close()
    with sqlite3.connect(newer / "store.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(Corrupt, match=naming(newer / "store.db", 99)):
        Store(newer)


def test_new_id_is_long_and_unique():
    new_ids = {new_id("file-") for _ in range(1000)}
    assert len(new_ids) == 1000 and all(len(id) == 29 and id[5:].isalnum() for id in new_ids)
