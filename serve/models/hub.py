"""Models from the Hugging Face Hub: `hf:OWNER/REPO@REVISION`. Untried.

The work is huggingface_hub's, which is an extra of ours. Only files that cannot run code are asked
for; a repository that holds its weights as pickles alone is refused. A revision that is a commit
hash means exact bytes; a branch name means whatever it was when it was pulled.
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
    """Downloads a repository's safetensors and tokenizer files, and returns their folder.

    Raises:
        WrongUsage: The name has another form, or the repository holds only pickles.
        NotFound: huggingface_hub is not installed.
        Unreachable: The repository could not be had.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise WrongUsage(f"{name!r} has another form than hf:OWNER/REPO@REVISION")
    repo = f"{match['owner']}/{match['repo']}"
    models = home / "models"
    folder = models / f"hf--{match['owner']}--{match['repo']}--{match['revision']}"
    if folder.is_dir():
        return folder
    try:
        import huggingface_hub
    except ImportError:
        raise NotFound(
            f"{name} needs huggingface_hub: .venv/bin/pip install -e '.[hub]' adds it"
        ) from None
    make_private_folder(home)
    make_private_folder(models)
    notify(f"pulling {name} (this source is untried)")
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=match["revision"])
        files = select_files(repo, [sibling.rfilename for sibling in info.siblings or []])
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=models) as temporary:
            huggingface_hub.snapshot_download(
                repo, revision=info.sha, allow_patterns=files, local_dir=temporary
            )
            # Renamed away, so that leaving the block finds nothing to remove.
            Path(temporary).rename(folder)
            Path(temporary).mkdir()
    except (OSError, ValueError) as error:  # what huggingface_hub's own errors derive from
        raise Unreachable(f"{name} could not be pulled: {error}") from None
    return folder


def select_files(repo: str, names: Iterable[str]) -> list[str]:
    """The files to fetch, from all that a repository has.

    Raises:
        WrongUsage: There are no safetensors among them.
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
