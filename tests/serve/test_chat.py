"""Test POST /v1/chat/completions with the official client over a socket."""

import asyncio

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.serve.scripted import CONTEXT, HELLO, IM_END, encoding

LENGTH = len(HELLO.encode())


def create(client, content="Say hello", **options):
    messages = options.pop("messages", [{"role": "user", "content": content}])
    return client.chat.completions.create(model="scripted", messages=messages, **options)


def prompt_of(engine):
    return encoding.decode(engine.requests[-1].prompt)


def test_request_with_user_message_returns_assistant_message(strict):
    answer = create(strict)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == "scripted" and answer.system_fingerprint == "fp_scripted"
    assert answer.service_tier == "default"
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == HELLO
    assert choice.message.refusal is None and choice.logprobs is None
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == LENGTH  # without the token that ended the turn
    assert answer._request_id.startswith("req_")


def test_response_has_required_keys_even_if_null(http):
    body = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["logprobs"] is None and choice["message"]["refusal"] is None


def test_chat_template_gets_roles_and_joined_text_parts(strict, engine):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And?"},
    ]
    create(strict, messages=messages)
    assert prompt_of(engine) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none two<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_token_in_message_is_encoded_as_text(strict, engine):
    create(strict, "<|im_end|>")
    assert engine.requests[-1].prompt.count(IM_END) == 1  # the template's own


def test_answer_without_max_tokens_fills_the_context(strict):
    answer = create(strict, "endless")
    assert answer.usage.total_tokens == CONTEXT and answer.choices[0].finish_reason == "length"


def test_max_completion_tokens_overrides_max_tokens(strict):
    assert create(strict, "endless", max_tokens=9).usage.completion_tokens == 9
    answer = create(strict, "endless", max_tokens=9, max_completion_tokens=4)
    assert answer.usage.completion_tokens == 4


def test_choices_differ_and_same_seed_repeats_them(strict):
    def texts():
        choices = create(strict, "seed", n=3, seed=-5).choices
        return [choice.message.content for choice in choices]

    assert texts() == texts() == ["-5/0", "-5/1", "-5/2"]


def test_logprobs_list_tokens_and_alternatives(strict):
    content = create(strict, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == HELLO
    assert content[0].token == "H" and content[0].logprob == -0.25
    assert [top.token for top in content[0].top_logprobs] == ["H", "A"]
    assert content[8].token == r"bytes:\xc3" and content[8].bytes == [0xC3]


def test_logprobs_with_stop_string_match_the_text(strict):
    choice = create(strict, logprobs=True, stop="wör").choices[0]
    assert all(entry.top_logprobs == [] for entry in choice.logprobs.content)
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content


def test_stream_starts_with_role_and_ends_with_finish_reason(strict):
    chunks = [*create(strict, "emoji", stream=True)]
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, *[{"content": "😀"}] * 3, {}]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * 4 + ["stop"]


def test_streamed_answer_equals_whole_answer(strict):
    options = {"n": 3, "stop": ["Bye"], "logprobs": True, "top_logprobs": 1}
    whole = create(strict, **options)
    texts, entries = [""] * 3, [[], [], []]
    stream = create(strict, **options, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            entries[choice.index] += choice.logprobs.content if choice.logprobs else []
        last = chunk
    assert texts == [choice.message.content for choice in whole.choices]
    assert entries == [choice.logprobs.content for choice in whole.choices]
    assert last.choices == [] and last.usage == whole.usage


def test_client_stream_helper_returns_whole_answer(strict):
    messages = [{"role": "user", "content": "hello"}]
    with strict.chat.completions.stream(model="scripted", messages=messages) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == stream.get_final_completion().choices[0].message.content == HELLO


def test_concurrent_requests_of_async_client_get_their_own_answers(address, engine):
    async def ask():
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as client:
            return await asyncio.gather(*(create(client, "seed", seed=n) for n in range(20)))

    answers = asyncio.run(ask())
    assert [answer.choices[0].message.content for answer in answers] == [
        f"{n}/0" for n in range(20)
    ]
    assert engine.running == 0


def test_fields_without_effect_are_accepted(strict):
    answer = create(
        strict,
        user="ann",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        reasoning_effort="low",
        verbosity="low",
        modalities=["text"],
        parallel_tool_calls=True,
        prediction={"type": "content", "content": "x"},
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        stream_options=None,
        safety_identifier="s",
        web_search_options={},
        response_format={"type": "text"},
        extra_body={
            "tools": None,
            "functions": [],
            "num_ctx": 4096,
            "moderation": None,
            "thinking": {"a": [1]},
        },
    )
    assert answer.choices[0].message.content == HELLO
    assert answer.metadata == {"a": "b"}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [IMAGE]}]}),
        ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [AUDIO]}]}),
    ],
)
def test_unsupported_fields_are_refused_by_name(strict, param, options):
    with pytest.raises(BadRequestError) as caught:
        create(strict, **options)
    assert caught.value.param == param and caught.value.code == "unsupported_value"


def test_model_without_chat_template_is_404(strict):
    # OpenAI's own sentence: there is no code for it.
    with pytest.raises(NotFoundError, match="This is not a chat model") as caught:
        strict.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}])
    assert (caught.value.param, caught.value.code) == ("model", None)


@pytest.mark.parametrize(("id", "reason"), [("picky", "roles must alternate"), ("hostile", None)])
def test_chat_template_that_fails_or_never_ends_is_400(strict, id, reason):
    with pytest.raises(BadRequestError, match=reason) as caught:
        strict.chat.completions.create(model=id, messages=[{"role": "user", "content": "x"}])
    assert caught.value.param == "messages" and caught.value.code == "invalid_value"
