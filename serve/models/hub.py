"""Models from the Hugging Face Hub: `hf:OWNER/REPO[@REVISION][:FILE]`.

The package huggingface_hub, an optional dependency, talks to the hub and owns the cache, which
other programs share: files that it has already are not fetched again. A large file is fetched over
HTTP into a partial file named after its hash, so that a later pull resumes it; it is renamed when
its content has the hash that the hub lists. A record in the data folder says which commit and which
files a name stands for; the name keeps this meaning until it is pulled again.

Only files that cannot run code are fetched. A repository whose only weights are pickles is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from serve.exceptions import (
    Corrupt,
    DoesNotFit,
    Failure,
    Forbidden,
    NotFound,
    RateLimited,
    Unreachable,
    Unusable,
    WrongUsage,
)
from serve.models import disk, hashes, json_cache
from serve.models.disk import human_size
from serve.models.hub_files import Candidate, RemoteFile, candidates, choose, select_files
from serve.settings import make_private_folder

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

    from transformer.checkpoint import Dtype

PREFIX = "hf:"
FORM = "hf:OWNER/REPO[@REVISION][:FILE]"
MAX_WAIT = 60  # seconds; a longer Retry-After of the hub ends the pull
MAX_ATTEMPTS = 5
# The files that Pellucid put into the cache, and when they were written: another program may have
# deleted one and fetched it again.
FETCHED_FILE = "fetched.json"
RESUMABLE_BYTES = 2**20  # smaller files are fetched again from the start

_NAME = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^:@]+))?(:(?P<file>.+))?",
    re.ASCII,
)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # SHA-1 or SHA-256

T = TypeVar("T")
Notify = Callable[[str], None]
Progress = Callable[[int, int], None]


# --- names and records ------------------------------------------------------------------------


@dataclass(frozen=True)
class HubName:
    """The parts of `hf:OWNER/REPO[@REVISION][:FILE]`.

    Attributes:
        repo: `OWNER/REPO`.
        revision: a branch, tag or commit; None for the default branch.
        file: a file of the repository, or a quantization of its GGUF files such as `Q8_0`.
    """

    repo: str
    revision: str | None = None
    file: str | None = None


def parse(name: str) -> HubName:
    """Return the parts of a name.

    Raises:
        WrongUsage: the name does not have this form.
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in PurePosixPath(match["file"] or "").parts:
        raise WrongUsage(f"{name!r} is not a name of a model of the hub: expected {FORM}")
    return HubName(match["repo"], match["revision"], match["file"])


@dataclass(frozen=True)
class Record:
    """The commit and the files that a name stood for when it was pulled.

    Attributes:
        name: the name, as it was pulled.
        id: `OWNER/REPO`, which is the id in the API.
        commit: the commit that the revision stood for.
        folder: the folder of the files in the cache of huggingface_hub.
        main: the GGUF file (the first one of a split model); empty for safetensors.
        files: the hash of each file: `sha256:HEX`, or `git:HEX` for a file that is not in LFS.
        size: bytes of all files.
        pulled_at: seconds since 1970.
    """

    name: str
    id: str
    commit: str
    folder: str
    main: str
    files: Mapping[str, str]
    size: int
    pulled_at: float

    @property
    def publisher(self) -> str:
        """Return the owner of the repository."""
        return self.id.partition("/")[0]

    @property
    def path(self) -> Path:
        """Return the path of the GGUF file, or of the folder."""
        return Path(self.folder, self.main)

    @property
    def paths(self) -> list[Path]:
        """Return the paths of all files."""
        return [Path(self.folder, file) for file in self.files]

    @property
    def is_complete(self) -> bool:
        """Whether all files exist."""
        return all(path.is_file() for path in self.paths)


