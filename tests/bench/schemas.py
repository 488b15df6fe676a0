"""JSON schemas from a seeded generator: flat objects, nested ones, and ones with rarer keywords."""

import random
from typing import Any

NOUNS = ["book", "city", "recipe", "product", "flight", "player", "song", "movie", "house", "robot"]
TEXTS = ["name", "title", "color", "status", "country", "category", "author", "unit", "comment"]
NUMBERS = ["size", "price", "weight", "year", "count", "score", "height", "distance", "speed"]
VALUES = ["red", "green", "blue", "small", "large", "new", "old", "open", "closed", "fast", "slow"]


def make_schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return schemas of objects: a third flat, a third nested, a third with other keywords.

    The other keywords are $ref, anyOf, enum, const and pattern. Half of the strings are unbounded.
    Each schema has a `title`, a noun.
    """
    rng = random.Random(seed)
    makers = (_flat, _nested, _other)
    return [
        {"title": rng.choice(NOUNS)} | makers[i * len(makers) // count](rng) for i in range(count)
    ]


def _string(rng: random.Random) -> dict[str, Any]:
    return {"type": "string"} if rng.random() < 0.5 else {"type": "string", "maxLength": 20}


def _field(rng: random.Random, name: str) -> dict[str, Any]:
    if name in TEXTS:
        return _string(rng)
    low = rng.randint(0, 10)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(1, 2000)},
            {"type": "number", "minimum": low, "maximum": low + 100},
            {"type": "integer"},
            {"type": "boolean"},
        ]
    )


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _names(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample([*TEXTS, *NUMBERS], rng.randint(low, high))


def _flat(rng: random.Random) -> dict[str, Any]:
    return _object({name: _field(rng, name) for name in _names(rng, 2, 6)})


def _nested(rng: random.Random) -> dict[str, Any]:
    properties: dict[str, Any] = {name: _field(rng, name) for name in _names(rng, 1, 3)}
    properties["details"] = _flat(rng)
    items = rng.choice([_string(rng), _flat(rng), {"type": "integer"}])
    properties["parts"] = {
        "type": "array", "items": items, "minItems": 1, "maxItems": rng.randint(2, 3)
    }  # fmt: skip
    return _object(properties)


def _other(rng: random.Random) -> dict[str, Any]:
    choices = {
        "state": {"enum": rng.sample(VALUES, 3)},
        "version": {"const": rng.randint(1, 9)},
        "code": {
            "type": "string",
            "pattern": rng.choice(["^[A-Z]{2}-[0-9]{3}$", "^#[0-9a-f]{6}$"]),
        },
        "amount": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "result": {"anyOf": [_flat(rng), _string(rng)]},
        "first": {"$ref": "#/$defs/part"},
        "day": {"type": "string", "format": "date"},
    }
    properties = {name: choices[name] for name in rng.sample(sorted(choices), rng.randint(2, 4))}
    return _object(properties) | {"$defs": {"part": _flat(rng)}}
