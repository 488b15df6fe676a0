"""Test the tokenizer routes, as called by harnesses and by clients of other servers."""

import pytest

from tests.serve.scripted import CONTEXT, END_OF_TEXT, IM_END, IM_START, TEMPLATE


def post(http, path, **body):
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_tokenize_as_evaluation_harness_returns_ids(http):
    """lm-eval's remote tokenizer sends no model, omits /v1 and looks up EOS by name."""
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
def test_tokenize_accepts_every_field_name(http, name):
    assert post(http, "/tokenize", **{name: "ab"})["tokens"] == [97, 98]


def test_tokenize_returns_token_strings_and_pieces(http):
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


def test_tokenize_messages_applies_template(http):
    messages = [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]
    tokens = post(http, "/tokenize", model="gpt-4", messages=messages)["tokens"]
    assert tokens[0] == IM_START and tokens.count(IM_END) == 1
    closed = post(http, "/tokenize", messages=messages, add_generation_prompt=False)["tokens"]
    assert tokens[: len(closed)] == closed
    text = post(http, "/detokenize", tokens=tokens)["content"]
    assert text.endswith("<|im_start|>assistant\n")


def test_tokenize_without_parse_special_encodes_text(http):
    answer = post(http, "/tokenize", text="<|endoftext|>", parse_special=False)
    assert END_OF_TEXT not in answer["tokens"] and answer["count"] == len("<|endoftext|>")


def test_tokenize_uses_requested_model(http):
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
def test_invalid_requests_name_the_field(http, path, body, param, code):
    response = http.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["code"]) == (param, code), error["message"]


def test_unknown_model_is_404(http):
    assert http.post("/tokenize", json={"model": "nobody", "text": "x"}).status_code == 404
    assert http.get("/tokenizer_info", params={"model": "nobody"}).status_code == 404
