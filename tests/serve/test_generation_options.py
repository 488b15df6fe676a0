"""Options of vLLM, transformers and llama.cpp on the generation routes, with a tiny model."""

import math

import httpx
import numpy as np
import pytest

from serve.models.token_limits import TokenLimits
from tests.serve.scripted import END_OF_TEXT, IM_END
from transformer.engine import GrammarMatcher

pytestmark = pytest.mark.heavy

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tiny(tiny_address):
    with httpx.Client(base_url=tiny_address, timeout=60) as http:
        yield http


def ask(http, path=COMPLETIONS, **fields):
    model = "tiny" if "scripted" not in fields else fields.pop("scripted")
    body = {"model": model} | ({"messages": HI} if path == CHAT else {"prompt": "ab"})
    return http.post(path, json=body | {"seed": 1} | fields)


def choice_of(response):
    assert response.status_code == 200, response.text
    assert response.headers.get("x-pellucid-ignored") is None
    (choice,) = response.json()["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, choice["finish_reason"], response.json()["usage"]["completion_tokens"]


def refusal(response):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["code"]


# --- which tokens, and when the text ends ---------------------------------------------------------

ENDS = {str(END_OF_TEXT): 100, str(IM_END): 100}  # the model wants to end at once


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_ignore_eos_generates_exactly_max_tokens(tiny, path):
    assert choice_of(ask(tiny, path, max_tokens=9, logit_bias=ENDS))[1:] == ("stop", 0)
    text, reason, count = choice_of(
        ask(tiny, path, max_tokens=9, logit_bias=ENDS, ignore_eos=True, temperature=0)
    )
    assert (reason, count) == ("length", 9) and "<|" not in text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_min_tokens_delays_the_end(tiny, path):
    options = {"max_tokens": 9, "logit_bias": ENDS, "min_tokens": 4}
    assert choice_of(ask(tiny, path, **options))[1:] == ("stop", 4)
    streamed = ask(tiny, path, **options, stream=True, stream_options={"include_usage": True})
    assert '"completion_tokens":4' in streamed.text


def test_min_tokens_delays_stop_strings(tiny):
    options = {"max_tokens": 6, "allowed_token_ids": [97], "stop": "a"}
    assert choice_of(ask(tiny, **options)) == ("", "stop", 1)
    assert choice_of(ask(tiny, **options, min_tokens=3)) == ("aaa", "stop", 4)


def test_stop_token_ids_end_the_text(tiny):
    options = {"max_tokens": 6, "logit_bias": {"97": 100}}
    assert choice_of(ask(tiny, **options)) == ("aaaaaa", "length", 6)
    assert choice_of(ask(tiny, **options, stop_token_ids=[97, 98])) == ("", "stop", 0)
    assert choice_of(ask(tiny, **options, stop_token_ids=[])) == ("aaaaaa", "length", 6)
    text = choice_of(ask(tiny, **options, stop_token_ids=[97], min_tokens=2))[0]
    assert len(text) == 2 and "a" not in text


@pytest.mark.parametrize("seed", range(3))
def test_allowed_token_ids_are_the_only_tokens(tiny, seed):
    text, *_ = choice_of(ask(tiny, max_tokens=30, allowed_token_ids=[97, 98], seed=seed))
    assert set(text) == {"a", "b"}


def test_limits_combine_with_a_grammar(tiny):
    """Where the grammar is complete, its text ends although the request asks for more tokens."""
    options = {"structured_outputs": {"regex": "a{1,4}"}, "max_tokens": 9, "logit_bias": ENDS}
    assert choice_of(ask(tiny, **options))[0] == "a"
    assert choice_of(ask(tiny, **options, min_tokens=3))[0] == "aaa"
    assert choice_of(ask(tiny, **options, ignore_eos=True))[:2] == ("aaaa", "stop")


def test_limits_of_one_row_do_not_change_another(tiny):
    alone = choice_of(ask(tiny, max_tokens=12))
    response = ask(tiny, prompt=["ab", "ab"], max_tokens=12)
    assert [c["text"] for c in response.json()["choices"]][0] == alone[0]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "integer_below_min_value"),
        ({"stop_token_ids": [97, 5000]}, "stop_token_ids[1]", "invalid_value"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "invalid_value"),
        ({"allowed_token_ids": ["a"]}, "allowed_token_ids[0]", "invalid_type"),
        (
            {"allowed_token_ids": [97], "structured_outputs": {"regex": "a"}},
            "allowed_token_ids",
            "invalid_value",
        ),
        ({"typical_p": 1.5}, "typical_p", "decimal_above_max_value"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty", "invalid_value"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "integer_above_max_value"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ],
)
def test_invalid_options_are_refused(tiny, fields, param, code):
    assert refusal(ask(tiny, **fields)) == (param, code)


def test_matcher_starts_anew_for_every_sequence():
    """A preempted sequence gets a new matcher, which must count from the start again."""
    limits = TokenLimits.create(70, stop_ids=[65], min_tokens=2)
    allowed = []
    for matcher in (limits.matcher(), limits.matcher()):
        _: GrammarMatcher = matcher
        for token in (1, 2, 3):
            bits = np.unpackbits(matcher.token_bitmask().view(np.uint8), bitorder="little")
            allowed.append(bool(bits[65]))
            assert bits[:70].sum() == 69 + bits[65] and not bits[70:].any()
            matcher.accept(token)
        assert not matcher.is_finished
    assert allowed == [False, False, True] * 2


