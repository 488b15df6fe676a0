"""Test each documented error as sent over HTTP, and that the next request succeeds.

Complete sentences are compared only where they are OpenAI's, because clients search for them.
"""

import json
import re

import pytest

from serve.api.errors import as_api_error
from serve.exceptions import CannotLoad, UnknownModel
from tests.naming import names
from tests.serve.scripted import CONTEXT
from transformer.engine import Busy

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def and_the_next_request_works(http):
    yield
    assert http.post(COMPLETIONS, json={"model": "scripted", "prompt": "x"}).status_code == 200


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def chat(**changes):
    body = {"model": "scripted", "messages": HI, **changes}
    return {name: value for name, value in body.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "param", "code", "message"),
    [
        (
            {"messages": ...},
            "messages",
            "missing_required_parameter",
            "Missing required parameter: 'messages'.",
        ),
        (
            {"model": ...},
            "model",
            "missing_required_parameter",
            "Missing required parameter: 'model'.",
        ),
        (
            {"messages": [{"content": "x"}]},
            "messages[0].role",
            "missing_required_parameter",
            "Missing required parameter: 'messages[0].role'.",
        ),
        (
            {"temperature": "hot"},
            "temperature",
            "invalid_type",
            "Invalid type for 'temperature': expected a decimal, but got a string instead.",
        ),
        (
            {"model": 5},
            "model",
            "invalid_type",
            "Invalid type for 'model': expected a string, but got an integer instead.",
        ),
        (
            {"n": 1.5},
            "n",
            "invalid_type",
            "Invalid type for 'n': expected an integer, but got a decimal instead.",
        ),
        (
            {"stream": "true"},
            "stream",
            "invalid_type",
            "Invalid type for 'stream': expected a boolean, but got a string instead.",
        ),
        (
            {"messages": "hi"},
            "messages",
            "invalid_type",
            "Invalid type for 'messages': expected an array, but got a string instead.",
        ),
        (
            {"messages": ["hi"]},
            "messages[0]",
            "invalid_type",
            "Invalid type for 'messages[0]': expected an object, but got a string instead.",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "invalid_type",
            "Invalid type for 'messages[0].content': expected one of a string or "
            "an array of objects, but got an integer instead.",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "invalid_value",
            "Invalid value for 'content': expected a string, got null.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "missing_required_parameter",
            "Missing required parameter: 'messages[0].content[0].text'.",
        ),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role",
            "invalid_value",
            "Invalid value: 'robot'. Supported values are: 'developer', 'system', 'user', "
            "'assistant', 'tool' and 'function'.",
        ),
        (
            {"messages": []},
            "messages",
            "empty_array",
            "Invalid 'messages': empty array. Expected an array with minimum length 1, "
            "but got an empty array instead.",
        ),
        (
            {"temperature": 3},
            "temperature",
            "decimal_above_max_value",
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, "
            "but got 3 instead.",
        ),
        (
            {"temperature": -0.5},
            "temperature",
            "decimal_below_min_value",
            "Invalid 'temperature': decimal below minimum value. Expected a value >= 0, "
            "but got -0.5 instead.",
        ),
        (
            {"max_tokens": -1},
            "max_tokens",
            "integer_below_min_value",
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, "
            "but got -1 instead.",
        ),
        (
            {"n": 129},
            "n",
            "integer_above_max_value",
            "Invalid 'n': integer above maximum value. Expected a value <= 128, "
            "but got 129 instead.",
        ),
        (
            {"seed": 2**63},
            "seed",
            "integer_above_max_value",
            "Invalid 'seed': integer above maximum value. Expected a value <= "
            "9223372036854775807, but got 9223372036854775808 instead.",
        ),
        (
            {"stop": list("abcde")},
            "stop",
            "array_above_max_length",
            "Invalid 'stop': array too long. Expected an array with maximum length 4, "
            "but got an array with length 5 instead.",
        ),
        (
            {"stop": [1]},
            "stop",
            "invalid_type",
            "Invalid type for 'stop': expected one of a string or an array of strings, "
            "but got an array instead.",
        ),
        (
            {"stop": ["a", 1]},
            "stop[1]",
            "invalid_type",
            "Invalid type for 'stop[1]': expected a string, but got an integer instead.",
        ),
        (
            {"stop": [""]},
            "stop[0]",
            "empty_string",
            "Invalid 'stop[0]': empty string. Expected a string with minimum length 1, "
            "but got an empty string instead.",
        ),
        (
            {"logit_bias": {"65": 101}},
            "logit_bias.65",
            "decimal_above_max_value",
            "Invalid 'logit_bias.65': decimal above maximum value. Expected a value <= 100, "
            "but got 101 instead.",
        ),
        (
            {"top_logprobs": 2},
            "top_logprobs",
            "invalid_value",
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
        ),
        (
            {"response_format": "text"},
            "response_format",
            "invalid_type",
            "Invalid type for 'response_format': expected an object, but got a string instead.",
        ),
    ],
)
def test_validation_errors_follow_openai(http, changes, param, code, message):
    error = error_of(http.post(CHAT, json=chat(**changes)), 400)
    expected = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    assert error == expected


