"""Test /v1/files with official clients, and with hostile and disconnecting clients."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import httpx
import psutil
import pytest
from openai import NotFoundError, OpenAI

from serve.api.multipart import form_fields, safe_filename
from serve.api.routes import files
from tests.naming import names
from tests.serve import scripted
from tests.serve.old_client import OldClient, install

pytestmark = pytest.mark.heavy

LONG = "x" * 300  # more than a boundary may have
LINES = b'{"messages": []}\n' * 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def address(home):
    with scripted.serve_models(scripted.model(), home=home) as address:
        yield address


@pytest.fixture(scope="module")
def openai(address):
    with OpenAI(
        base_url=f"{address}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client


def upload(http, name="a.jsonl", data=LINES, purpose="fine-tune", **fields):
    return http.post("/v1/files", files={"file": (name, data)}, data={"purpose": purpose} | fields)


def test_uploaded_file_downloads_unchanged(openai, http):
    before = time.time()
    file = openai.files.create(file=("train.jsonl", LINES), purpose="fine-tune")
    assert file.id.startswith("file-") and file.object == "file" and file.status == "processed"
    assert (file.bytes, file.filename, file.purpose) == (len(LINES), "train.jsonl", "fine-tune")
    assert before - 1 <= file.created_at <= time.time()
    assert openai.files.retrieve(file.id) == file
    assert openai.files.wait_for_processing(file.id) == file
    assert openai.files.content(file.id).read() == LINES
    response = http.get(f"/v1/files/{file.id}/content")
    assert response.headers["content-type"] == "application/jsonl"
    assert response.headers["content-disposition"] == 'attachment; filename="train.jsonl"'
    assert response.headers["x-content-type-options"] == "nosniff"
    deleted = openai.files.delete(file.id)
    assert deleted.id == file.id and deleted.deleted
    for call in (openai.files.retrieve, openai.files.content, openai.files.delete):
        # OpenAI's own sentence
        with pytest.raises(NotFoundError, match=f"No such File object: {file.id}") as caught:
            call(file.id)
        assert caught.value.code == "not_found"


def test_empty_fields_count_as_absent(http):
    """Regression: a form with `expires_after[seconds]=` was refused with 400."""
    empty = {"expires_after[anchor]": "", "expires_after[seconds]": " ", "user": ""}
    answer = upload(http, **empty)
    assert answer.status_code == 200 and "expires_at" not in answer.json(), answer.text
    http.delete(f"/v1/files/{answer.json()['id']}")


def test_list_pages_and_filters_by_purpose(openai):
    ids = [openai.files.create(file=(f"{i}", b"x"), purpose="batch").id for i in range(5)]
    other = openai.files.create(file=("o", b"x"), purpose="user_data").id
    page = openai.files.list(purpose="batch")
    assert [file.id for file in page.data] == ids[::-1] and not page.has_more
    assert openai.files.list().data[0].id == other, "newest first"
    assert [file.id for file in openai.files.list(purpose="batch", order="asc", limit=2)] == ids
    page = openai.files.list(purpose="batch", limit=2, after=ids[3])
    assert [file.id for file in page.data] == [ids[2], ids[1]] and page.has_more
    for file in openai.files.list(purpose="batch", limit=2):
        openai.files.delete(file.id)  # while the pages are being turned
    assert openai.files.list(purpose="batch").data == []
    openai.files.delete(other)


def test_expired_file_is_404(http, home, monkeypatch):
    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = upload(http, **expiry).json()
    assert file["expires_at"] == file["created_at"] + 3600
    blob = home / "files" / file["id"]
    assert http.get(f"/v1/files/{file['id']}").status_code == 200
    late = time.time() + 3601
    monkeypatch.setattr("serve.api.stored_files.time.time", lambda: late)
    assert http.get(f"/v1/files/{file['id']}").status_code == 404
    assert file["id"] not in http.get("/v1/files").text and blob.exists()
    with scripted.serve_models(scripted.model("other"), home=home):
        assert not blob.exists(), "the next server start deletes the blob"


@pytest.mark.parametrize(
    ("form", "param", "code", "facts"),
    [
        (
            {"data": {"purpose": "fine-tune"}, "files": {"other": b"x"}},
            "file",
            "missing_required_parameter",
            [],
        ),
        ({"files": {"file": b"x"}}, "purpose", "missing_required_parameter", []),
        (
            {"files": {"file": b"x"}, "data": {"purpose": "fun"}},
            "purpose",
            "invalid_value",
            ["'fun'", "'assistants'"],
        ),
        (
            {"files": {"file": b"x"}, "data": {"purpose": ""}},
            "purpose",
            "missing_required_parameter",
            [],
        ),
        (
            {
                "files": {"file": b"x"},
                "data": {
                    "purpose": "batch",
                    "expires_after[anchor]": "created_at",
                    "expires_after[seconds]": "",
                },
            },
            "expires_after.seconds",
            "missing_required_parameter",
            [],
        ),
        ({"files": {"file": b""}, "data": {"purpose": "batch"}}, "file", "invalid_file", []),
        (
            {"files": {"file": ("", b"")}, "data": {"purpose": "batch"}},
            "file",
            "missing_required_parameter",
            [],
        ),
        (
            {"files": {"other": b"x"}, "data": {"purpose": "batch", "file": "x"}},
            "file",
            "invalid_type",
            [],
        ),
        (
            {"files": [("file", b"x")] * 2, "data": {"purpose": "batch"}},
            "file",
            "invalid_form",
            ["'file'"],
        ),
        (
            {"files": {"file": b"x"}, "data": {"purpose": "x" * 140_000}},
            "purpose",
            "invalid_form",
            ["'purpose'", 131072],
        ),
        ({"json": {"purpose": "batch"}}, None, "invalid_form", ["multipart/form-data"]),
        (
            {"content": b"", "headers": {"content-type": f"multipart/form-data; boundary={LONG}"}},
            None,
            "invalid_form",
            [256],
        ),
        (
            {"files": {"file": b"x", "purpose": (None, "caf\xe9".encode("latin-1"))}},
            "purpose",
            "invalid_form",
            ["'purpose'", "UTF-8"],
        ),
        (
            {"content": b"--b\r\nContent-Disp", "headers": {"content-type": "multipart/form-data"}},
            None,
            "invalid_form",
            ["multipart/form-data"],
        ),
        (
            {
                "content": b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n'
                b"\r\nhalf of it",
                "headers": {"content-type": "multipart/form-data; boundary=b"},
            },
            None,
            "invalid_form",
            ["boundary"],
        ),
        (
            {
                "content": b"nonsense",
                "headers": {"content-type": "multipart/form-data; boundary=b"},
            },
            None,
            "invalid_form",
            [],
        ),
        (
            {
                "files": {"file": b"x"},
                "data": {
                    "purpose": "batch",
                    "expires_after[anchor]": "created_at",
                    "expires_after[seconds]": "60",
                },
            },
            "expires_after.seconds",
            "integer_below_min_value",
            [3600, 60],
        ),
    ],
)
def test_refused_forms_store_nothing(http, home, form, param, code, facts):
    before = http.get("/v1/files").json()
    response = http.post("/v1/files", **form)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error
    assert names(error["message"], *facts)
    assert http.get("/v1/files").json() == before
    assert len(os.listdir(home / "files")) == len(before["data"])


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "order=up", "after=file-nobody"])
def test_invalid_queries_are_refused(http, query):
    response = http.get(f"/v1/files?{query}")
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_file_names_lose_their_folders(http):
    r"""Browsers and attackers send folders in file names."""
    for name, stored in [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\töne 😀.jsonl", "töne 😀.jsonl"),
        ('a".html', None),
        ("x" * 500, "x" * 255),
    ]:
        file = upload(http, name).json()
        assert stored in (None, file["filename"]) and "/" not in file["filename"]
        response = http.get(f"/v1/files/{file['id']}/content")
        assert response.content == LINES
        assert response.headers["content-disposition"].startswith("attachment; filename")
        http.delete(f"/v1/files/{file['id']}")
    assert safe_filename("a\r\nSet-Cookie: b") == "aSet-Cookie: b"


def test_uploaded_html_is_not_rendered(http):
    file = upload(http, "x.html", b"<script>alert(1)</script>", "user_data").json()
    response = http.get(f"/v1/files/{file['id']}/content")
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-security-policy"] == "sandbox"
    http.delete(f"/v1/files/{file['id']}")


def test_path_traversal_is_404(http, home):
    (home / "secret").write_text("secret")
    for id in ("../secret", "..%2Fsecret", "%2E%2E%2Fsecret", ".new-x", "file-"):
        for path in (f"/v1/files/{id}", f"/v1/files/{id}/content"):
            response = http.get(path)
            assert response.status_code == 404 and response.text != "secret"


def test_upload_over_size_limit_is_refused_and_deleted(http, home, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 100_000)
    response = upload(http, data=b"x" * 200_000)
    assert response.status_code == 413  # with the message of OpenAI's API
    assert response.json()["error"]["message"] == "Maximum content size limit (100000) exceeded"
    assert not [name for name in os.listdir(home / "files") if name.startswith(".")]


def test_client_and_openai_command_of_2023_upload_file(address, tmp_path):
    old = OldClient(install(), address)
    path = tmp_path / "old.jsonl"
    path.write_bytes(LINES)
    answer = old.run(
        f"made = openai.File.create(file=open({str(path)!r}, 'rb'), purpose='fine-tune')\n"
        "found = openai.File.retrieve(made.id)\n"
        "text = openai.File.download(made.id).decode()\n"
        "listed = [file.id for file in openai.File.list().data]\n"
        "gone = openai.File.delete(made.id)\n"
        "answer = [made, found, text, listed, gone]"
    )
    created, retrieved, text, listed, deleted = answer
    assert created == retrieved and created["filename"] == "file" and text.encode() == LINES
    assert created["id"] in listed and deleted["deleted"]
    assert '"purpose": "fine-tune"' in old.command(
        "api", "files.create", "-f", str(path), "-p", "fine-tune"
    )


SERVER = """
    import sys
    from pathlib import Path
    from tests.serve import scripted

    with scripted.serve_models(scripted.model(), home=Path(sys.argv[1])) as address:
        print(address, flush=True)
        sys.stdin.read()
