"""The output format that a request asks for, as a grammar.

`response_format` is OpenAI's (https://platform.openai.com/docs/guides/structured-outputs);
`structured_outputs` and `guided_*` are vLLM's; `grammar` and `json_schema` are llama.cpp's. Each of
them limits the generated tokens, so the text of a choice that ends with "stop" has the format. A
choice that ends with "length" is incomplete.

An object schema with `properties` but without `additionalProperties` allows no further properties,
as in xgrammar's strict mode: small models otherwise invent properties until `max_tokens`.
"""

from collections.abc import Iterator, Sequence, Set
from functools import partial
from typing import Any
from urllib.parse import unquote

from pydantic_core import from_json, to_json

from serve.api.errors import APIError, missing_parameter, unsupported
from serve.api.requests import GenerationBody
from serve.models.decoder import DecoderModel
from serve.models.grammar import MAX_GRAMMAR_BYTES, CompiledGrammar, GrammarSource
from serve.models.harmony import final_grammar
from transformer.engine import GrammarError

ANY_OBJECT = GrammarSource.from_schema({"type": "object"})
# Keywords of drafts 3 and 4 that restrict documents. llguidance takes them for annotations.
_OLD_KEYWORDS = ("disallow", "divisibleBy", "extends")
# The bounds of OpenAPI's formats for integers. 64 bits are more than llguidance can bound.
_INTEGER_FORMATS: dict[str, dict[str, int]] = {
    **{f"int{n}": {"minimum": -(2 ** (n - 1)), "maximum": 2 ** (n - 1) - 1} for n in (8, 16, 32)},
    **{f"uint{n}": {"minimum": 0, "maximum": 2**n - 1} for n in (8, 16, 32)},
    "uint64": {"minimum": 0},
}


def compile_output_grammar(
    body: GenerationBody, model: DecoderModel, *, is_message: bool = False
) -> tuple[str, CompiledGrammar] | None:
    """Return the field of a request that sets the output format, and its compiled grammar.

    Args:
        body: the request.
        model: the model.
        is_message: whether the format is that of the final message of harmony, not of all text.

    Returns:
        The path of the field, for messages, and the grammar; None for free text.

    Raises:
        APIError: 400 if several fields set a format, or for a grammar that has an error, is not
            supported, or is too large.
    """
    if (output := output_source(body)) is None:
        return None
    param, source = output
    compiled = compile_grammar(param, source, model)
    if is_message:
        compiled = compile_grammar(param, final_grammar(source, model.tokenizer.encoding), model)
    return param, compiled


def output_source(body: GenerationBody) -> tuple[str, GrammarSource] | None:
    """Return the field of a request that sets the output format, and its grammar.

    Raises:
        APIError: 400 if several fields set a format, or for a schema that is not supported.
    """
    sources = list(_sources(body))
    if len(sources) > 1:
        first, second = sources[0][0], sources[1][0]
        raise APIError(
            400,
            f"Only one of '{first}' and '{second}' can be set, because both limit the output.",
            param=second,
            code="invalid_value",
        )
    return sources[0] if sources else None


def compile_grammar(param: str, source: GrammarSource, model: DecoderModel) -> CompiledGrammar:
    """Return a compiled grammar.

    Raises:
        APIError: 400 for a grammar that has an error, is not supported, or is too large.
    """
    try:
        return model.grammar_compiler.compile(source)
    except GrammarError as error:
        raise grammar_error(param, str(error)) from None


def grammar_error(param: str, reason: str) -> APIError:
    """Return the 400 error for a grammar that cannot be used."""
    return APIError(
        400, f"Invalid '{param}': {reason.rstrip('.')}.", param=param, code="invalid_grammar"
    )


def schema_source(param: str, schema: Any) -> GrammarSource:
    """Return the source of a JSON schema; arguments and errors as `checked_schema`."""
    return GrammarSource.from_schema(checked_schema(param, schema))


