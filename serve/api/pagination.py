"""Lists that clients page through: after which id, how many, in which order.

The page after an object can be asked for even when that object was deleted since.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError
from starlette.requests import Request

from serve.api.errors import APIError, from_validation
from serve.api.requests import Body
from serve.jobs.store import Store


class PageQuery(Body):
    """What the query string of a list may say."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class OrderedPageQuery(PageQuery):
    """The same, for lists that can be had in either order."""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"


AnyQuery = TypeVar("AnyQuery", bound=Body)


def read_query(request: Request, model: type[AnyQuery]) -> AnyQuery:
    """The query string as ``model``; the last of those that are there twice.

    Raises:
        APIError: 400 naming the parameter that is wrong.
    """
    try:
        return model.model_validate(dict(request.query_params), strict=False)
    except ValidationError as error:
        raise from_validation(error) from None


async def paginate(
    store: Store,
    kind: str,
    query: PageQuery,
    show: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    parent: str = "",
    order: Literal["asc", "desc"] = "desc",
    keep: Callable[[dict[str, Any]], bool] = lambda body: True,
) -> dict[str, Any]:
    """A page in OpenAI's shape.

    Args:
        kind, parent, keep: which objects; see `Store.page`.
        show: what is shown of each.

    Raises:
        APIError: 404 where ``after`` is no id of this list.
    """
    try:
        found, has_more = await asyncio.to_thread(
            store.page,
            kind,
            parent=parent,
            after=query.after,
            limit=query.limit,
            newest_first=order == "desc",
            predicate=keep,
        )
    except KeyError:
        raise APIError(
            404,
            f"Invalid 'after': this list has no object '{(query.after or '')[:80]}'.",
            param="after",
            code="not_found",
        ) from None
    data = [show(body) for body in found]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