def records(home: Path) -> list[Record]:
    """Return the records of pulled names, the newest first, without damaged ones."""
    readable = []
    for path in (home / "hub").glob("hf*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            readable.append(Record(**json.loads(path.read_text("utf-8"))))
    return sorted(readable, key=lambda record: (-record.pulled_at, record.name))


def find(name: str, home: Path) -> Record | None:
    """Return the newest record with this name or id whose files all exist, or None."""
    return next((r for r in records(home) if name in (r.name, r.id) and r.is_complete), None)


def remove(record: Record, home: Path) -> int:
    """Delete a record, and the files that Pellucid fetched for it.

    Files that another record needs are kept, and so are files that other programs put into the
    cache or link to from another snapshot.

    Returns:
        The number of bytes that were freed.
    """
    _record_path(record.name, home).unlink(missing_ok=True)
    disk.mark_changed(home)
    return _delete_files(record, home)


def _delete_files(record: Record, home: Path) -> int:
    """Delete the files that only a deleted record needs, and that Pellucid fetched.

    Returns:
        The number of bytes that were freed.
    """
    needed = {path for other in records(home) for path in other.paths}
    fetched = json_cache.read(home / "hub" / FETCHED_FILE)
    blobs = {path: _blob_of(path) for path in record.paths if path.exists()}
    ours = {path: blob for path, blob in blobs.items() if fetched.get(str(blob)) == _written(blob)}
    sizes = {blob: blob.lstat().st_size for blob in ours.values()}
    for path in ours.keys() - needed:
        path.unlink()
    snapshots = Path(record.folder).parent
    linked = {_blob_of(path) for path in snapshots.rglob("*") if path.is_file()}
    unused = sizes.keys() - linked
    for blob in unused:
        blob.unlink(missing_ok=True)
    return sum(sizes[blob] for blob in unused)


def _blob_of(path: Path) -> Path:
    """Return the file in `blobs` that a file of a snapshot links to.

    A link from there to another folder is not followed: huggingface_hub may share that file.
    """
    link = path.readlink() if path.is_symlink() else path.name
    return Path(os.path.normpath(path.parent.resolve() / link))


def _written(blob: Path) -> int:
    """Return when a file was written, in nanoseconds since 1970, as in `FETCHED_FILE`."""
    return blob.lstat().st_mtime_ns


def _record_path(name: str, home: Path) -> Path:
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]  # a name may be too long for a file
    return home / "hub" / f"hf-{digest}.json"


def verify(name: str, home: Path) -> Path:
    """Compare the files of a pulled name with the hashes of its record, and return its path.

    Raises:
        NotFound: the name is not pulled.
        Corrupt: a file was changed.
    """
    record = find(name, home)
    if record is None:
        raise NotFound(f"{name} is not pulled: run `pellucid pull {name}`")
    for path, expected in zip(record.paths, record.files.values(), strict=True):
        if hash_like(expected, path) != expected:
            raise Corrupt(
                f"{path} was changed since it was pulled: delete it, and run "
                f"`pellucid pull {record.name}`"
            )
    return record.path


# --- pulling ----------------------------------------------------------------------------------


