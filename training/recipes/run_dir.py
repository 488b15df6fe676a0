"""What a run leaves in its folder: whole or not at all, and a note of what it was begun with."""

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


def config_record(settings: Any) -> dict[str, Any]:
    """What a run was asked for, as JSON, with the hashes of the files that are its data."""
    found = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(settings).items()
        if name != "out"
    }
    for name in [name for name in ("data", "valid") if name in found]:
        path = getattr(settings, name)
        found[f"{name}_sha256"] = None if path is None else _sha256(path)
    return found


def read_job(path: Path, given: dict[str, Any]) -> dict[str, Any] | None:
    """The job that a folder was begun with, if it was asked for the same.

    Raises:
        ValueError: it was asked for something else.
    """
    if not path.exists():
        return None
    job = json.loads(path.read_text("utf-8"))
    for name, value in given.items():
        if (before := job["given"].get(name)) != value:
            raise ValueError(
                f"{path.parent}: was begun with {name} {before!r}, not {value!r}; give the same to "
                "go on, or another folder"
            )
    return job


def write_job(path: Path, job: dict[str, Any]) -> None:
    """Writes a job for `read_job`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(job, indent=2) + "\n", "utf-8")
    draft.replace(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_dir_atomic(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder that is there whole or not at all."""
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    if folder.exists():  # of the same step, before a stop
        remove_dir_atomic(folder)
    draft.rename(folder)


def remove_dir_atomic(folder: Path) -> None:
    """Takes a folder out of sight before its files go, so that nobody finds half of it."""
    doomed = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer and what ends a generation, as a Hugging Face folder has them."""
    encoding = tokenizer.encoding
    spelling = {id: token for token, id in encoding.special_tokens.items()}
    bos, eos = spelling.get(tokenizer.bos_id), spelling.get(tokenizer.eos_id)
    spec = json.loads(save.tokenizer_json(encoding))
    if tokenizer.add_bos:
        text = {"Sequence": {"id": "A", "type_id": 0}}
        begin = {"SpecialToken": {"id": bos, "type_id": 0}}
        pair = {"Sequence": {"id": "B", "type_id": 1}}
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, pair],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        }
    template = tokenizer.chat_template
    templates: Any = None if template is None else template.source
    if named := tokenizer.named_templates:
        sources = {name: other.source for name, other in named.items()}
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
    """Write generation_config.json: `settings`, and as `eos_token_id` the tokenizer's stop ids.

    The end token of the tokenizer comes first, as readers of a list take the first for padding.
    """
    ids = sorted(tokenizer.stop_ids, key=lambda id: (id != tokenizer.eos_id, id))
    _write_json(folder / "generation_config.json", {**settings, "eos_token_id": ids or None})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