# --- sampling -------------------------------------------------------------------------------------


def test_sampling_names_of_other_servers_reach_the_sampler(http, engine):
    ask(http, scripted="scripted", repeat_penalty=1.25, typical_p=0.5)
    params = engine.requests[-1].sampling_params
    assert (params.repetition_penalty, params.typical_p) == (1.25, 0.5)
    ask(http, scripted="scripted", repeat_penalty=1.25, repetition_penalty=1.25)
    assert engine.requests[-1].sampling_params.repetition_penalty == 1.25


# --- the chat template ----------------------------------------------------------------------------


def prompt_of(http, engine, **fields):
    response = ask(http, CHAT, scripted="scripted", **fields)
    assert response.status_code == 200, response.text
    text = bytes(id for id in engine.requests[-1].prompt if id < 256).decode()
    return text, response.headers.get("x-pellucid-ignored")


def test_final_message_is_continued(http, engine):
    messages = [*HI, {"role": "assistant", "content": "Once upon "}]
    text, _ = prompt_of(http, engine, messages=messages, continue_final_message=True)
    assert text == "user\nhi\nassistant\nOnce upon "
    assert engine.requests[-1].prompt[-1] == ord(" ")
    text, _ = prompt_of(http, engine, messages=HI, add_generation_prompt=False)
    assert text == "user\nhi\n"


def test_special_tokens_in_a_continued_message_stay_text(http, engine):
    messages = [*HI, {"role": "assistant", "content": "a<|im_end|>b<|im"}]
    text, _ = prompt_of(http, engine, messages=messages, continue_final_message=True)
    assert text.endswith("a<|im_end|>b<|im")


@pytest.mark.parametrize(
    ("messages", "param"),
    [([], "messages"), (["x"], "messages[0]"), ([*HI, None], "messages[1]")],
)
def test_message_without_text_is_not_continued(http, messages, param):
    response = ask(http, CHAT, scripted="scripted", messages=messages, continue_final_message=True)
    assert refusal(response)[0] == param


def test_continued_message_with_generation_prompt_is_refused(http):
    fields = {"continue_final_message": True, "add_generation_prompt": True}
    assert refusal(ask(http, CHAT, scripted="scripted", **fields)) == (
        "continue_final_message",
        "invalid_value",
    )


def test_template_variables_are_passed_on_or_named(http, engine):
    """`TEMPLATE` has no variable `enable_thinking`, so the request's value has no effect."""
    fields = {"chat_template_kwargs": {"enable_thinking": False}}
    assert prompt_of(http, engine, **fields)[1] == "chat_template_kwargs.enable_thinking"
    # Regression: a name that is part of the source, here of "messages", counted as read.
    fields = {"chat_template_kwargs": {"message": 1, "mess": 1, "add_generation_prompt_": 1}}
    ignored = prompt_of(http, engine, **fields)[1]
    assert ignored is not None and "chat_template_kwargs.mess" in ignored.split(", ")
    fields = {"chat_template_kwargs": {"messages": []}}
    assert refusal(ask(http, CHAT, scripted="scripted", **fields)) == (
        "chat_template_kwargs.messages",
        "invalid_value",
    )


# --- prompt_logprobs ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_prompt_logprobs_have_the_form_of_vllm(tiny, path):
    body = ask(tiny, path, prompt_logprobs=2, max_tokens=2).json()
    first, *rest = (body if path == CHAT else body["choices"][0])["prompt_logprobs"]
    assert first is None and len(rest) + 1 == body["usage"]["prompt_tokens"]
    for entries in rest:
        assert 2 <= len(entries) <= 3
        ranks = [entry["rank"] for entry in entries.values()]
        assert sorted(rank for rank in ranks if rank is not None) == [1, 2]
        for id, entry in entries.items():
            assert entry["logprob"] < 0
            assert int(id) > 127 or entry["decoded_token"] == chr(int(id))


def test_prompt_logprobs_equal_those_of_echo(tiny):
    options = {"prompt": "hello", "max_tokens": 1, "logprobs": 1}
    (echo,) = ask(tiny, **options, echo=True).json()["choices"]
    (both,) = ask(tiny, **options, echo=True, prompt_logprobs=3).json()["choices"]
    assert both["logprobs"] == echo["logprobs"] and both["text"] == echo["text"]
    (alone,) = ask(tiny, **options, prompt_logprobs=3).json()["choices"]
    assert alone["text"] == echo["text"].removeprefix("hello")
    for token, logprob, entries in zip(
        "ello", echo["logprobs"]["token_logprobs"][1:5], alone["prompt_logprobs"][1:], strict=True
    ):
        assert math.isclose(entries[str(ord(token))]["logprob"], logprob, abs_tol=1e-6)


def test_prompt_logprobs_of_several_prompts_and_choices(tiny):
    choices = ask(tiny, prompt=["ab", "abc"], n=2, prompt_logprobs=0).json()["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [2, 2, 3, 3]
