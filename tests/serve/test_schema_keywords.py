"""Every keyword of JSON Schema and OpenAPI: enforced, an annotation, or a 400 that names it.

The judge of documents is the `jsonschema` package.
"""

import json
from typing import Any

import jsonschema
import pytest

from serve.api.errors import APIError
from serve.api.structured_output import schema_source
from serve.models.grammar import GrammarCompiler
from tests.serve import scripted
from transformer.engine import GrammarError

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
AB = {"properties": {"a": INTEGER, "b": INTEGER}}
A_THEN_A_OR_B = [{"a": 1}, {"a": 1, "b": 1}]
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
TREE = {"type": "object", "properties": {"a": {"$ref": "#"}}}

# A schema with the keyword, and documents, of which some are invalid unless it is an annotation.
ENFORCED: dict[str, list[tuple[dict[str, Any], list[Any]]]] = {
    "type": [(INTEGER, [1, "a"]), ({"type": ["integer", "null"]}, [1, None, "a"])],
    "enum": [
        ({"enum": [1, {"a": [None]}]}, [1, {"a": [None]}, 2]),
        ({"enum": [1, "a"]} | STRING, [1, "a"]),
    ],
    "const": [({"const": [1]}, [[1], 1])],
    "multipleOf": [
        (INTEGER | {"multipleOf": 3}, [3, 4]),
        ({"type": "number", "multipleOf": 0.5}, [1.5, 1.3]),
    ],
    "minimum": [(INTEGER | {"minimum": 3}, [3, 2]), ({"minimum": 3}, [3, 2, "a"])],
    "maximum": [({"type": "number", "maximum": 3}, [2.5, 3.5])],
    "exclusiveMinimum": [(INTEGER | {"exclusiveMinimum": 3}, [3, 4])],
    "exclusiveMaximum": [(INTEGER | {"exclusiveMaximum": 3}, [2, 3])],
    "minLength": [(STRING | {"minLength": 2}, ["a", "ab"])],
    "maxLength": [(STRING | {"maxLength": 2}, ["äö", "abc"])],
    "pattern": [
        (STRING | {"pattern": "a$"}, ["ba", "ab"]),
        ({"enum": ["a", "b"], "pattern": "a"}, ["a", "b"]),
    ],
    "items": [
        ({"type": "array", "items": INTEGER}, [[1], ["a"]]),
        ({"items": [INTEGER], "$schema": DRAFT_7}, [[1], ["a"]]),
    ],
    "prefixItems": [
        ({"type": "array", "prefixItems": [INTEGER], "items": False}, [[1], ["a"], [1, 2]])
    ],
    "additionalItems": [
        (
            {"type": "array", "items": [INTEGER], "additionalItems": STRING, "$schema": DRAFT_7},
            [[1, "a"], [1, 2]],
        )
    ],
    "minItems": [({"type": "array", "minItems": 1}, [[], [1]])],
    "maxItems": [({"type": "array", "maxItems": 1}, [[1], [1, 2]])],
    "properties": [(AB, [{"a": 1}, {"a": "x"}])],
    "required": [(AB | {"type": "object", "required": ["a"]}, [{"a": 1}, {}])],
    "additionalProperties": [
        ({"type": "object", "additionalProperties": False}, [{}, {"a": 1}]),
        ({"type": "object", "additionalProperties": INTEGER}, [{"a": 1}, {"a": "x"}]),
    ],
    "patternProperties": [
        (
            {"type": "object", "patternProperties": {"^x": INTEGER}, "additionalProperties": False},
            [{"x": 1}, {"x": "a"}, {"y": 1}],
        )
    ],
    "minProperties": [({"type": "object", "minProperties": 1}, [{}, {"a": 1}])],
    "maxProperties": [({"type": "object", "maxProperties": 1}, [{"a": 1}, {"a": 1, "b": 1}])],
    "allOf": [({"allOf": [INTEGER, {"minimum": 3}]}, [3, 2, "a"])],
    "anyOf": [({"anyOf": [{"minimum": 3}, {"maximum": 0}]} | INTEGER, [3, 0, 1])],
    "oneOf": [({"oneOf": [INTEGER, STRING]}, [1, "a", None])],
    "$ref": [
        ({"$ref": "#/$defs/x", "minimum": 3, "$defs": {"x": INTEGER}}, [3, 1, "a"]),
        (TREE, [{"a": {}}, {"a": 1}]),
    ],
    "$defs": [({"$ref": "#/$defs/a~1b", "$defs": {"a/b": INTEGER}}, [1, "a"])],
    "definitions": [({"$ref": "#/definitions/x", "definitions": {"x": INTEGER}}, [1, "a"])],
    "components": [
        ({"$ref": "#/components/schemas/x", "components": {"schemas": {"x": INTEGER}}}, [1, "a"])
    ],
    "$anchor": [({"$ref": "#y", "$defs": {"x": INTEGER | {"$anchor": "y"}}}, [1, "a"])],
    "$id": [
        ({"$ref": "d", "$id": "http://a.b/c", "$defs": {"x": INTEGER | {"$id": "d"}}}, [1, "a"])
    ],
    "$schema": [(INTEGER | {"$schema": DRAFT_7}, [1, "a"])],
}