def pull(
    name: str,
    home: Path,
    *,
    notify: Notify,
    progress: Progress = lambda done, total: None,
    free_memory: int | None = None,
) -> Record:
    """Resolve a name to a commit, fetch the files that the cache lacks, and write a `Record`.

    If the hub cannot be reached, the name keeps the commit that it has. If it has none, the files
    of the repository that the cache has are used.

    Args:
        name: `hf:OWNER/REPO[@REVISION][:FILE]`.
        home: the data folder.
        notify: called with a message for each step.
        progress: called with the bytes done and the total bytes. If it raises, the pull ends.
        free_memory: bytes of available memory; None to ask the system.

    Raises:
        WrongUsage: the name does not have this form.
        Unusable: the repository has only pickles, or no weights.
        NotFound: huggingface_hub is not installed, or the hub has no such repository, revision or
            file.
        Forbidden: the repository is gated, or the token is invalid.
        RateLimited: the hub answers 429 and asks to wait longer than `MAX_WAIT`, or answers 429 to
            `MAX_ATTEMPTS` requests.
        Unreachable: the hub cannot be reached, and the cache does not have the model.
        Corrupt: a file differs from the hash that the hub lists.
        DoesNotFit: the model does not fit into memory, or its files do not fit onto the disk.
        Failure: the cache cannot be written, or a file is too large to be fetched over HTTP.
    """
    hub_name = parse(name)
    try:
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    except ImportError:
        raise NotFound(
            f"{name} needs huggingface_hub: `.venv/bin/pip install -e '.[hub]'` installs it"
        ) from None
    if not are_progress_bars_disabled():
        disable_progress_bars()  # `progress` shows it
    if free_memory is None:
        from serve.models import memory

        free_memory = memory.available()
    make_private_folder(home)
    make_private_folder(home / "hub")
    try:
        with _translate(name):
            listing = _list_remote(hub_name, notify)
    except Unreachable as error:
        if (record := find(name, home)) is not None:
            notify(f"{error}; keeping commit {record.commit[:8]}")
            return record
        listing = _list_cached(hub_name)
        if listing is None or not candidates(listing.files):
            raise
        notify(f"{error}; using commit {listing.commit[:8]} from {cache_folder()}")
    options = candidates(listing.files, listing.bits)
    if not options:
        raise _no_weights(hub_name.repo, [file.name for file in listing.files])
    cached = [file.name for file in listing.files if _cached_path(listing, file)]
    choice, dtype = choose(listing.repo, options, hub_name.file, free_memory, cached)
    notify(_explain(listing, options, choice, dtype, free_memory))
    names = select_files(listing.repo, [file.name for file in listing.files], choice.weights)
    files = [file for file in listing.files if file.name in names]
    with (
        disk.locked(home / "hub" / ".lock", lambda: notify("another pull runs: waiting for it")),
        _translate(name),
    ):
        _fetch_all(listing, files, home, notify, progress)
    old = next((r for r in records(home) if r.name == name), None)
    record = Record(
        name=name,
        id=listing.repo,
        commit=listing.commit,
        folder=str(_repo_cache(listing.repo) / "snapshots" / listing.commit),
        main=choice.weights[0] if choice.weights[0].endswith(".gguf") else "",
        files={file.name: file.hash for file in files},
        size=sum(file.size for file in files),
        pulled_at=time.time(),
    )
    previous = find(listing.repo, home)
    disk.replace_text(_record_path(name, home), json.dumps(dataclasses.asdict(record), indent=1))
    disk.mark_changed(home)
    if previous is not None and previous.name != name and previous.path != record.path:
        notify(f"{record.id} now means {record.path}; before, it meant {previous.path}")
    if old is not None and old.paths != record.paths:
        if old.commit != record.commit:
            notify(f"{name} is now commit {record.commit[:8]}; it was {old.commit[:8]}")
        _delete_files(old, home)
    return record


@dataclass(frozen=True)
class _Listing:
    """The files of a repository at a commit; `bits` are the bits per weight of its safetensors."""

    repo: str
    commit: str
    files: Sequence[RemoteFile]
    bits: float = 16


def _list_remote(name: HubName, notify: Notify) -> _Listing:
    """Return the files of a repository, as the hub lists them."""
    from huggingface_hub import HfApi

    api = HfApi()
    info = _patiently(
        lambda: api.model_info(name.repo, revision=name.revision, files_metadata=True), notify
    )
    if info.id != name.repo:
        notify(f"{name.repo} is now called {info.id}")
    files = [
        RemoteFile(
            file.rfilename,
            file.size or 0,
            f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}",
        )
        for file in info.siblings or []
    ]
    if info.gated and files:  # listed for everybody: check the access before choosing files
        _file_metadata(info.id, info.sha, files[0].name, notify)
    total = info.safetensors.total if info.safetensors else 0
    weights = next((c for c in candidates(files) if c.label == "safetensors"), None)
    bits = 8 * weights.size / total if weights and total else 16
    return _Listing(info.id, info.sha or "", files, bits)


