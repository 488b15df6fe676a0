"""Test openai 0.27.10, the client of 2023, and its command line with every endpoint it supports."""

import pytest
from openai import OpenAI

from serve.models import adapters
from tests.serve import scripted
from tests.serve.old_client import OldClient, install
from tests.serve.scripted import HELLO

pytestmark = pytest.mark.heavy

LENGTH = len(HELLO.encode())


@pytest.fixture(scope="session")
def old(address):
    return OldClient(install(), address)


def test_client_version_is_0_27(old):
    assert old.run("answer = openai.version.VERSION") == "0.27.10"


def test_completions_with_best_of_echo_and_logprobs_return_choices(old):
    answer = old.run(
        "answer = openai.Completion.create(model='scripted', prompt=['hello', 'emoji'], n=2,"
        " best_of=3, max_tokens=40, logprobs=2, echo=True, user='ann')"
    )
    assert answer["object"] == "text_completion" and answer["model"] == "scripted"
    assert [choice["text"] for choice in answer["choices"]] == [
        *["hello" + HELLO] * 2,
        *["emoji😀😀😀"] * 2,
    ]
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][:6] == ["h", "e", "l", "l", "o", "H"]
    assert logprobs["token_logprobs"][:2] == [None, -0.125]
    assert answer["usage"]["completion_tokens"] == 3 * (LENGTH + 12)


def test_completions_with_engine_or_token_ids_return_text(old, engine):
    answer = old.run(
        "answer = openai.Completion.create(engine='scripted', prompt=[101, 109, 111, 106, 105])"
    )
    assert answer["model"] == "scripted" and answer["choices"][0]["text"] == "😀😀😀"
    answer = old.run("answer = openai.Completion.create(engine='gpt-4', prompt='emoji')")
    assert answer["model"] == "scripted"


def test_completions_with_suffix_fill_in_the_middle(old):
    answer = old.run(
        "answer = openai.Completion.create(model='filling', prompt='emoji(', suffix=') end')"
    )
    assert answer["choices"][0]["text"] == "filled in"


def test_streamed_completions_and_chats_yield_deltas(old):
    texts = old.run(
        "answer = [part.choices[0].text for part in"
        " openai.Completion.create(model='scripted', prompt='emoji', stream=True)]"
    )
    assert "".join(texts) == "😀😀😀" and len(texts) == 4
    deltas = old.run(
        "answer = [part.choices[0].delta for part in openai.ChatCompletion.create("
        "model='scripted', messages=[{'role': 'user', 'content': 'emoji'}], stream=True)]"
    )
    assert deltas == [{"role": "assistant", "content": ""}, *[{"content": "😀"}] * 3, {}]


@pytest.mark.parametrize("name", ["model", "engine"])
def test_chat_with_model_or_engine_returns_message(old, name):
    answer = old.run(
        f"answer = openai.ChatCompletion.create({name}='scripted',"
        " messages=[{'role': 'user', 'content': 'hi'}], temperature=0, logit_bias={65: -100})"
    )
    assert answer["choices"][0]["message"]["content"] == HELLO
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_async_client_completes_and_streams(old):
    texts = old.run(
        "import asyncio\n"
        "async def main():\n"
        "    ask = {'model': 'scripted', 'prompt': 'emoji'}\n"
        "    one = await openai.Completion.acreate(**ask)\n"
        "    stream = await openai.Completion.acreate(**ask, stream=True)\n"
        "    return one.choices[0].text, ''.join([p.choices[0].text async for p in stream])\n"
        "answer = asyncio.run(main())"
    )
    assert texts == ["😀😀😀"] * 2


@pytest.mark.parametrize("name", ["model", "engine"])
def test_edits_with_model_or_engine_return_choices(old, engine, name):
    answer = old.run(
        f"answer = openai.Edit.create({name}='scripted', input='What day of the wek is it?',"
        " instruction='Fix the spelling mistakes', n=2, temperature=0)"
    )
    assert answer["object"] == "edit" and "id" not in answer
    assert [choice["text"] for choice in answer["choices"]] == [HELLO] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 2 * LENGTH


def test_models_and_engines_are_listed(old):
    ids = old.run("answer = [model.id for model in openai.Model.list().data]")
    assert "scripted" in ids
    assert old.run("answer = openai.Model.retrieve('org/with-slash').id") == "org/with-slash"
    engines = old.run("answer = openai.Engine.list()")
    assert engines["object"] == "list" and [one["id"] for one in engines["data"]] == ids
    assert old.run("answer = openai.Engine.retrieve('scripted')")["ready"] is True
    assert old.run("answer = openai.Engine.retrieve('org/with-slash').id") == "org/with-slash"


