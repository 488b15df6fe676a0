"""Translate token ids in requests to ids of the served model.

The encoding of the ids depends on the model name in the request:

- The id of the served model: the ids are those of its own vocabulary.
- An alias named after an OpenAI model ("gpt-4"): the ids are in the encoding of that OpenAI model,
  as LangChain's embeddings send them. They are decoded to text, which is encoded again.
- A name that matches a pattern of names ("gpt-9-turbo"): the same, and if the name is unknown, the
  encoding is o200k_base, that of OpenAI's latest models.
- Any other alias: the ids are those of the served model's vocabulary.

The functions take this encoding as `imitated`, which is None for ids of the served model.
"""

from collections.abc import Mapping, Sequence

import bpe
from bpe import Encoding
from serve.api.errors import APIError
from serve.models.decoder import DecoderModel


def imitated_encoding(name: str, model_id: str, *, is_pattern: bool) -> Encoding | None:
    """Return the encoding of the token ids in a request; None for that of the served model.

    Args:
        name: The model name in the request.
        model_id: The id of the served model that the name refers to.
        is_pattern: Whether the name matched a pattern of names.
    """
    if name == model_id:
        return None
    try:
        return bpe.encoding_for_model(name)
    except KeyError:
        return bpe.get_encoding("o200k_base") if is_pattern else None


def native_ids(
    ids: Sequence[int], name: str, model: DecoderModel, path: str, imitated: Encoding | None = None
) -> list[int]:
    """Translate the token ids of a request for the model `name` to ids of the served model.

    Args:
        ids: The ids in the request.
        name: The model name in the request.
        model: The served model that the name refers to.
        path: The request field that holds the ids, for the error.
        imitated: The encoding of the ids, if it is not that of the served model.

    Raises:
        APIError: 400 that names the first invalid id.
    """
    encoding = model.tokenizer.encoding
    _check(ids, imitated or encoding, name, path)
    if imitated is None:
        return list(ids)
    return encoding.encode(imitated.decode(ids), allowed_special="all")


def _check(ids: Sequence[int], encoding: Encoding, name: str, path: str) -> None:
    for index, id in enumerate(ids):
        try:
            encoding.decode_single_token_bytes(id)
        except (KeyError, OverflowError):
            raise APIError(
                400,
                f"Invalid '{path}[{index}]': {str(id)[:20]} is not a token id of `{name}`. "
                f"Use ids from 0 to {encoding.n_vocab - 1}.",
                param=f"{path}[{index}]",
                code="invalid_value",
            ) from None


def native_bias(
    bias: Mapping[str, float], name: str, model: DecoderModel, imitated: Encoding | None = None
) -> dict[int, float]:
    """Translate the keys of a `logit_bias` for the model `name` to token ids of the served model.

    Raises:
        APIError: 400 for a key that is not a token id, or not a single token of the served model.
    """
    native: dict[int, float] = {}
    for key, value in bias.items():
        is_number = key.isascii() and key.isdigit() and len(key) < 10
        id = int(key) if is_number else key[:80]
        native[_native_token(id, name, model, imitated, "key in 'logit_bias'", "logit_bias")] = (
            value
        )
    return native


def native_token_ids(
    ids: Sequence[int],
    name: str,
    model: DecoderModel,
    param: str,
    imitated: Encoding | None = None,
) -> list[int]:
    """Translate single token ids of the model `name`, which form no text, to the served model's.

    Raises:
        APIError: 400 that names the first id that is none, or no single token of the served model.
    """
    return [
        _native_token(id, name, model, imitated, f"'{param}[{index}]'", f"{param}[{index}]")
        for index, id in enumerate(ids)
    ]


def _native_token(
    id: int | str,
    name: str,
    model: DecoderModel,
    imitated: Encoding | None,
    place: str,
    param: str,
) -> int:
    encoding = imitated or model.tokenizer.encoding

    def bad(detail: str) -> APIError:
        message = f"Invalid {place}: {str(id)[:80]}{detail}"
        return APIError(400, message, param=param, code="invalid_value")

    try:
        token = encoding.decode_single_token_bytes(id if isinstance(id, int) else -1)
    except (KeyError, OverflowError):
        raise bad(
            f" is not a token id of `{name}`. Use ids from 0 to {encoding.n_vocab - 1}."
        ) from None
    if imitated is None:
        return int(id)
    try:
        return model.tokenizer.encoding.encode_single_token(token)
    except KeyError:
        text = token.decode(errors="backslashreplace")
        raise bad(
            f". In the encoding of `{name}` it is {text!r}, which is not a single token of "
            f"`{model.id}`. Use the model name `{model.id}` and its token ids."
        ) from None
