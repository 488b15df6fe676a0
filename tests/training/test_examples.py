"""Training examples: the target tokens of each kind, and the faults of invalid lines."""

import dataclasses
import json

import numpy as np
import pytest

from tests.naming import names
from tests.training.tokens import TOKENIZER, chat
from training import examples
from training.examples import Fault

ENCODING = TOKENIZER.encoding


def target_text(row: dict, kind: str, tokenizer=TOKENIZER) -> str:
    """Return the text of the tokens whose weight in the loss is above 0."""
    example = examples.encode(row, kind, tokenizer)
    assert example.weights.shape == example.ids.shape and not example.weights[0]
    return ENCODING.decode(example.ids[example.weights > 0].tolist())


def test_loss_targets_of_chat_are_assistant_messages_with_end_tokens():
    assert target_text(chat("q", "one", "r", "two"), "chat") == "one<|im_end|>two<|im_end|>"


def test_assistant_message_of_weight_0_is_no_loss_target():
    row = chat("q", "one", "r", "two")
    row["messages"][1]["weight"], row["messages"][3]["weight"] = 0, 1
    assert target_text(row, "chat") == "two<|im_end|>"
    plain = examples.encode(chat("q", "one", "r", "two"), "chat", TOKENIZER)
    assert (examples.encode(row, "chat", TOKENIZER).ids == plain.ids).all()


def test_tokens_before_an_answer_equal_the_generation_prompt():
    """A newline of the chat template must not be merged with a newline of the answer."""
    example = examples.encode(chat("q", "\n\nlow"), "chat", TOKENIZER)
    prompt = TOKENIZER.chat_template.encode(ENCODING, chat("q")["messages"])
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.weights[: len(prompt)].sum() == 0 and example.weights[len(prompt) :][0] == 1


def test_special_token_in_content_is_encoded_as_text():
    example = examples.encode(chat("<|im_end|>", "a"), "chat", TOKENIZER)
    assert example.ids.tolist().count(ENCODING.special_tokens["<|im_end|>"]) == 2


def test_content_parts_and_developer_role_are_accepted():
    parts = [{"type": "text", "text": "lo"}, {"type": "text", "text": "w"}]
    row = chat("q", "a")
    row["messages"][1]["content"] = parts
    assert not examples.faults(row, "chat") and target_text(row, "chat") == "low<|im_end|>"
    row = {"messages": [{"role": "developer", "content": "be brief"}, *chat("q", "a")["messages"]]}
    assert not examples.faults(row, "chat")
    ids = examples.encode(row, "chat", TOKENIZER).ids.tolist()
    assert ENCODING.decode(ids).startswith("<|im_start|>system\nbe brief")


def test_message_with_null_keys_of_the_api_is_accepted():
    """Null keys are not passed to the chat template."""
    row = chat("q", "low", refusal=None, audio=None, tool_calls=None, name=None, weight=None)
    assert not examples.faults(row | {"tools": None}, "chat")
    assert target_text(row, "chat") == "low<|im_end|>"


def test_empty_keys_and_float_weights_are_accepted():
    """Exported datasets have empty lists for absent values, and floats for integers."""
    row = chat("q", "low", tool_calls=[], annotations=[], weight=1.0)
    row |= {"tools": [], "functions": [], "parallel_tool_calls": False}
    assert not examples.faults(row, "chat") and target_text(row, "chat") == "low<|im_end|>"
    row = chat("q", "low", "q", "er", weight=0.0)
    row["messages"][1]["weight"] = 1
    assert not examples.faults(row, "chat") and target_text(row, "chat") == "low<|im_end|>"


def test_loss_targets_of_completion_example_are_completion_and_end_token():
    row = {"prompt": "low", "completion": "er"}
    assert target_text(row, "completion") == "er<|im_end|>"
    # Prompt and completion are tokenized separately: "lower" has other tokens.
    ids = examples.encode(row, "completion", TOKENIZER).ids.tolist()
    assert ids == ENCODING.encode("low") + ENCODING.encode("er") + [2]
    with_bos = dataclasses.replace(TOKENIZER, bos_id=0, add_bos=True)
    assert examples.encode(row, "completion", with_bos).ids.tolist() == [0, *ids]


def test_first_token_of_example_has_loss_weight_0():
    row = {"prompt": "", "completion": "aab"}
    example = examples.encode(row, "completion", TOKENIZER)
    assert example.weights.tolist() == [0] + [1] * (len(example) - 1)


def test_loss_targets_of_text_example_are_all_tokens_but_the_first():
    assert target_text({"text": "1 low"}, "text") == " low<|im_end|>"


def test_chat_example_without_chat_template_raises():
    without = dataclasses.replace(TOKENIZER, chat_template=None)
    with pytest.raises(ValueError, match="chat template"):
        examples.encode(chat("q", "a"), "chat", without)


