"""Cursor pagination of lists: after an id, up to a limit, in either order.

The page after an object is available even if that object has been deleted.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError
from starlette.requests import Request

from serve.api.errors import APIError, from_validation
from serve.api.requests import Body
from serve.jobs.store import Store


class PageQuery(Body):
    """Query parameters of a list: the object before the page, and the length of the page."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class OrderedPageQuery(PageQuery):
    """Query parameters of a list with a selectable order."""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"


class ItemsQuery(PageQuery):
    """Query parameters of a list of items."""

    order: Literal["asc", "desc"] = "desc"


AnyQuery = TypeVar("AnyQuery", bound=Body)


def read_query(request: Request, model: type[AnyQuery]) -> AnyQuery:
    """Parse the query string into ``model``. The last value of a repeated parameter counts.

    Raises:
        APIError: 400 that names an invalid parameter.
    """
    try:
        return model.model_validate(dict(request.query_params), strict=False)
    except ValidationError as error:
        raise from_validation(error) from None


async def paginate(
    store: Store,
    kind: str,
    query: PageQuery,
    to_api: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    parent: str = "",
    order: Literal["asc", "desc"] = "desc",
    predicate: Callable[[dict[str, Any]], bool] = lambda body: True,
) -> dict[str, Any]:
    """Return a page of stored objects in OpenAI's shape.

    Args:
        store: The store of the objects.
        kind: Kind of the objects in the store, such as "file".
        query: Cursor and limit.
        to_api: Converts a stored object to its API representation.
        parent: Id of the parent object, as in `Store.page`.
        order: Newest first ("desc") or oldest first ("asc").
        predicate: Selects objects, as in `Store.page`.

    Raises:
        APIError: 404 if ``after`` is not an id of this list.
    """
    try:
        objects, has_more = await asyncio.to_thread(
            store.page,
            kind,
            parent=parent,
            after=query.after,
            limit=query.limit,
            newest_first=order == "desc",
            predicate=predicate,
        )
    except KeyError:
        raise _not_in_list(query.after or "") from None
    return _page([to_api(body) for body in objects], has_more)


def page_of(
    items: Sequence[dict[str, Any]], query: PageQuery, *, newest_first: bool
) -> dict[str, Any]:
    """Return a page of items that are in memory, oldest first, in OpenAI's shape.

    Raises:
        APIError: 404 if ``after`` is not an id of the items.
    """
    items = list(reversed(items)) if newest_first else list(items)
    ids = [item["id"] for item in items]
    if query.after is not None and query.after not in ids:
        raise _not_in_list(query.after)
    start = 0 if query.after is None else ids.index(query.after) + 1
    end = start + query.limit
    return _page(items[start:end], end < len(items))


def _not_in_list(id: str) -> APIError:
    return APIError(
        404,
        f"Invalid 'after': this list has no object '{id[:80]}'. Use the 'last_id' of the previous "
        "page.",
        param="after",
        code="not_found",
    )


def _page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
