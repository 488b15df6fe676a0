"""Token ids that a client sends: are they the model's own?

Under a model's own name ids are its own. Under an alias ("gpt-4") they were made with the encoding
of the model that the alias imitates: here they would be noise.
"""

from collections.abc import Sequence

from serve.engine import ServedModel
from serve.errors import APIError


def check_ids(ids: Sequence[int], model: ServedModel, path: str) -> None:
    """Makes sure that all ids are the model's.

    Args:
        path: the field they came in, for the error.

    Raises:
        APIError: 400 naming the first that is not.
    """
    encoding = model.tokenizer.encoding
    for index, id in enumerate(ids):
        try:
            encoding.decode_single_token_bytes(id)
        except KeyError:
            raise APIError(
                400,
                f"Invalid '{path}[{index}]': {str(id)[:20]} is not a token id of `{model.id}`. "
                f"Its ids go from 0 to {encoding.n_vocab - 1}.",
                param=f"{path}[{index}]",
                code="invalid_value",
            ) from None


def refuse_foreign_ids(name: str, model: ServedModel, param: str) -> None:
    """Refuses ids that were sent to the model called `name` if that is not the model's own name."""
    if name != model.id:
        raise APIError(
            400,
            f"Invalid '{param}': token ids sent to `{name}` belong to that model's encoding, "
            f"which is not available here. Send text, or ids of `{model.id}` under its own name.",
            param=param,
            code="invalid_value",
        )
