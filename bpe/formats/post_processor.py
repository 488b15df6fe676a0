"""Read the post-processor of a `tokenizer.json`: the special tokens around texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bpe.formats.checks import get_required, short_repr
from bpe.post_processor import PostProcessor, Slot, bert_processor


def read_post_processor(spec: Any, where: str, vocab: Mapping[str, int]) -> PostProcessor:
    """Read the `post_processor` of a tokenizer.json.

    Args:
        spec: the value of the key; None adds nothing.
        where: the file and key, for error messages.
        vocab: token to id, for templates without ids.

    Raises:
        ValueError: if the post-processor is not supported.
    """
    steps = [spec] if spec is not None else []
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        steps = get_required(spec, "processors", list, where)
    processors = [_read_step(step, where, vocab) for step in steps if not _is_byte_level(step)]
    if len(processors) > 1:
        raise ValueError(
            f"{where}: expected at most one step that adds tokens, got {len(processors)} in "
            f"{short_repr(spec)}"
        )
    return processors[0] if processors else PostProcessor()


def _is_byte_level(step: Any) -> bool:
    return isinstance(step, dict) and step.get("type") == "ByteLevel"  # changes offsets only


def _read_step(step: Any, where: str, vocab: Mapping[str, int]) -> PostProcessor:
    match step:
        case {"type": "BertProcessing", "cls": [str(), int(cls)], "sep": [str(), int(sep)]}:
            return bert_processor(cls, sep)
        case {"type": "RobertaProcessing", "cls": [str(), int(cls)], "sep": [str(), int(sep)]}:
            a, b = Slot((), "A"), Slot((), "B")
            first, last = Slot((cls,)), Slot((sep,))
            return PostProcessor((first, a, last), (first, a, last, last, b, last))
        case {"type": "TemplateProcessing", "single": list(single)}:
            ids = {token: {"ids": [id]} for token, id in vocab.items()}
            try:
                special = {**ids, **step.get("special_tokens", {})}
                pair = [*single, {"Sequence": {"id": "B"}}]
                return PostProcessor(
                    _template(single, special), _template(step.get("pair", pair), special)
                )
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{where}: {short_repr(step)} is not supported") from error
    raise ValueError(f"{where}: {short_repr(step)} is not supported")


def _template(slots: list[Any], special: dict[str, Any]) -> tuple[Slot, ...]:
    result = []
    for slot in slots:
        match slot:
            case {"Sequence": {"id": str(text), **rest}}:
                result.append(Slot((), text, _type_id(rest)))
            case {"SpecialToken": {"id": str(token), **rest}}:
                ids = special[token]["ids"]
                if not all(isinstance(id, int) and id >= 0 for id in ids):
                    raise ValueError(f"expected ids from 0 on for {token!r}, got {ids}")
                result.append(Slot(tuple(ids), None, _type_id(rest)))
            case _:
                raise ValueError(f"expected a Sequence or a SpecialToken, got {short_repr(slot)}")
    return tuple(result)


def _type_id(rest: dict[str, Any]) -> int:
    value = rest.get("type_id", 0)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"expected an integer from 0 on for type_id, got {value!r}")
    return value
