"""The folder of a run: atomic writes, and job.json with the settings of the run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bpe import save
from bpe.formats import Tokenizer

# Keys of job.json by field name, where they differ; changing them would break existing runs.
_KEYS = {"dtype": "format"}


def config_record(settings: Any) -> dict[str, Any]:
    """Return the settings of a run as a JSON object, with the SHA-256 of its data files.

    Args:
        settings: a dataclass such as `FinetuneConfig`; its field `out` is left out.

    Raises:
        OSError: a data file cannot be read.
    """
    record = {
        _KEYS.get(name, name): str(value) if isinstance(value, Path) else value
        for name, value in asdict(settings).items()
        if name != "out"
    }
    for name in [name for name in ("data", "valid") if name in record]:
        path = getattr(settings, name)
        record[f"{name}_sha256"] = None if path is None else _sha256(path)
    return record


def read_job(path: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """Read the job.json of a run and check its settings; return None if there is no such file.

    Args:
        path: job.json of the run.
        record: the expected settings, from `config_record`.

    Raises:
        ValueError: the run was started with other settings.
    """
    if not path.exists():
        return None
    job = json.loads(path.read_text("utf-8"))
    for name, value in record.items():
        if (saved := job["given"].get(name)) != value:
            raise ValueError(
                f"{path.parent}: the run was started with {name}={saved!r}, got {value!r}; use the "
                "same value to resume it, or another folder"
            )
    return job


def write_job(path: Path, job: dict[str, Any]) -> None:
    """Write job.json atomically, for `read_job`.

    Args:
        path: job.json of the run.
        job: the contents, with `config_record` under the key "given".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(job, indent=2) + "\n", "utf-8")
    draft.replace(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_dir_atomic(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder completely or not at all, and replace an existing folder.

    Args:
        folder: the folder to write.
        write: a function that writes the files into the empty folder it is called with.
    """
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    if folder.exists():  # a resumed run repeats the steps since its last checkpoint
        remove_dir_atomic(folder)
    draft.rename(folder)


def remove_dir_atomic(folder: Path) -> None:
    """Remove a folder: rename it, then delete its files, so that it is never seen incomplete."""
    removed = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer and the generation config in the layout of Hugging Face.

    Args:
        folder: an existing folder.
        tokenizer: the tokenizer.
    """
    encoding = tokenizer.encoding
    names: dict[int | None, str] = {id: name for name, id in encoding.special_tokens.items()}
    bos, eos = names.get(tokenizer.bos_id), names.get(tokenizer.eos_id)
    spec = json.loads(save.tokenizer_json(encoding))
    if tokenizer.add_bos:
        first = {"Sequence": {"id": "A", "type_id": 0}}
        bos_token = {"SpecialToken": {"id": bos, "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos_token, first],
            "pair": [bos_token, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        }
    template = tokenizer.chat_template
    templates: Any = None if template is None else template.source
    if named_templates := tokenizer.named_templates:
        sources = {name: named.source for name, named in named_templates.items()}
        if template is not None:
            sources = {"default": template.source, **sources}
        templates = [{"name": name, "template": source} for name, source in sources.items()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": templates,
    }
    _write_json(folder / "tokenizer.json", spec)
    _write_json(folder / "tokenizer_config.json", config)
    save_generation_config(folder, tokenizer, {})


def save_generation_config(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Write generation_config.json with the stop ids of a tokenizer.

    Args:
        folder: an existing folder.
        tokenizer: its stop ids are written as `eos_token_id`. The end token comes first, because
            some libraries use the first id of the list for padding.
        settings: the other keys and values of the file.
    """
    ids = sorted(tokenizer.stop_ids, key=lambda id: (id != tokenizer.eos_id, id))
    _write_json(folder / "generation_config.json", {**settings, "eos_token_id": ids or None})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
