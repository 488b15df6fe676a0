"""Fields without effect: refused, corrected, or named in x-pellucid-ignored; never silent."""

from typing import Any

import httpx
import pytest

from serve.api import unused_fields
from serve.api.image_requests import ImageEditForm, ImageGenerationBody
from serve.api.requests import Body, ChatBody, CompletionBody
from serve.api.routes.audio import SpeechForm
from serve.api.routes.embeddings import EmbeddingsBody
from serve.api.routes.fine_tuning import JobBody
from serve.api.routes.legacy.edits import EditBody
from serve.api.routes.rerank import RerankBody, ScoreBody
from serve.api.routes.tokens import TokenizeBody
from serve.api.unused_fields import HEADER
from tests.serve import client_fields, scripted

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
BODIES = [ChatBody, CompletionBody, EditBody, EmbeddingsBody, RerankBody, ScoreBody, TokenizeBody]
BODIES += [ImageGenerationBody, ImageEditForm, SpeechForm]


def ask(http, path=CHAT, **fields: Any):
    body = {"model": "scripted"} | ({"messages": HI} if path == CHAT else {"prompt": "x"})
    return http.post(path, json=body | fields)


def ignored(response):
    assert response.status_code == 200, response.text
    return response.headers.get(HEADER)


def refusal(response):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["code"]


# --- without effect: 200 and the header -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "header"),
    [
        ({}, None),
        ({"num_ctx": 4096}, "num_ctx"),
        ({"num_ctx": None, "user": None}, None),
        ({"user": "ann", "verbosity": "low"}, "user, verbosity"),
        ({"service_tier": "auto", "parallel_tool_calls": True}, None),
        ({"service_tier": "flex", "reasoning_effort": "high"}, "service_tier, reasoning_effort"),
        ({"stream_options": {"include_usage": True, "why": 1}}, "stream_options.why"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        ({"response_format": {"type": "text", "more": {}}}, "response_format.more"),
        ({"thinking": {"deep": {"er": 1}}}, "thinking"),
        ({"metadata": {"a": "b"}, "temperature": 1, "n": 1}, None),
        ({"store": False, "moderation": None, "web_search_options": {}}, None),
        ({"modalities": ["text"], "format": "", "grammar": "", "guided_regex": ""}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
            "response_format.json_schema.x",
        ),
    ],
)
def test_field_without_effect_is_named_in_ignored_header(http, fields, header):
    assert ignored(ask(http, **fields)) == header


def test_effort_that_the_template_does_not_read_is_named_for_responses(http):
    fields = {"model": "scripted", "input": "hi", "reasoning": {"effort": "low"}}
    assert ignored(http.post("/v1/responses", json=fields)) == "reasoning.effort"


def test_unknown_keys_of_messages_and_content_parts_are_named_by_path(http):
    """Agents send messages of this server's and other servers' responses back as input."""
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [part], "name": "ann"},  # for the template
        {"role": "assistant", "content": "x", "refusal": None, "annotations": ["hm"]},
        {"role": "user", "content": "y"},
    ]
    assert ignored(ask(http, messages=messages)) == (
        "messages[0].content[0].cache_control, messages[1].annotations"
    )


def test_response_message_can_be_sent_back_as_input(http):
    message = ask(http).json()["choices"][0]["message"]
    assert ignored(ask(http, messages=[*HI, message, *HI])) is None


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_streamed_response_has_ignored_header(http, path):
    assert ignored(ask(http, path, stream=True, num_ctx=1)) == "num_ctx"


def test_ignored_header_has_escaped_names_and_limited_length(http):
    name = "a, b\r\nx-evil: 1é😀"
    assert ignored(ask(http, **{name: 1})) == "a%2C%20b%0D%0Ax-evil:%201%C3%A9%F0%9F%98%80"
    # A header value that ends with a space is not valid HTTP: this was a 500.
    assert ignored(ask(http, **{"": 1, "b c": 1})) == '"", b%20c'
    header = ignored(ask(http, **{"x" * 10_000: 1}))
    assert header == "x" * unused_fields.MAX_KEY
    header = ignored(ask(http, **{f"unknown_field_{i:04}": i for i in range(1000)}))
    assert header.startswith("unknown_field_0000, ") and header.endswith(", ...")
    assert len(header) <= unused_fields.MAX_HEADER + len(", ...")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"user": 5}, "user", "invalid_type"),
        ({"safety_identifier": "x" * 65}, "safety_identifier", "string_above_max_length"),
        ({"service_tier": "gold"}, "service_tier", "invalid_value"),
        ({"reasoning_effort": "much"}, "reasoning_effort", "invalid_value"),
        ({"prompt_cache_options": {"mode": 1}}, "prompt_cache_options.mode", "invalid_value"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls", "invalid_type"),
        ({"prediction": {"type": "content"}}, "prediction.content", "missing_required_parameter"),
    ],
)
def test_field_without_effect_is_validated(http, fields, param, code):
    assert refusal(ask(http, **fields)) == (param, code)