UNSUPPORTED: dict[str, dict[str, Any]] = {
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "unevaluatedProperties": AB | {"unevaluatedProperties": False},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "minContains": {"type": "array", "contains": INTEGER, "minContains": 2},
    "maxContains": {"type": "array", "contains": INTEGER, "maxContains": 2},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "x"}},
    "dependentRequired": AB | {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": AB | {"dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": AB | {"dependencies": {"a": ["b"]}},
    "not": INTEGER | {"not": {"const": 3}},
    "if": INTEGER | {"if": {"minimum": 3}, "then": {"multipleOf": 2}},
    "then": {"then": INTEGER},
    "else": {"else": INTEGER},
    "oneOf": {"oneOf": [INTEGER, {"minimum": 3}]},
    "additionalItems": {"prefixItems": [INTEGER], "additionalItems": False},
    "$dynamicRef": {"$dynamicRef": "#y", "$defs": {"x": {"$dynamicAnchor": "y"}}},
    "$dynamicAnchor": {"$dynamicAnchor": "y"},
    "$recursiveRef": {"properties": {"a": {"$recursiveRef": "#"}}},
    "$recursiveAnchor": {"$recursiveAnchor": True},
    "nullable": {"$ref": "#/$defs/x", "nullable": True, "$defs": {"x": INTEGER}},
    "divisibleBy": INTEGER | {"divisibleBy": 2},
    "disallow": {"disallow": "integer"},
    "extends": {"extends": INTEGER},
    "required": {"properties": {"a": INTEGER | {"required": True}}},
    "minProperties": AB | {"minProperties": 2},
    "$ref": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
}

ANNOTATIONS: dict[str, Any] = {
    **{"title": "x", "description": "x", "default": 1, "examples": ["b"], "$comment": "x"},
    **{"deprecated": True, "readOnly": True, "writeOnly": True, "$vocabulary": {"x": True}},
    **{"contentMediaType": "text/html", "contentEncoding": "base64", "contentSchema": {}},
    **{"discriminator": {"propertyName": "a"}, "xml": {}, "externalDocs": {}, "example": 1},
    **{"x-order": 1, "propertyOrdering": ["a"], "enumNames": ["a"], "nullable": False},
    **{"uniqueItems": False, "format": "password"},
}

