"""POST /v1/completions through the official client, on a real socket."""

import pytest
from openai import BadRequestError

from tests.serve.scripted import CONTEXT, END_OF_TEXT, HELLO, IM_START

LENGTH = len(HELLO.encode())  # in tokens: its vocabulary is bytes


def create(client, prompt="Say hello", **options):
    options = {"max_tokens": 100, **options}
    return client.completions.create(model="scripted", prompt=prompt, **options)


def test_text_in_text_out(strict):
    answer = create(strict)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.model == "scripted" and answer.system_fingerprint == "fp_scripted"
    assert answer.choices[0].text == HELLO and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len("Say hello"), LENGTH)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_an_alias_answers_with_the_models_own_name(strict):
    answer = strict.completions.create(model="gpt-4", prompt="x", max_tokens=100)
    assert answer.model == "scripted" and answer.choices[0].text == HELLO


def test_sixteen_tokens_unless_told_otherwise(strict):
    answer = strict.completions.create(model="scripted", prompt="endless")
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_zero_tokens_are_computed_by_nobody(strict, engine):
    before = len(engine.requests)
    answer = create(strict, max_tokens=0)
    assert answer.choices[0].text == "" and answer.choices[0].finish_reason == "length"
    assert len(engine.requests) == before


def test_prompts_and_choices_are_numbered_prompt_by_prompt(strict):
    answer = create(strict, ["seed", "hello", "emoji"], n=2, seed=7)
    texts = [choice.text for choice in answer.choices]
    assert texts == ["7/0", "7/1", HELLO, HELLO, "😀😀😀", "😀😀😀"]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == len("seed") + len("hello") + len("emoji")
    assert answer.usage.completion_tokens == 2 * (3 + LENGTH + 12)


@pytest.mark.parametrize("prompt", [list(b"emoji"), [list(b"emoji"), list(b"hello")]])
def test_token_ids(strict, prompt):
    answer = create(strict, prompt)
    assert [choice.text for choice in answer.choices] == ["😀😀😀", HELLO][: len(answer.choices)]


@pytest.mark.parametrize("prompt", ["", None])
def test_nothing_is_the_start_of_a_document(strict, engine, prompt):
    create(strict, prompt)
    assert engine.requests[-1].prompt == (END_OF_TEXT,)


def test_special_tokens_in_a_prompt_are_special(strict):
    assert create(strict, "<|im_start|> special").choices[0].text == str(IM_START)


def test_settings_reach_the_engine(strict, engine):
    settings = {"temperature": 0.5, "top_p": 0.25, "presence_penalty": 1, "frequency_penalty": -2}
    extensions = {"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5}
    bias = {"65": -100, "258": 2.5}
    create(strict, **settings, logit_bias=bias, seed=11, max_tokens=5, extra_body=extensions)
    request = engine.requests[-1]
    for name, value in {**settings, **extensions, "seed": 11}.items():
        assert getattr(request.sampling, name) == value, name
    assert request.sampling.logit_bias == {65: -100, 258: 2.5}
    assert request.max_tokens == 5 and request.top_logprobs is None


def test_null_is_not_given(http, engine):
    names = ["temperature", "top_p", "n", "stop", "seed", "logprobs", "logit_bias", "stream"]
    names += ["stream_options", "suffix", "echo", "best_of", "presence_penalty", "max_tokens"]
    body = {"model": "scripted", "prompt": "hello", **dict.fromkeys(names)}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert engine.requests[-1].sampling.temperature == 1 and engine.requests[-1].max_tokens == 16


def test_without_a_seed_every_request_draws_one(strict):
    texts = {create(strict, "seed").choices[0].text for _ in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("stop", "text"), [("wör", "Hello, "), ([", w", "l"], "He"), (["😀"], "Hello, wörld! ")]
)
def test_stop_strings(strict, engine, stop, text):
    answer = create(strict, stop=stop)
    assert answer.choices[0].text == text and answer.choices[0].finish_reason == "stop"
    assert engine.running == 0


def test_logprobs_line_up_with_the_text(strict):
    logprobs = create(strict, logprobs=2).choices[0].logprobs
    assert len(logprobs.tokens) == LENGTH
    assert logprobs.tokens[:2] == ["H", "e"] and logprobs.token_logprobs[0] == -0.25
    assert logprobs.tokens[8:10] == [r"bytes:\xc3", r"bytes:\xb6"]  # ö
    assert logprobs.text_offset[7:11] == [7, 8, 8, 9]
    assert logprobs.top_logprobs[0] == {"H": -0.25, "A": -2.5}


def test_logprobs_0_is_the_chosen_token_alone_and_impossible_is_a_number(strict):
    assert create(strict, logprobs=0).choices[0].logprobs.top_logprobs[0] == {"H": -0.25}
    top = create(strict, logprobs=3).choices[0].logprobs.top_logprobs[0]
    assert top[r"bytes:\xff"] == -9999.0


def test_streamed_equals_not_streamed(loose):
    options = {"n": 2, "logprobs": 1, "stop": "Bye", "max_tokens": 60, "prompt": ["hello", "emoji"]}
    whole = create(loose, **options)
    texts, tokens = [""] * 4, [[], [], [], []]
    reasons: dict[int, str] = {}
    for chunk in create(loose, **options, stream=True):
        assert chunk.object == "text_completion" and chunk.usage is None
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing follows the last chunk of a choice"
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert reasons[choice.index] == choice.finish_reason


def test_usage_comes_last_when_asked_for(loose):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = create(loose, ["hello", "emoji"], **options)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.prompt_tokens == 10 and last.usage.completion_tokens == LENGTH + 12


def test_a_stream_on_the_wire(http):
    body = {"model": "scripted", "prompt": "emoji", "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"].startswith("req_")
    events = response.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert all('"usage":null' in event for event in events[:-3])
    assert events[-2:] == ["data: [DONE]", ""]
    assert "\\u" not in response.text and "\ufffd" not in response.text


def test_completion_fills_the_context_exactly(strict):
    answer = create(strict, "endless", max_tokens=CONTEXT - len("endless"))
    assert answer.usage.total_tokens == CONTEXT


def test_the_default_shrinks_to_what_is_left(strict):
    answer = strict.completions.create(model="scripted", prompt="endless".rjust(CONTEXT - 3))
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("best_of", [1, 2])
def test_best_of_that_asks_for_nothing(strict, best_of):
    assert len(create(strict, n=2, best_of=best_of).choices) == 2


@pytest.mark.parametrize(("name", "value"), [("echo", True), ("suffix", "x"), ("best_of", 3)])
def test_what_is_not_supported_yet_says_so(strict, name, value):
    with pytest.raises(BadRequestError) as caught:
        create(strict, **{name: value})
    assert caught.value.param == name and caught.value.code == "unsupported_value"


def test_ids_under_an_alias_belong_to_another_encoding(strict):
    for options in ({"prompt": [1, 2]}, {"prompt": "x", "logit_bias": {"1": 1}}):
        with pytest.raises(BadRequestError, match="belong to that model's encoding"):
            strict.completions.create(model="gpt-4", **options)
