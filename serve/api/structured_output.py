"""The output format that a request asks for, as a grammar.

`response_format` is OpenAI's (https://platform.openai.com/docs/guides/structured-outputs);
`structured_outputs` and `guided_*` are vLLM's; `grammar` and `json_schema` are llama.cpp's. Each of
them limits the generated tokens, so the text of a choice that ends with "stop" has the format. A
choice that ends with "length" is incomplete.

An object schema with `properties` but without `additionalProperties` allows no further properties,
as in xgrammar's strict mode: small models otherwise invent properties until `max_tokens`.
"""

import json
from collections.abc import Iterator
from typing import Any

from serve.api.errors import APIError, missing_parameter, unsupported
from serve.api.requests import GenerationBody
from serve.models.decoder import DecoderModel
from serve.models.grammar import CompiledGrammar, GrammarSource
from serve.models.harmony import final_grammar
from transformer.engine import GrammarError

ANY_OBJECT = GrammarSource.from_schema({"type": "object"})
# Keywords of older drafts that restrict documents. llguidance takes them for annotations.
_UNSUPPORTED_KEYWORDS = ("dependencies", "additionalItems", "$recursiveRef", "disallow", "extends")


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
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise grammar_error(param, f"the text is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise grammar_error(param, "expected a JSON schema, which is an object")
    subschemas = list(_subschemas(schema))
    for subschema in subschemas:
        for keyword in _UNSUPPORTED_KEYWORDS:
            if keyword in subschema:
                raise grammar_error(param, f"the keyword '{keyword}' is not supported")
    # The branches of an allOf add properties to each other, so they stay open.
    if not any("allOf" in subschema for subschema in subschemas):
        schema = _close_objects(schema)
    return schema


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
            param = "response_format.json_schema"
            if (wrapper := response_format.json_schema) is None:
                raise missing_parameter(param)
            schema = wrapper.json_schema
            yield param, schema_source(f"{param}.schema", schema) if schema else ANY_OBJECT
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
        "additionalProperties", "anyOf", "oneOf", "allOf",
    ):  # fmt: skip
        if isinstance(value := schema.get(keyword), dict | list):
            yield keyword, value


_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # from a name to a schema


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


def _close_objects(schema: Any) -> Any:
    """Return a schema in which objects with `properties` allow no other properties by default."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for keyword, value in _children(schema):
        if keyword in _MAPS and isinstance(value, dict):
            closed[keyword] = {name: _close_objects(child) for name, child in value.items()}
        elif isinstance(value, list):
            closed[keyword] = [_close_objects(child) for child in value]
        else:
            closed[keyword] = _close_objects(value)
    if "properties" in schema and not schema.keys() & {"additionalProperties", "patternProperties"}:
        closed["additionalProperties"] = False
    return closed
