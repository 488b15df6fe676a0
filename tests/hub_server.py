"""A fake Hugging Face Hub on loopback, for tests with the real client (huggingface_hub).

The server has the part of the hub's HTTP interface that downloads use: the description of a
repository at a revision, and the files of a commit. Large files are kept "in LFS": the server
redirects to a second server on another port, as the hub redirects to its storage. Repositories can
be gated, private or renamed, and tests can inject errors: interrupted transfers, rate limits,
damaged files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model")
TOKEN = "hf_right"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    """Return the hash under which git stores a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """A repository: the files of each commit, and the commits of its branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


@dataclass
class Hub:
    """The state of the hub, which tests read and change.

    Attributes:
        repositories: the repositories by name.
        renamed: the new name of each renamed repository, by its old name.
        requests: "METHOD path" of each request so far.
        sent: the names of the files that were sent, in whole or in part.
        tokens: the authorization headers that the storage server received.
        rate_limited: the number of requests that will still be answered with 429.
        retry_after: the seconds to wait that these responses ask for.
        cut_after: the bytes after which an interrupted transfer of a large file ends.
        cuts: the number of transfers that will still be interrupted.
        damaged: whether large files are sent with a changed byte.
        expires: whether the location of a large file is valid for one request only.
        etag: the hash that is sent with large files instead of the right one.
        listed_hash: the hash that is listed for large files instead of the right one.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    rate_limited: int = 0
    retry_after: int = 0
    cut_after: int = 0
    cuts: int = 0
    damaged: bool = False
    expires: bool = False
    etag: str = ""
    listed_hash: str = ""
    used_locations: set[str] = field(default_factory=set)
    url: str = ""
    storage_url: str = ""

    def commit(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files to a repository, and return its hash."""
        repository = self.repositories.setdefault(repo, Repository())
        listing = repr(sorted((name, sha256(data)) for name, data in files.items()))
        commit = hashlib.sha1(f"{repo} {listing}".encode(), usedforsecurity=False).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[branch] = commit
        return commit

    def publish(self, repo: str, folder: Path) -> str:
        """Add a commit with the files of a folder, and return its hash."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.commit(
            repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        )


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802 (the name is that of http.server)
        self.do_GET()

    def reply(self, status: int, body: bytes = b"", **headers: str | int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "content_length" not in headers:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.reply(status, body, x_error_code=code, x_error_message=message)

    def do_GET(self) -> None:  # noqa: N802
        hub, path = self.hub, urlsplit(self.path).path
        hub.requests.append(f"{self.command} {path}")
        if hub.rate_limited:
            hub.rate_limited -= 1
            return self.reply(429, b"", retry_after=hub.retry_after)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        if match is None:
            return self.reply(404)
        name = match[1]
        if name in hub.renamed:
            return self.reply(307, location=self.path.replace(name, hub.renamed[name]))
        authorization = self.headers.get("authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            return self.fail(401, "", "Invalid credentials in Authorization header")
        repository = hub.repositories.get(name)
        if repository is None or (repository.private and not authorization):
            # The hub does not tell whether a repository is missing or private.
            status = 404 if authorization else 401
            return self.fail(status, "RepoNotFound", "Repository not found")
        revision = unquote(match[2] or "main")
        commit = repository.refs.get(revision, revision)
        if (files := repository.commits.get(commit)) is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self.describe(name, commit, files, repository)
        if repository.gated:  # the hub describes the repository, but refuses to send files
            status = 403 if authorization else 401
            return self.fail(status, "GatedRepo", f"Access to model {name} is restricted")
        data = files.get(unquote(match[3]))
        if data is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        if match[3].endswith(LFS_SUFFIXES):
            return self.reply(
                302,
                location=f"{hub.storage_url}/{sha256(data)}?signature={len(hub.requests)}",
                x_linked_etag=f'"{hub.etag or sha256(data)}"',
                x_linked_size=len(data),
                x_repo_commit=commit,
            )
        if self.command == "GET":
            hub.sent.append(unquote(match[3]))
        self.reply(200, data, etag=f'"{git_hash(data)}"', x_repo_commit=commit)

    def describe(
        self, name: str, commit: str, files: Mapping[str, bytes], repository: Repository
    ) -> None:
        siblings = []
        for file, data in files.items():
            entry = {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
            if file.endswith(LFS_SUFFIXES):
                digest = self.hub.listed_hash or sha256(data)
                pointer = {"sha256": digest, "size": len(data), "pointerSize": 134}
                entry |= {"lfs": pointer}
            siblings.append(entry)
        description = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        self.reply(200, json.dumps(description).encode(), content_type="application/json")


class _StorageHandler(_Handler):
    def do_GET(self) -> None:  # noqa: N802
        hub, name = self.hub, urlsplit(self.path).path[1:]
        hub.requests.append(f"{self.command} /storage/{self.headers.get('range', 'all')}")
        hub.tokens.append(self.headers.get("authorization"))
        if hub.expires and self.path in hub.used_locations:
            return self.reply(403)
        hub.used_locations.add(self.path)
        contents = [
            (file, data)
            for repository in hub.repositories.values()
            for files in repository.commits.values()
            for file, data in files.items()
            if sha256(data) == name
        ]
        if not contents:
            return self.reply(404)
        file, data = contents[0]
        hub.sent.append(file)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        first = int(start[1]) if start else 0
        if first >= len(data):
            return self.reply(416, content_range=f"bytes */{len(data)}")
        body = data[first:]
        if hub.damaged:
            body = body[:-1] + bytes([body[-1] ^ 1])
        headers: dict[str, str | int] = {"content_length": len(body)}
        if start:
            headers["content_range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if hub.cuts:
            hub.cuts -= 1
            body = body[: hub.cut_after]
            self.close_connection = True
        self.reply(206 if start else 200, body, **headers)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Do nothing: a client that stops a transfer resets its connection."""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run a hub without repositories on two free ports of loopback."""
    hub = Hub()
    servers = [
        _Server(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
        for handler in (_Handler, _StorageHandler)
    ]
    # Of another host: some versions of the client compare hosts, not ports.
    hosts = ("127.0.0.1", "localhost")
    hub.url, hub.storage_url = (
        f"http://{host}:{server.server_address[1]}"
        for host, server in zip(hosts, servers, strict=True)
    )
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def variables(hub: Hub, folder: Path) -> dict[str, str]:
    """Return the environment of a process that uses the hub, with its cache in `folder`."""
    clean = {name: "" for name in os.environ if name.startswith("HF_")}
    return {
        **clean,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