def _list_cached(name: HubName) -> _Listing | None:
    """Return the files of a repository that the cache has; None if it has none."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    revision = name.revision or "main"
    try:
        cache = scan_cache_dir(cache_folder())
    except CacheNotFound:
        return None
    for repo in cache.repos:
        if (repo.repo_type, repo.repo_id) != ("model", name.repo):
            continue
        for cached in repo.revisions:
            if revision in cached.refs or cached.commit_hash == revision:
                files = [
                    RemoteFile(
                        file.file_path.relative_to(cached.snapshot_path).as_posix(),
                        file.size_on_disk,
                        ("sha256:" if len(file.blob_path.name) == 64 else "git:")
                        + file.blob_path.name,
                    )
                    for file in sorted(cached.files, key=lambda file: file.file_path)
                ]
                return _Listing(name.repo, cached.commit_hash, files)
    return None


def cache_folder() -> Path:
    """Return the cache folder of huggingface_hub, which HF_HOME or HF_HUB_CACHE sets."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repo_cache(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def _cached_path(listing: _Listing, file: RemoteFile) -> Path | None:
    """Return the path of a file in the cache; None if it is missing or has another size."""
    path = _repo_cache(listing.repo) / "snapshots" / listing.commit / file.name
    return path if path.is_file() and path.stat().st_size == file.size else None


def _explain(
    listing: _Listing, options: Sequence[Candidate], choice: Candidate, dtype: Dtype, free: int
) -> str:
    """Return a sentence about the chosen weights, their memory, and the other weights.

    Args:
        listing: the files of the repository.
        options: all weights in the repository.
        choice: the chosen weights.
        dtype: the dtype in which they will be loaded.
        free: bytes of available memory.
    """
    names = [option.label for option in options if option is not choice]
    others = f"; it also has {', '.join(names)} (append :NAME to choose one)" if names else ""
    return (
        f"{listing.repo} {listing.commit[:8]}: {choice.label}, {human_size(choice.size)}, needs "
        f"{human_size(choice.memory(dtype))} of {human_size(free)} of memory in {dtype}{others}"
    )


def _no_weights(repo: str, names: Sequence[str]) -> Unusable:
    from transformer.checkpoint.safetensors import PICKLE_SUFFIXES, conversion_command

    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if not pickles:
        return Unusable(f"{repo} has no complete weights: expected model.safetensors or GGUF files")
    return Unusable(
        f"{repo} has only pickles ({pickles[0]}), which can run any code when they are loaded. "
        f"Download it with `hf download {repo} --local-dir FOLDER`, and convert it in an isolated "
        f"environment: {conversion_command(Path('FOLDER'), pickles)}"
    )


def _fetch_all(
    listing: _Listing,
    files: Sequence[RemoteFile],
    home: Path,
    notify: Notify,
    progress: Progress,
) -> None:
    """Fetch the files that the cache lacks."""
    missing = [file for file in files if _cached_path(listing, file) is None]
    if len(missing) < len(files):
        notify(f"{len(files) - len(missing)} of {len(files)} files are in {cache_folder()} already")
    cache_folder().mkdir(parents=True, exist_ok=True)
    needed = sum(file.size for file in missing) + disk.MARGIN
    if (free := shutil.disk_usage(cache_folder()).free) < needed:
        raise DoesNotFit(
            f"{cache_folder()} has {human_size(free)} of free disk space, and {listing.repo} needs "
            f"{human_size(needed)}: free some space, or set HF_HOME to a folder on another disk"
        )
    total, done = sum(file.size for file in missing), 0
    for file in missing:
        path, is_new = _fetch(
            listing, file, notify, lambda n, start=done: progress(start + n, total)
        )
        done += file.size
        progress(done, total)
        if is_new:
            blob = _blob_of(path)
            json_cache.add(home / "hub" / FETCHED_FILE, str(blob), _written(blob))
        if file.hash.startswith("sha256:"):
            hashes.record(path, home, file.hash.removeprefix("sha256:"))