MESSAGE = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "code", "param"),
    [
        ({}, "missing_key", "messages"),
        ({"messages": []}, "invalid_type", "messages"),
        ({"messages": {}}, "invalid_type", "messages"),
        ({"messages": ["q"]}, "invalid_type", "messages[0]"),
        ({"messages": [MESSAGE]}, "nothing_to_learn", "messages"),
        ({"messages": [MESSAGE, ANSWER | {"weight": 0}]}, "nothing_to_learn", "messages"),
        ({"messages": [MESSAGE | {"weight": 0}, ANSWER]}, "invalid_weight", "messages[0].weight"),
        ({"messages": [ANSWER | {"weight": 0.5}]}, "invalid_weight", "messages[0].weight"),
        ({"messages": [ANSWER | {"weight": True}]}, "invalid_weight", "messages[0].weight"),
        ({"messages": [{"content": "q"}, ANSWER]}, "missing_role", "messages[0].role"),
        ({"messages": [MESSAGE | {"role": "assistent"}]}, "invalid_role", "messages[0].role"),
        ({"messages": [MESSAGE | {"role": ["user"]}]}, "invalid_role", "messages[0].role"),
        ({"messages": [MESSAGE | {"role": "tool"}]}, "unsupported_tools", "messages[0].role"),
        ({"messages": [{"role": "user"}, ANSWER]}, "missing_content", "messages[0].content"),
        ({"messages": [MESSAGE | {"content": None}]}, "missing_content", "messages[0].content"),
        ({"messages": [MESSAGE | {"content": 1}]}, "invalid_type", "messages[0].content"),
        (
            {"messages": [MESSAGE | {"content": [{"type": "image_url"}]}]},
            "unsupported_content",
            "messages[0].content[0]",
        ),
        (
            {"messages": [MESSAGE | {"content": [{"type": "text"}]}]},
            "missing_content",
            "messages[0].content[0].text",
        ),
        ({"messages": [MESSAGE | {"name": 1}, ANSWER]}, "invalid_type", "messages[0].name"),
        ({"messages": [MESSAGE | {"wait": 1}, ANSWER]}, "extra_key", "messages[0].wait"),
        (
            {"messages": [MESSAGE, {"role": "assistant", "tool_calls": [{}]}]},
            "unsupported_tools",
            "messages[1].tool_calls",
        ),
        ({"messages": [MESSAGE, ANSWER], "tools": [{}]}, "unsupported_tools", "tools"),
        ({"messages": [MESSAGE, ANSWER], "id": 1}, "extra_key", "id"),
    ],
)
def test_invalid_chat_has_a_fault_with_code_and_param(row, code, param):
    assert [(fault.code, fault.param) for fault in examples.faults(row, "chat")] == [(code, param)]


def test_all_faults_of_a_line_are_returned():
    row = {"messages": [{"role": "usr"}, {"content": 3}], "a": 1, "b": 2}
    found = [fault.code for fault in examples.faults(row, "chat")]
    assert found == [
        "extra_key", "extra_key", "invalid_role", "missing_content", "missing_role", "invalid_type"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "kind", "code"),
    [
        ({"prompt": "a"}, "completion", "missing_key"),
        ({"prompt": "a", "completion": ""}, "completion", "nothing_to_learn"),
        ({"prompt": 1, "completion": "a"}, "completion", "invalid_type"),
        ({"prompt": "a", "completion": "b", "c": 1}, "completion", "extra_key"),
        ({"text": ""}, "text", "nothing_to_learn"),
        ({"text": ["a"]}, "text", "invalid_type"),
    ],
)
def test_invalid_completion_or_text_example_has_a_fault(row, kind, code):
    assert [fault.code for fault in examples.faults(row, kind)] == [code]


@pytest.mark.parametrize(
    ("line", "code", "facts"),
    [
        (b'{"a": 1', "invalid_json", ["char 7"]),  # the position of the error
        (b"{'a': 1}", "invalid_json", ["char 1"]),
        (b'{"a": NaN}', "invalid_json", ["NaN"]),
        (b"[1]", "not_an_object", ["[1]"]),
        (b'{"a": "\xff"}', "not_utf8", ["byte 8", "0xff"]),
        (b"[" * 100_000, "invalid_json", []),
        (b"a" * (examples.MAX_LINE + 1), "line_too_long", ["16 MB"]),
    ],
)
def test_line_that_is_not_a_json_object_is_a_fault(line, code, facts):
    found = examples.parse(line)
    assert isinstance(found, Fault) and found.code == code and names(found.message, *facts)


def test_lines_are_numbered_and_long_ones_truncated(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MAX_LINE", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n\n" + b"x" * 35 + b"\nend\r\nlast")
    assert list(examples.lines(path)) == [
        (1, b"one"), (2, b""), (3, b"x" * 11), (4, b"end\r"), (5, b"last")
    ]  # fmt: skip


def test_prompt_with_lone_surrogate_is_tokenized():
    row = json.loads('{"prompt": "\\ud83d", "completion": "a"}')
    assert not examples.faults(row, "completion")
    assert isinstance(examples.encode(row, "completion", TOKENIZER).ids, np.ndarray)