def checked_schema(param: str, schema: Any) -> dict[str, Any]:
    """Return a JSON schema in the form in which it limits the output.

    Args:
        param: the path of the field, for messages.
        schema: the schema, an object or its JSON text, which clients of vLLM send.

    Raises:
        APIError: 400 for a schema that is no object, or uses a keyword that is not supported.
    """
    if isinstance(schema, str):
        try:
            schema = from_json(schema, allow_inf_nan=False)
        except ValueError as error:
            raise grammar_error(param, f"the text is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise grammar_error(param, "expected a JSON schema, which is an object")
    if (size := len(to_json(schema))) > MAX_GRAMMAR_BYTES:  # before its parts are compared
        raise grammar_error(param, f"it has {size} bytes, more than {MAX_GRAMMAR_BYTES}")
    subschemas = list(_subschemas(schema))
    for subschema in subschemas:
        if (keyword := _unsupported_keyword(subschema)) is not None:
            raise grammar_error(param, f"the keyword '{keyword}' is not supported in this form")
    if (ref := _endless_ref(subschemas, schema)) is not None:
        raise grammar_error(param, f"the '$ref' {ref!r:.80} refers to itself")
    schema = _normalize(schema, open_ids=_intersecting(subschemas, schema))
    return {keyword: value for keyword, value in schema.items() if keyword != "x-guidance"}


def _unsupported_keyword(schema: dict[str, Any]) -> str | None:
    """Return a keyword that restricts documents but that llguidance would ignore, or None."""
    for keyword in _OLD_KEYWORDS:
        if keyword in schema:
            return keyword
    if "additionalItems" in schema and not isinstance(schema.get("items"), list):
        return "additionalItems"  # it restricts the items after those of a list
    if schema.get("nullable", False) is not False and not (
        schema["nullable"] is True and isinstance(schema.get("type"), str | list)
    ):
        return "nullable"  # OpenAPI defines it for schemas with a type
    if schema.get("format") == "unknown" or (
        _integer_bounds(schema) and "number" in _types(schema)
    ):
        return "format"
    properties = schema.get("properties")
    for child in properties.values() if isinstance(properties, dict) else ():
        if isinstance(child, dict) and isinstance(child.get("required"), bool):
            return "required"  # of draft 3
    return None


def _endless_ref(subschemas: Sequence[dict[str, Any]], root: dict[str, Any]) -> str | None:
    """Return a `$ref` that leads through other `$ref`s only back to itself; None if there is none.

    Args:
        subschemas: all schemas of the document.
        root: the document.
    """
    finite: set[str] = set()  # so that each is followed once
    for schema in subschemas:
        path: set[str] = set()
        value: Any = schema
        while isinstance(value, dict) and isinstance(ref := value.get("$ref"), str):
            if ref in path:
                return ref
            if ref in finite:
                break
            path.add(ref)
            value = _resolve(ref, root)
        finite |= path
    return None


def _resolve(ref: str, root: dict[str, Any]) -> Any:
    """Return the value in a document that a `$ref` such as "#/$defs/a" points to, or None."""
    value: Any = root if ref == "#" or ref.startswith("#/") else None
    for part in ref.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _intersecting(subschemas: Sequence[dict[str, Any]], root: dict[str, Any]) -> set[int]:
    """Return the `id` of each schema that must hold together with another one for one object.

    Such are the branches of an `allOf` with several, and `properties` beside a `$ref`, `anyOf`,
    `oneOf` or `allOf`. Closed to the properties of each other, they would allow nothing.

    Args:
        subschemas: all schemas of the document.
        root: the document.
    """
    open_ids: set[int] = set()
    for schema in subschemas:
        num_parts = sum(keyword in schema for keyword in ("properties", "$ref", "anyOf", "oneOf"))
        if num_parts + len(_list(schema.get("allOf"))) <= 1:
            continue
        waiting: list[Any] = [schema]
        while waiting:
            part = waiting.pop()
            if not isinstance(part, dict) or id(part) in open_ids:
                continue
            open_ids.add(id(part))
            if isinstance(ref := part.get("$ref"), str):
                waiting.append(_resolve(ref, root))
            for keyword in ("allOf", "anyOf", "oneOf"):
                waiting += _list(part.get(keyword))
    return open_ids


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _types(schema: dict[str, Any]) -> list[Any]:
    types = schema.get("type", [])
    return types if isinstance(types, list) else [types]


def _sources(body: GenerationBody) -> Iterator[tuple[str, GrammarSource]]:
    """Yield the path and the grammar of each field that sets the output format."""
    response_format = body.response_format
    match response_format.type:
        case "json_object":
            if schema := response_format.object_schema:
                yield "response_format.schema", schema_source("response_format.schema", schema)
            else:
                yield "response_format", ANY_OBJECT
        case "json_schema":
            if (wrapper := response_format.json_schema) is None:
                raise missing_parameter("response_format.json_schema")
            param, schema = "response_format.json_schema.schema", wrapper.json_schema
            yield param, schema_source(param, schema) if schema else ANY_OBJECT
    if response_format.object_schema and response_format.type != "json_object":
        raise APIError(
            400,
            "'response_format.schema' needs the type 'json_object'.",
            param="response_format.schema",
            code="invalid_value",
        )
    for prefix, fields in (
        ("structured_outputs.", body.structured_outputs),
        ("guided_", body.guided),
    ):
        if fields.json_schema is not None:
            yield f"{prefix}json", schema_source(f"{prefix}json", fields.json_schema)
        if fields.regex:
            yield f"{prefix}regex", GrammarSource("regex", fields.regex)
        if fields.choice is not None:
            yield f"{prefix}choice", GrammarSource.from_choices(fields.choice)
        if fields.grammar:
            yield f"{prefix}grammar", GrammarSource("grammar", fields.grammar)
        if fields.json_object:
            yield f"{prefix}json_object", ANY_OBJECT
        if fields.structural_tag is not None:
            raise unsupported(
                f"{prefix}structural_tag", fields.structural_tag, "Use 'json' or 'grammar'."
            )
    if body.grammar:
        yield "grammar", GrammarSource("grammar", body.grammar)
    if body.json_schema is not None:
        yield "json_schema", schema_source("json_schema", body.json_schema)


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name of each keyword whose value contains schemas, and the value."""
    for keyword in (
        "properties", "patternProperties", "$defs", "definitions", "items", "prefixItems",
        "additionalProperties", "additionalItems", "anyOf", "oneOf", "allOf",
        "components", "schemas",  # OpenAPI: `components` contains `schemas`
    ):  # fmt: skip
        if isinstance(value := schema.get(keyword), dict | list):
            yield keyword, value


_MAPS = (
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
    "schemas",
)  # from a name to a schema


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and all schemas inside it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword, value in _children(schema):
        if keyword in _MAPS and isinstance(value, dict):
            value = list(value.values())
        for child in value if isinstance(value, list) else [value]:
            yield from _subschemas(child)


def _normalize(schema: Any, *, open_ids: Set[int]) -> Any:
    """Return a schema that means the same with the keywords of llguidance.

    - `nullable`, of OpenAPI 3.0, adds the type "null".
    - Formats for integers of OpenAPI are bounds; other formats for numbers restrict nothing.
    - The format "password" and `uniqueItems: false` restrict nothing.

    Args:
        schema: the schema, which `_unsupported_keyword` has checked.
        open_ids: the `id` of each schema whose objects may have other properties than its
            `properties`; those of all others may not by default.
    """
    if not isinstance(schema, dict):
        return schema
    normalize = partial(_normalize, open_ids=open_ids)
    result = dict(schema)
    for keyword, value in _children(schema):
        if keyword in _MAPS and isinstance(value, dict):
            result[keyword] = {name: normalize(child) for name, child in value.items()}
        elif isinstance(value, list):
            result[keyword] = [normalize(child) for child in value]
        else:
            result[keyword] = normalize(value)
    limits_others = schema.keys() & {"additionalProperties", "patternProperties"}
    if id(schema) not in open_ids and "properties" in schema and not limits_others:
        result["additionalProperties"] = False
    if result.pop("nullable", False):
        result["type"] = list(dict.fromkeys([*_types(schema), "null"]))
    if schema.get("uniqueItems") is False:
        del result["uniqueItems"]
    if schema.get("format") == "password":
        del result["format"]
    if "integer" in _types(schema):
        for keyword, bound in _integer_bounds(schema).items():
            nearer = max if keyword == "minimum" else min
            if isinstance(own := schema.get(keyword, bound), int | float):
                result[keyword] = nearer(own, bound)
    return result


def _integer_bounds(schema: dict[str, Any]) -> dict[str, int]:
    """Return the bounds of the `format` of a schema, if it is one for integers."""
    format = schema.get("format")
    return _INTEGER_FORMATS.get(format, {}) if isinstance(format, str) else {}
