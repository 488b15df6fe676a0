"""Read the chat templates of a model, by name, from the files of its folder.

Follows `PreTrainedTokenizerBase.from_pretrained` of transformers 5. Only the first of these that
exists is read:

1. `chat_template.jinja`, which is "default", and `additional_chat_templates/NAME.jinja`;
2. `chat_template` in tokenizer_config.json: a string, or a list of objects with `name` and
   `template`;
3. `chat_template.json`, which older processors of multimodal models wrote, in the same form.

A template called "tool_use" replaces "default" when a request has tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the Jinja sources of a folder's chat templates, by name.

    Args:
        folder: the folder of the model.
        config: the content of its tokenizer_config.json.

    Raises:
        ValueError: if a file is damaged, or a template is not a string.
    """
    paths = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = {path.stem: path for path in paths}
    if (single := folder / "chat_template.jinja").is_file():
        files["default"] = single
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    if (value := config.get("chat_template")) is not None:
        return parse_chat_templates(value, f"{folder / 'tokenizer_config.json'}: chat_template")
    if (legacy := folder / "chat_template.json").is_file():
        try:
            content = json.loads(_read_text(legacy))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{legacy} is not a JSON file: {error}") from error
        if not isinstance(content, dict) or content.get("chat_template") is None:
            raise ValueError(f"{legacy}: chat_template is missing")
        return parse_chat_templates(content["chat_template"], f"{legacy}: chat_template")
    return {}


def parse_chat_templates(value: Any, where: str) -> dict[str, str]:
    """Return the templates of a JSON value, by name.

    Args:
        value: one template, a list of objects with `name` and `template`, or an object that maps
            names to templates.
        where: the file and key, for error messages.

    Raises:
        ValueError: if the value has none of these three forms.
    """
    if isinstance(value, str):
        return {"default": value} if value else {}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: expected a string, a list or an object, got {type(value).__name__}"
        )
    for name, source in value.items():
        if not isinstance(name, str) or not isinstance(source, str):
            raise ValueError(
                f"{where}: expected a name and a template, both strings, got {name!r} and a "
                f"template of type {type(source).__name__}"
            )
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
