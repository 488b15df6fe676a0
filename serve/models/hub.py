"""Models from the Hugging Face Hub: `hf:OWNER/REPO@REVISION`. Untested against the real hub.

The package huggingface_hub, an optional dependency, downloads the files. Only files that cannot run
code are fetched; a repository whose only weights are pickles is refused. A commit hash as revision
means exact bytes; a branch name means its state at the time of the pull.
"""

import re
import tempfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from serve.exceptions import NotFound, Unreachable, WrongUsage
from serve.settings import make_private_folder

_NAME = re.compile(r"hf:(?P<owner>[\w.-]+)/(?P<repo>[\w.-]+)@(?P<revision>[\w.-]+)")
_ALLOWED_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


def pull(name: str, home: Path, *, notify: Callable[[str], None]) -> Path:
    """Download a repository's safetensors and tokenizer files, and return their folder.

    Args:
        name: `hf:OWNER/REPO@REVISION`.
        home: the data folder.
        notify: called with a line when the download starts.

    Raises:
        WrongUsage: the name has another form, or the repository has no safetensors.
        NotFound: huggingface_hub is not installed.
        Unreachable: the repository could not be fetched.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise WrongUsage(f"{name!r} is not a hub model: use hf:OWNER/REPO@REVISION")
    repo = f"{match['owner']}/{match['repo']}"
    models = home / "models"
    folder = models / f"hf--{match['owner']}--{match['repo']}--{match['revision']}"
    if folder.is_dir():
        return folder
    try:
        import huggingface_hub
    except ImportError:
        raise NotFound(
            f"{name} needs huggingface_hub: `.venv/bin/pip install -e '.[hub]'` installs it"
        ) from None
    make_private_folder(home)
    make_private_folder(models)
    notify(f"pulling {name} (this source is untested)")
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=match["revision"])
        files = select_files(repo, [sibling.rfilename for sibling in info.siblings or []])
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=models) as temporary:
            huggingface_hub.snapshot_download(
                repo, revision=info.sha, allow_patterns=files, local_dir=temporary
            )
            # Leave an empty folder for TemporaryDirectory to remove.
            Path(temporary).rename(folder)
            Path(temporary).mkdir()
    except (OSError, ValueError) as error:  # base classes of huggingface_hub's errors
        raise Unreachable(f"{name} could not be pulled: {error}") from None
    return folder


def select_files(repo: str, names: Iterable[str]) -> list[str]:
    """Return the files of a repository to fetch.

    Args:
        repo: the name of the repository, for the message.
        names: all its files.

    Raises:
        WrongUsage: the repository has no safetensors.
    """
    names = list(names)
    top = [name for name in names if "/" not in name and name.endswith(_ALLOWED_SUFFIXES)]
    top += [name for name in names if fnmatch(name, "additional_chat_templates/*.jinja")]
    if not any(name.endswith(".safetensors") for name in top):
        raise WrongUsage(
            f"{repo} holds no .safetensors weights. Pickles (.bin, .pt) are refused: "
            "they can run any program when they are loaded"
        )
    return top
