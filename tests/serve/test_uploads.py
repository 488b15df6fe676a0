"""/v1/uploads with the official client."""

import hashlib

import openai
import pytest

from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.serve.tiny_data import TEMPLATE

pytestmark = pytest.mark.heavy

DATA = bytes(range(256)) * 10


@pytest.fixture(scope="module")
def client():
    with (
        scripted.serve_models(scripted.model("scripted", TEMPLATE)) as address,
        open_client(address, strict=True) as client,
    ):
        yield client


def start(client, size=2560):
    return client.uploads.create(
        bytes=size, filename="data.bin", mime_type="application/octet-stream", purpose="batch"
    )


def add(client, upload, data):
    return client.uploads.parts.create(upload.id, data=data).id


def test_parts_are_joined_in_the_given_order(client):
    upload = start(client)
    assert (upload.status, upload.bytes) == ("pending", len(DATA))
    last, first = add(client, upload, DATA[1000:]), add(client, upload, DATA[:1000])
    md5 = hashlib.md5(DATA).hexdigest()
    done = client.uploads.complete(upload.id, part_ids=[first, last], md5=md5)
    assert (done.status, done.file.bytes, done.file.filename) == ("completed", 2560, "data.bin")
    assert client.files.content(done.file.id).content == DATA
    assert done.file.id in [file.id for file in client.files.list()]


def test_helper_of_the_client_uploads_a_file_in_chunks(client, tmp_path):
    (tmp_path / "data.bin").write_bytes(DATA)
    done = client.uploads.upload_file_chunked(
        file=tmp_path / "data.bin",
        mime_type="application/octet-stream",
        purpose="batch",
        part_size=1000,
    )
    assert client.files.content(done.file.id).content == DATA


@pytest.mark.parametrize(
    ("pick", "md5", "param"),
    [
        (lambda parts: parts[:1], None, "part_ids"),
        (lambda parts: [parts[0], parts[0]], None, "part_ids[1]"),
        (lambda parts: [parts[0], "part_none"], None, "part_ids[1]"),
        (lambda parts: parts, "0" * 32, "md5"),
    ],
    ids=["missing part", "part twice", "unknown part", "wrong md5"],
)
def test_wrong_completion_is_refused_and_can_be_repeated(client, pick, md5, param):
    upload = start(client)
    parts = [add(client, upload, DATA[:1000]), add(client, upload, DATA[1000:])]
    fields = {} if md5 is None else {"md5": md5}
    with pytest.raises(openai.BadRequestError) as error:
        client.uploads.complete(upload.id, part_ids=pick(parts), **fields)
    assert error.value.param == param
    assert client.uploads.complete(upload.id, part_ids=parts).status == "completed"


def test_part_beyond_the_announced_size_is_refused(client):
    upload = start(client, size=10)
    with pytest.raises(openai.BadRequestError) as error:
        add(client, upload, DATA)
    assert error.value.param == "data"


def test_part_can_be_sent_again(client):
    """Bug: after a lost response or a wrong MD5, the upload could not be completed."""
    upload = start(client)
    add(client, upload, bytes(len(DATA)))
    again = add(client, upload, DATA)
    done = client.uploads.complete(upload.id, part_ids=[again])
    assert client.files.content(done.file.id).read() == DATA
    upload = start(client)
    for _ in range(2):
        add(client, upload, DATA)
    with pytest.raises(openai.BadRequestError) as error:
        add(client, upload, DATA)
    assert error.value.param == "data"


def test_cancelled_upload_takes_no_parts(client):
    upload = start(client)
    add(client, upload, DATA)
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        add(client, upload, DATA)


def test_expired_upload_takes_no_parts(client, monkeypatch):
    monkeypatch.setattr("serve.api.routes.uploads.PENDING_SECONDS", -1)
    upload = start(client)
    with pytest.raises(openai.BadRequestError):
        add(client, upload, DATA)


def test_unknown_upload_is_404(client):
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_none")
