"""A minimal model kind for tests: a folder with toy.json, whose word a route returns."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.requests import Body, read_json
from serve.api.state import get_loaded_model
from serve.models.spec import Example, Kind, LoadOptions, ModelFiles, ModelSpec, stamp_of


@dataclass(frozen=True, kw_only=True)
class ToyModel:
    kind: ClassVar[str] = "toy"

    id: str
    created: int
    owned_by: str
    word: str
    context: int = 0
    dtype: str = "float32"
    fingerprint: str = "fp_toy"
    memory: int = 1
    is_idle: bool = True

    def close(self, timeout: float) -> None: ...


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    word = json.loads((files.path / "toy.json").read_text())["word"]

    def load() -> ToyModel:
        return ToyModel(id=files.id, created=1, owned_by=files.publisher, word=word)

    return ModelSpec(
        id=files.id,
        created=1,
        owned_by=files.publisher,
        memory=lambda: 1,
        load=load,
        stamp=lambda: stamp_of(files.path),
        kind="toy",
    )


def recognizes(path: Path) -> bool:
    return (path / "toy.json").is_file()


KIND = Kind(
    name="toy",
    task="say a word",
    recognizes=recognizes,
    describe=describe,
    example=lambda model: Example(route="words", call="words.create", result="word"),
)

router = APIRouter(prefix="/v1")


class WordBody(Body):
    model: str


@router.post("/words")
async def create_word(request: Request) -> dict[str, Any]:
    body = await read_json(request, WordBody)
    model = await get_loaded_model(request, body.model, ToyModel)
    return {"object": "word", "model": model.id, "word": model.word}
