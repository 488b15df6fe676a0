"""The tokenizer by itself, as harnesses and other servers' clients call it."""

import pytest

from tests.serve.scripted import CONTEXT, END_OF_TEXT, IM_END, IM_START, TEMPLATE


def post(http, path, **body):
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_as_a_harness_calls_it(http):
    """lm-eval's remote tokenizer: no model, no /v1, ids there and back, eos looked up by name."""
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and info["bos_token"] is None
    assert info["chat_template"] == TEMPLATE and info["pad_token"] == "<|im_end|>"
    tokens = post(http, "/tokenize", prompt="hé", add_special_tokens=False)["tokens"]
    assert tokens == list("hé".encode())
    assert post(http, "/tokenize", prompt="<|im_end|>", add_special_tokens=False) == {
        "tokens": [IM_END],
        "count": 1,
        "max_model_len": CONTEXT,
        "token_strs": None,
    }
    assert post(http, "/detokenize", tokens=tokens)["prompt"] == "hé"


@pytest.mark.parametrize("name", ["prompt", "content", "text"])
def test_every_servers_name_for_text(http, name):
    assert post(http, "/tokenize", **{name: "ab"})["tokens"] == [97, 98]


def test_token_strings_and_pieces(http):
    answer = post(
        http, "/tokenize", content="aö<|im_end|>", return_token_strs=True, with_pieces=True
    )
    assert answer["token_strs"] == ["a", r"bytes:\xc3", r"bytes:\xb6", "<|im_end|>"]
    assert answer["tokens"] == [
        {"id": 97, "piece": "a", "special": False},
        {"id": 0xC3, "piece": [0xC3], "special": False},
        {"id": 0xB6, "piece": [0xB6], "special": False},
        {"id": IM_END, "piece": "<|im_end|>", "special": True},
    ]


def test_messages_are_put_through_the_template(http):
    messages = [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]
    tokens = post(http, "/tokenize", model="gpt-4", messages=messages)["tokens"]
    assert tokens[0] == IM_START and tokens.count(IM_END) == 1
    closed = post(http, "/tokenize", messages=messages, add_generation_prompt=False)["tokens"]
    assert tokens[: len(closed)] == closed
    text = post(http, "/detokenize", tokens=tokens)["content"]
    assert text.endswith("<|im_start|>assistant\n")


def test_special_tokens_as_text(http):
    answer = post(http, "/tokenize", text="<|endoftext|>", parse_special=False)
    assert END_OF_TEXT not in answer["tokens"] and answer["count"] == len("<|endoftext|>")


def test_each_model_has_its_own(http):
    assert post(http, "/tokenize", model="filling", text="<|fim_middle|>")["tokens"] == [261]
    assert http.get("/tokenizer_info", params={"model": "base"}).json()["chat_template"] is None


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_required_parameter"),
        ("/tokenize", {"prompt": "a", "text": "b"}, "text", "invalid_value"),
        ("/tokenize", {"prompt": 3}, "prompt", "invalid_type"),
        ("/detokenize", {"tokens": [1, 999]}, "tokens[1]", "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "invalid_value"),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
    ],
)
def test_what_is_wrong_says_so(http, path, body, param, code):
    response = http.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["code"]) == (param, code), error["message"]


def test_an_unknown_model_is_a_404(http):
    assert http.post("/tokenize", json={"model": "nobody", "text": "x"}).status_code == 404
    assert http.get("/tokenizer_info", params={"model": "nobody"}).status_code == 404
