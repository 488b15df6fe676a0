"""A server with a scripted engine for all tests of the HTTP layer, and three clients for it."""

import json
from collections.abc import Iterator
from itertools import starmap

import httpx
import pytest
from openai import OpenAI

from serve.models.decoder import DecoderModel
from tests.serve import scripted, tiny
from tests.serve.tiny_data import TEMPLATE, TOOL_TEMPLATE


@pytest.fixture(scope="session")
def model() -> DecoderModel:
    return scripted.model()


@pytest.fixture(scope="session")
def address(model: DecoderModel) -> Iterator[str]:
    templates = {
        "org/with-slash": scripted.TEMPLATE,
        "base": None,
        "picky": "{{ raise_exception('Conversation roles must alternate') }}",
        "hostile": "{% for i in range(10 ** 9) %}x{% endfor %}",
    }
    fim_model = scripted.model("filling", None, scripted.fim_encoding)
    with scripted.serve_models(
        model, *starmap(scripted.model, templates.items()), fim_model
    ) as address:
        yield address


@pytest.fixture
def engine(model: DecoderModel) -> scripted.ScriptedEngine:
    """Return the engine of the server, which records its requests."""
    assert isinstance(model.engine, scripted.ScriptedEngine)
    return model.engine


@pytest.fixture(scope="session")
def tiny_address(tmp_path_factory) -> Iterator[str]:
    """Yield the address of a complete server with a tiny random model, `tiny`, for tools."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny.model(folder / "model") / "tokenizer_config.json"
    text = config.read_text().replace(json.dumps(TEMPLATE), json.dumps(TOOL_TEMPLATE))
    config.write_text(text)
    with tiny.serving(folder / "home", folder / "model") as address:
        yield address


def client(address: str, *, strict: bool) -> OpenAI:
    return OpenAI(
        base_url=f"{address}/v1",
        api_key="any",
        max_retries=0,
        _strict_response_validation=strict,
    )


@pytest.fixture(scope="session")
def strict(address: str) -> Iterator[OpenAI]:
    """Yield the official client, which raises on deviations from OpenAI's schema."""
    with client(address, strict=True) as openai:
        yield openai


@pytest.fixture(scope="session")
def loose(address: str) -> Iterator[OpenAI]:
    """Yield the official client with its default checks, as streamed completions need it."""
    with client(address, strict=False) as openai:
        yield openai


@pytest.fixture(scope="session")
def http(address: str) -> Iterator[httpx.Client]:
    """Yield an HTTP client, for requests that the official client does not send."""
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client
