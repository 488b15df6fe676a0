"""Test POST /v1/completions with the official client over a socket."""

import asyncio
from contextlib import aclosing

import pytest
from openai import BadRequestError

import bpe
from serve.api.generation import interleave
from tests.naming import naming
from tests.serve.scripted import CONTEXT, END_OF_TEXT, HELLO, IM_START, encoding

LENGTH = len(HELLO.encode())  # in tokens: its vocabulary is bytes


def create(client, prompt="Say hello", **options):
    options = {"max_tokens": 100, **options}
    return client.completions.create(model="scripted", prompt=prompt, **options)


def test_text_prompt_returns_completion(strict):
    answer = create(strict)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.model == "scripted" and answer.system_fingerprint == "fp_scripted"
    assert answer.choices[0].text == HELLO and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len("Say hello"), LENGTH)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_request_to_alias_returns_model_id(strict):
    answer = strict.completions.create(model="gpt-4", prompt="x", max_tokens=100)
    assert answer.model == "scripted" and answer.choices[0].text == HELLO


def test_default_max_tokens_is_sixteen(strict):
    answer = strict.completions.create(model="scripted", prompt="endless")
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_max_tokens_0_does_not_reach_the_engine(strict, engine):
    before = len(engine.requests)
    answer = create(strict, max_tokens=0)
    assert answer.choices[0].text == "" and answer.choices[0].finish_reason == "length"
    assert len(engine.requests) == before


def test_choices_of_several_prompts_are_ordered_by_prompt(strict):
    answer = create(strict, ["seed", "hello", "emoji"], n=2, seed=7)
    texts = [choice.text for choice in answer.choices]
    assert texts == ["7/0", "7/1", HELLO, HELLO, "😀😀😀", "😀😀😀"]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == len("seed") + len("hello") + len("emoji")
    assert answer.usage.completion_tokens == 2 * (3 + LENGTH + 12)


@pytest.mark.parametrize("prompt", [list(b"emoji"), [list(b"emoji"), list(b"hello")]])
def test_prompt_of_token_ids_returns_completion(strict, prompt):
    answer = create(strict, prompt)
    assert [choice.text for choice in answer.choices] == ["😀😀😀", HELLO][: len(answer.choices)]


@pytest.mark.parametrize("prompt", ["", None])
def test_empty_prompt_is_encoded_as_end_of_text_token(strict, engine, prompt):
    create(strict, prompt)
    assert engine.requests[-1].prompt == (END_OF_TEXT,)


def test_special_token_in_prompt_is_encoded_as_one_token(strict):
    assert create(strict, "<|im_start|> special").choices[0].text == str(IM_START)