"""


def start(home):
    """Start a server in its own process; return the process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER), str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    return process, process.stdout.readline().strip()


def half_an_upload(address, megabytes):
    """Return a connection on which the headers of a large upload have been sent."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = (
        '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        '--b\r\nContent-Disposition: form-data; name="file"; filename="big"\r\n\r\n'
    )
    size = len(head) + megabytes * 2**20 + 7
    connection.sendall(
        f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\n\r\n{head}".encode()
    )
    return connection


def test_killed_server_leaves_no_partial_file(tmp_path):
    """Files whose upload was confirmed remain; unfinished uploads leave no file."""
    process, address = start(tmp_path)
    with httpx.Client(base_url=address) as http:
        stored = [upload(http, f"{i}", LINES * (i + 1)).json() for i in range(3)]
    done = threading.Event()
    late = []

    def hasty():
        with httpx.Client(base_url=address) as http:
            while not done.is_set():
                try:
                    late.append(upload(http, "late", b"y" * 300_000).json())
                except httpx.HTTPError:
                    return

    thread = threading.Thread(target=hasty)
    thread.start()
    with half_an_upload(address, 50) as connection:
        for _ in range(20):
            connection.sendall(b"x" * 2**20)
        folder = tmp_path / "files"
        scripted.wait_until(
            lambda: any(
                path.stat().st_size > 10 * 2**20 for path in folder.iterdir() if path.name[0] == "."
            )
        )
        assert psutil.Process(process.pid).memory_info().rss < 2**30
        process.send_signal(signal.SIGKILL)
        with process:  # closes its pipes
            process.wait()
    done.set()
    thread.join()
    process, address = start(tmp_path)
    try:
        with httpx.Client(base_url=address) as http:
            listed = http.get("/v1/files").json()["data"]
            assert [file for file in listed if file["filename"] != "late"] == stored[::-1]
            late_files = [file for file in listed if file["filename"] == "late"]
            unacknowledged = len(late_files) - len(late)
            assert unacknowledged in (0, 1) and late_files[unacknowledged:] == late[::-1]
            assert {path.name for path in folder.iterdir()} == {file["id"] for file in listed}
            for file in listed:
                content = http.get(f"/v1/files/{file['id']}/content").content
                assert len(content) == file["bytes"]
    finally:
        process.kill()
        with process:
            process.wait()


def test_disconnect_in_upload_stores_nothing(address, home):
    before = sorted(os.listdir(home / "files"))
    with half_an_upload(address, 8) as connection:
        connection.sendall(b"x" * 2**20)
        scripted.wait_until(lambda: len(os.listdir(home / "files")) == len(before) + 1)
    scripted.wait_until(lambda: sorted(os.listdir(home / "files")) == before)


def test_large_upload_needs_little_memory(address):
    """An upload of 200 MB increases the memory of the server by much less."""
    process = psutil.Process()
    before = process.memory_info().rss
    highest = before
    with half_an_upload(address, 200) as connection:
        block = b"x" * 2**20
        for _ in range(200):
            connection.sendall(block)
            highest = max(highest, process.memory_info().rss)
        connection.sendall(b"\r\n--b--")
        head = connection.recv(4096)
    assert head.startswith(b"HTTP/1.1 200")
    assert highest - before < 60 * 2**20


@pytest.mark.timeout(60)
def test_hostile_field_names_parse_fast():
    """Regression: a regular expression took a minute for these names and blocked the event loop."""
    assert len(form_fields([(f"{i}" + "[" * 3900, "x") for i in range(90)])) == 90
    assert form_fields([("[" * 3900 + "a]", "x")]) == {"[" * 3899: {"a": "x"}}
    assert form_fields([("[a]", "x"), ("a]", "y")]) == {"[a]": "x", "a]": "y"}
