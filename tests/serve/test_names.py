"""Names of models in requests that match a pattern: who answers, and in which encoding ids are."""

import pytest

import bpe
from tests.serve.scripted import HELLO

O200K = bpe.get_encoding("o200k_base")


@pytest.mark.parametrize("name", ["gpt-5-mini", "gpt-9", "o7", "chatgpt-next"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_reply_and_header_name_the_model_that_answers(http, name, is_streamed):
    body = {"model": name, "messages": [{"role": "user", "content": "x"}], "stream": is_streamed}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200 and response.headers["openai-model"] == "scripted"
    if not is_streamed:
        assert response.json()["model"] == "scripted"
        assert response.json()["choices"][0]["message"]["content"] == HELLO


@pytest.mark.parametrize("name", ["gpt-4o-audio-preview", "gpt-realtime", "tts-1", "claude-4"])
def test_name_of_another_kind_is_404(http, name):
    response = http.post("/v1/completions", json={"model": name, "prompt": "x"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "openai-model" not in response.headers


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("gpt-5-mini", O200K),
        ("gpt-9", O200K),  # unknown to OpenAI's tables
        ("gpt-3.5-turbo-0125", bpe.get_encoding("cl100k_base")),
    ],
)
def test_token_ids_are_in_the_encoding_of_the_name(http, engine, name, encoding):
    ids = encoding.encode("hello world")
    body = {"model": name, "prompt": ids, "logit_bias": {str(encoding.encode("a")[0]): 5}}
    body |= {"stop_token_ids": encoding.encode("b"), "max_tokens": 3}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    request = engine.requests[-1]
    assert bytes(request.prompt) == b"hello world"
    assert request.sampling_params.logit_bias == {ord("a"): 5}
    assert ord("b") in request.stop_ids


def test_token_ids_of_an_alias_without_openai_name_are_those_of_the_model(http, engine):
    http.post("/v1/completions", json={"model": "mine", "prompt": [104, 105]})
    assert engine.requests[-1].prompt == (104, 105)


def test_models_route_describes_the_model_of_a_pattern(http):
    assert http.get("/v1/models/gpt-5-mini").json()["id"] == "scripted"