def test_engine_gets_sampling_settings(strict, engine):
    settings = {"temperature": 0.5, "top_p": 0.25, "presence_penalty": 1, "frequency_penalty": -2}
    extensions = {"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5}
    bias = {"65": -100, "258": 2.5}
    create(strict, **settings, logit_bias=bias, seed=11, max_tokens=5, extra_body=extensions)
    request = engine.requests[-1]
    for name, value in {**settings, **extensions, "seed": 11}.items():
        assert getattr(request.sampling_params, name) == value, name
    assert request.sampling_params.logit_bias == {65: -100, 258: 2.5}
    assert request.max_tokens == 5 and request.top_logprobs is None


def test_null_field_counts_as_absent(http, engine):
    names = ["temperature", "top_p", "n", "stop", "seed", "logprobs", "logit_bias", "stream"]
    names += ["stream_options", "suffix", "echo", "best_of", "presence_penalty", "max_tokens"]
    body = {"model": "scripted", "prompt": "hello", **dict.fromkeys(names)}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert (
        engine.requests[-1].sampling_params.temperature == 1
        and engine.requests[-1].max_tokens == 16
    )


def test_requests_without_seed_get_different_seeds(strict):
    texts = {create(strict, "seed").choices[0].text for _ in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("stop", "text"), [("wör", "Hello, "), ([", w", "l"], "He"), (["😀"], "Hello, wörld! ")]
)
def test_stop_strings_end_the_text(strict, engine, stop, text):
    answer = create(strict, stop=stop)
    assert answer.choices[0].text == text and answer.choices[0].finish_reason == "stop"
    assert engine.running == 0


def test_logprobs_have_tokens_and_offsets_of_the_text(strict):
    logprobs = create(strict, logprobs=2).choices[0].logprobs
    assert len(logprobs.tokens) == LENGTH + 1
    assert logprobs.tokens[-1] == "<|im_end|>", "the end token has a logprob, but no text"
    assert logprobs.text_offset[-1] == len(HELLO)
    assert logprobs.tokens[:2] == ["H", "e"] and logprobs.token_logprobs[0] == -0.25
    assert logprobs.tokens[8:10] == [r"bytes:\xc3", r"bytes:\xb6"]  # ö
    assert logprobs.text_offset[7:11] == [7, 8, 8, 9]
    assert logprobs.top_logprobs[0] == {"H": -0.25, "A": -2.5}


def test_logprobs_0_lists_chosen_token_and_infinity_is_clamped(strict):
    assert create(strict, logprobs=0).choices[0].logprobs.top_logprobs[0] == {"H": -0.25}
    top = create(strict, logprobs=3).choices[0].logprobs.top_logprobs[0]
    assert top[r"bytes:\xff"] == -9999.0


def test_streamed_completion_equals_whole_completion(loose):
    options = {"n": 2, "logprobs": 1, "stop": "Bye", "max_tokens": 60, "prompt": ["hello", "emoji"]}
    whole = create(loose, **options)
    texts, tokens = [""] * 4, [[], [], [], []]
    reasons: dict[int, str] = {}
    for chunk in create(loose, **options, stream=True):
        assert chunk.object == "text_completion" and chunk.usage is None
        for choice in chunk.choices:
            assert choice.index not in reasons, "no chunk of a choice follows its finish_reason"
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert reasons[choice.index] == choice.finish_reason


def test_stream_with_include_usage_ends_with_usage(loose):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = create(loose, ["hello", "emoji"], **options)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.prompt_tokens == 10 and last.usage.completion_tokens == LENGTH + 12


def test_stream_bytes_are_server_sent_events(http):
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


def test_max_tokens_may_fill_the_context_exactly(strict):
    answer = create(strict, "endless", max_tokens=CONTEXT - len("endless"))
    assert answer.usage.total_tokens == CONTEXT


def test_default_max_tokens_shrinks_to_remaining_context(strict):
    answer = strict.completions.create(model="scripted", prompt="endless".rjust(CONTEXT - 3))
    assert answer.usage.completion_tokens == 3


def test_echoed_text_starts_with_prompt(strict, engine):
    for prompt in ("Say hello, ö", list("Say hello, ö".encode())):
        answer = create(strict, prompt, echo=True)
        assert answer.choices[0].text == "Say hello, ö" + HELLO
        assert engine.requests[-1].prompt_logprobs is None
    assert answer.usage.completion_tokens == LENGTH
    both = create(strict, ["emoji", "seed"], echo=True, seed=1, n=2).choices
    assert [choice.text for choice in both] == ["emoji😀😀😀"] * 2 + ["seed1/2", "seed1/3"]


def test_echo_omits_added_bos_token(strict):
    assert create(strict, "", echo=True).choices[0].text == HELLO


def test_stop_string_in_echo_is_ignored(strict):
    answer = create(strict, "Say wör", echo=True, stop="wör")
    assert answer.choices[0].text == "Say wörHello, " and answer.choices[0].finish_reason == "stop"


def test_echo_with_logprobs_scores_prompt(loose, engine):
    """Evaluation harnesses score a text with max_tokens 0."""
    prompt = "aö, b"
    answer = create(loose, prompt, echo=True, max_tokens=0, logprobs=1)
    choice, size = answer.choices[0], len(prompt.encode())
    assert choice.text == prompt and choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == size and answer.usage.completion_tokens == 0
    logprobs = choice.logprobs
    assert logprobs.tokens == ["a", r"bytes:\xc3", r"bytes:\xb6", ",", " ", "b"]
    assert logprobs.token_logprobs == [None, *(-at / 8 for at in range(1, size))]
    assert logprobs.top_logprobs[0] is None and logprobs.top_logprobs[3] == {",": -0.375}
    assert logprobs.text_offset == [0, 1, 1, 2, 3, 4]
    assert engine.requests[-1].max_tokens == 0


@pytest.mark.parametrize("prompt", ["emoji", "hey"])
def test_logprobs_of_scored_text_include_end_token(loose, prompt):
    """Evaluation harnesses request one new token, perhaps the end token, and drop its entry."""
    choice = create(loose, "nothing " + prompt, echo=True, max_tokens=1, logprobs=1).choices[0]
    assert len(choice.logprobs.tokens) == len("nothing " + prompt) + 1
    assert (choice.logprobs.tokens[-1] == "<|im_end|>") == (prompt == "hey")


def test_cached_tokens_of_many_choices_count_once(strict):
    usage = create(strict, ["cached", "hello", "cached"], n=2).usage
    assert usage.prompt_tokens_details.cached_tokens == 8


def test_logprobs_cover_echo_and_completion(loose):
    choice = create(loose, "hey", echo=True, logprobs=0).choices[0]
    assert choice.text == "hey" + HELLO
    assert choice.logprobs.token_logprobs == [None, -0.125, -0.25, *[-0.25] * (LENGTH + 1)]
    assert choice.logprobs.text_offset[:5] == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs[1] == {"e": -0.125}


def test_character_split_between_prompt_and_completion_is_whole(loose):
    """The prompt ends with the first byte of "é", and the completion starts with the second one."""
    answer = create(loose, [*b"half ", 0xC3], echo=True, logprobs=0)
    assert answer.choices[0].text == "half é!"
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4, 5, 5, 6, 7]


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("max_tokens", [0, 9])
def test_streamed_echo_equals_whole_echo(loose, logprobs, max_tokens):
    options = {"echo": True, "n": 2, "logprobs": logprobs, "max_tokens": max_tokens}
    prompts = ["hello wörld", "emoji 😀"]
    whole = create(loose, prompts, **options)
    texts, tokens = [""] * 4, [[], [], [], []]
    for chunk in create(loose, prompts, **options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += zip(
                    choice.logprobs.tokens,
                    choice.logprobs.token_logprobs,
                    choice.logprobs.text_offset,
                    strict=True,
                )
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        if (logprobs := choice.logprobs) is not None:
            expected = zip(
                logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, strict=True
            )
            assert tokens[choice.index] == [*expected]


def test_best_of_returns_likeliest_choices(strict, engine):
    answer = create(strict, ["best", "hello"], best_of=4)
    assert [choice.text for choice in answer.choices] == ["2", HELLO]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in answer.choices)
    assert answer.usage.completion_tokens == 4 + 4 * LENGTH, "usage counts all computed choices"
    two = create(strict, "best", best_of=4, n=2, logprobs=1).choices
    assert [choice.text for choice in two] == ["2", "3"]
    assert two[0].logprobs.token_logprobs == [-1.0, -0.25]


