"""Define `Tokenizer`, the result of every reader: an encoding, chat templates and special ids."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from bpe.chat import ChatTemplate
from bpe.encoding import Encoding
from bpe.log_once import warn_once

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What converts between text and the ids of a model: encoding, chat templates, special ids.

    Attributes:
        encoding: the vocabulary, with `encode` and `decode`.
        chat_template: the default chat template, or None.
        named_templates: the other chat templates ("tool_use", "rag"), by name.
        bos_id: the id of the token at the beginning of a text, or None.
        eos_id: the id of the token at the end of a text or message, or None.
        add_bos: whether to add `bos_id` before plain text; a chat template writes the token itself.
        add_eos: whether to add `eos_id` after a text, as encoder models expect.
        stop_ids: the ids of the tokens that end a generation, see `bpe.stop_tokens`.
    """

    encoding: Encoding
    chat_template: ChatTemplate | None = None
    named_templates: Mapping[str, ChatTemplate] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    stop_ids: frozenset[int] = frozenset()

    def for_embedding_table(self, num_rows: int) -> Tokenizer:
        """Return the tokenizer without the added tokens that have no row in an embedding table.

        Published models have such tokens: the images of Gemma 3 in its text-only models, a padding
        token that was added to Llama 2. The dropped tokens are logged, and a text that contains one
        is encoded as ordinary text.

        Args:
            num_rows: the number of rows of the embedding table.

        Raises:
            ValueError: if a token that was not added has no row, or the token that begins each
                text.
        """
        encoding = self.encoding.without_added_tokens(num_rows)
        beyond = sorted(self.encoding.token_ids - encoding.token_ids)
        if encoding.n_vocab > num_rows or (self.add_bos and self.bos_id in beyond):
            raise ValueError(
                f"the tokenizer has ids up to {self.encoding.max_token_value}, but the model's "
                f"embedding table has {num_rows} rows: use the tokenizer of this model"
            )
        if not beyond:
            return self
        names = [
            repr(self.encoding.decode_single_token_bytes(id).decode(errors="replace"))
            for id in beyond
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warn_once(
            log,
            f"{self.encoding.name}: ignoring the added tokens {', '.join(names[:3])}{more}: their "
            f"ids begin at {beyond[0]}, but the model's embedding table has {num_rows} rows",
        )
        return dataclasses.replace(
            self,
            encoding=encoding,
            bos_id=None if self.bos_id in beyond else self.bos_id,
            eos_id=None if self.eos_id in beyond else self.eos_id,
            stop_ids=self.stop_ids.difference(beyond),
        )


def build_chat_templates(
    sources: Mapping[str, str],
    bos: str | None,
    eos: str | None,
    encoding: Encoding,
    stop_ids: Collection[int],
) -> tuple[ChatTemplate | None, dict[str, ChatTemplate]]:
    """Create the chat templates of a model from their Jinja sources.

    Args:
        sources: name to Jinja source.
        bos: the token at the beginning of a text, or None.
        eos: the token at the end of a text or message, or None.
        encoding: the vocabulary.
        stop_ids: the ids of the tokens that end a generation.

    Returns:
        The template "default" or None, and the other templates by name.
    """
    stop_tokens = [
        encoding.decode_single_token_bytes(id).decode(errors="replace") for id in stop_ids
    ]
    create = functools.partial(
        ChatTemplate, bos_token=bos or "", eos_token=eos or "", stop_tokens=stop_tokens
    )
    named = {name: create(source) for name, source in sources.items() if source}
    if (default := named.pop("default", None)) is not None:
        default.tool_use_template = named.get("tool_use")
    return default, named
