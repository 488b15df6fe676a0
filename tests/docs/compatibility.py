"""The tables of docs/guides/compatibility.md: `python -m tests.docs.compatibility` writes them.

They come from the bodies of requests and from `serve.api.unused_fields`, so they say what the
server does.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from serve.api.image_requests import ImageGenerationBody
from serve.api.requests import ChatBody, CompletionBody
from serve.api.routes.audio import SpeechForm
from serve.api.routes.decisions import DecisionsBody, SystemOneBody
from serve.api.routes.embeddings import EmbeddingsBody
from serve.api.unused_fields import is_unused, promises_of
from tests.docs.blocks import ROOT

PAGE = ROOT / "docs" / "guides" / "compatibility.md"
START = "<!-- The tables are written by `python -m tests.docs.compatibility`. -->\n"
END = "<!-- end of the tables -->\n"
BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingsBody,
    "/v1/decisions": DecisionsBody,
    "/v1/systemone": SystemOneBody,
    "/v1/images/generations": ImageGenerationBody,
    "/v1/audio/transcriptions": SpeechForm,
}


def tables() -> str:
    """Return a table of all request fields of each route, in Markdown."""
    return "\n".join(
        f"## {route}\n\n| field | values | effect |\n|---|---|---|\n" + "".join(_rows(model))
        for route, model in BODIES.items()
    )


def _rows(model: type[BaseModel]) -> Iterator[str]:
    promises = promises_of(model)
    for name, schema in model.model_json_schema(by_alias=False)["properties"].items():
        if name not in promises:
            if is_unused(model, name):
                effect = "none; named in the header"
            else:
                description = schema.get("description")
                effect = f"works: {description}" if description else "works"
            yield f"| `{name}` | {_values(schema)} | {effect} |\n"
    for name, (reason, harmless) in promises.items():
        allowed = "".join(f", `{value}`" for value in harmless)
        yield f"| `{name}` | null, false, empty{allowed} | other values return 400. {reason} |\n"


def _values(schema: dict[str, Any]) -> str:
    """Return the values that a JSON schema allows, in words."""
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        values = [_values(part) for part in parts if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(values)) or "any"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    if "$ref" in schema:
        return "object"
    kind = {"object": "object", "array": "array", None: "any"}.get(
        schema.get("type"), str(schema.get("type"))
    )
    if schema.get("format") == "binary":
        kind = "file"
    if (items := schema.get("items")) is not None:
        kind = f"array of {_values(items)}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None and high < 2**31 - 1:
        return f"{kind}, {low:g} to {high:g}"
    if low is not None and low > -(2**31):
        return f"{kind}, {low:g} or more"
    if (longest := schema.get("maxLength")) is not None:
        return f"{kind} of at most {longest} characters"
    return kind


def page_with_tables(page: str) -> str:
    """Return the text of the page with current tables."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text("utf-8")), "utf-8")