def _fetch(
    listing: _Listing, file: RemoteFile, notify: Notify, progress: Callable[[int], None]
) -> tuple[Path, bool]:
    """Fetch a file into the cache.

    Returns:
        The path of the file, and whether its content was not in the cache before.

    Raises:
        Corrupt: the hash of the file differs from the hash that the hub lists.
    """
    from huggingface_hub import hf_hub_download

    digest = file.hash.partition(":")[2]  # also the name of the file in `blobs`
    if not _DIGEST.fullmatch(digest):
        raise Corrupt(f"{file.name} of {listing.repo} has no valid hash: the hub lists {file.hash}")
    is_large = file.size >= RESUMABLE_BYTES
    if is_large:
        is_new = _fetch_blob(listing, file, digest, notify, progress)
    else:
        is_new = not (_repo_cache(listing.repo) / "blobs" / digest).is_file()
    path = Path(
        _patiently(
            lambda: hf_hub_download(listing.repo, file.name, revision=listing.commit), notify
        )
    )
    if not is_large and hash_like(file.hash, path) != file.hash:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise _wrong_hash(listing, file)
    return path, is_new


def _fetch_blob(
    listing: _Listing,
    file: RemoteFile,
    digest: str,
    notify: Notify,
    progress: Callable[[int], None],
) -> bool:
    """Fetch a large file into the cache, resuming from a partial file if there is one.

    Returns:
        Whether the file was fetched; False if it was in the cache.

    Raises:
        Corrupt: the hash of the file differs from the hash that the hub lists.
    """
    from huggingface_hub.utils import WeakFileLock

    folder = _repo_cache(listing.repo)
    locks = cache_folder() / ".locks" / folder.name
    for parent in (folder / "blobs", locks):
        parent.mkdir(parents=True, exist_ok=True)
    blob, partial = folder / "blobs" / digest, folder / "blobs" / f"{digest}.pellucid"
    with WeakFileLock(locks / f"{digest}.lock"):  # `hf_hub_download` takes the same lock
        if blob.is_file() and blob.stat().st_size == file.size:
            return False
        blob.unlink(missing_ok=True)  # its size is wrong
        if partial.is_file() and partial.stat().st_size > file.size:
            partial.unlink()
        _transfer(listing, file, digest, partial, notify, progress)
        if hash_like(file.hash, partial) != file.hash:
            partial.unlink()
            raise _wrong_hash(listing, file)
        disk.flush(partial)
        partial.rename(blob)
        return True


def _transfer(
    listing: _Listing,
    file: RemoteFile,
    digest: str,
    partial: Path,
    notify: Notify,
    progress: Callable[[int], None],
) -> None:
    """Append the rest of a file to its partial file.

    `hf_hub_download` deletes a partial file when a download ends early, so this function calls
    huggingface_hub's `http_get`, which can resume.

    Raises:
        Corrupt: the hub sends another hash than it lists.
        Failure: `http_get` refuses to fetch a file of this size.
    """
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    while True:
        # The location is signed and expires, so each attempt asks for a new one.
        url, metadata = _file_metadata(listing.repo, listing.commit, file.name, notify)
        if metadata.etag != digest:
            raise Corrupt(
                f"{file.name} of {listing.repo} has two hashes: the hub lists {file.hash}, and "
                f"sends {metadata.etag}"
            )
        headers = build_hf_headers()
        if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # the storage behind the hub must not see the token
        with _CountingFile(partial, progress) as out:
            if start := out.tell():
                notify(f"resuming {file.name} after {human_size(start)}")
            try:
                http_get(
                    metadata.location,
                    cast(Any, out),
                    resume_size=start,
                    headers=headers,
                    expected_size=file.size,
                )
                return
            except (OSError, errors.HTTPError):  # pyright: ignore[reportPrivateImportUsage]
                # Versions before 2 do not go on after a broken transfer.
                if out.tell() == start:
                    raise
            except ValueError as error:  # above 50 GB
                raise Failure(
                    f"{file.name} of {listing.repo} ({human_size(file.size)}) cannot be fetched: "
                    f"{_first_line(error)} `hf download {listing.repo} {file.name}` fetches it "
                    "into the same cache; then pull again"
                ) from None