def test_best_of_with_suffix_ignores_echo(strict, engine):
    """Regression: the echo was taken from the FIM prompt instead of the request's prompt."""
    answer = create(strict, "It said: ", suffix=" Bye.\nThe end.", echo=True, best_of=2)
    assert answer.choices[0].text == "It said: Hello, wörld! 😀 "
    assert engine.requests[-1].prompt_logprobs is None


def test_best_of_with_echo_ignores_prompt_logprobs(strict):
    assert create(strict, "best", best_of=4, echo=True).choices[0].text == "best2"


@pytest.mark.parametrize("best_of", [0, 2, None])
def test_choices_with_best_of_equal_to_n_are_not_ranked(strict, loose, best_of):
    assert len(create(strict, n=2, best_of=best_of).choices) == 2
    assert [*create(loose, n=2, best_of=best_of, stream=True)]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"n": 3, "best_of": 2}, ["'n'", 3, "'best_of'", 2]),
        ({"best_of": 2, "stream": True}, ["'best_of'", 2, "'stream'"]),
    ],
)
def test_best_of_with_stream_or_below_n_is_refused(strict, options, facts):
    with pytest.raises(BadRequestError, match=naming(*facts)) as caught:
        create(strict, **options)
    assert caught.value.param == "best_of" and caught.value.code == "invalid_value"


