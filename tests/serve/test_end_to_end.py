"""Test the whole path with real weights: official client, socket, text in, text out."""

import itertools
import json
import math
import socket
import subprocess
import sys
import time

import httpx
import jax
import numpy as np
import pytest
from openai import BadRequestError, OpenAI

from serve.models.decoder import load_decoder
from tests.naming import names
from tests.serve import scripted
from transformer import checkpoint, decoder

CHAT = "smollm2-135m-instruct"
CODER = "qwen2.5-coder-0.5b-instruct"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def loaded(model_file, id):
    """Start a server with a fixed dtype, so that no benchmark runs first."""
    return load_decoder(
        id,
        model_file(id),
        owned_by="test",
        cache_budget=128 * 2**20,
        dtype="int8",
        max_batch_size=1,
    )


@pytest.fixture(scope="module")
def served(model_file):
    model = loaded(model_file, CHAT)
    yield model
    model.engine.close(drain=False)


@pytest.fixture(scope="module")
def address(served):
    with scripted.serve_models(served) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def strict(address):
    """Return a client that validates responses against OpenAI's schema."""
    with OpenAI(
        base_url=f"{address}/v1",
        api_key="any",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


def is_free(served):
    scheduler = served.engine._scheduler
    return scheduler.is_idle and len(scheduler.free_slots) == 16


def test_model_is_listed(strict):
    assert [model.id for model in strict.models.list()] == [CHAT]
    assert strict.models.retrieve(CHAT).id == CHAT


def test_chat_answers_capital_of_france(strict, served):
    answer = strict.chat.completions.create(
        model=CHAT, messages=FRANCE, temperature=0, max_tokens=40
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == CHAT and answer.system_fingerprint == served.fingerprint
    encoding = served.tokenizer.encoding
    prompt = served.tokenizer.chat_template.encode(encoding, FRANCE, add_generation_prompt=True)
    usage = answer.usage
    assert usage.prompt_tokens == len(prompt)
    assert 0 < usage.completion_tokens <= 40
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_streamed_answer_equals_whole_answer(client):
    body = {"model": CHAT, "messages": FRANCE, "seed": 3, "temperature": 1.1, "max_tokens": 30}
    whole = client.chat.completions.create(**body)
    with client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def complete(client, prompt="The river", **body):
    body = {"model": CHAT, "max_tokens": 16, "seed": 1, **body}
    return client.completions.create(prompt=prompt, **body)


def test_same_seed_repeats_answer_and_other_seed_changes_it(strict):
    texts = [complete(strict, seed=seed).choices[0].text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_choices_differ_and_do_not_depend_on_n(strict):
    answer = complete(strict, n=3, temperature=1.3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens <= 48
    alone = complete(strict, temperature=1.3).choices[0].text
    assert answer.choices[0].text == alone, "other choices do not change the first"


def test_stop_string_ends_text_and_is_not_emitted(strict):
    long = complete(strict, temperature=0, max_tokens=40).choices[0].text
    stop = long[12:20]  # cuts through tokens
    short = complete(strict, temperature=0, max_tokens=40, stop=[stop]).choices[0]
    assert short.text == long[: long.index(stop)] and short.finish_reason == "stop"


def test_probabilities_of_top_logprobs_sum_to_at_most_1(strict):
    answer = strict.chat.completions.create(
        model=CHAT, messages=FRANCE, temperature=0, max_tokens=6, logprobs=True, top_logprobs=20
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 20 and values == sorted(values, reverse=True)
        assert token.logprob == values[0] and token.token == token.top_logprobs[0].token
        assert 0.3 < sum(map(math.exp, values)) <= 1.0001
    assert "".join(token.token for token in content) == answer.choices[0].message.content


def test_request_over_context_is_400(strict, served):
    with pytest.raises(BadRequestError) as caught:
        complete(strict, max_tokens=served.context)
    assert caught.value.code == "context_length_exceeded"
    assert names(caught.value.message, served.context)
    with pytest.raises(BadRequestError):
        complete(strict, prompt="word " * (served.context + 1))
    assert complete(strict).choices[0].text


@pytest.mark.parametrize(
    "body",
    [b"", b'{"model": "smol', b"[]", b'{"model": 3}', b'{"temperature": NaN}'],
    ids=["none", "half", "list", "types", "nan"],
)
def test_request_after_invalid_request_is_answered(address, strict, body):
    url, kind = f"{address}/v1/completions", {"Content-Type": "application/json"}
    response = httpx.post(url, content=body, headers=kind)
    assert response.status_code == 400 and response.json()["error"]["message"]
    assert complete(strict, max_tokens=2).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_batch_slot(address, served, stream):
    host, port = address.removeprefix("http://").split(":")
    bias = {str(id): -100 for id in served.tokenizer.stop_ids}  # or it may end by itself
    body = {"model": CHAT, "prompt": "Once", "max_tokens": 4000, "stream": stream}
    data = json.dumps({**body, "logit_bias": bias}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        scripted.wait_until(lambda: len(served.engine._scheduler.running) == 1, 10)
        time.sleep(0.1)
        assert not is_free(served)
    scripted.wait_until(lambda: is_free(served), 2)


@pytest.mark.slow  # loading and compiling alone may take half a minute
def test_coder_model_completes_working_function(model_file):
    model = loaded(model_file, CODER)
    ask = 'def is_prime(n: int) -> bool:\n    """Whether n is a prime number."""\n'
    try:
        with (
            scripted.serve_models(model) as address,
            OpenAI(base_url=f"{address}/v1", api_key="any") as client,
        ):
            answer = client.completions.create(
                model=CODER,
                prompt=ask,
                temperature=0,
                max_tokens=96,
            )
    finally:
        model.engine.close(drain=False)
    lines = (ask + answer.choices[0].text).splitlines()
    body = itertools.takewhile(lambda line: not line or line[0] == " ", lines[1:])
    program = "\n".join([lines[0], *body]) + "\n\nprint([n for n in range(30) if is_prime(n)])\n"
    run = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=20
    )
    assert run.stdout.strip() == "[2, 3, 5, 7, 11, 13, 17, 19, 23, 29]", program + run.stderr


@pytest.mark.slow  # in float32 it takes the memory and the seconds of a first load
def test_echo_logprobs_equal_forward_pass(model_file):
    """Evaluation harnesses compare likelihoods of answers, so the logprobs must be exact."""
    text = "The capital of France is Paris, and the capital of Italy is Rome. " * 5
    path = model_file(CHAT)
    model = load_decoder(
        CHAT, path, owned_by="test", cache_budget=128 * 2**20, dtype="float32", max_batch_size=1
    )
    try:
        with (
            scripted.serve_models(model) as address,
            OpenAI(base_url=f"{address}/v1", api_key="any") as client,
        ):
            ask = {"model": CHAT, "echo": True, "max_tokens": 0, "logprobs": 5}
            result = client.completions.create(prompt=text, **ask).choices[0].logprobs
    finally:
        model.engine.close(drain=False)
    ids = model.tokenizer.encoding.encode(text)
    params, cfg, _ = checkpoint.load(path, dtype="float32")
    logits, _ = jax.jit(decoder.forward, static_argnums=1)(params, cfg, np.array([ids]))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0]))
    assert len(result.tokens) == len(ids) > 64 and "".join(result.tokens) == text
    expected = [logprobs[at, id] for at, id in enumerate(ids[1:])]
    np.testing.assert_allclose(result.token_logprobs[1:], expected, atol=1e-4)
    for at, top in enumerate(result.top_logprobs[1:]):
        best = np.sort(logprobs[at])[::-1][:5]
        np.testing.assert_allclose(sorted(top.values(), reverse=True)[:5], best, atol=1e-4)


@pytest.mark.slow
def test_coder_model_fills_in_the_middle(model_file):
    model = loaded(model_file, CODER)
    before = "def total_price(prices, tax_rate):\n    subtotal = "
    after = "\n    return subtotal * (1 + tax_rate)\n"
    try:
        with (
            scripted.serve_models(model) as address,
            OpenAI(base_url=f"{address}/v1", api_key="any") as client,
        ):
            answer = client.completions.create(
                model=CODER, prompt=before, suffix=after, temperature=0, max_tokens=32
            )
    finally:
        model.engine.close(drain=False)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    names = {}
    exec(before + choice.text + after, names)
    assert names["total_price"]([10, 20], 0.5) == 45, choice.text