def _file_metadata(
    repo: str, commit: str | None, file: str, notify: Notify
) -> tuple[str, HfFileMetadata]:
    """Return the URL of a file, and its metadata from the response headers of the hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, file, revision=commit)
    return url, _patiently(lambda: get_hf_file_metadata(url), notify)


class _CountingFile(io.FileIO):
    """A file to append to, which reports its size after each write."""

    def __init__(self, path: Path, progress: Callable[[int], None]):
        super().__init__(path, "ab")
        self._progress = progress

    def write(self, data: Any, /) -> int:
        """Write all of `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[super().write(rest) :]
        self._progress(self.tell())
        return len(data)


def hash_like(expected: str, path: Path) -> str:
    """Return the hash of a file in the format of the `expected` hash: `sha256:HEX` or `git:HEX`."""
    if expected.startswith("sha256:"):
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    content = path.read_bytes()
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return f"git:{digest.hexdigest()}"


def _wrong_hash(listing: _Listing, file: RemoteFile) -> Corrupt:
    return Corrupt(
        f"{file.name} of {listing.repo} is not the file that the hub lists ({file.hash}): it was "
        "deleted; pull it again"
    )


def _patiently(call: Callable[[], T], notify: Notify) -> T:
    """Return the result of `call`; retry it when the hub answers 429 or 503 with a Retry-After."""
    from huggingface_hub.errors import HfHubHTTPError

    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            seconds = error.response.headers.get("retry-after", "")
            if error.response.status_code not in (429, 503) or not seconds.isdigit():
                raise
            if int(seconds) > MAX_WAIT:
                raise
            notify(f"the hub asks to wait {seconds} s")
            time.sleep(int(seconds))
    return call()


@contextlib.contextmanager
def _translate(name: str) -> Iterator[None]:
    """Convert errors of huggingface_hub that the block raises to a `Failure`."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        if (failure := _failure(name, error)) is None:
            raise
        raise failure from None


def _failure(name: str, error: BaseException) -> Failure | None:
    """Return the failure that reports an error of huggingface_hub; None for any other error."""
    from huggingface_hub import constants, errors, get_token

    repo, end = parse(name).repo, constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _failure(name, error.__cause__)
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.DisabledRepoError():
            return Forbidden(f"{end} has disabled {repo}: choose another repository")
        case errors.GatedRepoError():
            step = " with the account of your token"
            if get_token() is None:
                step = ", and set HF_TOKEN to a token of your account"
            return Forbidden(f"{repo} is gated: accept its terms at {end}/{repo}{step}")
        case errors.RepositoryNotFoundError():
            return NotFound(
                f"{end} has no repository {repo}: check the name; a private one needs HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return NotFound(f"{repo} has no revision {parse(name).revision!r}")
        case errors.OfflineModeIsEnabled():
            return Unreachable(
                f"HF_HUB_OFFLINE is set, so only files in {cache_folder()} are used: unset it to "
                f"pull {name}"
            )
        case errors.HFValidationError():
            return WrongUsage(f"{name!r} is not a name of a model of the hub: {error}")
        case errors.HfHubHTTPError() if status in (401, 403):
            return Forbidden(f"{end} refuses the token for {repo} ({status}): check HF_TOKEN")
        case errors.HfHubHTTPError() if status == 429:
            return RateLimited(f"{end} limits the rate of requests for {repo}: try again later")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return DoesNotFit(f"the disk of {cache_folder()} is full: free some space")
        case OSError(filename=str() | Path() as path):  # of this machine, not of the network
            return Failure(
                f"{path} cannot be used ({error.strerror}): correct this, or set HF_HOME to "
                "another folder"
            )
        case OSError() | ValueError() | errors.HTTPError():  # pyright: ignore[reportPrivateImportUsage]
            return Unreachable(f"{name} could not be pulled from {end}: {_first_line(error)}")
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