def test_invalid_bias_key_is_refused(http):
    error = error_of(http.post(CHAT, json=chat(logit_bias={"259": 1})), 400)
    assert (error["param"], error["code"]) == ("logit_bias", "invalid_value")
    assert names(error["message"], 259, "`scripted`", 258)


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        ([], "prompt", "empty_array"),
        ([[]], "prompt[0]", "empty_array"),
        ([["a"]], "prompt[0][0]", "invalid_type"),
        (["a", 5], "prompt[1]", "invalid_type"),
        ({"a": 1}, "prompt", "invalid_type"),
        ([259], "prompt[0]", "invalid_value"),
        ([[65], [66, -1]], "prompt[1][1]", "invalid_value"),
        ([10**30], "prompt[0]", "invalid_value"),
    ],
)
def test_invalid_prompts_are_refused(http, prompt, param, code):
    error = error_of(http.post(COMPLETIONS, json={"model": "scripted", "prompt": prompt}), 400)
    assert (error["param"], error["code"]) == (param, code)


def test_unknown_model_is_404(http):
    error = error_of(http.post(CHAT, json=chat(model="nobody")), 404)
    assert error["code"] == "model_not_found"
    assert error["message"].startswith(
        "The model `nobody` does not exist or you do not have access to it."
    )


@pytest.mark.parametrize("path", ["/v1/foo", "/foo", "/v1", "/v1/v1", "/v1/foo/"])
def test_unknown_route_is_404(http, path):
    error = error_of(http.post(path), 404)
    assert error["message"] == f"Invalid URL (POST {path})"
    assert (error["type"], error["code"]) == ("invalid_request_error", "unknown_url")


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("/chat/completions", CHAT),
        ("/completions", COMPLETIONS),
        ("/v1/v1/chat/completions", CHAT),
        ("/v1/v1/v1/embeddings", "/v1/embeddings"),
        ("/v1/chat/completions/", CHAT),
        ("/v1//chat/completions", CHAT),
        ("/models/scripted", "/v1/models/scripted"),
        ("/engines/a/b/completions", "/v1/engines/a/b/completions"),
    ],
)
def test_wrong_base_url_is_404_that_names_the_right_path(http, path, right):
    error = error_of(http.post(path, json=chat()), 404)
    assert error["code"] == "unknown_url" and names(error["message"], path, right)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/responses/compact"),
        ("POST", "/v1/assistants"),
        ("POST", "/v1/threads/runs"),
        ("POST", "/v1/vector_stores/vs_1/search"),
        ("POST", "/v1/realtime/sessions"),
        ("POST", "/v1/audio/speech"),
        ("POST", "/v1/videos"),
        ("POST", "/v1/evals"),
        ("GET", "/v1/containers"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-1/pause"),
        ("POST", "/v1/engines/davinci/search"),
        ("GET", "/v1/organization/usage"),
    ],
)
def test_route_of_openai_that_is_missing_is_404_with_a_hint(http, method, path):
    error = error_of(http.request(method, path), 404)
    assert error["code"] == "unsupported_endpoint" and error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"Invalid URL ({method} {path}): ")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", COMPLETIONS), ("DELETE", CHAT), ("POST", "/health")]
)
def test_wrong_method_is_405(http, method, path):
    response = http.request(method, path)
    error = error_of(response, 405)
    assert error["message"] == (
        f"Not allowed to {method} on {path}. "
        "(HINT: Perhaps you meant to use a different HTTP method?)"
    )
    assert error["code"] == "method_not_supported" and response.headers["allow"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"model": "scripted", "messages"',
        b'{"model": "scripted", "messages": [], "temperature": NaN}',
        b'{"model": "scripted", "messages": [], "temperature": -Infinity}',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"seed": ' + b"9" * 100_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_invalid_json_is_400(http, path, body):
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    error = error_of(response, 400)
    assert error["message"].startswith("We could not parse the JSON body of your request.")
    assert error["param"] is None and error["code"] is None


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null"])
def test_json_other_than_object_is_400(http, body):
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    error = error_of(response, 400)
    assert (error["param"], error["code"]) == (None, "invalid_type")


def test_overflowing_number_is_400(http):
    for number in (b"1e400", b"1" + b"0" * 400):
        body = b'{"model":"scripted","messages":[{"role":"user","content":"x"}],"temperature":%s}'
        headers = {"content-type": "application/json"}
        error_of(http.post(CHAT, content=body % number, headers=headers), 400)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_content_type_of_web_form_is_415(http, content_type):
    headers = {"content-type": content_type} if content_type else {}
    error = error_of(http.post(CHAT, content=json.dumps(chat()), headers=headers), 415)
    assert names(error["message"], "application/json")


def test_many_invalid_elements_are_one_error(http):
    body = {"model": "scripted", "prompt": [65] + ["x"] * 500_000}
    error = error_of(http.post(COMPLETIONS, json=body), 400)
    assert error["param"] == "prompt[1]"


def test_error_messages_truncate_values(http):
    for body in (chat(model="x" * 10**6), chat(messages=[{"role": "y" * 10**6, "content": ""}])):
        assert len(http.post(CHAT, json=body).content) < 1000


# --- the context ------------------------------------------------------------------------------

CHAT_EXTRA = len("user\n\nassistant\n") + 3  # what the template adds, in tokens


def context_error(response):
    error = error_of(response, 400)
    assert error["code"] == "context_length_exceeded"
    assert error["type"] == "invalid_request_error"
    sentence, _, code = error["message"].rpartition(" ")
    assert code == "(context_length_exceeded)", "LangChain searches the message for the code"
    return sentence, error["param"]


def test_messages_longer_than_context_are_refused(http):
    content = "x" * CONTEXT
    body = chat(messages=[{"role": "user", "content": content}])
    total = CONTEXT + CHAT_EXTRA
    assert context_error(http.post(CHAT, json=body)) == (
        f"This model's maximum context length is {CONTEXT} tokens. However, your messages resulted "
        f"in {total} tokens. Please reduce the length of the messages.",
        "messages",
    )


def test_messages_with_completion_over_context_are_refused(http):
    assert context_error(http.post(CHAT, json=chat(max_completion_tokens=CONTEXT))) == (
        f"This model's maximum context length is {CONTEXT} tokens. However, you requested "
        f"{CONTEXT + CHAT_EXTRA + 2} tokens ({CHAT_EXTRA + 2} in the messages, {CONTEXT} in the "
        "completion). Please reduce the length of the messages or completion.",
        "messages",
    )


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_with_completion_over_context_is_refused(http, stream):
    body = {"model": "scripted", "prompt": "x" * 12, "max_tokens": 505, "stream": stream}
    assert context_error(http.post(COMPLETIONS, json=body)) == (
        f"This model's maximum context length is {CONTEXT} tokens, however you requested 517 tokens"
        " (12 in your prompt; 505 for the completion). Please reduce your prompt; or completion "
        "length.",
        None,
    )


def test_prompt_of_context_length_is_refused(http):
    body = {"model": "scripted", "prompt": [65] * CONTEXT, "max_tokens": 5}
    assert context_error(http.post(COMPLETIONS, json=body))[0] == (
        f"This model's maximum context length is {CONTEXT} tokens. However, your prompt resulted "
        f"in {CONTEXT} tokens. Please reduce the length of the prompt."
    )


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_huge_prompt_is_refused_without_encoding(http, route):
    text = "x" * 3_000_000
    body = {"model": "scripted", "prompt": text}
    if route == CHAT:
        body = chat(messages=[{"role": "user", "content": text}])
    message, _ = context_error(http.post(route, json=body))
    about = max(map(int, re.findall(r"\d+", message)))
    assert 0.99 < about / len(text) < 1.01, (
        "a client can compute from the estimate how much to remove"
    )


# --- sizes ------------------------------------------------------------------------------------


def test_large_content_length_is_413(http):
    body = {"model": "scripted", "prompt": "x" * 10_000_000}
    error = error_of(http.post(COMPLETIONS, json=body), 413)
    assert error["message"] == "Maximum content size limit (4194304) exceeded"


def test_large_chunked_body_is_413(http):
    chunks = (b"x" * 100_000 for _ in range(100))
    headers = {"content-type": "application/json"}
    error_of(http.post(COMPLETIONS, content=chunks, headers=headers), 413)


def test_too_many_choices_are_refused(http):
    body = {"model": "scripted", "prompt": ["x"] * 100, "n": 100}
    error = error_of(http.post(COMPLETIONS, json=body), 400)
    assert error["param"] == "n" and names(error["message"], 2048)


# --- the engine -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_429(http, stream):
    body = chat(messages=[{"role": "user", "content": "busy"}], stream=stream)
    response = http.post(CHAT, json=body)
    error = error_of(response, 429)
    assert error["code"] == "rate_limit_exceeded" and response.headers["retry-after"] == "1"


def test_full_queue_with_echo_is_429(http):
    """Regression: the echo was sent with status 200 before the engine refused the request."""
    body = {"model": "scripted", "prompt": "busy", "echo": True, "stream": True}
    error_of(http.post(COMPLETIONS, json=body), 429)


def test_client_with_too_many_waiting_requests_is_429():
    error = as_api_error(Busy(2.5, num_waiting=64))
    assert error.status == 429 and error.headers["retry-after"] == "3"
    assert error.code == "rate_limit_exceeded" and names(error.message, 64)


def test_model_not_pulled_names_pull_command():
    error = as_api_error(UnknownModel("gpt-4o", not_pulled_id="other-model"))
    assert error.status == 404 and error.code == "model_not_found"
    assert names(error.message, "`gpt-4o`", "`pellucid pull other-model`")


@pytest.mark.parametrize("stream", [False, True])
def test_engine_failure_before_first_token_is_500(http, stream):
    body = {"model": "scripted", "prompt": "fail at once", "stream": stream}
    error = error_of(http.post(COMPLETIONS, json=body), 500)
    assert error["type"] == "server_error" and "the numbers went bad" in error["message"]


def test_unhandled_exception_is_logged_and_hidden_from_client(http, caplog):
    response = http.post(COMPLETIONS, json={"model": "scripted", "prompt": "crash"})
    error = error_of(response, 500)
    assert "secret" not in response.text and error["type"] == "server_error"
    record = next(record for record in caplog.records if record.name == "serve.api.headers")
    assert names(record.getMessage(), "POST", COMPLETIONS) and record.exc_info


def test_request_during_shutdown_is_503(http):
    response = http.post(COMPLETIONS, json={"model": "scripted", "prompt": "shutdown"})
    assert error_of(response, 503)["type"] == "server_error"


@pytest.mark.parametrize("prompt", ["fail later", "crash", "shutdown"])
def test_engine_failure_in_stream_is_last_event(http, prompt):
    body = {"model": "scripted", "prompt": prompt, "stream": True}
    response = http.post(COMPLETIONS, json=body)
    assert response.status_code == 200
    *events, last = response.text.strip().split("\n\n")
    assert all("error" not in event for event in events)
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and set(error) == {"message", "type", "param", "code"}
    assert "secret" not in last and "[DONE]" not in response.text


def test_model_that_cannot_be_loaded_is_named_once():
    """Regression: the message named the model twice."""
    error = as_api_error(CannotLoad("tiny", "config.json lacks vocab_size", is_busy=False))
    assert (error.status, error.code) == (503, "model_not_ready")
    assert error.message.count("tiny") == 1 and names(error.message, "vocab_size")