def test_model_is_deleted(tmp_path):
    adapter = "ft:scripted:me::old"
    adapters.adapter_folder(tmp_path, adapter).mkdir(parents=True)
    with scripted.serve_models(scripted.model(), scripted.model(adapter), home=tmp_path) as address:
        old = OldClient(install(), address)
        answer = old.run(f"answer = openai.Model.delete({adapter!r})")
        assert answer == {"id": adapter, "object": "model", "deleted": True}
        assert old.run("answer = [model.id for model in openai.Model.list().data]") == ["scripted"]


def test_routes_without_client_method_are_called_by_path(old, address):
    """Neither client has methods for the tokenizer routes, so both call them by their paths."""
    both = old.run(
        "ask = openai.api_requestor.APIRequestor(api_base=openai.api_base[:-3]).request\n"
        "cut = ask('post', '/tokenize', {'model': 'scripted', 'prompt': 'höher'})[0].data\n"
        "back = {'model': 'scripted', 'tokens': cut['tokens']}\n"
        "text = ask('post', '/detokenize', back)[0].data\n"
        "info = ask('get', '/tokenizer_info', {'model': 'scripted'})[0].data\n"
        "answer = [cut, text, info]"
    )
    with OpenAI(base_url=f"{address}/v1", api_key="any") as new:
        cut = new.post(
            f"{address}/tokenize", body={"model": "scripted", "prompt": "höher"}, cast_to=object
        )
        text = new.post(
            f"{address}/detokenize",
            body={"model": "scripted", "tokens": cut["tokens"]},
            cast_to=object,
        )
        info = new.get(
            f"{address}/tokenizer_info",
            options={"params": {"model": "scripted"}},
            cast_to=object,
        )
        edits = new.post("/edits", body={"model": "scripted", "instruction": "x"}, cast_to=object)
        engines = new.get("/engines", cast_to=object)
    assert both == [cut, text, info]
    assert cut["tokens"] == list("höher".encode()) and text["prompt"] == "höher"
    assert edits["object"] == "edit" and engines["object"] == "list"


@pytest.mark.parametrize(
    ("call", "kind", "status", "type", "code"),
    [
        (
            "openai.Completion.create(model='nobody', prompt='x')",
            *("InvalidRequestError", 404, "invalid_request_error", "model_not_found"),
        ),
        (
            "openai.Completion.create(engine='nobody', prompt='x')",
            *("InvalidRequestError", 404, "invalid_request_error", "model_not_found"),
        ),
        (
            "openai.Completion.create(model='scripted', prompt='x', max_tokens=9999)",
            *("InvalidRequestError", 400, "invalid_request_error", "context_length_exceeded"),
        ),
        (
            "openai.Completion.create(model='scripted', prompt='busy')",
            *("RateLimitError", 429, "requests", "rate_limit_exceeded"),
        ),
        (
            "openai.Edit.create(model='base', instruction='x')",
            *("InvalidRequestError", 404, "invalid_request_error", None),
        ),
        (
            "openai.Completion.create(model='scripted', prompt='fail at once')",
            *("APIError", 500, "server_error", None),
        ),
        (
            "list(openai.Completion.create(model='scripted', prompt='fail later', stream=True))",
            *("APIError", 200, "server_error", None),
        ),
    ],
)
def test_errors_raise_exceptions_of_the_client(old, call, kind, status, type, code):
    result = old.run(
        f"try:\n    {call}\nexcept openai.error.OpenAIError as error:\n"
        "    sent = error.json_body['error']\n"
        "    answer = [type(error).__name__, error.http_status, sent['type'], sent['code']]"
    )
    assert result == [kind, status, type, code]


def test_openai_command_lists_models_completes_and_chats(old):
    assert '"id": "scripted"' in old.command("api", "models.list")
    assert '"id": "scripted"' in old.command("api", "models.get", "-i", "scripted")
    assert '"ready": true' in old.command("api", "engines.list")
    assert '"id": "scripted"' in old.command("api", "engines.get", "-i", "scripted")
    ask = ("-m", "scripted", "-p", "emoji", "-M", "8")
    assert old.command("api", "completions.create", *ask).strip() == "emoji😀😀"
    streamed = old.command("api", "completions.create", *ask, "--stream")
    assert streamed.strip() == "emoji😀😀"
    say = ("-m", "scripted", "-g", "user", "hi")
    assert old.command("api", "chat_completions.create", *say).strip() == HELLO
    assert old.command("api", "chat_completions.create", *say, "--stream").strip() == HELLO
    assert (
        old.command("api", "chat_completions.create", "-e", "scripted", *say[2:]).strip() == HELLO
    )