# --- promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"web_search_options": {"search_context_size": "low"}}),
        (CHAT, {"audio": {"voice": "x", "format": "wav"}}),
        (CHAT, {"modalities": ["text", "audio"]}),
        (CHAT, {"modalities": ["audio"]}),
        ("/v1/fine_tuning/jobs", {"training_file": "x", "integrations": [{"type": "wandb"}]}),
        (COMPLETIONS, {"format": "json"}),
        ("/v1/edits", {"instruction": "x", "stream": True}),
    ],
)
def test_field_asking_for_unsupported_result_is_refused(http, path, fields):
    *_, param = fields
    assert refusal(ask(http, path, **fields)) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (model, name)
        for model in (*(body for body in BODIES if body is not EditBody), JobBody)
        for name in unused_fields.promises_of(model)
    ],
)
def test_every_refused_field_with_harmless_value_is_accepted(model, name):
    harmless = unused_fields.promises_of(model)[name].harmless
    for value in (None, False, "", [], {}, "false", *harmless):
        unused_fields.check_names({name: value}, model)
    with pytest.raises(unused_fields.APIError) as caught:
        unused_fields.check_names({name: {"a": 1}}, model)
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    assert name not in model.model_fields


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "intended"),
    [
        (CHAT, "max_token", "max_tokens"),
        (CHAT, "maxtokens", "max_tokens"),
        (CHAT, "mx_tokens", "max_tokens"),
        (CHAT, "temprature", "temperature"),
        (CHAT, "temperatur", "temperature"),
        (CHAT, "stpo", "stop"),
        (CHAT, "sede", "seed"),
        (CHAT, "topp", "top_p"),
        (CHAT, "messagse", "messages"),
        (CHAT, "steam", "stream"),
        (CHAT, "respone_format", "response_format"),
        (COMPLETIONS, "sufix", "suffix"),
        (COMPLETIONS, "promt", "prompt"),
        (COMPLETIONS, "log_probs", "logprobs"),
    ],
)
def test_misspelt_field_name_is_refused_and_right_name_suggested(http, path, name, intended):
    response = ask(http, path, **{name: 1})
    assert refusal(response) == (name, "unknown_parameter")
    assert f"Did you mean '{intended}'?" in response.json()["error"]["message"]


@pytest.mark.parametrize("model", [*BODIES, JobBody])
def test_field_names_of_other_clients_are_never_taken_for_misspelt(model: type[Body]):
    """A client that also calls other servers or routes must not get a 400 for their fields."""
    names = {name for fields in client_fields.FIELDS.values() for name in fields.split()}
    names.update(*(other.model_fields for other in BODIES))
    refused = []
    for name in sorted(names):
        try:
            unused_fields.check_names({name: ["x"]}, model)
        except unused_fields.APIError as error:
            if error.code != "unsupported_parameter":
                refused.append(error.message)
    assert refused == []


def test_edits_counts_insertions_deletions_replacements_and_swaps():
    for a, b, distance in [
        *(("stop", "stop", 0), ("stp", "stop", 1), ("sstop", "stop", 1), ("ztop", "stop", 1)),
        *(("tsop", "stop", 1), ("tsopp", "stop", 2), ("n", "stop", 3), ("ab", "ba", 1)),
        ("kitten", "sitting", 3),
    ]:
        assert unused_fields.edits(a, b) == unused_fields.edits(b, a) == distance, (a, b)


# --- fine-tuning, forms, strict -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/fine_tuning/jobs", {"hyperparameters": {"lora_rank": 4}}, "lora_rank"),
        (
            "/v1/fine_tuning/jobs",
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}},
            "beta",
        ),
        ("/v1/fine-tunes", {"classification_n_classes": 3}, "classification_n_classes"),
    ],
)
def test_unknown_hyperparameter_is_refused(http, path, fields, param):
    body = {"model": "scripted", "training_file": "file-x", **fields}
    found, code = refusal(http.post(path, json=body))
    assert found.endswith(param) and code == "unknown_parameter"


def test_form_fields_without_effect_are_named_in_ignored_header(http):
    fields = {
        "purpose": "fine-tune",
        "tags[]": ["a", "b"],
        "why": "x",
        "expires_after[seconds]": "",
    }
    file = {"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n')}
    assert ignored(http.post("/v1/files", data=fields, files=file)) == "tags, why"
    response = http.post("/v1/files", data={"purpos": "fine-tune"}, files=file)
    assert refusal(response) == ("purpos", "unknown_parameter")


@pytest.mark.heavy
def test_strict_server_refuses_fields_without_effect(model):
    with scripted.serve_models(model, is_strict=True) as url, httpx.Client(base_url=url) as http:
        assert refusal(ask(http, num_ctx=1)) == ("num_ctx", "unknown_parameter")
        assert refusal(ask(http, user="ann")) == ("user", "unsupported_parameter")
        messages = [{"role": "user", "content": "x", "annotations": []}]
        assert ignored(ask(http, messages=messages)) == "messages[0].annotations"
        assert ignored(ask(http, temperature=0)) is None
