"""Add a tokenizer's special tokens around a text, or around a pair of texts.

An encoder reads `[CLS] text [SEP]`, and a cross-encoder `[CLS] question [SEP] document [SEP]`. The
post-processor of a `tokenizer.json` says which special tokens a model was trained with, and the
type of each token, by which BERT distinguishes the two texts of a pair. The supported
post-processors of Hugging Face's `tokenizers` are `BertProcessing`, `RobertaProcessing`,
`TemplateProcessing`, and a `Sequence` with one of these; `formats/post_processor.py` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A part of a template: special tokens, or the position of a text.

    Attributes:
        ids: the ids of the special tokens; empty for a text.
        text: "A" for the first text, "B" for the second, None for special tokens.
        type_id: the token type id (`token_type_ids` of BERT) of the tokens of this part.
    """

    ids: tuple[int, ...]
    text: str | None = None
    type_id: int = 0


@dataclass(frozen=True)
class PostProcessor:
    """The templates that place special tokens around a text, and around a pair of texts.

    Attributes:
        single: the template of one text: a slot for the text "A", and special tokens.
        pair: the template of a pair: a slot for "A", a later slot for "B", and special tokens.

    Raises:
        ValueError: if a template lacks one of its texts, or has a text twice.
    """

    single: tuple[Slot, ...] = (Slot((), "A"),)
    pair: tuple[Slot, ...] = (Slot((), "A"), Slot((), "B"))

    def __post_init__(self) -> None:
        for template, texts in ((self.single, ["A"]), (self.pair, ["A", "B"])):
            slot_texts = [slot.text for slot in template if slot.text is not None]
            if slot_texts != texts:
                raise ValueError(
                    f"expected a template with slots for the texts {texts}, in this order, got "
                    f"slots for {slot_texts}"
                )

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids of the special tokens before a single text."""
        return _ids(self.single[: self._index])

    @property
    def suffix(self) -> tuple[int, ...]:
        """The ids of the special tokens after a single text."""
        return _ids(self.single[self._index + 1 :])

    @property
    def _index(self) -> int:
        return next(i for i, slot in enumerate(self.single) if slot.text)

    def process(self, ids: Sequence[int], max_length: int | None = None) -> list[int]:
        """Return the ids of a text with the special tokens around it.

        Args:
            ids: the ids of the text.
            max_length: the maximum number of ids; the end of a longer text is cut off.

        Raises:
            ValueError: if `max_length` is too small for the special tokens.
        """
        limit = _limit(max_length, len(self.prefix) + len(self.suffix))
        return [*self.prefix, *ids[:limit], *self.suffix]

    def process_pair(
        self, first: Sequence[int], second: Sequence[int], max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a pair of texts with special tokens, and their token type ids.

        Args:
            first: the ids of the first text.
            second: the ids of the second text.
            max_length: the maximum number of ids. If the texts are too long, the end of the longer
                text is cut off until both have equal length, and then the end of both.

        Raises:
            ValueError: if `max_length` is too small for the special tokens.
        """
        limit = _limit(max_length, len(_ids(self.pair)))
        texts = dict(zip("AB", truncate_pair(first, second, limit), strict=True))
        ids: list[int] = []
        types: list[int] = []
        for slot in self.pair:
            part = slot.ids if slot.text is None else texts[slot.text]
            ids += part
            types += [slot.type_id] * len(part)
        return ids, types


def truncate_pair(
    first: Sequence[int], second: Sequence[int], limit: int | None
) -> tuple[Sequence[int], Sequence[int]]:
    """Cut off the end of the longer text, or of both, until there are at most `limit` ids."""
    if limit is None or len(first) + len(second) <= limit:
        return first, second
    shorter = min(len(first), len(second), limit // 2)
    if len(first) <= len(second):
        return first[:shorter], second[: limit - shorter]
    return first[: limit - shorter], second[:shorter]


def bert_processor(cls: int, sep: int) -> PostProcessor:
    """Return BERT's templates: [CLS] A [SEP], and [CLS] A [SEP] B [SEP] with type 1 from B on."""
    single = (Slot((cls,)), Slot((), "A"), Slot((sep,)))
    return PostProcessor(single, (*single, Slot((), "B", 1), Slot((sep,), None, 1)))


def _ids(slots: Sequence[Slot]) -> tuple[int, ...]:
    return tuple(id for slot in slots for id in slot.ids)


def _limit(max_length: int | None, num_special: int) -> int | None:
    """Return how many of `max_length` ids the special tokens leave for the texts."""
    if max_length is not None and max_length < num_special:
        raise ValueError(
            f"max_length={max_length} is less than the number of special tokens, {num_special}"
        )
    return None if max_length is None else max_length - num_special
