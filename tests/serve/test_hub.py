"""Pull models of the Hugging Face Hub: the real client against a fake hub on loopback."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

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
from serve.models import catalogue, disk, download, hub, hub_files, resolve
from serve.models.hub import HubName
from serve.models.hub_files import Candidate, RemoteFile
from serve.models.spec import LoadOptions
from tests import hub_server
from tests.hub_server import Hub
from tests.naming import names, naming
from tests.serve import processes, tiny_gguf

pytestmark = pytest.mark.heavy

GB = 10**9
REPO = "someone/tiny"
WEIGHTS = b"weights " * 60_000  # fetched in several chunks
FILES = {
    "README.md": b"# a model",
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"\x80\x04",
    "onnx/model.onnx": b"ONNX",
    "1_Pooling/config.json": b"{}",
    "additional_chat_templates/tool_use.jinja": b"x",
}
GGUF_FILES = {f"tiny-{name}.gguf": b"GGUF" + name.encode() for name in ("Q4_K_M", "Q8_0", "F16")}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a fake hub, and point the hub client of this process to it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    with hub_server.serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr(hub, "RESUMABLE_BYTES", 1000)
        yield server
        close_session()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def pull(name: str, home: Path, *, lines: list[str] | None = None, **options) -> hub.Record:
    notify = print if lines is None else lines.append
    return hub.pull(name, home, notify=notify, **{"free_memory": 8 * GB, **options})


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:a/b", HubName("a/b")),
        ("hf:a/b.c-D_1", HubName("a/b.c-D_1")),
        ("hf:a/b@v1.0", HubName("a/b", "v1.0")),
        ("hf:a/b@refs/pr/4:x/y-Q4.gguf", HubName("a/b", "refs/pr/4", "x/y-Q4.gguf")),
        ("hf:a/b:Q8_0", HubName("a/b", None, "Q8_0")),
    ],
)
def test_parse_returns_parts(name: str, expected: HubName) -> None:
    assert hub.parse(name) == expected


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:b", "hf:a/b/c", "hf:a/b@", "hf:a/b:", "hf:../b", "hf:a/..", "hf:a/b:../../x", "a/b",
     "hf:a b/c", "hf:https://x/y", "hf:ä/b"],
)  # fmt: skip
def test_parse_invalid_name_raises_wrong_usage(name: str) -> None:
    with pytest.raises(WrongUsage):
        hub.parse(name)


# --- choosing ---------------------------------------------------------------------------------


def option(label: str, billions: float = 1) -> Candidate:
    bits = 16 if label == "safetensors" else hub_files._bits(label)
    return Candidate(label, (f"x-{label}.gguf",), int(billions * GB * bits / 8), bits)


ALL = [option(label) for label in ("safetensors", "F32", "F16", "Q8_0", "Q6_K", "Q4_K_M", "IQ2_XS")]


@pytest.mark.parametrize(
    ("labels", "free", "chosen", "dtype"),
    [
        ("all", 10, "F32", "float32"),  # a file of float32 counts if float32 fits
        ("all", 4, "safetensors", "bfloat16"),
        ("all", 2, "Q8_0", "int8"),  # 16 bits in memory do not fit, so 16 bits on disk are waste
        ("F16 Q8_0 Q4_K_M", 4, "F16", "bfloat16"),
        ("Q6_K Q4_K_M", 10, "Q6_K", "int8"),
        ("Q4_K_M IQ2_XS", 2, "Q4_K_M", "int8"),
        ("safetensors", 2, "safetensors", "int8"),
        ("F32 F16", 2, "F16", "int8"),
    ],
)
def test_choose_returns_most_precise_weights_that_fit(labels, free, chosen, dtype) -> None:
    options = [o for o in ALL if labels == "all" or o.label in labels.split()]
    choice, fitting = hub_files.choose("a/b", options, None, free * GB)
    assert (choice.label, fitting) == (chosen, dtype)


def test_choose_too_large_raises_does_not_fit() -> None:
    with pytest.raises(DoesNotFit):
        hub_files.choose("a/b", [option("Q4_K_M", 8)], None, 2 * GB)


def test_choose_prefers_cached_file() -> None:
    choice, _ = hub_files.choose("a/b", ALL, None, 10 * GB, cached=["x-Q4_K_M.gguf"])
    assert choice.label == "Q4_K_M"


def test_choose_by_file_name_or_quantization_returns_that_file() -> None:
    options = hub_files.candidates(
        RemoteFile(name, 10, "") for name in [*GGUF_FILES, "sub/y-Q5_K_S.gguf"]
    )
    for file in ("Q5_K_S", "q5_k_s", "sub/y-Q5_K_S.gguf", "y-Q5_K_S.gguf"):
        choice, _ = hub_files.choose("a/b", options, file, 8 * GB)
        assert choice.weights == ("sub/y-Q5_K_S.gguf",)
    with pytest.raises(NotFound):
        hub_files.choose("a/b", options, "Q3_K", 8 * GB)


def test_candidates_groups_shards_and_skips_other_files() -> None:
    files = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",  # Mistral's second copy
        "mmproj-F16.gguf",
        "imatrix.gguf",
        "tiny.Q8_0.gguf",
        "tiny-iq4_xs.gguf",
        "BF16/tiny-BF16-00001-of-00002.gguf",
        "BF16/tiny-BF16-00002-of-00002.gguf",
        "Q8_0-tiny.gguf",
        "plain.gguf",
    ]
    counts = {
        c.label: len(c.weights) for c in hub_files.candidates(RemoteFile(f, 1, "") for f in files)
    }
    assert counts == {"safetensors": 2, "Q8_0": 1, "IQ4_XS": 1, "BF16": 2, "gguf": 1}
    selected = hub_files.select_files("a/b", files, files[:2])
    assert set(selected) == set(files[:3])


@pytest.mark.parametrize("stem", ["model", "Q8_0/tiny-Q8_0"])
@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 3), (2, 3), (1, 2, 3, 4)])
def test_candidates_leaves_out_split_models_that_lack_a_part(stem, numbers) -> None:
    """Regression: offline, a model was pulled of which the cache had only some parts."""
    suffix = "gguf" if "Q8_0" in stem else "safetensors"
    names = [f"{stem}-{n:05}-of-00003.{suffix}" for n in numbers]
    assert hub_files.candidates(RemoteFile(name, 1, "") for name in names) == []


# --- pulling ----------------------------------------------------------------------------------


def test_pull_safetensors_fetches_needed_files_and_records_commit(server, home) -> None:
    commit = server.commit(REPO, FILES)
    progress: list[tuple[int, int]] = []
    record = pull(f"hf:{REPO}", home, progress=lambda *p: progress.append(p))
    assert (record.id, record.publisher, record.commit) == (REPO, "someone", commit)
    assert names_in(record.path) == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "1_Pooling/config.json",
        "additional_chat_templates/tool_use.jinja",
    }
    assert (record.path / "model.safetensors").read_bytes() == WEIGHTS
    assert progress == sorted(progress) and progress[-1][0] == progress[-1][1] == record.size
    assert len(progress) > 10, "large files report their progress"
    assert hub.find(f"hf:{REPO}", home) == record == hub.find(REPO, home)


def test_pull_gguf_fetches_one_quantization(server, home) -> None:
    server.commit(REPO, GGUF_FILES)
    lines: list[str] = []
    record = pull(f"hf:{REPO}", home, lines=lines)
    assert record.path.name == "tiny-F16.gguf" and len(server.sent) == 1
    assert all(
        word in lines[0] for word in ("F16", "bfloat16", "Q8_0", "Q4_K_M", record.commit[:8])
    )
    lines.clear()
    other = pull(f"hf:{REPO}:q4_k_m", home, lines=lines)
    assert other.path.name == "tiny-Q4_K_M.gguf"
    assert any(str(other.path) in line and str(record.path) in line for line in lines), (
        "the id now means another file"
    )
    assert hub.find(f"hf:{REPO}", home) == record
    assert hub.find(REPO, home).path.name == "tiny-Q4_K_M.gguf", "an id finds the newest record"


def test_pull_again_fetches_nothing_until_branch_moves(server, home) -> None:
    """After a new commit, changed files are fetched, and the files of the old commit deleted."""
    server.commit(REPO, FILES)
    first = pull(f"hf:{REPO}", home)
    count = len(server.sent)
    assert pull(f"hf:{REPO}", home).commit == first.commit
    assert len(server.sent) == count
    changed = server.commit(REPO, {**FILES, "model.safetensors": WEIGHTS + b"!"})
    assert hub.find(f"hf:{REPO}", home) == first or not server.sent[count:]
    lines: list[str] = []
    second = pull(f"hf:{REPO}", home, lines=lines)
    assert second.commit == changed and any(changed[:8] in line for line in lines)
    assert (second.path / "model.safetensors").read_bytes() == WEIGHTS + b"!"
    assert server.sent[count:].count("config.json") == 0, "an unchanged file is not fetched"
    assert not first.is_complete and second.is_complete
    assert pull(f"hf:{REPO}@{first.commit}", home).path == first.path, "old commits remain"


def test_pull_interrupted_transfer_resumes_after_last_byte(server, home) -> None:
    server.commit(REPO, FILES)
    server.cuts, server.cut_after = 1, 100_000
    record = pull(f"hf:{REPO}", home)
    assert (record.path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [r for r in server.requests if r.startswith("GET /storage/")]
    assert ranges == ["GET /storage/all", "GET /storage/bytes=100000-"]


def pull_and_stop(home: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(f"hf:{REPO}", home, progress=stop)


def test_pull_after_stopped_pull_resumes(server, home) -> None:
    server.commit(REPO, FILES)
    pull_and_stop(home)
    assert hub.find(f"hf:{REPO}", home) is None, "an incomplete model has no record"
    lines: list[str] = []
    record = pull(f"hf:{REPO}", home, lines=lines)
    assert (record.path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [r for r in server.requests if r.startswith("GET /storage/")]
    assert ranges[0] == "GET /storage/all" and len(ranges) == 2
    assert int(ranges[1].split("=")[1][:-1]) > 190_000


def test_pull_of_a_file_that_changed_does_not_continue_its_old_part(server, home) -> None:
    server.commit(REPO, FILES)
    pull_and_stop(home)
    changed = WEIGHTS[::-1]
    server.commit(REPO, {**FILES, "model.safetensors": changed})
    count = len(server.requests)
    assert (pull(f"hf:{REPO}", home).path / "model.safetensors").read_bytes() == changed
    ranges = [r for r in server.requests[count:] if r.startswith("GET /storage/")]
    assert ranges == ["GET /storage/all"]


def test_pull_damaged_file_raises_corrupt_and_leaves_nothing(server, home) -> None:
    server.commit(REPO, FILES)
    server.damaged = True
    with pytest.raises(Corrupt):
        pull(f"hf:{REPO}", home)
    assert hub.find(REPO, home) is None
    server.damaged = False
    assert (pull(f"hf:{REPO}", home).path / "model.safetensors").read_bytes() == WEIGHTS


def test_pull_asks_for_a_new_location_when_the_old_one_expires(server, home) -> None:
    """Regression: after the expiry of its signed location, a broken transfer ended with 403."""
    server.commit(REPO, FILES)
    server.expires, server.cuts, server.cut_after = True, 1, 100_000
    record = pull(f"hf:{REPO}", home)
    assert (record.path / "model.safetensors").read_bytes() == WEIGHTS
    assert "GET /storage/bytes=100000-" in server.requests


@pytest.mark.parametrize("is_listed", [False, True])
def test_pull_invalid_hash_raises_corrupt(server, home, tmp_path, is_listed) -> None:
    """Regression: the hash that the hub sends was used as a file name, unchecked."""
    server.commit(REPO, FILES)
    server.etag = "../../escaped"
    server.listed_hash = server.etag if is_listed else ""
    with pytest.raises(Corrupt):
        pull(f"hf:{REPO}", home)
    assert not list(tmp_path.rglob("escaped*"))


def test_pull_from_two_data_folders_fetches_once(server, home, tmp_path) -> None:
    """Regression: the lock was in the data folder, so that two pulls wrote to one partial file."""
    server.commit(REPO, FILES)
    other: list[hub.Record] = []
    thread = threading.Thread(target=lambda: other.append(pull(f"hf:{REPO}", tmp_path / "other")))

    def start_other(done: int, total: int) -> None:
        if done > 200_000 and thread.ident is None:
            thread.start()
            thread.join(0.5)

    record = pull(f"hf:{REPO}", home, progress=start_other)
    thread.join()
    assert (record.path / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.path for r in other] == [record.path]
    assert server.sent.count("model.safetensors") == 1


def test_pull_into_unusable_cache_raises_failure(server, home, tmp_path, monkeypatch) -> None:
    """Regression: a cache that cannot be written was reported as a hub that cannot be reached."""
    from huggingface_hub import constants

    server.commit(REPO, FILES)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Failure, match=naming(str(tmp_path / "file"))) as raised:
        pull(f"hf:{REPO}", home)
    assert not isinstance(raised.value, Unreachable)


def test_pull_file_too_large_for_http_raises_failure(server, home, monkeypatch) -> None:
    """Regression: a file above 50 GB was reported as a hub that cannot be reached."""
    from huggingface_hub import constants

    server.commit(REPO, FILES)
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 10_000)
    with pytest.raises(Failure, match=naming("model.safetensors")) as raised:
        pull(f"hf:{REPO}", home)
    assert not isinstance(raised.value, Unreachable)


def test_pull_uses_cached_file_and_remove_keeps_it(server, home) -> None:
    from huggingface_hub import hf_hub_download

    server.commit(REPO, GGUF_FILES)
    cached = hf_hub_download(REPO, "tiny-Q4_K_M.gguf")
    count = len(server.sent)
    record = pull(f"hf:{REPO}", home)
    assert str(record.path) == cached and len(server.sent) == count
    assert hub.remove(record, home) == 0
    assert Path(cached).is_file(), "a file that another program fetched is kept"


def test_remove_deletes_fetched_files_that_no_other_name_needs(server, home) -> None:
    server.commit(REPO, FILES)
    record = pull(f"hf:{REPO}", home)
    other = pull(f"hf:{REPO}@main", home)
    assert hub.remove(record, home) == 0 and other.is_complete, "files of another name are kept"
    assert hub.remove(other, home) >= len(WEIGHTS)
    assert hub.records(home) == []
    assert names_in(hub.cache_folder() / "models--someone--tiny" / "blobs") == set()


def other_program_fetches(names: list[str], revision: str) -> list[Path]:
    from huggingface_hub import hf_hub_download

    return [Path(hf_hub_download(REPO, name, revision=revision)) for name in names]


@pytest.mark.parametrize("is_pulled_again", [False, True])
def test_remove_keeps_content_of_another_snapshot(server, home, is_pulled_again) -> None:
    """Regression: content that another program had put into the cache was deleted."""
    first = server.commit(REPO, FILES)
    paths = other_program_fetches(["model.safetensors", "config.json"], first)
    server.commit(REPO, {**FILES, "README.md": b"new"})
    record = pull(f"hf:{REPO}", home)
    if is_pulled_again:
        server.commit(REPO, {**FILES, "model.safetensors": b"2" * 2000, "config.json": b"{ }"})
        record = pull(f"hf:{REPO}", home)
    assert hub.remove(record, home) < len(WEIGHTS)
    assert all(path.is_file() for path in paths)


def test_remove_keeps_fetched_content_that_another_program_uses(server, home) -> None:
    """Regression: the snapshot of another program kept links to deleted files."""
    server.commit(REPO, FILES)
    record = pull(f"hf:{REPO}", home)
    other = server.commit(REPO, {**FILES, "README.md": b"new"})
    paths = other_program_fetches(["model.safetensors", "config.json"], other)
    assert hub.remove(record, home) < len(WEIGHTS) and not record.is_complete
    assert all(path.is_file() for path in paths)


def test_remove_keeps_content_that_another_program_fetched_again(server, home) -> None:
    """Regression: content that Pellucid had fetched and deleted counted as fetched ever after."""
    commit = server.commit(REPO, FILES)
    assert hub.remove(pull(f"hf:{REPO}", home), home) >= len(WEIGHTS)
    paths = other_program_fetches(["model.safetensors", "config.json"], commit)
    hub.remove(pull(f"hf:{REPO}", home), home)
    assert all(path.is_file() for path in paths)


def test_verify_changed_file_raises_corrupt(server, home) -> None:
    server.commit(REPO, FILES)
    record = pull(f"hf:{REPO}", home)
    assert hub.verify(REPO, home) == record.path
    for name in ("config.json", "model.safetensors"):
        data = (record.path / name).read_bytes()
        (record.path / name).write_bytes(data[:-1] + b"?")
        with pytest.raises(Corrupt):
            hub.verify(REPO, home)
        (record.path / name).write_bytes(data)
    with pytest.raises(NotFound):
        hub.verify("hf:someone/other", home)


def test_pull_renamed_repository_records_new_name(server, home) -> None:
    server.commit("new/name", FILES)
    server.renamed["old/name"] = "new/name"
    lines: list[str] = []
    record = pull("hf:old/name", home, lines=lines)
    assert record.id == "new/name" and "new/name" in lines[0]
    assert hub.find("hf:old/name", home) == record == hub.find("new/name", home)


def test_pull_sends_token_to_hub_but_not_to_storage(server, home, monkeypatch) -> None:
    server.commit(REPO, FILES)
    server.repositories[REPO].private = True
    with pytest.raises(NotFound):
        pull(f"hf:{REPO}", home)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert pull(f"hf:{REPO}", home).is_complete
    assert server.tokens and set(server.tokens) == {None}


def test_pull_refused_token_raises_forbidden(server, home, monkeypatch) -> None:
    server.commit(REPO, FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Forbidden):
        pull(f"hf:{REPO}", home)


@pytest.mark.parametrize("token", [None, hub_server.TOKEN])
def test_pull_gated_repository_raises_forbidden(server, home, monkeypatch, token) -> None:
    server.commit(REPO, FILES)
    server.repositories[REPO].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(Forbidden):
        pull(f"hf:{REPO}", home)


@pytest.mark.parametrize("token", [None, hub_server.TOKEN])
@pytest.mark.parametrize("name", ["hf:nobody/nothing", f"hf:{REPO}@nowhere", f"hf:{REPO}:Q2_K"])
def test_pull_missing_repository_revision_or_file_raises_not_found(
    server, home, monkeypatch, name, token
) -> None:
    server.commit(REPO, FILES)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(NotFound):
        pull(name, home)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pickle"])
def test_pull_repository_without_safe_weights_raises_unusable(server, home, pickle) -> None:
    """Regression: pickles were wrong usage in a repository only, and .pickle was unknown there."""
    server.commit(REPO, {"config.json": b"{}", pickle: b"\x80\x04"})
    with pytest.raises(Unusable, match=naming(pickle)):
        pull(f"hf:{REPO}", home)
    assert server.sent == []
    server.commit(REPO, {"README.md": b""})
    with pytest.raises(Unusable):
        pull(f"hf:{REPO}", home)


def test_pull_model_too_large_raises_does_not_fit_before_fetching(
    server, home, monkeypatch
) -> None:
    server.commit(REPO, FILES)
    with pytest.raises(DoesNotFit):
        pull(f"hf:{REPO}", home, free_memory=1000)
    monkeypatch.setattr(disk, "MARGIN", 10**18)
    with pytest.raises(DoesNotFit):
        pull(f"hf:{REPO}", home)
    assert server.sent == []


def test_pull_rate_limited_waits_and_retries(server, home) -> None:
    server.commit(REPO, FILES)
    server.rate_limited = 2
    lines: list[str] = []
    assert pull(f"hf:{REPO}", home, lines=lines).is_complete
    assert len(lines) > 2


def test_pull_long_rate_limit_raises_rate_limited(server, home) -> None:
    server.commit(REPO, FILES)
    server.rate_limited, server.retry_after = 10**6, 3600
    with pytest.raises(RateLimited):
        pull(f"hf:{REPO}", home)


def test_pull_offline_uses_cache_or_raises_unreachable(server, home, monkeypatch) -> None:
    from huggingface_hub import constants

    server.commit(REPO, FILES)
    record = pull(f"hf:{REPO}", home)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(server.requests)
    notes: list[str] = []
    assert pull(f"hf:{REPO}", home, lines=notes) == record
    assert names(notes[-1], "HF_HUB_OFFLINE", record.commit[:8])
    hub._record_path(record.name, home).unlink()
    (record.path / "README.md").write_text("of another program")
    again = pull(f"hf:{REPO}@{record.commit}", home)
    assert (again.path, again.files) == (record.path, record.files)
    with pytest.raises(Unreachable):
        pull("hf:someone/else", home)
    assert len(server.requests) == count


def test_pull_offline_of_a_partly_cached_model_raises_unreachable(
    server, home, monkeypatch
) -> None:
    from huggingface_hub import constants

    shards = {f"model-0000{n}-of-00002.safetensors": b"x" * 2000 for n in (1, 2)}
    index = "model.safetensors.index.json"
    commit = server.commit(REPO, {"config.json": b"{}", index: b"{}", **shards})
    other_program_fetches(["config.json", index, min(shards)], "main")
    assert hub._list_cached(HubName(REPO)).commit == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable):
        pull(f"hf:{REPO}", home)
    assert hub.records(home) == []


def test_pull_unreachable_hub_uses_cache_or_raises_unreachable(
    server, home, monkeypatch, refused_url
) -> None:
    from huggingface_hub import constants

    server.commit(REPO, FILES)
    record = pull(f"hf:{REPO}@{server.repositories[REPO].refs['main']}", home)
    named = pull(f"hf:{REPO}", home)
    monkeypatch.setattr(constants, "ENDPOINT", refused_url)
    # Regression: a name without a revision was not found, because the cache has no branch for it.
    assert pull(f"hf:{REPO}", home) == named
    hub._record_path(record.name, home).unlink()
    assert pull(record.name, home).files == record.files
    with pytest.raises(Unreachable):
        pull("hf:someone/else", home)


# --- names in the catalogue and in --model ----------------------------------------------------


def test_hub_model_of_the_catalogue_is_pulled_and_described(server, home, tmp_path) -> None:
    tiny_gguf.write_gguf(tmp_path / "m.gguf")
    server.commit(REPO, {"m-F16.gguf": (tmp_path / "m.gguf").read_bytes()})
    row = f'[models.mine]\nkind = "decoder"\nhub = "hf:{REPO}:F16"\n[aliases]\nmy-alias = "mine"\n'
    (tmp_path / "models.toml").write_text(row)
    known_models = catalogue.load(tmp_path)
    entry = known_models.models["mine"]
    assert download.find_pulled(entry, home) is None
    files = download.resolve_model("my-alias", known_models, home, notify=print, progress=print)
    assert (files.id, files.publisher, files.path.name) == ("mine", "someone", "m-F16.gguf")
    count = len(server.requests)
    assert download.resolve_model("mine", known_models, home, notify=print) == files
    assert download.verify(entry, home) == files.path
    assert len(server.requests) == count, "a pulled model asks nothing of the network"
    options = LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    spec = resolve.describe(files, options)
    assert (spec.id, spec.context) == ("mine", tiny_gguf.CONTEXT)
    pulled_specs = resolve.PulledSpecs(known_models, options, {})
    assert pulled_specs().keys() == {"mine", REPO}
    with pytest.raises(NotFound):
        download.verify(catalogue.load(tmp_path).models["mine"], tmp_path / "other home")


def test_model_option_gives_a_hub_model_another_id(server, home, tmp_path) -> None:
    tiny_gguf.write_gguf(tmp_path / "m.gguf")
    server.commit(REPO, {"m-F16.gguf": (tmp_path / "m.gguf").read_bytes()})
    known_models = catalogue.load()
    files = download.resolve_model(f"mine/x=hf:{REPO}", known_models, home, notify=print)
    assert (files.id, files.publisher) == ("mine/x", "someone")
    count = len(server.requests)
    for name, id in ((f"hf:{REPO}", REPO), (REPO, REPO), (f"other=hf:{REPO}", "other")):
        again = download.resolve_model(name, known_models, home, notify=print)
        assert (again.id, again.path) == (id, files.path)
    assert len(server.requests) == count
    for name in (f"a b=hf:{REPO}", "mine=hf:someone"):
        with pytest.raises(WrongUsage):
            download.resolve_model(name, known_models, home, notify=print)
    with pytest.raises(NotFound):
        download.resolve_model("mine=hf:someone/nothing", known_models, home, notify=print)


def test_pull_from_server_that_is_no_hub_raises_failure(server, home, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.storage_url)
    with pytest.raises((Unreachable, NotFound)):
        pull(f"hf:{REPO}", home)


# --- the command ------------------------------------------------------------------------------


def run(server: Hub, tmp_path: Path, *arguments: str, **variables: str):
    environment = processes.environment(
        **hub_server.variables(server, tmp_path / "hf"),
        PELLUCID_HOME=str(tmp_path / "home"),
        **variables,
    )
    return subprocess.run(
        [sys.executable, "-m", "serve", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=processes.TIMEOUT,
    )


def test_pull_command_uses_hf_environment_variables(tmp_path: Path) -> None:
    tiny_gguf.write_gguf(tmp_path / "m.gguf")
    with hub_server.serve_hub() as server:
        server.commit(REPO, {"m-F16.gguf": (tmp_path / "m.gguf").read_bytes()})
        server.repositories[REPO].private = True
        done = run(server, tmp_path, "pull", f"hf:{REPO}", HF_TOKEN=hub_server.TOKEN)
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.strip())
        assert path.is_relative_to(tmp_path / "hf") and path.name == "m-F16.gguf"
        count = len(server.requests)
        done = run(server, tmp_path, "pull", f"hf:{REPO}", HF_HUB_OFFLINE="1")
        assert done.returncode == 0 and Path(done.stdout.strip()) == path, done.stderr
        assert len(server.requests) == count


def test_pull_command_of_damaged_model_names_the_file_and_keeps_it(tmp_path: Path) -> None:
    tiny_gguf.write_gguf(tmp_path / "m.gguf")
    with hub_server.serve_hub() as server:
        server.commit(REPO, {"m-F16.gguf": (tmp_path / "m.gguf").read_bytes()[:-100]})
        done = run(server, tmp_path, "pull", f"hf:{REPO}")
    assert done.returncode == 3 and "m-F16.gguf" in done.stderr and not done.stdout
    assert list((tmp_path / "hf").rglob("m-F16.gguf"))
