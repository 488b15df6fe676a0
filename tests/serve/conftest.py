"""One scripted server for all tests of the HTTP layer, and three ways to talk to it."""

from collections.abc import Iterator
from itertools import starmap

import httpx
import pytest
from openai import OpenAI

from serve.models.decoder import DecoderModel
from tests.serve import scripted


@pytest.fixture(scope="session")
def model() -> DecoderModel:
    return scripted.model()


@pytest.fixture(scope="session")
def address(model: DecoderModel) -> Iterator[str]:
    others = {
        "org/with-slash": scripted.TEMPLATE,
        "base": None,
        "picky": "{{ raise_exception('Conversation roles must alternate') }}",
        "hostile": "{% for i in range(10 ** 9) %}x{% endfor %}",
    }
    filling = scripted.model("filling", None, scripted.fim_encoding)
    with scripted.serve_models(model, *starmap(scripted.model, others.items()), filling) as address:
        yield address


@pytest.fixture
def engine(model: DecoderModel) -> scripted.ScriptedEngine:
    """The engine behind the server: what it was asked is on record."""
    assert isinstance(model.engine, scripted.ScriptedEngine)
    return model.engine


def client(address: str, *, strict: bool) -> OpenAI:
    return OpenAI(
        base_url=f"{address}/v1",
        api_key="any",
        max_retries=0,
        _strict_response_validation=strict,
    )


@pytest.fixture(scope="session")
def strict(address: str) -> Iterator[OpenAI]:
    """The official client, raising on anything that is not as OpenAI's schema says."""
    with client(address, strict=True) as openai:
        yield openai


@pytest.fixture(scope="session")
def loose(address: str) -> Iterator[OpenAI]:
    """The same as most use it: streamed completions need it, for their null finish_reason."""
    with client(address, strict=False) as openai:
        yield openai


@pytest.fixture(scope="session")
def http(address: str) -> Iterator[httpx.Client]:
    """Plain HTTP, for what the official client would not send."""
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client