FORMATS: dict[str, tuple[list[str], list[str]]] = {
    "date-time": (["2020-01-31T10:00:00Z"], ["2020-01-31", "x"]),
    "date": (["2020-01-31"], ["2020-13-01", "2020-02-30"]),
    "time": (["10:00:00Z"], ["25:00:00Z"]),
    "duration": (["P1DT2H"], ["1D"]),
    "email": (["a@b.co"], ["ab"]),
    "hostname": (["a.b"], ["a b"]),
    "ipv4": (["1.2.3.4"], ["1.2.3.400"]),
    "ipv6": (["::1"], ["1.2"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
    "uri": (["http://a.b/c"], ["x y"]),
}
UNSUPPORTED_FORMATS = ["idn-email", "idn-hostname", "uri-reference", "uri-template", "iri"]
UNSUPPORTED_FORMATS += ["iri-reference", "json-pointer", "relative-json-pointer", "regex", "byte"]
UNSUPPORTED_FORMATS += ["binary", "unknown", "url", "color", "int32"]


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(scripted.tokenizer(None))


@pytest.fixture
def allows(compiler):
    """Return a function: whether a schema allows a document, as it is sent in a request."""

    def allows(schema, document):
        state = compiler.compile(schema_source("guided_json", schema)).matcher()
        for token in [*json.dumps(document, ensure_ascii=False).encode(), scripted.IM_END]:
            if not state.token_bitmask()[token // 32] >> (token % 32) & 1:
                return False
            state.accept(token)
        return True

    return allows


@pytest.mark.parametrize("keyword", ENFORCED)
def test_supported_keyword_allows_exactly_the_valid_documents(allows, keyword):
    for schema, documents in ENFORCED[keyword]:
        assert keyword in json.dumps(schema)
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        expected = [validator(schema).is_valid(document) for document in documents]
        assert [allows(schema, document) for document in documents] == expected
        assert {*expected} == {True, False}


def test_keyword_that_is_not_supported_is_an_error_that_names_it(compiler):
    """Regression: `nullable`, `divisibleBy` and a boolean `required` were ignored in silence."""
    for keyword, schema in UNSUPPORTED.items():
        for nested in (schema, {"type": "array", "prefixItems": [schema]}):
            if "$ref" in schema and nested is not schema:
                continue  # the reference would lead elsewhere
            with pytest.raises((APIError, GrammarError)) as error:
                compiler.compile(schema_source("guided_json", nested))
            name = "min/maxProperties" if keyword == "minProperties" else keyword
            assert name in str(error.value), (keyword, error.value)


def test_annotation_restricts_nothing(allows):
    for keyword, value in ANNOTATIONS.items():
        schema = {"type": ["string", "array"], keyword: value}
        assert [allows(schema, x) for x in ("b", ["b", "b"], 1)] == [True, True, False], keyword


def test_nullable_of_openapi_adds_the_type_null(allows):
    schema = {"properties": {"a": INTEGER | {"nullable": True, "minimum": 3}}, "required": ["a"]}
    schema = {"type": "object", **schema}
    assert [allows(schema, {"a": value}) for value in (3, None, 2, "x")] == [
        True,
        True,
        False,
        False,
    ]
    assert not allows(INTEGER | {"nullable": True, "enum": [1]}, None)  # as OpenAPI 3.0.3 says
    below = {"components": {"schemas": {"x": STRING | {"nullable": True}}}}
    assert allows({"$ref": "#/components/schemas/x"} | below, None)


def test_formats_are_enforced_or_refused(allows, compiler):
    for name, (valid, invalid) in FORMATS.items():
        assert all(allows(STRING | {"format": name}, text) for text in valid), name
        assert not any(allows(STRING | {"format": name}, text) for text in invalid), name
    for name in UNSUPPORTED_FORMATS:
        schema = STRING | {"format": name}
        with pytest.raises((APIError, GrammarError), match="format"):
            compiler.compile(schema_source("guided_json", schema))


def test_formats_of_integers_are_bounds(allows):
    """Regression: `int32` and its neighbours were ignored in silence."""
    for name, low, high in [("int32", -(2**31), 2**31 - 1), ("uint8", 0, 255)]:
        schema = INTEGER | {"format": name}
        assert [allows(schema, x) for x in (low - 1, low, high, high + 1)] == [
            False,
            True,
            True,
            False,
        ]
    assert not allows(INTEGER | {"format": "uint8", "maximum": 9}, 10)
    assert [allows(INTEGER | {"format": "int64"}, x) for x in (2**62, 1.5)] == [True, False]
    assert allows({"type": "number", "format": "double"}, 1.5)


def test_options_of_llguidance_in_a_schema_have_no_effect(allows):
    assert not allows({"type": "array", "x-guidance": {"whitespace_pattern": " *"}}, " [1]")
