"""Token ids that a client sends, as the model's own.

Under a model's own name ids are its own. Under an alias that imitates a model of OpenAI's ("gpt-4")
they were made with that model's encoding, as LangChain's embeddings are: here they would be noise.
So they are decoded with it and encoded again. An alias of another kind imitates nobody, and its ids
are the model's.
"""

from collections.abc import Mapping, Sequence

import bpe
from bpe import Encoding
from serve.api.errors import APIError
from serve.models.decoder import DecoderModel


def native_ids(ids: Sequence[int], name: str, model: DecoderModel, path: str) -> list[int]:
    """The model's ids for ids that were sent to `name`.

    Args:
        path: the field they came in, for the error.

    Raises:
        APIError: 400 naming the first that is no id there.
    """
    foreign = _encoding_of(name, model)
    if foreign is None:
        _check(ids, model.tokenizer.encoding, name, path)
        return list(ids)
    text = decode_foreign_ids(ids, name, path)
    return model.tokenizer.encoding.encode(text, allowed_special="all")


def decode_foreign_ids(ids: Sequence[int], name: str, path: str) -> str:
    """The text of ids that were made with the encoding of OpenAI's model called `name`.

    Raises:
        APIError: 400 where that encoding is not known, or naming the first id that it has not.
    """
    try:
        encoding = bpe.encoding_for_model(name)
    except KeyError:
        raise APIError(
            400,
            f"Invalid '{path}': token ids sent to `{name}` belong to that model's encoding, which "
            "is not known here. Send text, or the model's own ids under its own name.",
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
                f"Its ids go from 0 to {encoding.n_vocab - 1}.",
                param=f"{path}[{index}]",
                code="invalid_value",
            ) from None


def native_bias(bias: Mapping[str, float], name: str, model: DecoderModel) -> dict[int, float]:
    """A `logit_bias` that was sent to `name`, by the model's ids.

    Raises:
        APIError: 400 for a key that is no token of the model's.
    """
    foreign = _encoding_of(name, model)
    encoding = foreign or model.tokenizer.encoding
    native: dict[int, float] = {}
    for key, value in bias.items():
        is_number = key.isascii() and key.isdigit() and len(key) < 10
        try:
            token = encoding.decode_single_token_bytes(int(key) if is_number else -1)
        except (KeyError, OverflowError):
            raise _bad_bias(
                f"{key[:80]}. Keys are token ids of `{name}`, from 0 to {encoding.n_vocab - 1}."
            ) from None
        if foreign is None:
            native[int(key)] = value
            continue
        try:
            native[model.tokenizer.encoding.encode_single_token(token)] = value
        except KeyError:
            text = token.decode(errors="backslashreplace")
            raise _bad_bias(
                f"{key}. It is {text!r} in the encoding of `{name}`, which is no single token of "
                f"`{model.id}`. Send ids of `{model.id}` under its own name."
            ) from None
    return native


def _encoding_of(name: str, model: DecoderModel) -> Encoding | None:
    """The encoding that ids sent to `name` belong to, if that is not the model's own."""
    if name == model.id:
        return None
    try:
        return bpe.encoding_for_model(name)
    except KeyError:
        return None


def _bad_bias(what: str) -> APIError:
    return APIError(
        400, f"Invalid key in 'logit_bias': {what}", param="logit_bias", code="invalid_value"
    )