def test_suffix_for_model_with_fim_tokens_fills_in_the_middle(strict, loose, engine):
    def ask(client, prompt="emoji(", **options):
        return client.completions.create(
            model="filling", prompt=prompt, suffix=") end", max_tokens=40, **options
        )

    assert ask(strict).choices[0].text == "filled in"
    assert ask(strict, list(b"emoji(")).choices[0].text == "filled in"
    assert ask(strict, echo=True).choices[0].text == "emoji(filled in"
    chunks = ask(loose, stream=True, logprobs=1)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "filled in"
    with pytest.raises(BadRequestError, match=naming("'suffix'", "logprobs")) as caught:
        ask(strict, echo=True, logprobs=1)
    assert caught.value.param == "echo"


def test_suffix_for_chat_model_becomes_chat_instruction(strict, engine):
    answer = create(strict, "It said: ", suffix=" Bye.\nThe end.")
    assert encoding.decode(engine.requests[-1].prompt) == (
        "<|im_start|>user\nWrite a text that ends with the words below. Begin at once, without "
        "introduction or comment.\n\nThe text ends with:\nBye.\nThe end.<|im_end|>\n"
        "<|im_start|>assistant\nIt said: "
    )
    assert answer.choices[0].text == "Hello, wörld! 😀 ", (
        "generation stops at the start of the suffix"
    )
    assert answer.choices[0].finish_reason == "stop"


def test_suffix_without_fim_tokens_or_template_is_refused(strict):
    with pytest.raises(BadRequestError) as caught:
        strict.completions.create(model="base", prompt="x", suffix="y")
    assert caught.value.param == "suffix" and caught.value.code == "unsupported_value"


def test_token_ids_sent_to_openai_alias_are_translated(strict, engine):
    """LangChain sends ids of cl100k to the alias gpt-4."""
    ids = bpe.get_encoding("cl100k_base").encode("Say emoji, ö<|endoftext|>", allowed_special="all")
    for prompt in (ids, [ids, ids]):
        answer = strict.completions.create(model="gpt-4", prompt=prompt, max_tokens=99, echo=True)
        assert answer.choices[0].text == "Say emoji, ö<|endoftext|>😀😀😀"
    assert engine.requests[-1].prompt == (*"Say emoji, ö".encode(), END_OF_TEXT)
    with pytest.raises(BadRequestError, match=naming(999999, "`gpt-4`")) as caught:
        strict.completions.create(model="gpt-4", prompt=[1, 999999])
    assert caught.value.param == "prompt[1]"


def test_logit_bias_sent_to_openai_alias_is_translated(strict, engine):
    a, end, burger = 32, 100257, 47775  # "A", "<|endoftext|>", "amburger"
    bias = {str(a): 5, str(end): -100}
    strict.completions.create(model="gpt-4", prompt="x", logit_bias=bias)
    assert engine.requests[-1].sampling_params.logit_bias == {65: 5, END_OF_TEXT: -100}
    for key, facts in ((burger, ["'amburger'"]), (999999, [999999, 100276])):
        with pytest.raises(BadRequestError, match=naming(*facts)) as caught:
            strict.completions.create(model="gpt-4", prompt="x", logit_bias={str(key): 1})
        assert caught.value.param == "logit_bias" and caught.value.code == "invalid_value"


def test_token_ids_sent_to_other_alias_are_not_translated(strict, engine):
    strict.completions.create(model="mine", prompt=list(b"emoji"), logit_bias={"65": 1})
    assert engine.requests[-1].prompt == tuple(b"emoji")
    assert engine.requests[-1].sampling_params.logit_bias == {65: 1}


def test_choices_of_one_request_share_admission_and_deadline(strict, engine):
    """Regression: each choice had its own deadline, and a full queue refused later choices."""
    before = len(engine.requests)
    strict.completions.create(model="scripted", prompt=["a", "b"], n=2)
    requests = engine.requests[before:]
    assert [request.is_accepted for request in requests] == [False, True, True, True]
    assert len({request.deadline for request in requests}) == 1


def test_interleave_waits_for_slow_consumer():
    """Regression: output that a slow client did not read was buffered without limit."""
    num_made = 0

    async def endless():
        nonlocal num_made
        while True:
            num_made += 1
            yield num_made
            await asyncio.sleep(0)

    async def main():
        async with aclosing(interleave([endless() for _ in range(5)], max_concurrent=2)) as merged:
            async for _ in merged:
                await asyncio.sleep(0.02)  # a hundred turns of the loop and more
                if num_made > 2:
                    break
        return num_made

    assert asyncio.run(main()) <= 5
