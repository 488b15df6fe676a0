"""Translate token ids in requests to ids of the served model.

The encoding of the ids depends on the model name in the request:

- The id of the served model: the ids are those of its own vocabulary.
- An alias named after an OpenAI model ("gpt-4"): the ids are in the encoding of that OpenAI model,
  as LangChain's embeddings send them. They are decoded to text, which is encoded again.
- Any other alias: the ids are those of the served model's vocabulary.
"""

from collections.abc import Mapping, Sequence

import bpe
from bpe import Encoding
from serve.api.errors import APIError
from serve.models.decoder import DecoderModel


def native_ids(ids: Sequence[int], name: str, model: DecoderModel, path: str) -> list[int]:
    """Translate the token ids of a request for the model `name` to ids of the served model.

    Args:
        ids: The ids in the request.
        name: The model name in the request.
        model: The served model that the name refers to.
        path: The request field that holds the ids, for the error.

    Raises:
        APIError: 400 that names the first invalid id.
    """
    if _imitated_encoding(name, model) is None:
        _check(ids, model.tokenizer.encoding, name, path)
        return list(ids)
    text = decode_foreign_ids(ids, name, path)
    return model.tokenizer.encoding.encode(text, allowed_special="all")


def decode_foreign_ids(ids: Sequence[int], name: str, path: str) -> str:
    """Return the text of ids in the encoding of the OpenAI model `name`.

    Raises:
        APIError: 400 if the encoding is unknown, or an id is invalid; the message names the first.
    """
    try:
        encoding = bpe.encoding_for_model(name)
    except KeyError:
        raise APIError(
            400,
            f"Invalid '{path}': the encoding of `{name}` is unknown, so its token ids cannot be "
            "decoded. Send text, or use the served model's name and its token ids.",
            param=path,
            code="invalid_value",
        ) from None
    _check(ids, encoding, name, path)
    return encoding.decode(ids)


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


def native_bias(bias: Mapping[str, float], name: str, model: DecoderModel) -> dict[int, float]:
    """Translate the keys of a `logit_bias` for the model `name` to token ids of the served model.

    Raises:
        APIError: 400 for a key that is not a token id, or not a single token of the served model.
    """
    native: dict[int, float] = {}
    for key, value in bias.items():
        is_number = key.isascii() and key.isdigit() and len(key) < 10
        id = int(key) if is_number else key[:80]
        native[_native_token(id, name, model, "key in 'logit_bias'", "logit_bias")] = value
    return native


def native_token_ids(ids: Sequence[int], name: str, model: DecoderModel, param: str) -> list[int]:
    """Translate single token ids of the model `name`, which form no text, to the served model's.

    Raises:
        APIError: 400 that names the first id that is none, or no single token of the served model.
    """
    return [
        _native_token(id, name, model, f"'{param}[{index}]'", f"{param}[{index}]")
        for index, id in enumerate(ids)
    ]


def _native_token(id: int | str, name: str, model: DecoderModel, place: str, param: str) -> int:
    imitated = _imitated_encoding(name, model)
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


def _imitated_encoding(name: str, model: DecoderModel) -> Encoding | None:
    """Return the encoding of the OpenAI model that a request names; None for other names.

    The token ids of the request belong to that encoding, or else to the served model.
    """
    if name == model.id:
        return None
    try:
        return bpe.encoding_for_model(name)
    except KeyError:
        return None
